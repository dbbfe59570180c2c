package sandbox

import (
	"context"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// separate gives a directory files of its own in place of those that have a name outside of it as well. No link leads from one mount
// into another; but what was moved into a root was no mount, and who writes to it later must not change what stayed there.
func separate(dir string) error {
	type file struct {
		links uint64
		names []string
	}
	files := map[uint64]*file{} // by number: there is one file system below
	err := filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil {
			return &os.PathError{Op: "lstat", Path: name, Err: err}
		}
		if st.Nlink > 1 {
			f := files[st.Ino]
			if f == nil {
				f = &file{links: uint64(st.Nlink)}
				files[st.Ino] = f
			}
			f.names = append(f.names, name)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, inode := range slices.Sorted(maps.Keys(files)) {
		f := files[inode]
		if uint64(len(f.names)) == f.links {
			continue
		}
		own := filepath.Join(dir, ".cooper-own")
		if err := copyTree(context.Background(), f.names[0], own); err != nil {
			return err
		}
		for _, name := range f.names {
			if err := os.Remove(name); err != nil {
				return err
			}
			if err := os.Link(own, name); err != nil {
				return err
			}
		}
		if err := os.Remove(own); err != nil {
			return err
		}
	}
	return nil
}
