package layer

import (
	"fmt"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/owner"
)

const (
	paxXattr        = "SCHILY.xattr."
	xattrCapability = "security.capability"
)

// ours reports attributes that steer the overlay or record owners: a stranger's layer must not set
// them, and a layer of ours must not carry them.
func ours(name string) bool {
	return isACLRecord(name) || strings.HasPrefix(name, "user.overlay.") ||
		strings.HasPrefix(name, "trusted.overlay.") ||
		name == owner.Xattr
}

func isACLRecord(name string) bool {
	_, ok := owner.ACLName(name)
	return ok
}

// hostOnly reports attributes that mean something on one machine only.
func hostOnly(name string) bool {
	return name == "security.selinux" || name == "system.nfs4_acl"
}

type xattr struct {
	name  string
	value string
}

// wantedXattrs picks the attributes that an entry sets, sorted by name.
func wantedXattrs(records map[string]string) ([]xattr, error) {
	var attrs []xattr
	for record, value := range records {
		name, ok := strings.CutPrefix(record, paxXattr)
		if !ok || ours(name) || hostOnly(name) {
			continue
		}
		if name == "" || len(name) > maxComponent || strings.ContainsRune(name, 0) {
			return nil, fmt.Errorf("the name of an extended attribute is not valid")
		}
		if len(value) > maxXattrSize {
			return nil, fmt.Errorf("extended attribute %s is larger than %d bytes", shown(name), maxXattrSize)
		}
		attrs = append(attrs, xattr{name: name, value: value})
	}
	if len(attrs) > maxXattrs {
		return nil, fmt.Errorf("more than %d extended attributes", maxXattrs)
	}
	sort.Slice(attrs, func(i, j int) bool { return attrs[i].name < attrs[j].name })
	return attrs, nil
}

// setXattr sets one attribute. It reports false, and no error, for what the kernel keeps from us in a
// user namespace or on this file system but which changes no behaviour there either. File
// capabilities do change behaviour, so losing one is an error.
func setXattr(fd int, a xattr) (bool, error) {
	err := unix.Setxattr(procPath(fd), a.name, []byte(a.value), 0)
	switch {
	case err == nil:
		return true, nil
	case a.name != xattrCapability && (err == unix.EPERM || err == unix.EOPNOTSUPP || err == unix.EINVAL):
		return false, nil
	default:
		return false, fmt.Errorf("set extended attribute %s: %w", shown(a.name), err)
	}
}

// recordACL writes down an access list that the kernel refuses because it names ids which are not here.
func recordACL(fd int, a xattr) (bool, error) {
	record, ok := owner.ACLRecord(a.name)
	if !ok || !owner.NamesOthers([]byte(a.value)) {
		return false, nil
	}
	return setXattr(fd, xattr{name: record, value: a.value})
}

// copyXattrs gives dst the attributes of src, except those that steer the overlay.
func copyXattrs(dst, src int) error {
	attrs, err := readXattrs(src)
	if err != nil {
		return err
	}
	for _, a := range attrs {
		if ours(a.name) && a.name != owner.Xattr && !isACLRecord(a.name) || hostOnly(a.name) {
			continue
		}
		if _, err := setXattr(dst, a); err != nil {
			return err
		}
	}
	return nil
}

// readXattrs reads all attributes of an open file, sorted by name. The file may be open with O_PATH.
func readXattrs(fd int) ([]xattr, error) {
	var list [512]byte // of nearly every file there are none
	names := list[:]
	n, err := listXattrs(fd, names)
	if err == unix.ERANGE {
		names = make([]byte, maxXattrSize) // the kernel's own limit for the list
		n, err = listXattrs(fd, names)
	}
	if n == 0 || err == unix.EOPNOTSUPP {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list extended attributes: %w", err)
	}
	var attrs []xattr
	value := make([]byte, maxXattrSize)
	for name := range strings.SplitSeq(string(names[:n]), "\x00") {
		if name == "" {
			continue
		}
		size, err := unix.Getxattr(procPath(fd), name, value)
		if err == unix.ENODATA || err == unix.EOPNOTSUPP {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read extended attribute %s: %w", shown(name), err)
		}
		attrs = append(attrs, xattr{name: name, value: string(value[:size])})
	}
	sort.Slice(attrs, func(i, j int) bool { return attrs[i].name < attrs[j].name })
	return attrs, nil
}

func listXattrs(fd int, names []byte) (int, error) {
	n, err := unix.Flistxattr(fd, names)
	if err == unix.EBADF { // open with O_PATH
		n, err = unix.Listxattr(procPath(fd), names)
	}
	return n, err
}

// valueOf is the value of one attribute, or empty.
func valueOf(attrs []xattr, name string) string {
	for _, a := range attrs {
		if a.name == name {
			return a.value
		}
	}
	return ""
}
