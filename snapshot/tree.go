package snapshot

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/snapshot/layer"
)

// Where nothing can be mounted, a directory that shows a snapshot is a tree: a copy of all its layers. A tree goes from step to
// step: it is kept under the snapshot that it shows, and who wants to see that takes it away from there. What lies under
// trees is whole and nobody's; what somebody uses lies in tmp and is removed when that process is gone.

// treeRecord is what a kept tree says about itself.
type treeRecord struct {
	Made  string `json:"made,omitempty"` // of the snapshot
	Boot  string `json:"boot"`           // a tree is not synced
	Table []byte `json:"table"`
}

func (s *Store) treeDir(id ID) string { return s.path("trees", s.idMap, string(id)) }

func treeName(id ID) string { return "tree/" + string(id) }

// takeTree makes a temporary directory whose merged is a tree of id, and returns its table. The tree is a kept one, if there
// is one that nobody was faster to take, else a new copy.
func (s *Store) takeTree(ctx context.Context, id ID, made string) (*temp, layer.Table, error) {
	if id != "" {
		t, table, err := s.takeKept(id, made)
		if t != nil || err != nil {
			return t, table, err
		}
	}
	return s.newTree(ctx, id)
}

func (s *Store) takeKept(id ID, made string) (*temp, layer.Table, error) {
	t, err := s.takeAway(s.treeDir(id))
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, nil, nil // somebody else is taking it
	}
	if t == nil || err != nil {
		return nil, nil, err
	}
	var r treeRecord
	_, err = peekRecord(t.path("table"), treeName(id), &r)
	if err == nil && r.Made == made && r.Boot == s.boot {
		if table, err := layer.DecodeTable(r.Table); err == nil && passed(table.Newest()) {
			return t, table, nil
		}
	}
	return nil, nil, t.remove() // it shows something else
}

func (s *Store) newTree(ctx context.Context, id ID) (*temp, layer.Table, error) {
	layers, err := s.layers(id)
	if err != nil {
		return nil, nil, err
	}
	t, err := s.newTemp()
	if err != nil {
		return nil, nil, err
	}
	table, err := copyLayers(ctx, t.path("merged"), layers)
	if err != nil {
		return nil, nil, errors.Join(err, t.remove())
	}
	return t, table, nil
}

func copyLayers(ctx context.Context, dir string, layers []string) (layer.Table, error) {
	if err := makeRoot(dir); err != nil {
		return nil, err
	}
	if err := layer.Merge(ctx, dir, layers); err != nil {
		return nil, err
	}
	table, err := layer.Walk(ctx, dir)
	if err != nil {
		return nil, err
	}
	for !passed(table.Newest()) {
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	return table, nil
}

// passed reports whether a change now would get a later ctime than t. Before Linux 6.13 ctime goes by the tick: what changes
// within the tick in which the table was made would look as if it had not. It is the clock that ctime is taken from, and
// it may have been set back.
func passed(t time.Time) bool {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &now); err != nil {
		return false
	}
	return time.Unix(now.Unix()).After(t)
}

// makeRoot makes the root of a tree of nothing.
func makeRoot(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	return os.Chtimes(dir, time.Unix(0, 0), time.Unix(0, 0))
}

// keepTree moves a tree to where the next step finds it. It is a cache: what goes wrong costs a copy.
func (s *Store) keepTree(t *temp, id ID, made string, table layer.Table) {
	if err := s.tryKeepTree(t, id, made, table); err != nil {
		_ = t.remove() // what stays is swept by the next Open
	}
}

func (s *Store) tryKeepTree(t *temp, id ID, made string, table layer.Table) error {
	// A record is there as a whole or not at all, and it is not there while the tree is somebody's.
	entries, err := os.ReadDir(t.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != "merged" {
			if err := layer.RemoveAll(t.path(e.Name())); err != nil {
				return err
			}
		}
	}
	data, err := sealed(treeName(id), treeRecord{made, s.boot, table.Encode()})
	if err != nil {
		return err
	}
	if err := os.WriteFile(t.path("table"), data, 0o600); err != nil {
		return err
	}
	at := s.treeDir(id)
	err = os.Rename(t.dir, at)
	if errors.Is(err, fs.ErrNotExist) {
		if err = os.MkdirAll(filepath.Dir(at), 0o700); err == nil {
			err = os.Rename(t.dir, at)
		}
	}
	if err != nil {
		return err // one is there
	}
	return t.lock.Close()
}

// listTrees lists the kept trees. Nobody uses them: who does has moved them away.
func (s *Store) listTrees(idMap string) ([]Entry, error) {
	seen := s.of(idMap)
	dirs, err := os.ReadDir(s.path("trees", idMap))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []Entry
	for _, d := range dirs {
		id := ID(d.Name())
		e := Entry{Kind: KindTree, IDMap: idMap, Name: d.Name(), path: seen.treeDir(id)}
		var r treeRecord
		e.Used, err = peekRecord(filepath.Join(e.path, "table"), treeName(id), &r)
		if errors.Is(err, fs.ErrNotExist) && !exists(e.path) {
			continue // taken meanwhile
		}
		if err == nil {
			m, metaErr := seen.meta(id)
			e.Usable = metaErr == nil && m.Made == r.Made && r.Boot == s.boot
		}
		if e.Size, err = measure(e.path); err != nil && !errors.Is(err, fs.ErrNotExist) && idMap == s.idMap {
			return nil, err
		}
		all = append(all, e)
	}
	return all, nil
}

// prepareTree is Prepare without a mount.
func (s *Store) prepareTree(ctx context.Context, parent ID) (*Active, error) {
	a := &Active{store: s, parent: parent}
	if parent != "" {
		on, err := s.use(parent)
		if err != nil {
			return nil, err
		}
		a.on = on.Made
	}
	var err error
	if a.temp, a.table, err = s.takeTree(ctx, parent, a.on); err != nil {
		return nil, err
	}
	if err := os.Mkdir(a.temp.path("snapshot"), 0o700); err != nil {
		a.Discard()
		return nil, err
	}
	return a, nil
}

// change writes the change set of a tree. It returns the tree's new table, nil when the tree does not show the snapshot.
func (a *Active) change(ctx context.Context) (layer.Table, error) {
	below, err := a.store.layers(a.parent)
	if err != nil {
		return nil, err
	}
	table, exact, err := layer.Changes(ctx, a.Dir(), a.table, a.upper(), below)
	if err != nil || !exact {
		return nil, err
	}
	return table, nil
}

// viewTree is View without a mount.
func (s *Store) viewTree(ctx context.Context, id ID) (*View, error) {
	v := &View{store: s, id: id}
	if id != "" {
		m, err := s.use(id)
		if err != nil {
			return nil, err
		}
		v.made = m.Made
	}
	var err error
	v.temp, v.table, err = s.takeTree(ctx, id, v.made)
	return v, err
}

// closeTree gives the tree back, unless somebody wrote to it.
func (v *View) closeTree() error {
	table, err := layer.Walk(context.Background(), v.Dir())
	if err == nil && v.id != "" && table.Equal(v.table) {
		v.store.keepTree(v.temp, v.id, v.made, table)
		return nil
	}
	return v.temp.remove()
}
