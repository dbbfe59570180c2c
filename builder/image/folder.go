package image

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const tempPrefix = ".cooper-"

// A folder is a directory in which files appear whole or not at all. It is held open, so that it stays the
// same one when its path is given to something else.
type folder struct{ root *os.Root }

// mkdir makes a directory that survives a power failure. Its parent exists.
func (d folder) mkdir(name string) error {
	err := d.root.Mkdir(name, 0o755)
	if errors.Is(err, fs.ErrExist) {
		fi, err := d.root.Stat(name)
		if err == nil && !fi.IsDir() {
			err = fmt.Errorf("%s is not a directory", name)
		}
		return err
	}
	if err != nil {
		return err
	}
	return d.syncDir(filepath.Dir(name))
}

func (d folder) syncDir(name string) error {
	f, err := d.root.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync directory %s: %w", name, err)
	}
	return nil
}

// makeDirs is os.MkdirAll that syncs the parent of every directory it makes.
func makeDirs(dir string) error {
	err := os.Mkdir(dir, 0o755)
	if errors.Is(err, fs.ErrNotExist) {
		if err := makeDirs(filepath.Dir(filepath.Clean(dir))); err != nil {
			return err
		}
		err = os.Mkdir(dir, 0o755)
	}
	if errors.Is(err, fs.ErrExist) {
		fi, err := os.Stat(dir)
		if err == nil && !fi.IsDir() {
			err = fmt.Errorf("%s is not a directory", dir)
		}
		return err
	}
	if err != nil {
		return err
	}
	return syncParent(dir)
}

func syncParent(file string) error {
	d, err := os.Open(filepath.Dir(filepath.Clean(file)))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// temp makes a file that only this process uses, in the top directory so that nothing below blobs/ is ever
// unfinished. It is locked as long as it is open: sweep takes the ones whose maker died.
func (d folder) temp() (*os.File, string, error) {
	for {
		name := tempPrefix + randomName()
		f, err := d.root.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
		if err != nil {
			return nil, "", err
		}
		if err := flock(f, unix.LOCK_EX); err != nil {
			f.Close()
			d.root.Remove(name)
			return nil, "", err
		}
		fi, err := f.Stat()
		if err == nil && linked(fi) {
			return f, name, nil
		}
		f.Close() // a sweep came between open and lock
	}
}

func (d folder) sweep() {
	entries, err := fs.ReadDir(d.root.FS(), ".")
	if err != nil {
		return
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) && e.Type().IsRegular() {
			d.sweepOne(e.Name())
		}
	}
}

func (d folder) sweepOne(name string) {
	f, err := d.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return
	}
	defer f.Close()
	if flock(f, unix.LOCK_EX|unix.LOCK_NB) != nil {
		return
	}
	// The maker may have renamed it between our open and our lock; then the name is gone or not this file.
	if fi, err := f.Stat(); err == nil {
		if at, err := d.root.Lstat(name); err == nil && os.SameFile(fi, at) {
			d.root.Remove(name)
		}
	}
}

// replace gives a file new content in one step.
func (d folder) replace(name string, content []byte) error {
	f, tmp, err := d.temp()
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.Write(content)
	if err == nil {
		err = d.settleForGood(f, tmp, name)
	}
	if err != nil {
		d.root.Remove(tmp)
	}
	return err
}

// settle moves a finished temporary file to its name. A power failure may take the name, never a part of the file.
func (d folder) settle(f *os.File, tmp, name string) error {
	if err := f.Sync(); err != nil {
		return err
	}
	return d.root.Rename(tmp, name)
}

// settleForGood is settle for a name that survives a power failure.
func (d folder) settleForGood(f *os.File, tmp, name string) error {
	if err := d.settle(f, tmp, name); err != nil {
		return err
	}
	return d.syncDir(filepath.Dir(name))
}

func (d folder) readSmall(name string, max int64) ([]byte, error) {
	f, _, err := d.openFile(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, max+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > max {
		return nil, fmt.Errorf("%s has more than %d bytes", name, max)
	}
	return b, nil
}

// openFile opens a regular file of the layout and nothing else: not through a symlink, which could lead to
// a file of somebody else, and not a FIFO, which would wait for ever.
func (d folder) openFile(name string) (*os.File, fs.FileInfo, error) {
	const tries = 100 // index.json is replaced by every build that ends
	for try := 1; ; try++ {
		f, fi, err := d.tryOpenFile(name)
		if try == tries || !errors.Is(err, errExchanged) {
			return f, fi, err
		}
	}
}

var errExchanged = errors.New("it was exchanged while it was opened")

func (d folder) tryOpenFile(name string) (*os.File, fs.FileInfo, error) {
	at, err := d.root.Lstat(name)
	if err != nil {
		return nil, nil, err
	}
	if !at.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("%s is not a regular file", name)
	}
	f, err := d.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	fi, err := f.Stat()
	if err == nil && !os.SameFile(at, fi) {
		err = fmt.Errorf("%s: %w", name, errExchanged)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, fi, nil
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); err != unix.EINTR {
			return err
		}
	}
}
