package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/clone"
)

// copier copies a tree that nobody changes meanwhile, with all that a mount of it would show.
type copier struct {
	ctx   context.Context      // of the one copy
	links map[[2]uint64]string // where a file of several names was copied to
}

// copyTree copies what from names, following a last link there, to a name that does not exist.
func copyTree(ctx context.Context, from, to string) error {
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return &os.PathError{Op: "stat", Path: from, Err: err}
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		from += "/." // so that no further step takes the descriptor for a link
	}
	c := copier{ctx: ctx, links: map[[2]uint64]string{}}
	return c.copy(from, to, st)
}

func (c *copier) copy(from, to string, st unix.Stat_t) error {
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		id := [2]uint64{uint64(st.Dev), st.Ino}
		if first, ok := c.links[id]; ok {
			return os.Link(first, to)
		}
		c.links[id] = to
	}
	var err error
	switch kind {
	case unix.S_IFDIR:
		err = c.copyDir(from, to)
	case unix.S_IFREG:
		err = c.copyFile(from, to)
	case unix.S_IFLNK:
		var target string
		if target, err = os.Readlink(from); err == nil {
			err = os.Symlink(target, to)
		}
	default:
		err = unix.Mknod(to, st.Mode, int(st.Rdev))
	}
	if err != nil {
		return err
	}
	return copyAttributes(from, to, st)
}

func (c *copier) copyDir(from, to string) error {
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		var st unix.Stat_t
		name := from + "/" + e.Name()
		if err := unix.Lstat(name, &st); err != nil {
			return &os.PathError{Op: "lstat", Path: name, Err: err}
		}
		if err := c.copy(name, filepath.Join(to, e.Name()), st); err != nil {
			return err
		}
	}
	return nil
}

func (c *copier) copyFile(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	return clone.File(c.ctx, out, in)
}

// copyAttributes copies owner, mode, extended attributes and times, in an order in which none undoes another.
func copyAttributes(from, to string, st unix.Stat_t) error {
	if err := os.Lchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	isLink := st.Mode&unix.S_IFMT == unix.S_IFLNK
	if !isLink {
		if err := unix.Chmod(to, st.Mode&0o7777); err != nil {
			return &os.PathError{Op: "chmod", Path: to, Err: err}
		}
	}
	if err := copyXattrs(from, to, isLink); err != nil {
		return fmt.Errorf("extended attributes of %s: %w", to, err)
	}
	times := []unix.Timespec{st.Atim, st.Mtim}
	return os.NewSyscallError("utimensat", unix.UtimesNanoAt(unix.AT_FDCWD, to, times, unix.AT_SYMLINK_NOFOLLOW))
}

func copyXattrs(from, to string, isLink bool) error {
	list, get, set := unix.Listxattr, unix.Getxattr, unix.Setxattr
	if isLink {
		list, get, set = unix.Llistxattr, unix.Lgetxattr, unix.Lsetxattr
	}
	names := make([]byte, 64<<10)
	n, err := list(from, names)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return err
	}
	value := make([]byte, 64<<10)
	for _, name := range strings.Split(string(names[:n]), "\x00") {
		if !strings.HasPrefix(name, "user.") && name != "security.capability" {
			continue // what belongs to the machine
		}
		size, err := get(from, name, value)
		if err != nil {
			return err
		}
		if err := set(to, name, value[:size], 0); err != nil {
			return err
		}
	}
	return nil
}
