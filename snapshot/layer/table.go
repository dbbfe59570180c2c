package layer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Table says what the files of a tree were at one time, by their path. The root has the path "".
//
// A file that still has its inode and ctime is the file that it was: every change of content or attributes sets
// ctime, and nothing but the clock says to what.
type Table map[string]FileState

// FileState is what statx says about one file.
type FileState struct {
	Inode      uint64
	Born       int64 // tells it from an older file of that inode, where the file system keeps it
	Changed    int64 // ctime in nanoseconds
	Mode       uint32
	UID, GID   uint32
	Size       int64
	Links      uint64
	DeviceType uint64
}

// stateAt describes one name in an open directory, or that directory for "".
func stateAt(dir int, name string) (f FileState, exists bool, err error) {
	var st unix.Statx_t
	err = unix.Statx(dir, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st)
	if err == unix.ENOENT {
		return f, false, nil
	}
	if err != nil {
		return f, false, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	nanoseconds := func(t unix.StatxTimestamp) int64 { return t.Sec*1e9 + int64(t.Nsec) }
	f = FileState{
		Inode: st.Ino, Changed: nanoseconds(st.Ctime), Mode: uint32(st.Mode), UID: st.Uid, GID: st.Gid, Size: int64(st.Size),
		Links: uint64(st.Nlink), DeviceType: unix.Mkdev(st.Rdev_major, st.Rdev_minor),
	}
	if st.Mask&unix.STATX_BTIME != 0 {
		f.Born = nanoseconds(st.Btime)
	}
	return f, true, nil
}

// sameFile reports whether both are one file, changed or not.
func (f FileState) sameFile(o FileState) bool {
	return f.Inode == o.Inode && f.Born == o.Born && f.Mode&unix.S_IFMT == o.Mode&unix.S_IFMT
}

func (f FileState) isDir() bool { return f.Mode&unix.S_IFMT == unix.S_IFDIR }

func (f FileState) isSocket() bool { return f.Mode&unix.S_IFMT == unix.S_IFSOCK }

func (f FileState) isWhiteout() bool { return f.Mode&unix.S_IFMT == unix.S_IFCHR && f.DeviceType == 0 }

// Walk reads the table of a tree. Nothing is opened but directories.
func Walk(ctx context.Context, tree string) (Table, error) {
	root, err := unix.Open(tree, openDirectory, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", tree, err)
	}
	defer closeFD(root)
	f, _, err := stateAt(root, "")
	if err != nil {
		return nil, fmt.Errorf("walk %s: %w", tree, err)
	}
	t := Table{"": f}
	if err := t.walk(ctx, directory{fd: root}); err != nil {
		return nil, fmt.Errorf("walk %s: %w", tree, err)
	}
	return t, nil
}

func (t Table) walk(ctx context.Context, d directory) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	names, err := readNames(d.fd)
	if err != nil {
		return err
	}
	for _, name := range names {
		f, exists, err := stateAt(d.fd, name)
		if err != nil {
			return fmt.Errorf("%s: %w", shown(d.path), err)
		}
		if !exists {
			continue
		}
		t[d.join(name)] = f
		if !f.isDir() {
			continue
		}
		fd, err := unix.Openat(d.fd, name, openDirectory, 0)
		if err != nil {
			return fmt.Errorf("%s: %w", shown(d.join(name)), err)
		}
		err = t.walk(ctx, directory{fd: fd, path: d.join(name)})
		closeFD(fd)
		if err != nil {
			return err
		}
	}
	return nil
}

// Newest is the latest ctime in the table.
func (t Table) Newest() time.Time {
	var newest int64
	for _, f := range t {
		newest = max(newest, f.Changed)
	}
	return time.Unix(0, newest)
}

// Equal reports whether nothing changed between two walks. The root's ctime counts, too.
func (t Table) Equal(o Table) bool { return maps.Equal(t, o) }

// Encode writes the table as bytes: names are no text, and a tree has many.
func (t Table) Encode() []byte {
	b := make([]byte, 0, len(t)*64)
	for _, name := range slices.Sorted(maps.Keys(t)) {
		f := t[name]
		b = binary.AppendUvarint(b, uint64(len(name)))
		b = append(b, name...)
		for _, v := range []uint64{
			f.Inode, uint64(f.Born), uint64(f.Changed), uint64(f.Mode), uint64(f.UID), uint64(f.GID), uint64(f.Size), f.Links, f.DeviceType,
		} {
			b = binary.AppendUvarint(b, v)
		}
	}
	return b
}

// DecodeTable reads what Encode wrote.
func DecodeTable(b []byte) (Table, error) {
	t := Table{}
	number := func() uint64 {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			b = nil
			return 0
		}
		b = b[n:]
		return v
	}
	for len(b) > 0 {
		length := number()
		if length >= uint64(len(b)) {
			return nil, errors.New("the table of a tree is cut off")
		}
		name := string(b[:length])
		b = b[length:]
		t[name] = FileState{
			Inode: number(), Born: int64(number()), Changed: int64(number()), Mode: uint32(number()), UID: uint32(number()), GID: uint32(number()),
			Size: int64(number()), Links: number(), DeviceType: number(),
		}
	}
	if !t[""].isDir() {
		return nil, errors.New("the table of a tree has no root")
	}
	return t, nil
}

// parentIsDir reports whether the tree has a directory in which name could be.
func (t Table) parentIsDir(name string) bool { return t[above(name)].isDir() }

// linked are the names of each file that has several, sorted.
func (t Table) linked() map[uint64][]string {
	names := map[uint64][]string{}
	for name, f := range t {
		if f.Links > 1 && !f.isDir() {
			names[f.Inode] = append(names[f.Inode], name)
		}
	}
	for _, list := range names {
		slices.Sort(list)
	}
	return names
}

func baseOf(name string) string { return path.Base(name) }
