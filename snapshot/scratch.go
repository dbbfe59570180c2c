package snapshot

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// CacheDir returns the directory of a cache mount, which outlives builds. It is shared with every
// build that asks for the same id, or with none when exclusive; it waits until that is possible or
// ctx ends. unlock ends the use.
func (s *Store) CacheDir(ctx context.Context, id string, exclusive bool) (dir string, unlock func(), err error) {
	sum := sha256.Sum256([]byte(id)) // ids come from Dockerfiles and are no file names
	at := s.path("cache", filepath.Base(s.snapshots), hex.EncodeToString(sum[:]))
	if err := os.MkdirAll(at, 0o700); err != nil {
		return "", nil, fmt.Errorf("cache directory: %w", err)
	}
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	lock, err := awaitLock(ctx, filepath.Join(at, "lock"), how)
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

// awaitLock waits for a lock that a RUN may hold for hours. The kernel's own wait cannot be called off.
func awaitLock(ctx context.Context, name string, how int) (*os.File, error) {
	for {
		lock, err := lockFile(name, os.O_RDWR|os.O_CREATE, how|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return lock, err
		}
		select {
		case <-time.After(lockPoll):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// lockPoll is how often a lock is tried that somebody else holds.
const lockPoll = 50 * time.Millisecond

// Temp returns a private directory on the store's file system. cleanup removes it.
func (s *Store) Temp() (dir string, cleanup func(), err error) {
	t, err := s.newTemp()
	if err != nil {
		return "", nil, fmt.Errorf("temporary directory: %w", err)
	}
	return t.dir, func() { _ = t.remove() }, nil // what stays is swept by the next Open
}
