// Package lease lets running processes say what they use, so that nobody removes it.
//
// A process that uses something writes its name into a file of its own, on which it holds an flock, and
// then looks whether the thing is (still) there. Whoever removes things does so inside Exclude, where no
// one can begin a use. A lease ends with its process, however that ends: nothing has to be cleaned up.
// Nobody waits for longer than it takes to write a name or to rename what was removed.
//
// The package does not know what the names stand for.
package lease

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// A Lease is what one process, or one part of it, uses. Its methods may be used by many goroutines.
type Lease struct {
	dir string

	mu   sync.Mutex
	gate *os.File // the directory; locked while a name is written
	file *os.File // nil before the first use
	held map[string]bool
}

// New returns a lease that says nothing yet, in the directory that all who share the things agree on.
func New(dir string) *Lease { return &Lease{dir: dir, held: map[string]bool{}} }

// Use says that a thing is used until Close. When it returns nil, a thing that is there now stays.
func (l *Lease) Use(name string) error {
	if name == "" || strings.ContainsRune(name, '\n') {
		return fmt.Errorf("lease: %q is no name", name)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held[name] {
		return nil
	}
	if err := l.write(name); err != nil && !errors.Is(err, unix.EROFS) { // nobody can remove anything there either
		return fmt.Errorf("lease: %w", err)
	}
	l.held[name] = true
	return nil
}

func (l *Lease) write(name string) (err error) {
	if l.gate == nil {
		l.gate, err = lock(l.dir, unix.LOCK_SH)
	} else {
		err = flock(l.gate, unix.LOCK_SH)
	}
	if err != nil {
		return err
	}
	if l.file == nil {
		l.file, err = l.begin()
	}
	if err == nil {
		_, err = l.file.WriteString(name + "\n")
	}
	return errors.Join(err, flock(l.gate, unix.LOCK_UN))
}

// begin makes the file and locks it. The gate is held: nobody takes it for one of a dead process meanwhile.
func (l *Lease) begin() (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(l.dir, rand.Text()), os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(f, unix.LOCK_EX); err != nil {
		os.Remove(f.Name())
		f.Close()
		return nil, err
	}
	return f, nil
}

// Close ends every use. The lease may be used again.
func (l *Lease) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held = map[string]bool{}
	var err error
	if l.gate != nil {
		err = l.gate.Close()
		l.gate = nil
	}
	if l.file == nil {
		return err
	}
	f := l.file
	l.file = nil
	return errors.Join(err, end(f))
}

// end gives a lease's file back.
func end(f *os.File) error {
	err := os.Remove(f.Name())
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EROFS) {
		err = nil
	}
	return errors.Join(err, f.Close())
}

// Exclude runs f while nobody begins a use, and hands it the names that are in use. f must be quick. What
// it removes must be out of sight when it returns.
func Exclude(dir string, f func(used map[string]bool) error) error {
	gate, err := lock(dir, unix.LOCK_EX)
	if err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	defer gate.Close()
	used, err := read(dir)
	if err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	return f(used)
}

// Sweep removes what dead processes left, if nobody is busy with leases now.
func Sweep(dir string) {
	gate, err := lock(dir, unix.LOCK_EX|unix.LOCK_NB)
	if err != nil {
		return
	}
	defer gate.Close()
	_, _ = read(dir) // what cannot be removed now is left to the next one
}

// read returns what living processes use, and removes the files of others.
func read(dir string) (map[string]bool, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	for _, e := range entries {
		name := filepath.Join(dir, e.Name())
		f, err := lock(name, unix.LOCK_SH|unix.LOCK_NB)
		switch {
		case errors.Is(err, unix.EWOULDBLOCK):
			data, err := os.ReadFile(name)
			if errors.Is(err, fs.ErrNotExist) {
				continue // it ended just now
			}
			if err != nil {
				return nil, err
			}
			for line := range strings.Lines(string(data)) {
				used[strings.TrimSuffix(line, "\n")] = true
			}
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return nil, err
		default:
			os.Remove(name) // fails on what is no file; that says nothing
			f.Close()
		}
	}
	return used, nil
}

func lock(name string, how int) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if err := flock(f, how); err != nil {
		f.Close()
		return nil, &os.PathError{Op: "lock", Path: name, Err: err}
	}
	return f, nil
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); err != unix.EINTR {
			return err
		}
	}
}
