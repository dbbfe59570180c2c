package snapshot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// Lookup returns the snapshot that Remember stored for a cause. It reports false when there is none,
// or none any more.
func (s *Store) Lookup(k Key) (ID, bool, error) {
	name, err := entry(s.keys, k)
	if err != nil {
		return "", false, err
	}
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", false, nil
	}
	if err != nil {
		return "", false, fmt.Errorf("look up key: %w", err)
	}
	id := ID(text)
	if !s.Has(id) {
		return "", false, nil
	}
	return id, true, nil
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
	if err := s.replaceFile(name, []byte(id)); err != nil {
		return fmt.Errorf("remember key: %w", err)
	}
	return nil
}

// Fact fills v with what SetFact stored for a cause, and reports whether there was anything.
func (s *Store) Fact(k Key, v any) (bool, error) {
	name, err := entry(s.path("facts"), k)
	if err != nil {
		return false, err
	}
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read fact: %w", err)
	}
	if !json.Valid(data) {
		return false, nil // torn by a loss of power
	}
	if err := json.Unmarshal(data, v); err != nil {
		return false, fmt.Errorf("read fact: %w", err)
	}
	return true, nil
}

// SetFact stores v as JSON for a cause, in place of what was there. Readers see the old or the new.
func (s *Store) SetFact(k Key, v any) error {
	name, err := entry(s.path("facts"), k)
	if err != nil {
		return err
	}
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("store fact: %w", err)
	}
	if err := s.replaceFile(name, data); err != nil {
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

// Has reports whether the snapshot and all it stands on are in the store.
func (s *Store) Has(id ID) bool {
	_, err := s.Chain(id)
	return err == nil
}

// Chain returns the snapshots that id stands on and id itself, base first.
func (s *Store) Chain(id ID) ([]ID, error) {
	var chain []ID
	for id != "" {
		m, err := s.readMeta(id)
		if err != nil {
			return nil, err
		}
		if m.Of != "" {
			if _, err := s.readMeta(m.Of); err != nil {
				return nil, err
			}
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
