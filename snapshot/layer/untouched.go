package layer

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// DropUntouched removes from the overlay upper directory dir the directories that say nothing: empty, and equal in
// every attribute and time to what the layers below, topmost first, show in their place. Overlay copies a directory
// up as soon as something is made in it, and leaves the copy when that something is gone again, as the mount points
// of a sandbox are.
func DropUntouched(dir string, lowers []string) error {
	root, err := unix.Open(dir, openDirectory, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dir, err)
	}
	defer closeFD(root)
	return dropUntouched(directory{fd: root}, lowers)
}

func dropUntouched(d directory, lowers []string) error {
	names, err := readNames(d.fd)
	if err != nil {
		return err
	}
	a, err := attributesOf(d.fd)
	if err != nil {
		return err
	}
	var dropped bool
	for _, name := range names {
		st, _, err := lstatAt(d.fd, name)
		if err != nil {
			return err
		}
		if !isDir(&st) {
			continue
		}
		gone, err := dropUntouchedBelow(d, name, lowers)
		if err != nil {
			return fmt.Errorf("%s: %w", d.join(name), err)
		}
		dropped = dropped || gone
	}
	if !dropped {
		return nil
	}
	return setTime(d.fd, "", a.mtime)
}

func dropUntouchedBelow(d directory, name string, lowers []string) (bool, error) {
	fd, err := unix.Openat(d.fd, name, openDirectory, 0)
	if err != nil {
		return false, err
	}
	defer closeFD(fd)
	if isOpaque(fd) {
		return false, nil
	}
	below := directory{fd: fd, path: d.join(name)}
	if err := dropUntouched(below, lowers); err != nil {
		return false, err
	}
	left, err := readNames(fd)
	if err != nil || len(left) > 0 {
		return false, err
	}
	same, err := showsTheSame(below, lowers)
	if err != nil || !same {
		return false, err
	}
	return true, unix.Unlinkat(d.fd, name, unix.AT_REMOVEDIR)
}

// showsTheSame reports whether the layers below show an equal directory at d's path.
func showsTheSame(d directory, lowers []string) (bool, error) {
	lower, found, err := lowerDirectory(lowers, d.path)
	if err != nil || !found {
		return false, err
	}
	defer closeFD(lower)
	have, err := attributesText(d.fd)
	if err != nil {
		return false, err
	}
	want, err := attributesText(lower)
	if err != nil {
		return false, err
	}
	haveTime, err := attributesOf(d.fd)
	if err != nil {
		return false, err
	}
	wantTime, err := attributesOf(lower)
	if err != nil {
		return false, err
	}
	return have == want && haveTime.mtime.Equal(wantTime.mtime), nil
}
