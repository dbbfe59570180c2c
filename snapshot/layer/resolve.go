package layer

import (
	"fmt"
	"io/fs"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// parentOf opens the directory that an entry goes into and makes it when it is missing. The result
// belongs to the unpacker.
//
// A symlink on the way is followed inside the root, as containerd and umoci do: "/x" is the root's
// x, and ".." at the root stays there.
func (u *unpacker) parentOf(parts []string) (directory, error) {
	name := strings.Join(parts, "/")
	if u.hasParent && !u.parentStale && u.parentName == name {
		return u.parent, nil
	}
	u.forgetParent()
	fd, err := openBeneath(u.root, name, openDirectory)
	d := directory{fd: fd, path: name}
	if err == unix.ENOENT || err == unix.ENOTDIR || err == unix.ELOOP {
		d, err = u.walk(parts, true)
	}
	if err != nil {
		return d, fmt.Errorf("parent directory: %w", err)
	}
	if err := u.keepTime(d); err != nil {
		closeFD(d.fd)
		return d, err
	}
	u.parent, u.parentName, u.hasParent, u.parentStale = d, name, true, false
	return d, nil
}

func (u *unpacker) forgetParent() {
	if u.hasParent {
		closeFD(u.parent.fd)
		u.hasParent = false
	}
}

// keepTime remembers a directory's time before anything changes in it.
func (u *unpacker) keepTime(d directory) error {
	if _, known := u.times[d.path]; known {
		return nil
	}
	a, err := attributesOf(d.fd)
	if err != nil {
		return err
	}
	u.times[d.path] = a.mtime
	return nil
}

// walk resolves a directory's name component by component and opens it; the caller closes it. With
// create, missing directories are made.
func (u *unpacker) walk(parts []string, create bool) (directory, error) {
	var resolved []string              // free of symlinks and dots: "this is where we are"
	defer func() { u.implied = nil }() // what comes next may make a directory opaque
	links := 0
	for todo := parts; len(todo) > 0; {
		part := todo[0]
		todo = todo[1:]
		if part == "" || part == "." {
			continue
		}
		if part == ".." {
			resolved = resolved[:max(len(resolved)-1, 0)]
			continue
		}
		here := path.Join(path.Join(resolved...), part)
		target, err := u.step(here, create)
		if err != nil {
			return directory{fd: -1}, err
		}
		if target == "" {
			resolved = append(resolved, part)
			continue
		}
		if links++; links > maxLinks {
			return directory{fd: -1}, fmt.Errorf("%s: %w", shown(here), unix.ELOOP)
		}
		if strings.HasPrefix(target, "/") {
			resolved = nil
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	name := path.Join(resolved...)
	fd, err := openBeneath(u.root, name, openDirectory)
	return directory{fd: fd, path: name}, err
}

// step looks at one resolved name: it returns the target of a symlink, or "" for a directory, which
// it may have made.
func (u *unpacker) step(here string, create bool) (target string, err error) {
	fd, err := openBeneath(u.root, here, unix.O_PATH|unix.O_NOFOLLOW)
	if err == unix.ENOENT && create {
		return "", u.imply(here, false)
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w", shown(here), err)
	}
	defer closeFD(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	switch {
	case isDir(&st):
		return "", nil
	case isLink(&st):
		buf := make([]byte, maxName)
		n, err := unix.Readlinkat(fd, "", buf)
		return string(buf[:max(n, 0)]), err
	case isWhiteout(&st) && create:
		return "", u.imply(here, true)
	case isWhiteout(&st):
		return "", fmt.Errorf("%s: %w", shown(here), fs.ErrNotExist)
	default:
		return "", fmt.Errorf("%s: %w", shown(here), unix.ENOTDIR)
	}
}

// imply makes a directory that the stream does not describe. In place of a whiteout it is opaque and
// has nothing to inherit.
func (u *unpacker) imply(here string, replace bool) error {
	if err := u.count(); err != nil {
		return err
	}
	base := path.Base(here)
	fd, err := openBeneath(u.root, above(here), openDirectory)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	parent := directory{fd: fd, path: above(here)}
	if err := u.keepTime(parent); err != nil {
		return err
	}
	if replace {
		if err := u.remove(parent, base); err != nil {
			return err
		}
	}
	if err := unix.Mkdirat(parent.fd, base, 0o700); err != nil {
		return fmt.Errorf("create directory: %w", err)
	}
	dir, err := unix.Openat(parent.fd, base, openDirectory, 0)
	if err != nil {
		return err
	}
	defer closeFD(dir)
	u.touch(here)
	if replace {
		err = setOpaque(dir)
	}
	if err != nil {
		return err
	}
	return u.inherit(directory{fd: dir, path: here})
}

// inherit gives an implied directory root's attributes, and notes that it takes those of the one it covers.
func (u *unpacker) inherit(d directory) error {
	hidden, err := u.hiddenBelow(d)
	if err != nil {
		return err
	}
	u.implied = &implied{path: d.path, hidden: hidden}
	if hidden {
		delete(u.inherits, d.path)
	} else {
		u.inherits[d.path] = struct{}{}
	}
	a := attributes{mode: 0o755, mtime: time.Unix(0, 0), from: -1}
	u.times[d.path] = a.mtime
	return a.apply(d.fd)
}

// implied is a directory that the walk going on has just made, and whether one above hides what lies below it.
type implied struct {
	path   string
	hidden bool
}

// hiddenBelow reports whether an opaque directory, d or one above it, hides what lies below d.
func (u *unpacker) hiddenBelow(d directory) (bool, error) {
	if isOpaque(d.fd) {
		return true, nil
	}
	if u.implied != nil && u.implied.path == above(d.path) {
		return u.implied.hidden, nil // else a path of n names would be looked at n times over
	}
	for name := d.path; name != ""; {
		name = above(name)
		fd, err := openBeneath(u.root, name, openDirectory)
		if err != nil {
			return false, err
		}
		opaque := isOpaque(fd)
		closeFD(fd)
		if opaque {
			return true, nil
		}
	}
	return false, nil
}

// remove removes one name and everything below it.
func (u *unpacker) remove(parent directory, base string) error {
	st, exists, err := lstatAt(parent.fd, base)
	if err != nil || !exists {
		return err
	}
	if isDir(&st) || isLink(&st) {
		u.parentStale = true // its name may have led through this one
	}
	if err := removeAt(parent.fd, base); err != nil {
		return fmt.Errorf("remove what it replaces: %w", err)
	}
	return nil
}

// above names the directory that a resolved path lies in, "" for the root.
func above(name string) string {
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		return name[:i]
	}
	return ""
}
