package files

import (
	"cmp"
	"errors"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/owner"
)

// maxLinks is how many symbolic links one path may have, as in the kernel and in BuildKit.
const maxLinks = 255

// openBeneath opens a path that must have no link in it: resolve has made it, and if a component was swapped for a
// link since, that is an error and no way out. The final component may be a link if flags have O_PATH and O_NOFOLLOW.
func openBeneath(dir int, p string, flags int) (int, error) {
	if p == "" {
		p = "."
	}
	how := &unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(dir, p, how)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return fd, err
	}
}

// lstatBeneath describes what lies at a path that has no link in it, the final component excepted.
func lstatBeneath(dir int, p string) (unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := openBeneath(dir, p, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return st, err
	}
	defer unix.Close(fd)
	return st, unix.Fstat(fd, &st)
}

func lstatAt(dir int, name string) (unix.Stat_t, error) {
	var st unix.Stat_t
	return st, unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
}

func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// resolve turns a path into one without links, relative to dir and below it, as chroot would. What does not exist
// stays as it is written. If follow is false the final component is not followed. passed, if not nil, hears of every
// link that was followed.
func resolve(dir int, p string, follow bool, passed func(link string) error) (string, error) {
	var done string
	todo := components(p)
	for links := 0; len(todo) > 0; {
		c := todo[0]
		todo = todo[1:]
		if c == ".." {
			done = parent(done)
			continue
		}
		next := path.Join(done, c)
		if len(todo) == 0 && !follow {
			return next, nil
		}
		to, isLink, err := readlink(dir, next)
		if err != nil && !isNotExist(err) {
			return "", err
		}
		if !isLink {
			done = next
			continue
		}
		if links++; links > maxLinks {
			return "", unix.ELOOP
		}
		if passed != nil {
			if err := passed(next); err != nil {
				return "", err
			}
		}
		if strings.HasPrefix(to, "/") {
			done = ""
		}
		todo = append(components(to), todo...)
	}
	return done, nil
}

func components(p string) []string {
	var all []string
	for c := range strings.SplitSeq(p, "/") {
		if c != "" && c != "." {
			all = append(all, c)
		}
	}
	return all
}

// parent is the directory of a path as resolve gives it.
func parent(p string) string {
	i := strings.LastIndexByte(p, '/')
	return p[:max(i, 0)]
}

func readlink(dir int, p string) (to string, isLink bool, err error) {
	fd, err := openBeneath(dir, p, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return "", false, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFLNK {
		return "", false, err
	}
	to, err = readlinkAt(fd, "")
	return to, true, err
}

func readlinkAt(dir int, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dir, name, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// fdPath names an open file for calls that have no variant for descriptors.
func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// openRegular opens name in dir for reading if it is a regular file. It is pinned with O_PATH first: opening a device
// is already a request to its driver, and opening a FIFO may never return.
func openRegular(dir int, name string) (*os.File, error) {
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errors.New("not a regular file any more")
	}
	return os.Open(fdPath(fd))
}

// A xattr is an extended attribute that belongs to a file's content.
type xattr struct{ name, value string }

const (
	capability = "security.capability"
	// vfsCapSize is the size of a capability attribute of revision 2; revision 3 appends the id of a namespace's root.
	vfsCapSize, vfsCapRevision, vfsCapRevision2, vfsCapRevision3 = 20, 3, 2, 3
)

// carried tells whether an attribute goes where the file goes. The others belong to the file system (overlayfs), to
// the machine (labels, access lists with its ids) or to our own book-keeping of owners.
func carried(name string) bool {
	switch {
	case strings.HasPrefix(name, "user.overlay."), name == owner.Xattr:
		return false
	case strings.HasPrefix(name, "user."), name == capability:
		return true
	}
	return false
}

// xattrsAt lists the attributes of name in dir that are carried, sorted, and apart from them the recorded owner. kind
// is the type of the file.
func xattrsAt(dir int, name string, kind uint32) (all []xattr, own owner.IDs, err error) {
	// There is no listxattrat before Linux 6.13. The descriptor pins the directory and no call follows name.
	file := fdPath(dir) + "/" + name
	names, err := listXattrs(file)
	if err != nil || len(names) == 0 {
		return nil, own, err
	}
	plain := kind == unix.S_IFREG || kind == unix.S_IFDIR
	for _, n := range names {
		if n == owner.Xattr || !plain && n == owner.XattrOther {
			v, err := getXattr(file, n)
			if err != nil {
				return nil, own, err
			}
			own, _ = owner.Decode(v, kind)
		}
		if !carried(n) || !plain {
			continue
		}
		v, err := getXattr(file, n)
		if errors.Is(err, unix.ENODATA) || n == capability && errors.Is(err, unix.EOVERFLOW) {
			// A capability for the root of a namespace that is not above ours is none here.
			continue
		}
		if err != nil {
			return nil, own, err
		}
		if n == capability {
			v = portableCapability(v)
		}
		all = append(all, xattr{n, v})
	}
	slices.SortFunc(all, func(a, b xattr) int { return cmp.Compare(a.name, b.name) })
	return all, own, nil
}

// portableCapability drops the id of the namespace's root, which is this machine's business.
func portableCapability(v string) string {
	if len(v) < vfsCapSize || v[vfsCapRevision] != vfsCapRevision3 {
		return v
	}
	b := []byte(v[:vfsCapSize])
	b[vfsCapRevision] = vfsCapRevision2
	return string(b)
}

func listXattrs(file string) ([]string, error) {
	var small [512]byte
	n, err := unix.Llistxattr(file, small[:])
	if err == nil {
		return splitNames(small[:n]), nil
	}
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if !errors.Is(err, unix.ERANGE) {
		return nil, err
	}
	large := make([]byte, 64<<10) // XATTR_LIST_MAX
	n, err = unix.Llistxattr(file, large)
	if err != nil {
		return nil, err
	}
	return splitNames(large[:n]), nil
}

func splitNames(b []byte) []string {
	return strings.FieldsFunc(string(b), func(r rune) bool { return r == 0 })
}

func getXattr(file, name string) (string, error) {
	buf := make([]byte, 256)
	n, err := unix.Lgetxattr(file, name, buf)
	if errors.Is(err, unix.ERANGE) {
		buf = make([]byte, 64<<10) // XATTR_SIZE_MAX
		n, err = unix.Lgetxattr(file, name, buf)
	}
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}
