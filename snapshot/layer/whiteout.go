package layer

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// A whiteout hides what earlier layers brought, never what its own layer brings, wherever in the
// stream it stands.

// touch notes that this layer made path, and so all the directories above it.
func (u *unpacker) touch(name string) {
	if u.touched == nil {
		return
	}
	for {
		if _, known := u.touched[name]; known {
			return
		}
		u.touched[name] = struct{}{}
		if name == "" {
			return
		}
		name = above(name)
	}
}

func (u *unpacker) isTouched(name string) bool {
	if u.touched == nil {
		return true
	}
	_, known := u.touched[name]
	return known
}

// whiteout hides one name of parent.
func (u *unpacker) whiteout(parent directory, hidden string) error {
	st, exists, err := lstatAt(parent.fd, hidden)
	if err != nil {
		return err
	}
	switch {
	case exists && isWhiteout(&st):
		return nil
	case exists && u.isTouched(parent.join(hidden)):
		if !isDir(&st) {
			return nil
		}
		fd, err := unix.Openat(parent.fd, hidden, openDirectory, 0)
		if err != nil {
			return err
		}
		defer closeFD(fd)
		return u.makeOpaque(directory{fd: fd, path: parent.join(hidden)})
	case exists:
		if err := u.remove(parent, hidden); err != nil {
			return err
		}
	}
	// Overlay lists a directory that merges with nothing as it is, whiteouts included.
	covered, err := u.hiddenBelow(parent)
	if err != nil || covered {
		return err
	}
	if err := unix.Mknodat(parent.fd, hidden, unix.S_IFCHR, 0); err != nil {
		return fmt.Errorf("create whiteout: %w", err)
	}
	return setTime(parent.fd, hidden, time.Unix(0, 0))
}

// makeOpaque hides all that earlier layers have in a directory.
func (u *unpacker) makeOpaque(d directory) error {
	if isOpaque(d.fd) && u.touched == nil {
		return nil
	}
	if err := u.keepTime(d); err != nil {
		return err
	}
	if err := setOpaque(d.fd); err != nil {
		return err
	}
	return u.uncover(d)
}

// uncover removes from a directory, at every depth, what earlier layers brought, and whiteouts, which
// have nothing left to hide.
func (u *unpacker) uncover(d directory) error {
	names, err := readNames(d.fd)
	if err != nil {
		return err
	}
	for _, name := range names {
		st, exists, err := lstatAt(d.fd, name)
		if err != nil {
			return err
		}
		switch child := d.join(name); {
		case !exists:
		case isWhiteout(&st) || !u.isTouched(child):
			err = u.remove(d, name)
		case isDir(&st):
			err = u.uncoverChild(d, name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (u *unpacker) uncoverChild(d directory, name string) error {
	fd, err := unix.Openat(d.fd, name, openDirectory, 0)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	child := directory{fd: fd, path: d.join(name)}
	if err := u.keepTime(child); err != nil {
		return err
	}
	return u.uncover(child)
}
