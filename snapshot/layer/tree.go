package layer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// openBeneath opens a path whose components are all known not to be "..". It follows no symlink,
// crosses no mount and cannot leave root, whatever the tree has become in the meantime.
func openBeneath(root int, name string, flags int) (int, error) {
	if name == "" {
		name = "."
	}
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	for {
		fd, err := unix.Openat2(root, name, &how)
		if err != unix.EINTR && err != unix.EAGAIN {
			return fd, err
		}
	}
}

const openDirectory = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC

func closeFD(fd int) { _ = unix.Close(fd) } // nothing was written through it, or the write was checked

// lstatAt describes one name in an open directory; ok is false when there is none.
func lstatAt(dir int, base string) (st unix.Stat_t, ok bool, err error) {
	err = unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == unix.ENOENT {
		return st, false, nil
	}
	return st, err == nil, err
}

func isDir(st *unix.Stat_t) bool  { return st.Mode&unix.S_IFMT == unix.S_IFDIR }
func isLink(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFLNK }

// isWhiteout reports overlay's mark of a deleted name.
func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

func isOpaque(dir int) bool {
	var value [2]byte
	n, err := unix.Fgetxattr(dir, xattrOpaque, value[:])
	return err == nil && n == 1 && value[0] == 'y'
}

func setOpaque(dir int) error {
	if err := unix.Fsetxattr(dir, xattrOpaque, []byte("y"), 0); err != nil {
		return fmt.Errorf("mark the directory opaque: %w", err)
	}
	return nil
}

// readNames lists an open directory. The order is the file system's.
func readNames(dir int) ([]string, error) {
	if _, err := unix.Seek(dir, 0, unix.SEEK_SET); err != nil {
		return nil, err
	}
	var names []string
	buf := make([]byte, 32<<10)
	for {
		n, err := unix.Getdents(dir, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return names, nil
		}
		names = appendNames(names, buf[:n])
	}
}

// appendNames decodes linux_dirent64 records: inode, offset, length (u16 at 16), type, name.
func appendNames(names []string, buf []byte) []string {
	const lengthAt, nameAt = 16, 19
	for len(buf) > nameAt {
		length := int(binary.NativeEndian.Uint16(buf[lengthAt:]))
		name, _, _ := strings.Cut(string(buf[nameAt:length]), "\x00")
		if name != "." && name != ".." {
			names = append(names, name)
		}
		buf = buf[length:]
	}
	return names
}

// RemoveAll removes dir and everything in it, however deep it is and whoever owns it. That there is
// nothing to remove is success.
func RemoveAll(dir string) error {
	parent, err := unix.Open(path.Dir(dir), openDirectory&^unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: path.Dir(dir), Err: err}
	}
	defer closeFD(parent)
	if err := removeAt(parent, path.Base(dir)); err != nil {
		return &os.PathError{Op: "remove", Path: dir, Err: err}
	}
	return nil
}

// removeAt removes one name and what is below it. It holds few directories open: a tree may be deeper than
// the file descriptors we are allowed.
func removeAt(parent int, base string) error {
	err := unix.Unlinkat(parent, base, 0)
	if err == nil || err == unix.ENOENT {
		return nil
	}
	if err != unix.EISDIR && err != unix.EPERM {
		return err
	}
	if err := unix.Unlinkat(parent, base, unix.AT_REMOVEDIR); err == nil {
		return nil
	} else if err != unix.ENOTEMPTY && err != unix.EEXIST {
		return err
	}
	top, err := unix.Openat(parent, base, openDirectory, 0)
	if err != nil {
		return err
	}
	defer closeFD(top)
	if err := empty(top); err != nil {
		return err
	}
	return unix.Unlinkat(parent, base, unix.AT_REMOVEDIR)
}

// nested is how many directories are held open below the one that is removed.
const nested = 16

// empty empties a directory. What lies deeper than nested is lifted up into it first.
func empty(top int) error {
	lifted := 0
	for {
		names, err := readNames(top)
		if err != nil || len(names) == 0 {
			return err
		}
		for _, name := range names {
			if err := removeOrLift(top, name, top, &lifted, nested); err != nil {
				return err
			}
		}
	}
}

func removeOrLift(dir int, name string, top int, lifted *int, room int) error {
	err := unix.Unlinkat(dir, name, 0)
	if err != unix.EISDIR && err != unix.EPERM {
		return err
	}
	if unix.Unlinkat(dir, name, unix.AT_REMOVEDIR) == nil {
		return nil
	}
	if room == 0 {
		return lift(dir, name, top, lifted)
	}
	child, err := unix.Openat(dir, name, openDirectory, 0)
	if err != nil {
		return err
	}
	defer closeFD(child)
	names, err := readNames(child)
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := removeOrLift(child, n, top, lifted, room-1); err != nil {
			return err
		}
	}
	return unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
}

// lift moves a directory into top under a name that is free there.
func lift(dir int, child string, top int, lifted *int) error {
	for {
		*lifted++
		err := unix.Renameat2(dir, child, top, ".lifted-"+strconv.Itoa(*lifted), unix.RENAME_NOREPLACE)
		if err != unix.EEXIST {
			return err
		}
	}
}

// procPath names an open file for the calls that refuse an O_PATH descriptor. The kernel jumps to
// the file itself; a symlink at its end is not followed.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }
