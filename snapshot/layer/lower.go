package layer

import (
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// attributes is what a directory has apart from its contents.
type attributes struct {
	mode  uint32
	mtime time.Time
	from  int // copy owner and extended attributes from this descriptor; -1: root's, none
}

// CopyAttributes gives the directory dst the owner, mode, extended attributes and modification time
// of the directory src, as overlay does when it copies a directory up.
func CopyAttributes(dst, src string) error {
	from, err := unix.Open(src, openDirectory, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", src, err)
	}
	defer closeFD(from)
	to, err := unix.Open(dst, openDirectory, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dst, err)
	}
	defer closeFD(to)
	a, err := attributesOf(from)
	if err != nil {
		return err
	}
	if err := a.apply(to); err != nil {
		return fmt.Errorf("copy the attributes of %s: %w", src, err)
	}
	return setTime(to, "", a.mtime)
}

func attributesOf(fd int) (attributes, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return attributes{}, err
	}
	return attributes{mode: st.Mode & 0o7777, mtime: time.Unix(st.Mtim.Unix()), from: fd}, nil
}

// apply sets everything but the time, which the next change in the directory would undo.
func (a attributes) apply(fd int) error {
	if a.from >= 0 {
		var st unix.Stat_t
		if err := unix.Fstat(a.from, &st); err != nil {
			return err
		}
		if err := unix.Fchown(fd, int(st.Uid), int(st.Gid)); err != nil {
			return fmt.Errorf("change owner: %w", err)
		}
		if err := copyXattrs(fd, a.from); err != nil {
			return err
		}
	}
	if err := unix.Fchmod(fd, a.mode); err != nil {
		return fmt.Errorf("change mode: %w", err)
	}
	return nil
}

// Implied are the directories that a layer brings without describing them. They have the attributes
// of what they cover, which is not known before the layers below are there.
type Implied struct {
	dir   string
	names map[string]struct{}
	root  bool
}

// Root reports whether the root is one of them. Inherit leaves it alone, because it is of all layers
// that were applied to the directory.
func (i *Implied) Root() bool { return i.root }

// Inherit gives each directory owner, mode, attributes and time of the one that the layers below show
// in its place, topmost first. One that covers nothing keeps 0755 and root. The unpacked directory must
// not have changed.
func (i *Implied) Inherit(lower []string) error {
	if len(lower) == 0 {
		return nil
	}
	root, err := unix.Open(i.dir, openDirectory, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", i.dir, err)
	}
	defer closeFD(root)
	for name := range i.names {
		fd, err := openBeneath(root, name, openDirectory)
		if notDirectory(err) {
			continue // the layer put something else there later
		}
		if err == nil {
			err = inheritOne(fd, name, lower)
			closeFD(fd)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", shown(name), err)
		}
	}
	return nil
}

func inheritOne(fd int, name string, lower []string) error {
	from, found, err := lowerDirectory(lower, name)
	if err != nil || !found {
		return err
	}
	defer closeFD(from)
	a, err := attributesOf(from)
	if err != nil {
		return err
	}
	if err := a.apply(fd); err != nil {
		return err
	}
	return setTime(fd, "", a.mtime)
}

// notDirectory says that a resolved name does not lead to a directory any more.
func notDirectory(err error) bool {
	return err == unix.ENOENT || err == unix.ENOTDIR || err == unix.ELOOP
}

// lowerDirectory finds the directory that the layers below show at path, and returns it open. It
// reports false when they show none: nothing, something else, or something hidden on the way.
func lowerDirectory(lowers []string, path string) (int, bool, error) {
	for _, lower := range lowers {
		if path == "" {
			path = "."
		}
		dir, err := unix.Open(lower, openDirectory, 0)
		if err != nil {
			return -1, false, fmt.Errorf("open lower layer: %w", err)
		}
		opaque := isOpaque(dir)
		for part := range strings.SplitSeq(path, "/") {
			var next int
			next, err = unix.Openat(dir, part, openDirectory, 0)
			closeFD(dir)
			if err != nil {
				break
			}
			dir = next
			opaque = opaque || isOpaque(dir)
		}
		switch {
		case err == nil:
			return dir, true, nil
		case err != unix.ENOENT || opaque:
			return -1, false, nil // a file, a link or a whiteout ends the search
		}
	}
	return -1, false, nil
}

// DropIdleWhiteouts removes from the overlay upper directory dir the whiteouts that hide nothing in
// the layers below, topmost first. A squashed layer would otherwise name files that no layer holds.
func DropIdleWhiteouts(dir string, lowers []string) error {
	root, err := unix.Open(dir, openDirectory, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dir, err)
	}
	defer closeFD(root)
	return dropIdle(directory{fd: root}, lowers)
}

func dropIdle(d directory, lowers []string) error {
	names, err := readNames(d.fd)
	if err != nil {
		return err
	}
	a, err := attributesOf(d.fd)
	if err != nil {
		return err
	}
	for _, name := range names {
		st, _, err := lstatAt(d.fd, name)
		if err != nil {
			return err
		}
		switch {
		case isDir(&st):
			err = dropIdleBelow(d, name, lowers)
		case isWhiteout(&st):
			err = dropIfIdle(d, name, lowers)
		}
		if err != nil {
			return err
		}
	}
	return setTime(d.fd, "", a.mtime)
}

func dropIdleBelow(d directory, name string, lowers []string) error {
	fd, err := unix.Openat(d.fd, name, openDirectory, 0)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	if isOpaque(fd) {
		lowers = nil
	}
	return dropIdle(directory{fd: fd, path: d.join(name)}, lowers)
}

func dropIfIdle(d directory, name string, lowers []string) error {
	lower, found, err := lowerDirectory(lowers, d.path)
	if err != nil {
		return err
	}
	if found {
		// Layers further down may hold the name too, under the directory's copies there.
		closeFD(lower)
		for _, one := range lowers {
			shown, err := holds(one, d.join(name))
			if err != nil || shown {
				return err
			}
		}
	}
	return unix.Unlinkat(d.fd, name, 0)
}

// holds reports whether one layer has anything at path but a whiteout.
func holds(lower, path string) (bool, error) {
	root, err := unix.Open(lower, openDirectory, 0)
	if err != nil {
		return false, err
	}
	defer closeFD(root)
	st, err := statBeneath(root, path)
	if err != nil {
		return false, nil // nothing there, or not through directories
	}
	return !isWhiteout(&st), nil
}
