package snapshot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/snapshot/lease"
)

// Kind is what an Entry is.
type Kind string

// The kinds of entries.
const (
	KindSnapshot   Kind = "snapshot"
	KindCache      Kind = "cache mount"
	KindFact       Kind = "fact"
	KindTree       Kind = "tree"       // a copy of a snapshot
	KindQuarantine Kind = "quarantine" // what verify has moved away
)

// An Entry is one thing in the store that takes space and can be removed. Entries of all id maps are listed.
type Entry struct {
	Kind  Kind
	IDMap string
	// Name is the ID of a snapshot, the id of a cache mount, the key of a fact or the name of a file.
	Name   string
	Needs  []ID      // the snapshots without which this one is of no use
	About  []Subject // of a fact
	Size   Size
	Used   time.Time // last
	InUse  bool      // by a running process; that may have changed when you read it
	Usable bool      // false: damaged, or something that it needs is gone

	path string
	file os.FileInfo // of a fact
}

// List returns everything that takes space but for what is being made and the blobs. It must run inside a
// user namespace that maps the ids of the files.
func (s *Store) List() ([]Entry, error) {
	var names map[string]bool
	err := lease.Exclude(s.path("leases"), func(used map[string]bool) error { names = used; return nil })
	if err != nil {
		return nil, fmt.Errorf("list store: %w", err)
	}
	var all []Entry
	for _, list := range []func(string) ([]Entry, error){s.listSnapshots, s.listTrees, s.listCaches, s.listFacts} {
		for _, idMap := range s.idMaps() {
			entries, err := list(idMap)
			if err != nil {
				return nil, fmt.Errorf("list store: %w", err)
			}
			all = append(all, entries...)
		}
	}
	quarantined, err := s.listQuarantine()
	if err != nil {
		return nil, fmt.Errorf("list store: %w", err)
	}
	all = append(all, quarantined...)
	used := inUse{store: s}
	used.add(names)
	for i, e := range all {
		if e.Kind == KindSnapshot {
			all[i].InUse = used.has(e.IDMap, ID(e.Name))
		}
	}
	return all, nil
}

// idMaps are the maps that the store has something of.
func (s *Store) idMaps() []string {
	var maps []string
	for _, dir := range []string{"snapshots", "trees", "keys", "facts", "cache"} {
		entries, err := os.ReadDir(s.path(dir))
		if err != nil {
			continue // made by Open, or empty
		}
		for _, e := range entries {
			if checkName(e.Name()) == nil && e.IsDir() && !slices.Contains(maps, e.Name()) {
				maps = append(maps, e.Name())
			}
		}
	}
	slices.Sort(maps)
	return maps
}

// of is the store as seen under another id map, for looking only.
func (s *Store) of(idMap string) *Store {
	return &Store{
		root: s.root, idMap: idMap, boot: s.boot, lease: s.lease, good: map[ID]meta{}, peek: true,
		snapshots: s.path("snapshots", idMap), keys: s.path("keys", idMap), facts: s.path("facts", idMap),
	}
}

func (s *Store) listSnapshots(idMap string) ([]Entry, error) {
	seen := s.of(idMap)
	dirs, err := os.ReadDir(seen.snapshots)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []Entry
	for _, d := range dirs {
		id := ID(d.Name())
		e := Entry{Kind: KindSnapshot, IDMap: idMap, Name: d.Name(), path: seen.dir(id)}
		var m meta
		e.Used, err = peekRecord(filepath.Join(e.path, "meta"), metaName(id), &m)
		if errors.Is(err, fs.ErrNotExist) && !exists(e.path) {
			continue // removed meanwhile
		}
		for _, n := range m.needs() {
			e.Needs = append(e.Needs, n.id)
		}
		if _, err := seen.closure(id); err == nil {
			e.Usable = true
		} else if !errors.Is(err, ErrNotFound) && checkName(d.Name()) == nil {
			return nil, err
		}
		e.Size = Size{m.Disk, m.Bytes}
		if e.Size == (Size{}) {
			// Of a build that is running or was killed. What another map hides has no size for us.
			if e.Size, err = measure(e.path); err != nil && !errors.Is(err, fs.ErrNotExist) && idMap == s.idMap {
				return nil, err
			}
		}
		all = append(all, e)
	}
	return all, nil
}

func exists(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}

func (s *Store) listCaches(idMap string) ([]Entry, error) {
	dirs, err := os.ReadDir(s.path("cache", idMap))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []Entry
	for _, d := range dirs {
		e := Entry{Kind: KindCache, IDMap: idMap, Name: d.Name(), Usable: true, path: s.path("cache", idMap, d.Name())}
		var label string
		e.Used, err = peekRecord(filepath.Join(e.path, "id"), "cache/"+d.Name(), &label)
		if err == nil {
			e.Name = label
		}
		if e.Size, err = measure(e.path); err != nil && !errors.Is(err, fs.ErrNotExist) && idMap == s.idMap {
			return nil, err
		}
		held, err := lockFile(e.path, os.O_RDONLY|unix.O_NOFOLLOW, unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case errors.Is(err, unix.EWOULDBLOCK):
			e.InUse = true
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err == nil:
			held.Close()
		}
		all = append(all, e)
	}
	return all, nil
}

func (s *Store) listFacts(idMap string) ([]Entry, error) {
	seen := s.of(idMap)
	var all []Entry
	err := eachEntry(seen.facts, func(file string, k Key) error {
		info, err := os.Lstat(file)
		if err != nil {
			return nil // replaced or removed meanwhile
		}
		e := Entry{Kind: KindFact, IDMap: idMap, Name: string(k), Used: info.ModTime(), path: file, file: info}
		e.Size = sizeOf(info)
		var r factRecord[json.RawMessage]
		if _, err := peekRecord(file, "fact/"+string(k), &r); err == nil {
			e.About = r.About
			e.Usable = seen.holds(r.About)
		} else if !absent(err) {
			return err
		}
		all = append(all, e)
		return nil
	})
	return all, err
}

// holds reports whether all snapshots that a fact is about are what they were.
func (s *Store) holds(about []Subject) bool {
	for _, a := range about {
		if a.Snapshot == "" {
			continue
		}
		if m, err := s.meta(a.Snapshot); err != nil || m.Made != a.Made {
			return false
		}
	}
	return true
}

func sizeOf(info os.FileInfo) Size {
	size := Size{Bytes: info.Size()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		size.Disk = st.Blocks * 512
	}
	return size
}

// eachEntry calls do for every file of a directory of keys or facts.
func eachEntry(dir string, do func(file string, k Key) error) error {
	heads, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, head := range heads {
		files, err := os.ReadDir(filepath.Join(dir, head.Name()))
		if err != nil && !errors.Is(err, unix.ENOTDIR) {
			return err
		}
		for _, f := range files {
			if err := do(filepath.Join(dir, head.Name(), f.Name()), Key(f.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Store) listQuarantine() ([]Entry, error) {
	files, err := os.ReadDir(s.path("quarantine"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []Entry
	for _, f := range files {
		e := Entry{Kind: KindQuarantine, Name: f.Name(), path: s.path("quarantine", f.Name())}
		if info, err := f.Info(); err == nil {
			e.Used = info.ModTime()
		}
		if e.Size, err = measure(e.path); err != nil {
			return nil, err
		}
		all = append(all, e)
	}
	return all, nil
}

// inUse is what leased snapshots and all that they need are.
type inUse struct {
	store *Store
	seen  map[string]bool // leases that were looked at
	ids   map[string]bool
}

func (u *inUse) add(names map[string]bool) {
	if u.seen == nil {
		u.seen, u.ids = map[string]bool{}, map[string]bool{}
	}
	for name := range names {
		idMap, id, ok := strings.Cut(name, "/")
		if !ok || u.seen[name] || checkName(idMap) != nil || checkName(id) != nil {
			continue
		}
		u.ids[name] = true
		at := u.store.of(idMap)
		whole := true
		for todo := []ID{ID(id)}; len(todo) > 0; todo = todo[1:] {
			m, err := at.readMeta(todo[0])
			if err != nil {
				whole = false // not there yet, or no longer: look again next time
				continue
			}
			for _, n := range m.needs() {
				if below := leaseName(idMap, n.id); !u.ids[below] {
					u.ids[below] = true
					todo = append(todo, n.id)
				}
			}
		}
		u.seen[name] = whole
	}
}

func (u *inUse) has(idMap string, id ID) bool { return u.ids[leaseName(idMap, id)] }
