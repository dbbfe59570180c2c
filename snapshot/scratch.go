package snapshot

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// CacheDir returns the directory of a cache mount, which outlives builds. It is shared with every
// build that asks for the same id, or with none when exclusive; it waits until that is possible.
// unlock ends the use.
func (s *Store) CacheDir(id string, exclusive bool) (dir string, unlock func(), err error) {
	sum := sha256.Sum256([]byte(id)) // ids come from Dockerfiles and are no file names
	at := s.path("cache", filepath.Base(s.snapshots), hex.EncodeToString(sum[:]))
	if err := os.MkdirAll(at, 0o700); err != nil {
		return "", nil, fmt.Errorf("cache directory: %w", err)
	}
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	lock, err := lockFile(filepath.Join(at, "lock"), os.O_RDWR|os.O_CREATE, how)
	if err != nil {
		return "", nil, fmt.Errorf("cache directory: %w", err)
	}
	dir = filepath.Join(at, "fs")
	if err := os.Mkdir(dir, 0o755); err != nil && !os.IsExist(err) {
		lock.Close()
		return "", nil, fmt.Errorf("cache directory: %w", err)
	}
	return dir, func() { lock.Close() }, nil
}

// Temp returns a private directory on the store's file system. cleanup removes it.
func (s *Store) Temp() (dir string, cleanup func(), err error) {
	t, err := s.newTemp()
	if err != nil {
		return "", nil, fmt.Errorf("temporary directory: %w", err)
	}
	return t.dir, func() { _ = t.remove() }, nil // what stays is swept by the next Open
}
