package owner

import (
	"encoding/binary"
	"strings"

	"golang.org/x/sys/unix"
)

// The kernel refuses an access list that names an id it does not have. Such a list is recorded as it is, in an
// attribute of the same name elsewhere, and the file has the mode that goes with it.

const (
	aclPrefix    = "system.posix_acl_"
	recordPrefix = "user.cooper.posix_acl_"

	aclHeader, aclEntry                            = 4, 8
	aclUser, aclGroup, aclNamedUser, aclNamedGroup = 0x01, 0x04, 0x02, 0x08
	aclMask, aclOther                              = 0x10, 0x20
)

// ACLRecord is the attribute that a list which the kernel calls name is recorded in.
func ACLRecord(name string) (record string, ok bool) {
	kind, ok := strings.CutPrefix(name, aclPrefix)
	return recordPrefix + kind, ok && (kind == "access" || kind == "default")
}

// ACLName is the attribute of the kernel that a record stands for.
func ACLName(record string) (name string, ok bool) {
	kind, ok := strings.CutPrefix(record, recordPrefix)
	return aclPrefix + kind, ok
}

// NamesOthers reports whether a list names an id other than root.
func NamesOthers(acl []byte) bool {
	found := false
	eachEntry(acl, func(tag uint16, _ []byte, id uint32) {
		found = found || (tag == aclNamedUser || tag == aclNamedGroup) && id != 0
	})
	return found
}

// ACLMode is the mode of a file with permissions of perm that gets the list.
func ACLMode(acl []byte, mode uint32) uint32 {
	var masked bool
	eachEntry(acl, func(tag uint16, perm []byte, _ uint32) {
		p := uint32(binary.LittleEndian.Uint16(perm)) & 7
		switch {
		case tag == aclUser:
			mode = mode&^0o700 | p<<6
		case tag == aclMask || tag == aclGroup && !masked:
			masked = masked || tag == aclMask
			mode = mode&^0o070 | p<<3
		case tag == aclOther:
			mode = mode&^0o007 | p
		}
	})
	return mode
}

// WithMode returns the list as a later change of mode has made it.
func WithMode(acl []byte, mode uint32) []byte {
	acl = append([]byte(nil), acl...)
	eachEntry(acl, func(tag uint16, perm []byte, _ uint32) {
		switch tag {
		case aclUser:
			binary.LittleEndian.PutUint16(perm, uint16(mode>>6&7))
		case aclMask:
			binary.LittleEndian.PutUint16(perm, uint16(mode>>3&7))
		case aclOther:
			binary.LittleEndian.PutUint16(perm, uint16(mode&7))
		}
	})
	return acl
}

func eachEntry(acl []byte, visit func(tag uint16, perm []byte, id uint32)) {
	for len(acl) >= aclHeader+aclEntry {
		e := acl[aclHeader : aclHeader+aclEntry]
		visit(binary.LittleEndian.Uint16(e), e[2:4], binary.LittleEndian.Uint32(e[4:]))
		acl = acl[aclEntry:]
	}
}

// ReadACL returns the list recorded for a file of the given mode, and nil when there is none.
func ReadACL(path, name string, mode uint32) []byte {
	record, ok := ACLRecord(name)
	if !ok {
		return nil
	}
	acl := make([]byte, 64<<10)
	n, err := unix.Getxattr(path, record, acl)
	if err != nil || n < aclHeader {
		return nil
	}
	if strings.HasSuffix(name, "access") {
		return WithMode(acl[:n], mode)
	}
	return acl[:n]
}
