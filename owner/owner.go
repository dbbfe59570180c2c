// Package owner records who owns a file where the kernel knows one id only.
//
// On files and directories the record is the attribute user.rootlesscontainers, in the protobuf form that umoci and
// other rootless tools share. The kernel takes no user attribute on links, pipes and sockets. There it takes
// security.capability, which means something on programs only: its two capability sets are 128 bits that nobody
// reads, and they hold a mark and the two ids. Either way the record belongs to the inode: it goes along when the file
// is renamed, linked to or copied up by an overlay, and ends with the file.
//
// The package knows nothing of layers, sandboxes or who may change an owner.
package owner

import (
	"encoding/binary"
	"errors"
	"fmt"

	rootlesscontainers "github.com/rootless-containers/proto/go-proto"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// IDs are a user and a group. The zero value is root, and what a file without a record belongs to.
type IDs struct{ UID, GID uint32 }

const (
	// Xattr is the attribute on files and directories.
	Xattr = rootlesscontainers.Keyname
	// XattrOther is the attribute on everything else.
	XattrOther = "security.capability"
)

const (
	otherSize = 20         // struct vfs_cap_data
	revision2 = 0x02000000 // the kernel makes revision 3 of it and back
	mark1     = 0x77d5e3a6 // bits that no capability has, in the places of "inheritable"
	mark2     = 0x6f776e72
)

// Read returns the owner recorded for the file at path, whose type is the S_IFMT part of mode. path must name the
// file itself: a link at its end is followed, so for a link it is /proc/self/fd/N. A file without a record, or on a file
// system that keeps none, belongs to root.
func Read(path string, mode uint32) (IDs, error) {
	var value [64]byte
	n, err := unix.Getxattr(path, Attribute(mode), value[:])
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ERANGE), errors.Is(err, unix.EOVERFLOW):
		return IDs{}, nil // ERANGE and EOVERFLOW: whatever that is, it is none of ours
	case err != nil:
		return IDs{}, fmt.Errorf("read the recorded owner: %w", err)
	}
	ids, _ := Decode(string(value[:n]), mode)
	return ids, nil
}

// Record writes the owner of the file at path, as Read reads it. For root that is to forget what was recorded.
func Record(path string, mode uint32, ids IDs) error {
	name := Attribute(mode)
	if ids == (IDs{}) {
		err := unix.Removexattr(path, name)
		if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("forget the recorded owner: %w", err)
		}
		return nil
	}
	value, err := encode(mode, ids)
	if err == nil {
		err = unix.Setxattr(path, name, value, 0)
	}
	if err != nil {
		return fmt.Errorf("record owner %d:%d: %w", ids.UID, ids.GID, err)
	}
	return nil
}

// Decode reads the value of the attribute, Xattr or XattrOther as mode says. ok is false when it records no owner.
func Decode(value string, mode uint32) (ids IDs, ok bool) {
	if Attribute(mode) == Xattr {
		var r rootlesscontainers.Resource
		if err := proto.Unmarshal([]byte(value), &r); err != nil {
			return IDs{}, false
		}
		if r.Uid != rootlesscontainers.NoopID {
			ids.UID = r.Uid
		}
		if r.Gid != rootlesscontainers.NoopID {
			ids.GID = r.Gid
		}
		return ids, true
	}
	// Revision 3, with the id of a namespace's root behind, is what one sees from outside of the namespace.
	b := []byte(value)
	if len(b) < otherSize || binary.LittleEndian.Uint32(b[8:]) != mark1 || binary.LittleEndian.Uint32(b[16:]) != mark2 {
		return IDs{}, false
	}
	return IDs{binary.LittleEndian.Uint32(b[4:]), binary.LittleEndian.Uint32(b[12:])}, true
}

func encode(mode uint32, ids IDs) ([]byte, error) {
	if Attribute(mode) == Xattr {
		r := &rootlesscontainers.Resource{Uid: rootlesscontainers.NoopID, Gid: rootlesscontainers.NoopID}
		if ids.UID != 0 { // an id of 0 is what the file has anyway
			r.Uid = ids.UID
		}
		if ids.GID != 0 {
			r.Gid = ids.GID
		}
		return proto.Marshal(r)
	}
	var b []byte
	for _, word := range []uint32{revision2, ids.UID, mark1, ids.GID, mark2} {
		b = binary.LittleEndian.AppendUint32(b, word)
	}
	return b, nil
}

// Attribute names the attribute of a file whose type is the S_IFMT part of mode.
func Attribute(mode uint32) string {
	if kind := mode & unix.S_IFMT; kind == unix.S_IFREG || kind == unix.S_IFDIR {
		return Xattr
	}
	return XattrOther
}
