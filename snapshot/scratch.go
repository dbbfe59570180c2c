package snapshot

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Sharing says what a second user of a cache directory gets while a first one has it. A stronger one comes later.
type Sharing int

const (
	// Shared lets everybody who asks for Shared use one directory at the same time.
	Shared Sharing = iota
	// Private gives each a directory of its own: the first of the id's that nobody has, and a new one if all are taken.
	Private
	// Locked gives all the same directory, one after the other.
	Locked
)

// CacheDir returns a directory of the cache mounts with this id. It outlives builds, and nobody else
// has it but those who share it. Where sharing allows no other directory, CacheDir waits for it until ctx ends.
// unlock ends the use.
func (s *Store) CacheDir(ctx context.Context, id string, sharing Sharing) (dir string, unlock func(), err error) {
	at := s.path("cache", s.idMap, cacheHash(id))
	held, err := holdCache(at)
	if err != nil {
		return "", nil, fmt.Errorf("cache directory: %w", err)
	}
	lock, number, err := lockCache(ctx, at, sharing)
	if err != nil {
		held.Close()
		return "", nil, fmt.Errorf("cache directory: %w", err)
	}
	dir = filepath.Join(at, "fs"+number)
	err = os.Mkdir(dir, 0o755)
	if os.IsExist(err) {
		err = nil
	}
	if err = errors.Join(err, s.labelCache(at, id)); err != nil {
		lock.Close()
		held.Close()
		return "", nil, fmt.Errorf("cache directory: %w", err)
	}
	return dir, func() { lock.Close(); held.Close() }, nil
}

// cacheHash names the directory of a cache mount: ids come from Dockerfiles and are no file names.
func cacheHash(id string) string {
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:])
}

// labelCache notes which id a cache mount has, for people, and that it was used.
func (s *Store) labelCache(at, id string) error {
	file, name := filepath.Join(at, "id"), "cache/"+filepath.Base(at)
	var label string
	err := readRecord(file, name, &label)
	if absent(err) || err == nil && label != id {
		err = s.writeRecord(file, name, id)
	}
	return err
}

// holdCache makes the directory of a cache mount and shares a lock on it. Who wants to remove it needs that
// lock alone; the directory that we waited for may be gone then.
func holdCache(at string) (*os.File, error) {
	for {
		if err := os.MkdirAll(at, 0o700); err != nil {
			return nil, err
		}
		held, err := lockFile(at, os.O_RDONLY, unix.LOCK_SH)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		same, err := stillAt(held, at)
		if same {
			return held, nil
		}
		held.Close()
		if err != nil {
			return nil, err
		}
	}
}

// stillAt reports whether a name still leads to an open file.
func stillAt(f *os.File, name string) (bool, error) {
	ours, err := f.Stat()
	if err != nil {
		return false, err
	}
	there, err := os.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(ours, there), err
}

// lockCache locks one of the directories beneath at and returns what is appended to its name. Only
// Private goes beyond the first.
func lockCache(ctx context.Context, at string, sharing Sharing) (lock *os.File, number string, err error) {
	name := filepath.Join(at, "lock")
	switch sharing {
	case Shared:
		lock, err = awaitLock(ctx, name, unix.LOCK_SH)
		return lock, "", err
	case Locked:
		lock, err = awaitLock(ctx, name, unix.LOCK_EX)
		return lock, "", err
	case Private:
		for n := 2; ; n++ {
			lock, err = lockFile(name+number, os.O_RDWR|os.O_CREATE, unix.LOCK_EX|unix.LOCK_NB)
			if !errors.Is(err, unix.EWOULDBLOCK) {
				return lock, number, err
			}
			number = fmt.Sprintf("#%d", n)
		}
	}
	return nil, "", fmt.Errorf("no way to share it is called %d", sharing)
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
