package snapshot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/snapshot/layer"
)

// flock takes a lock that dies with its holder.
func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if err != unix.EINTR {
			return err
		}
	}
}

// lockFile opens name and locks it. Closing the file unlocks it.
func lockFile(name string, flags, how int) (*os.File, error) {
	f, err := os.OpenFile(name, flags, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(f, how); err != nil {
		f.Close()
		return nil, &os.PathError{Op: "lock", Path: name, Err: err}
	}
	return f, nil
}

// temp is a directory that belongs to us for as long as we live.
type temp struct {
	dir  string
	lock *os.File
}

// newTemp makes a temporary directory and locks it. No sweep can come between: it waits for nobody
// and needs the lock that we share here.
func (s *Store) newTemp() (*temp, error) {
	guard, err := lockFile(s.path("tmp"), os.O_RDONLY, unix.LOCK_SH)
	if err != nil {
		return nil, err
	}
	defer guard.Close()
	dir, err := os.MkdirTemp(s.path("tmp"), "d-")
	if err != nil {
		return nil, err
	}
	lock, err := lockFile(dir, os.O_RDONLY, unix.LOCK_EX)
	if err != nil {
		os.Remove(dir)
		return nil, err
	}
	return &temp{dir: dir, lock: lock}, nil
}

func (t *temp) path(name string) string { return filepath.Join(t.dir, name) }

func (t *temp) remove() error {
	err := layer.RemoveAll(t.dir)
	return errors.Join(err, t.lock.Close())
}

// sweep removes the temporary files of processes that are gone. They harm nobody: what cannot be
// removed now, or while another process makes one, is left to the next Open.
func (s *Store) sweep() {
	for _, t := range s.deadTemps() {
		_ = t.remove()
	}
}

// deadTemps returns what nobody holds, locked by us, so that no one else sweeps it too.
func (s *Store) deadTemps() []*temp {
	guard, err := lockFile(s.path("tmp"), os.O_RDONLY, unix.LOCK_EX|unix.LOCK_NB)
	if err != nil {
		return nil
	}
	defer guard.Close()
	entries, err := os.ReadDir(s.path("tmp"))
	if err != nil {
		return nil
	}
	var dead []*temp
	for _, e := range entries {
		name := s.path("tmp", e.Name())
		lock, err := lockFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			dead = append(dead, &temp{dir: name, lock: lock})
		}
	}
	return dead
}

// replaceFile makes name hold data, at once or not at all. It need not survive a loss of power: a
// reader takes a broken file for an absent one.
func (s *Store) replaceFile(name string, data []byte) error {
	guard, err := lockFile(s.path("tmp"), os.O_RDONLY, unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer guard.Close() // held to the end: the file itself needs no lock then
	f, err := os.CreateTemp(s.path("tmp"), "f-")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(f.Name())
		return err
	}
	err = os.Rename(f.Name(), name)
	if errors.Is(err, fs.ErrNotExist) {
		if err = os.MkdirAll(filepath.Dir(name), 0o700); err == nil {
			err = os.Rename(f.Name(), name)
		}
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

func writeSynced(f *os.File, data []byte) error {
	_, err := f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func syncDirectory(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func syncFileSystem(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(d.Fd())), d.Close())
}

// meta is what a snapshot says about itself.
type meta struct {
	// Made tells this making of the ID from others. What was imported is always the same and needs none.
	Made   string `json:"made,omitempty"`
	Parent ID     `json:"parent,omitempty"`
	On     string `json:"on,omitempty"` // the parent's Made
	// Of names the snapshot whose change set this one repeats on another parent.
	Of     ID     `json:"of,omitempty"`
	OfMade string `json:"ofMade,omitempty"`
	// Boot is the boot in which the files were written but not synced. After another boot they may
	// be incomplete, and the snapshot counts as absent.
	Boot string `json:"boot,omitempty"`
	// Disk and Bytes are the size of fs. A change set without any file has one, too: that of its root.
	Disk  int64 `json:"disk,omitempty"`
	Bytes int64 `json:"bytes,omitempty"`
}

func (s *Store) dir(id ID) string { return filepath.Join(s.snapshots, string(id)) }

func metaName(id ID) string { return "snapshot/" + string(id) }

// readMeta returns ErrNotFound for a snapshot that is absent or cannot be trusted.
func (s *Store) readMeta(id ID) (meta, error) {
	var m meta
	if err := checkName(string(id)); err != nil {
		return m, fmt.Errorf("snapshot id: %w", err)
	}
	read := readRecord
	if s.peek {
		read = lookAtRecord
	}
	err := read(filepath.Join(s.dir(id), "meta"), metaName(id), &m)
	if absent(err) || err == nil && m.Boot != "" && m.Boot != s.boot {
		return m, fmt.Errorf("%s: %w", id, ErrNotFound)
	}
	return m, err
}

// absent reports an error of readRecord after which the record counts as absent.
func absent(err error) bool {
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNoRecord) || errors.As(err, &syntax) || errors.As(err, &kind)
}

// markSafe notes that a snapshot survives a loss of power, and how large it is.
func (s *Store) markSafe(id ID) (Size, error) {
	m, err := s.readMeta(id)
	if err != nil || m.Boot == "" {
		return Size{}, err
	}
	size, err := measure(filepath.Join(s.dir(id), "fs"))
	if err != nil {
		return Size{}, err
	}
	m.Boot, m.Disk, m.Bytes = "", size.Disk, size.Bytes
	return size, s.writeRecord(filepath.Join(s.dir(id), "meta"), metaName(id), m)
}

// writeRecord replaces a record.
func (s *Store) writeRecord(file, name string, v any) error {
	data, err := sealed(name, v)
	if err != nil {
		return err
	}
	return s.replaceFile(file, data)
}
