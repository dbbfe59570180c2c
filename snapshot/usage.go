package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// A Size is how much something takes.
type Size struct {
	Disk  int64 // what the file system allots
	Bytes int64 // the lengths of the files
}

func (s *Size) add(o Size) {
	s.Disk += o.Disk
	s.Bytes += o.Bytes
}

// ErrForeign says that something made under another id map has directories from which we can remove nothing.
var ErrForeign = errors.New("it has files of ids that are not mapped here")

// measure returns the size of a tree or a file. What has several names in it counts once.
func measure(root string) (Size, error) { return measureIf(root, nil) }

// measureIf asks about every directory before it goes there.
func measureIf(root string, enter func(dir string) error) (Size, error) {
	type inode struct{ dev, ino uint64 }
	var size Size
	seen := map[inode]bool{}
	err := filepath.WalkDir(root, func(name string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && name != root {
			return nil // of a cache mount that a RUN is changing
		}
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil {
			if err == unix.ENOENT {
				return nil
			}
			return &os.PathError{Op: "stat", Path: name, Err: err}
		}
		if e.IsDir() {
			if enter != nil {
				if err := enter(name); err != nil {
					return err
				}
			}
		} else if st.Nlink > 1 {
			if at := (inode{uint64(st.Dev), st.Ino}); seen[at] {
				return nil
			} else {
				seen[at] = true
			}
		}
		size.add(Size{Disk: st.Blocks * 512, Bytes: st.Size})
		return nil
	})
	return size, err
}

// usage is the record of how much is thought to be in use.
type usage struct {
	Disk     int64     `json:"disk"`
	Measured time.Time `json:"measured"` // when Disk was last more than an estimate
}

// Grow adds to the estimate of the space in use.
func (s *Store) Grow(by int64) error {
	if by == 0 {
		return nil
	}
	return s.changeUsage(func(u usage, known bool) (usage, bool) {
		u.Disk += by
		return u, known // without a beginning there is nothing to add to
	})
}

// Estimate returns the space that is thought to be in use. It reports false when that is not known, or
// was not measured for a day: cache mounts grow without our knowing.
func (s *Store) Estimate() (disk int64, ok bool) {
	var u usage
	if _, err := peekRecord(s.path("usage"), "usage", &u); err != nil {
		return 0, false
	}
	return u.Disk, time.Since(u.Measured).Abs() < 24*time.Hour
}

// Measured stores how much was found to be in use.
func (s *Store) Measured(disk int64) error {
	return s.changeUsage(func(usage, bool) (usage, bool) { return usage{disk, time.Now().UTC()}, true })
}

func (s *Store) changeUsage(change func(u usage, known bool) (usage, bool)) error {
	guard, err := lockFile(s.root, os.O_RDONLY, unix.LOCK_EX)
	if err != nil {
		return fmt.Errorf("estimate of the space in use: %w", err)
	}
	defer guard.Close()
	var u usage
	_, err = peekRecord(s.path("usage"), "usage", &u)
	if err != nil && !absent(err) {
		return fmt.Errorf("estimate of the space in use: %w", err)
	}
	u, ok := change(u, err == nil)
	if !ok {
		return nil
	}
	if err := s.writeRecord(s.path("usage"), "usage", u); err != nil {
		return fmt.Errorf("estimate of the space in use: %w", err)
	}
	return nil
}
