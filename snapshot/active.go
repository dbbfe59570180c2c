package snapshot

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/snapshot/layer"
)

// Active is a snapshot in the making: a writable directory that shows its parent. It ends by exactly
// one of Commit and Discard. It belongs to one goroutine.
type Active struct {
	store  *Store
	parent ID
	on     string      // the parent's making
	temp   *temp       // nil when it ended
	table  layer.Table // of a tree when it was handed out; nil where there is a mount or nothing to show
}

// Prepare begins a snapshot on parent, or on nothing for "". Its directory is mounted in the mount
// namespace of this process, or is a tree.
func (s *Store) Prepare(ctx context.Context, parent ID) (*Active, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if s.copying {
		a, err := s.prepareTree(ctx, parent)
		if err != nil {
			return nil, fmt.Errorf("prepare snapshot: %w", err)
		}
		return a, nil
	}
	if err := s.shorten(ctx, parent); err != nil {
		return nil, fmt.Errorf("prepare snapshot: %w", err)
	}
	a, lower, err := s.begin(parent)
	if err != nil {
		return nil, fmt.Errorf("prepare snapshot: %w", err)
	}
	mount := overlay{
		lower: append(lower, s.path("empty")),
		upper: a.upper(), work: a.temp.path("work"), target: a.Dir(),
	}
	if err := mount.mount(); err != nil {
		a.Discard()
		return nil, fmt.Errorf("prepare snapshot: %w", err)
	}
	return a, nil
}

// begin makes the directories of an Active without mounting anything, and returns the layers below,
// topmost first. The new root has the attributes of the one it covers.
func (s *Store) begin(parent ID) (*Active, []string, error) {
	a := &Active{store: s}
	lower, err := a.place(parent)
	if err != nil {
		return nil, nil, err
	}
	if a.temp, err = s.newTemp(); err != nil {
		return nil, nil, err
	}
	if err := a.makeDirectories(lower); err != nil {
		a.Discard()
		return nil, nil, err
	}
	return a, lower, nil
}

// place says what the snapshot stands on, and returns the layers below, topmost first.
func (a *Active) place(parent ID) ([]string, error) {
	a.parent, a.on = parent, ""
	if parent != "" {
		on, err := a.store.use(parent)
		if err != nil {
			return nil, err
		}
		a.on = on.Made
	}
	return a.store.layers(parent)
}

func (a *Active) makeDirectories(lower []string) error {
	for _, dir := range []string{a.temp.path("snapshot"), a.temp.path("work"), a.Dir()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	if err := makeRoot(a.upper()); err != nil || len(lower) == 0 {
		return err
	}
	return layer.CopyAttributes(a.upper(), lower[0])
}

// Upper is the directory that what is made in Dir lies in, for somebody who makes files there before anything has looked
// for them in Dir. Between Prepare and Commit nobody else may. It is empty where Dir is a tree of its own: what it holds must
// share no file with a change set, as a command writes to it in place.
func (a *Active) Upper() string {
	if a.store.copying {
		return ""
	}
	return a.upper()
}

func (a *Active) upper() string { return a.temp.path("snapshot/fs") }

// Dir is the directory. It is of no use after Commit or Discard.
func (a *Active) Dir() string { return a.temp.path("merged") }

// Commit freezes the directory as id. When the store has id already, that one stays and this one is
// dropped. A nil error means that the returned snapshot is in the store, whatever becomes of this
// process.
func (a *Active) Commit(ctx context.Context, id ID) (ID, error) {
	return a.commit(ctx, id, meta{Made: rand.Text()}, nil)
}

// Earlier is what a cause led to before, if it stands on what this stands on. It may be gone by the time it is asked for.
func (a *Active) Earlier(k Key) (ID, bool) {
	name, err := entry(a.store.keys, k)
	if err != nil {
		return "", false
	}
	var r keyRecord
	if lookAtRecord(name, "key/"+string(k), &r) != nil || checkName(string(r.ID)) != nil {
		return "", false
	}
	var m meta
	if lookAtRecord(filepath.Join(a.store.dir(r.ID), "meta"), metaName(r.ID), &m) != nil {
		return "", false
	}
	return r.ID, a.standsAs(m)
}

func (a *Active) standsAs(m meta) bool { return m.Parent == a.parent && m.On == a.on && m.Of == "" }

// CommitOrFind is Commit for what may have been made before: the first of earlier that stands on the same snapshot and has an equal
// change set, as [layer.Equal] says with epoch, is returned, and this one is dropped.
func (a *Active) CommitOrFind(ctx context.Context, id ID, earlier []ID, epoch *time.Time) (ID, error) {
	return a.commit(ctx, id, meta{Made: rand.Text()}, func(e ID) bool { return a.equals(ctx, e, epoch) }, earlier...)
}

func (a *Active) commit(ctx context.Context, id ID, m meta, same func(ID) bool, earlier ...ID) (ID, error) {
	if a.temp == nil {
		return "", fmt.Errorf("commit snapshot: it was committed or discarded before")
	}
	defer a.Discard() // what is left of it
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	if err := checkName(string(id)); err != nil {
		return "", fmt.Errorf("commit snapshot: id: %w", err)
	}
	shows, err := a.freeze(ctx)
	if err != nil {
		return "", fmt.Errorf("commit snapshot: %w", err)
	}
	if i := slices.IndexFunc(earlier, same); i >= 0 {
		return earlier[i], nil
	}
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	// Before it is there, so that nobody removes it in between.
	if err := a.store.lease.Use(a.store.leaseName(id)); err != nil {
		return "", fmt.Errorf("commit snapshot: %w", err)
	}
	m.Parent, m.On, m.Boot = a.parent, a.on, a.store.boot
	data, err := sealed(metaName(id), m)
	if err != nil {
		return "", fmt.Errorf("commit snapshot: %w", err)
	}
	f, err := os.OpenFile(a.temp.path("snapshot/meta"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", fmt.Errorf("commit snapshot: %w", err)
	}
	if err := writeSynced(f, data); err != nil {
		return "", fmt.Errorf("commit snapshot: %w", err)
	}
	if err := a.store.install(a.temp, id); err != nil {
		return "", fmt.Errorf("commit snapshot: %w", err)
	}
	if shows != nil {
		a.keepTree(id, m.Made, shows)
	}
	return id, nil
}

// equals reports whether id is what a frozen Active would be. What cannot be read of id is not equal: nobody needs it.
func (a *Active) equals(ctx context.Context, id ID, epoch *time.Time) bool {
	m, err := a.store.use(id)
	if err != nil || !a.standsAs(m) {
		return false
	}
	// The directories above the two are made when a step begins, and moved. The time of a record says when it was used last.
	there := a.store.dir(id)
	same, err := layer.Equal(ctx,
		layer.Written{Dir: a.upper(), Begun: born(a.temp.path("snapshot")), Ended: time.Now()},
		layer.Written{Dir: filepath.Join(there, "fs"), Begun: born(there), Ended: born(filepath.Join(there, "meta"))}, epoch)
	return err == nil && same
}

// born is when a file was made, zero where that is not known.
func born(file string) time.Time {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, file, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BTIME, &st)
	if err != nil || st.Mask&unix.STATX_BTIME == 0 {
		return time.Time{}
	}
	return time.Unix(st.Btime.Sec, int64(st.Btime.Nsec))
}

// keepTree keeps the tree when id is what we made, and not what another process had made before.
func (a *Active) keepTree(id ID, made string, shows layer.Table) {
	if there, err := a.store.readMeta(id); err != nil || there.Made != made {
		return
	}
	a.store.keepTree(a.temp, id, made, shows)
	a.temp = nil
}

// Freeze ends all writing. What was changed can be read with WriteLayer until the end.
func (a *Active) Freeze(ctx context.Context) error {
	_, err := a.freeze(ctx)
	return err
}

// freeze returns what the tree shows, if there is one.
func (a *Active) freeze(ctx context.Context) (shows layer.Table, err error) {
	if a.table != nil {
		shows, err = a.change(ctx)
	} else {
		err = a.store.unmount(a.Dir())
	}
	if err != nil {
		return shows, err
	}
	return shows, a.simplify(ctx)
}

// WriteLayer writes the uncompressed layer that a frozen Active is.
func (a *Active) WriteLayer(ctx context.Context, w io.Writer, o layer.DiffOptions) error {
	return a.store.writeLayer(ctx, a.upper(), a.parent, w, o)
}

// simplify takes out what overlay copied up for nothing.
func (a *Active) simplify(ctx context.Context) error {
	below, err := a.store.layers(a.parent)
	if err != nil || len(below) == 0 {
		return err
	}
	return layer.Simplify(ctx, a.upper(), below)
}

// install moves a finished snapshot to its place, unless a good one is there.
func (s *Store) install(t *temp, id ID) error {
	guard, err := lockFile(s.snapshots, os.O_RDONLY, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer guard.Close()
	if s.Has(id) {
		return nil
	}
	// What is there in spite of that did not survive a loss of power.
	err = os.Rename(s.dir(id), t.path("stale"))
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	if err := os.Rename(t.path("snapshot"), s.dir(id)); err != nil {
		return err
	}
	if err := guard.Sync(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.good, id) // not that of what was there before
	s.unsafe = append(s.unsafe, id)
	return nil
}

// Discard forgets the snapshot. After Commit or Discard it does nothing.
func (a *Active) Discard() error {
	if a.temp == nil {
		return nil
	}
	t := a.temp
	a.temp = nil
	if err := a.store.unmount(t.path("merged")); err != nil {
		t.lock.Close() // not removed: it may still show other layers. The next Open will.
		return fmt.Errorf("discard snapshot: %w", err)
	}
	if err := t.remove(); err != nil {
		return fmt.Errorf("discard snapshot: %w", err)
	}
	return nil
}

// View shows a snapshot, read-only, until it is closed.
type View struct {
	store  *Store
	temp   *temp
	layers []string

	// Of a tree:
	table layer.Table
	id    ID
	made  string
}

// View mounts a snapshot read-only in the mount namespace of this process. Where that is a tree, nothing but the caller keeps
// it from being written to; one that was is not used again.
func (s *Store) View(ctx context.Context, id ID) (*View, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if s.copying {
		v, err := s.viewTree(ctx, id)
		if err != nil {
			return nil, fmt.Errorf("view snapshot: %w", err)
		}
		return v, nil
	}
	if id != "" {
		if _, err := s.use(id); err != nil {
			return nil, fmt.Errorf("view snapshot: %w", err)
		}
	}
	if err := s.shorten(ctx, id); err != nil {
		return nil, fmt.Errorf("view snapshot: %w", err)
	}
	lower, err := s.layers(id)
	if err != nil {
		return nil, fmt.Errorf("view snapshot: %w", err)
	}
	t, err := s.newTemp()
	if err != nil {
		return nil, fmt.Errorf("view snapshot: %w", err)
	}
	v := &View{store: s, temp: t, layers: lower}
	// The kernel wants two layers where there is no upper one, even to show nothing.
	if len(lower) == 0 {
		lower = append(lower, t.path("nothing"))
	}
	if err := v.mount(append(lower, s.path("empty"))); err != nil {
		v.Close()
		return nil, fmt.Errorf("view snapshot: %w", err)
	}
	return v, nil
}

func (v *View) mount(lower []string) error {
	for _, dir := range []string{v.Dir(), v.temp.path("nothing")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	return overlay{lower: lower, target: v.Dir()}.mount()
}

// Dir is the directory.
func (v *View) Dir() string { return filepath.Join(v.temp.dir, "merged") }

// Layers are the directories that Dir shows together, topmost first; none if it is a tree, which is a plain directory. They
// stay until the store is closed, and nothing in them may be changed.
func (v *View) Layers() []string { return v.layers }

// WriteLayer writes all that the view shows as one uncompressed layer on nothing.
func (v *View) WriteLayer(ctx context.Context, w io.Writer, o layer.DiffOptions) error {
	o.Single, o.Base = v.store.single, ""
	return layer.Diff(ctx, v.Dir(), w, o)
}

// Close ends the view. Closing it again does nothing.
func (v *View) Close() error {
	if v.temp.lock == nil {
		return nil
	}
	var err error
	if v.table != nil {
		err = v.closeTree()
	} else if err = unmount(v.Dir()); err == nil {
		err = v.temp.remove()
	} else {
		v.temp.lock.Close()
	}
	v.temp.lock = nil
	if err != nil {
		return fmt.Errorf("close view: %w", err)
	}
	return nil
}
