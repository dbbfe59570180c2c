package snapshot

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cooper-build/cooper/snapshot/layer"
)

// trees compares each kept tree that somebody could take with its table and with a new copy. The files of other maps may be
// hidden from us.
func (v *verification) trees(ctx context.Context) error {
	s := v.store
	dirs, err := os.ReadDir(s.path("trees", s.idMap))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, d := range dirs {
		id := ID(d.Name())
		what, err := v.tree(ctx, id)
		if err != nil {
			return fmt.Errorf("tree of %s: %w", id, err)
		}
		if what != "" {
			v.tell(s.treeDir(id), what, v.aside(s.treeDir(id)))
		}
	}
	return nil
}

func (v *verification) tree(ctx context.Context, id ID) (what string, err error) {
	s, at := v.store, v.store.treeDir(id)
	var r treeRecord
	if _, err := peekRecord(filepath.Join(at, "table"), treeName(id), &r); err != nil {
		if !exists(at) {
			return "", nil // taken meanwhile
		}
		if absent(err) {
			return "table: " + err.Error(), nil
		}
		return "", err
	}
	if m, err := s.use(id); err != nil || m.Made != r.Made || r.Boot != s.boot || v.broken[leaseName(s.idMap, id)] != "" {
		return "", nil // never believed
	}
	table, err := layer.DecodeTable(r.Table)
	if err != nil {
		return "table: " + err.Error(), nil
	}
	now, err := layer.Walk(ctx, filepath.Join(at, "merged"))
	if err != nil {
		if !exists(at) {
			return "", nil
		}
		return "", err
	}
	if !now.Equal(table) {
		return "it was written to since it was kept", nil
	}
	fresh, _, err := s.newTree(ctx, id)
	if err != nil {
		return "", err
	}
	defer fresh.remove()
	same, err := equalTrees(ctx, filepath.Join(at, "merged"), fresh.path("merged"))
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	if err != nil || same { // a tree with a socket is no layer: its table has to do
		return "", nil
	}
	return "its files are not those of the snapshot", nil
}

func equalTrees(ctx context.Context, dirs ...string) (bool, error) {
	var digests []string
	for _, dir := range dirs {
		h := sha256.New()
		if err := layer.Diff(ctx, dir, h, layer.DiffOptions{}); err != nil {
			return false, err
		}
		digests = append(digests, string(asDigest(h)))
	}
	return digests[0] == digests[1], nil
}
