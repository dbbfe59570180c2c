package snapshot

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/snapshot/layer"
	"github.com/cooper-build/cooper/snapshot/lease"
)

// Prune waits until no other process prunes, and keeps the others waiting until free is called. Two that each make
// room would make twice as much. Builds do not wait.
func (s *Store) Prune(ctx context.Context) (free func(), err error) {
	for {
		free, ok, err := s.TryPrune()
		if ok || err != nil {
			return free, err
		}
		select {
		case <-time.After(lockPoll):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// TryPrune is Prune without waiting. It reports false when another process prunes.
func (s *Store) TryPrune() (free func(), ok bool, err error) {
	guard, err := lockFile(s.path("cache"), os.O_RDONLY, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("prune: %w", err)
	}
	return func() { guard.Close() }, true, nil
}

// A Pruner removes entries. It belongs to one goroutine.
type Pruner struct {
	store *Store
	used  inUse
}

// Pruner returns a Pruner.
func (s *Store) Pruner() *Pruner { return &Pruner{store: s, used: inUse{store: s}} }

// Remove removes what List found. It reports false when it left it because it is in use, or is not what it was.
// Whoever removes a snapshot has removed what stands on it before.
func (p *Pruner) Remove(e Entry) (bool, error) {
	var done bool
	var err error
	switch e.Kind {
	case KindSnapshot:
		done, err = p.snapshot(e)
	case KindCache, KindTree:
		done, err = p.store.removeLocked(e)
	case KindFact:
		done, err = p.store.removeFact(e)
	case KindQuarantine:
		done, err = true, layer.RemoveAll(e.path)
	default:
		err = errors.New("no way to remove it")
	}
	if err != nil {
		return done, fmt.Errorf("remove %s %s: %w", e.Kind, e.Name, err)
	}
	return done, nil
}

func (p *Pruner) snapshot(e Entry) (bool, error) {
	if e.IDMap != p.store.idMap {
		if err := removable(e.path); err != nil {
			return false, err
		}
	}
	var away *temp
	err := lease.Exclude(p.store.path("leases"), func(names map[string]bool) (err error) {
		p.used.add(names)
		if !p.used.has(e.IDMap, ID(e.Name)) {
			away, err = p.store.takeAway(e.path)
		}
		return err
	})
	if away == nil {
		return false, err
	}
	return true, errors.Join(err, away.remove())
}

// removable refuses a tree that we could take out of sight and then not remove.
func removable(dir string) error {
	_, err := measureIf(dir, func(dir string) error {
		if unix.Access(dir, unix.R_OK|unix.W_OK|unix.X_OK) != nil {
			return ErrForeign
		}
		return nil
	})
	return err
}

// takeAway moves something to tmp in one step, locked, so that nobody sweeps it while we remove it. It needs
// no space: a full disk is when it is called. It returns nil when there is nothing.
func (s *Store) takeAway(path string) (*temp, error) {
	lock, err := lockFile(path, os.O_RDONLY|unix.O_NOFOLLOW, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	// Who had it locked before may have moved it away, and something else may have the name since.
	if same, err := stillAt(lock, path); err != nil || !same {
		lock.Close()
		return nil, err
	}
	away := &temp{dir: s.path("tmp", "p-"+rand.Text()), lock: lock}
	if err := os.Rename(path, away.dir); err != nil {
		lock.Close()
		return nil, err
	}
	return away, nil
}

// removeLocked removes what its users have a lock on.
func (s *Store) removeLocked(e Entry) (bool, error) {
	if e.IDMap != s.idMap {
		if err := removable(e.path); err != nil {
			return false, err
		}
	}
	away, err := s.takeAway(e.path)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return false, nil
	}
	if away == nil {
		return false, err
	}
	return true, errors.Join(err, away.remove())
}

// removeFact removes a fact that was neither replaced nor used since it was listed.
func (s *Store) removeFact(e Entry) (bool, error) {
	// Whoever replaces a file shares this lock.
	guard, err := lockFile(s.path("tmp"), os.O_RDONLY, unix.LOCK_EX)
	if err != nil {
		return false, err
	}
	defer guard.Close()
	info, err := os.Lstat(e.path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil || !os.SameFile(info, e.file) || !info.ModTime().Equal(e.file.ModTime()) {
		return false, err
	}
	return true, os.Remove(e.path)
}

// DropKeys removes the keys that lead to no snapshot any more.
func (s *Store) DropKeys() error {
	guard, err := lockFile(s.path("tmp"), os.O_RDONLY, unix.LOCK_EX)
	if err != nil {
		return fmt.Errorf("remove keys: %w", err)
	}
	defer guard.Close()
	for _, idMap := range s.idMaps() {
		seen := s.of(idMap)
		err := eachEntry(seen.keys, func(file string, k Key) error {
			if seen.leads(file, k) {
				return nil
			}
			return os.Remove(file)
		})
		if err != nil {
			return fmt.Errorf("remove keys: %w", err)
		}
	}
	return nil
}

// leads reports whether a key is whole and leads to a snapshot.
func (s *Store) leads(file string, k Key) bool {
	var r keyRecord
	if _, err := peekRecord(file, "key/"+string(k), &r); err != nil {
		return false
	}
	_, err := s.meta(r.ID)
	return err == nil
}
