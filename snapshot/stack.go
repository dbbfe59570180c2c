package snapshot

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"slices"
)

const (
	// maxLayers is the kernel's limit, less the upper and the empty layer.
	maxLayers = 498
	// deepStack is when stand-ins are used. Kernels before 6.7 take about 220 layers, and each costs at every lookup.
	deepStack = 190
	// groupSize is how many of our own snapshots one stand-in covers.
	groupSize = 64
)

// A stand-in is one snapshot with the change sets of groupSize others, for showing what stands on them: a build of many
// hundred steps has more layers than the kernel can stack. Nothing is built on one and no other record names it, so it may
// be pruned like anything else that is not in use, and is made again.

// standInFor names the stand-in of the group that ends with a snapshot. Its making says what is below, too.
func standInFor(top ID, m meta) ID {
	h := sha256.New()
	for _, s := range []string{"stand-in", string(top), m.Made} {
		fmt.Fprintf(h, "%d %s", len(s), s) // never fails
	}
	return ID(hex.EncodeToString(h.Sum(nil)))
}

// A group is a run of our own snapshots, lowest first.
type group struct {
	on      ID
	members []ID
	standIn ID
}

// groups cuts what we made of a snapshot's chain into full groups, lowest first.
func (s *Store) groups(id ID) ([]group, error) {
	var chain []ID // base first
	metas := map[ID]meta{}
	for at := id; at != ""; {
		m, err := s.meta(at)
		if err != nil {
			return nil, err
		}
		chain = append(chain, at)
		metas[at] = m
		at = m.Parent
	}
	slices.Reverse(chain)
	ours := slices.IndexFunc(chain, func(id ID) bool { return metas[id].Made != "" })
	if ours < 0 {
		return nil, nil
	}
	var all []group
	for members := range slices.Chunk(chain[ours:], groupSize) {
		if len(members) < groupSize {
			break
		}
		top := members[groupSize-1]
		all = append(all, group{metas[members[0]].Parent, members, standInFor(top, metas[top])})
	}
	return all, nil
}

// layers returns the directories that show a snapshot together, topmost first.
func (s *Store) layers(id ID) ([]string, error) {
	dirs, err := s.stack(id, nil)
	if err != nil || len(dirs) <= deepStack {
		return dirs, err
	}
	groups, err := s.groups(id)
	if err != nil {
		return nil, err
	}
	shown := map[ID]group{}
	for _, g := range groups {
		if s.Has(g.standIn) {
			shown[g.members[groupSize-1]] = g
		}
	}
	return s.stack(id, shown)
}

// stack returns the directories of a chain, with groups in the place of what ends with their keys. A directory counts
// once: what a change set brings again further down is already covered by its first appearance.
func (s *Store) stack(id ID, groups map[ID]group) ([]string, error) {
	var dirs []string
	seen := map[string]bool{}
	for id != "" {
		m, err := s.meta(id)
		if err != nil {
			return nil, err
		}
		own, next := []string{filepath.Join(s.dir(id), "fs")}, m.Parent
		if g, ok := groups[id]; ok {
			own, next = []string{filepath.Join(s.dir(g.standIn), "fs")}, g.on
		} else if m.Of != "" {
			own = append(own, filepath.Join(s.dir(m.Of), "fs"))
		}
		for _, dir := range own {
			if !seen[dir] {
				seen[dir] = true
				dirs = append(dirs, dir)
			}
			// Overlay does not honour the mark on a root, so the stack ends here.
			if opaqueRoot(dir) {
				return dirs, nil
			}
		}
		id = next
	}
	return dirs, nil
}

// shorten makes stand-ins, lowest first, until a snapshot can be shown.
func (s *Store) shorten(ctx context.Context, id ID) error {
	dirs, err := s.layers(id)
	if err != nil || len(dirs) <= deepStack {
		return err
	}
	groups, err := s.groups(id)
	if err != nil {
		return err
	}
	for _, g := range groups {
		if s.Has(g.standIn) {
			continue
		}
		if _, err := s.Squash(ctx, g.on, g.members, g.standIn); err != nil {
			return err
		}
		if dirs, err = s.layers(id); err != nil {
			return err
		}
		if len(dirs) <= deepStack {
			return nil
		}
	}
	if len(dirs) > maxLayers {
		return fmt.Errorf("%d layers are more than the kernel can stack (%d)", len(dirs), maxLayers)
	}
	return nil
}
