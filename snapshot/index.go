package snapshot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
)

// A Subject is what a fact is about: a snapshot or a blob.
type Subject struct {
	Snapshot ID            `json:"snapshot,omitempty"`
	Made     string        `json:"made,omitempty"` // which making of the snapshot; SetFact fills it in
	Blob     digest.Digest `json:"blob,omitempty"`
}

// OfSnapshot is a snapshot as a Subject. Of the empty ID, the empty root, there is nothing that could be lost.
func OfSnapshot(id ID) Subject { return Subject{Snapshot: id} }

// OfBlob is a blob as a Subject.
func OfBlob(d digest.Digest) Subject { return Subject{Blob: d} }

// keyRecord is the file of a key.
type keyRecord struct {
	ID ID `json:"id"`
}

// factRecord is the file of a fact.
type factRecord[T any] struct {
	About []Subject `json:"about,omitempty"`
	Value T         `json:"value"`
	bytes []byte    // instead of a value
}

func (r *factRecord[T]) attached() *[]byte { return &r.bytes }

// Lookup returns the snapshot that Remember stored for a cause. It reports false when there is none,
// or none any more. What it returns stays until Close.
func (s *Store) Lookup(k Key) (ID, bool, error) {
	name, err := entry(s.keys, k)
	if err != nil {
		return "", false, err
	}
	var r keyRecord
	err = readRecord(name, "key/"+string(k), &r)
	if absent(err) {
		return "", false, nil
	}
	if err == nil {
		_, err = s.use(r.ID)
	}
	if errors.Is(err, ErrNotFound) {
		return "", false, nil
	}
	if err != nil {
		return "", false, fmt.Errorf("look up key: %w", err)
	}
	return r.ID, true, nil
}

// Remember notes that a cause led to a snapshot, in place of what was noted before.
func (s *Store) Remember(k Key, id ID) error {
	if err := checkName(string(id)); err != nil {
		return fmt.Errorf("remember key: id: %w", err)
	}
	name, err := entry(s.keys, k)
	if err != nil {
		return err
	}
	if err := s.writeRecord(name, "key/"+string(k), keyRecord{id}); err != nil {
		return fmt.Errorf("remember key: %w", err)
	}
	return nil
}

// Fact fills v with what SetFact stored for a cause, and reports whether there was anything. A fact
// about a snapshot that is gone, or that was made again since, is gone with it.
func (s *Store) Fact(k Key, v any) (bool, error) {
	name, err := entry(s.facts, k)
	if err != nil {
		return false, err
	}
	r := factRecord[any]{Value: v}
	err = readRecord(name, "fact/"+string(k), &r)
	if errors.Is(err, errNoRecord) || errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read fact: %w", err)
	}
	for _, about := range r.About {
		if about.Snapshot == "" {
			continue
		}
		m, err := s.meta(about.Snapshot)
		if errors.Is(err, ErrNotFound) || err == nil && m.Made != about.Made {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("read fact: %w", err)
		}
	}
	if b, ok := v.(*[]byte); ok {
		*b = r.bytes
	}
	return true, nil
}

// SetFact stores v as JSON, or as it is if it is a []byte, for a cause, in place of what was there. Readers see the old or the new. The
// fact lives as long as all that it is about; the snapshots among that must be in the store.
func (s *Store) SetFact(k Key, v any, about ...Subject) error {
	name, err := entry(s.facts, k)
	if err != nil {
		return err
	}
	r := factRecord[any]{About: slices.DeleteFunc(slices.Clone(about), func(a Subject) bool { return a == (Subject{}) }), Value: v}
	for i, a := range r.About {
		if a.Snapshot == "" {
			continue
		}
		m, err := s.meta(a.Snapshot)
		if err != nil {
			return fmt.Errorf("store fact: %w", err)
		}
		r.About[i].Made = m.Made
	}
	if b, ok := v.([]byte); ok {
		r.Value, r.bytes = nil, b
	}
	if err := s.writeRecord(name, "fact/"+string(k), &r); err != nil {
		return fmt.Errorf("store fact: %w", err)
	}
	return nil
}

// entry names the file of a key. Two characters of directory keep directories small.
func entry(dir string, k Key) (string, error) {
	if err := checkName(string(k)); err != nil || len(k) < 3 {
		return "", fmt.Errorf("key %.60q is not valid", k)
	}
	return filepath.Join(dir, string(k[:2]), string(k)), nil
}

// Has reports whether the snapshot and all it stands on are in the store. What is stays until Close.
func (s *Store) Has(id ID) bool {
	_, err := s.use(id)
	return err == nil
}

// Chain returns the snapshots that id stands on and id itself, base first. They stay until Close.
func (s *Store) Chain(id ID) ([]ID, error) {
	var chain []ID
	for id != "" {
		m, err := s.use(id)
		if err != nil {
			return nil, err
		}
		if slices.Contains(chain, id) {
			return nil, fmt.Errorf("snapshot %s stands on itself", id)
		}
		chain = append(chain, id)
		id = m.Parent
	}
	slices.Reverse(chain)
	return chain, nil
}

func (s *Store) leaseName(id ID) string { return leaseName(s.idMap, id) }

func leaseName(idMap string, id ID) string { return idMap + "/" + string(id) }

// use takes a lease on a snapshot, and so on all that it needs, and returns ErrNotFound when something of
// that is not there or is not what id was made on.
func (s *Store) use(id ID) (meta, error) {
	s.mu.Lock()
	m, ok := s.good[id]
	s.mu.Unlock()
	if ok {
		return m, nil
	}
	if err := checkName(string(id)); err != nil {
		return meta{}, fmt.Errorf("snapshot id: %w", err)
	}
	if _, err := os.Lstat(s.dir(id)); errors.Is(err, os.ErrNotExist) { // most often: nothing to lease
		return meta{}, fmt.Errorf("%s: %w", id, ErrNotFound)
	}
	if err := s.lease.Use(s.leaseName(id)); err != nil {
		return meta{}, err
	}
	needed, err := s.closure(id)
	if err != nil {
		return meta{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, m := range needed {
		s.good[id] = m
	}
	return needed[id], nil
}

// meta is the meta of a snapshot that is in the store, used or not.
func (s *Store) meta(id ID) (meta, error) {
	s.mu.Lock()
	m, ok := s.good[id]
	s.mu.Unlock()
	if ok {
		return m, nil
	}
	m, err := s.readMeta(id)
	if err == nil && s.peek { // one look at the store as it is
		s.mu.Lock()
		s.good[id] = m
		s.mu.Unlock()
	}
	return m, err
}

// closure returns the snapshot id and everything that it needs.
func (s *Store) closure(id ID) (map[ID]meta, error) {
	m, err := s.meta(id)
	if err != nil {
		return nil, err
	}
	found := map[ID]meta{id: m}
	for todo := []ID{id}; len(todo) > 0; todo = todo[1:] {
		m := found[todo[0]]
		for _, need := range m.needs() {
			below, known := found[need.id]
			if !known {
				if below, err = s.meta(need.id); err != nil {
					return nil, err
				}
				found[need.id] = below
				todo = append(todo, need.id)
			}
			if below.Made != need.made {
				return nil, fmt.Errorf("%s: what it stands on was made again since: %w", todo[0], ErrNotFound)
			}
		}
	}
	return found, nil
}

// A need is a snapshot without which another is of no use.
type need struct {
	id   ID
	made string
}

func (m meta) needs() []need {
	var needs []need
	if m.Parent != "" {
		needs = append(needs, need{m.Parent, m.On})
	}
	if m.Of != "" {
		needs = append(needs, need{m.Of, m.OfMade})
	}
	return needs
}
