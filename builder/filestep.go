package builder

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/cooper-build/cooper/builder/files"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/snapshot"
)

// filesCause is the cause of a COPY, ADD or WORKDIR: what it does, what it stands on, and the content that it
// selects. So a COPY whose files did not change hits, whatever happened around it.
func (b *build) filesCause(ctx context.Context, f plan.Files, in inputs, list bool) (*cause, error) {
	base, err := b.identity(ctx, in.of(f.Base))
	if err != nil {
		return nil, err
	}
	c := &cause{kind: "files", op: plan.Encode(f)}
	c.input("base", in.of(f.Base), base)
	c.add(epochPart, asJSON(b.epoch()))
	for _, a := range f.Actions {
		if a, ok := a.(plan.Copy); ok {
			if err := b.selects(ctx, c, "", in.of(a.From), a, list); err != nil {
				return nil, err
			}
		}
	}
	return c, nil
}

// selects adds what a copy reads of a value to a cause. list also lists the files, if they are the user's own.
func (b *build) selects(ctx context.Context, c *cause, name string, from value, sel plan.Copy, list bool) error {
	var d digest.Digest
	var err error
	if list && from.tree != nil {
		var l files.Listing
		if d, l, err = files.DigestAndList(ctx, *from.tree, sel, b.hashes); err != nil {
			return err
		}
		if c.lists == nil {
			c.lists = map[digest.Digest]files.Listing{}
		}
		c.lists[d] = l
	} else if d, err = b.selection(ctx, from, sel); err != nil {
		return err
	}
	c.files(name, from, d)
	return nil
}

// confirm takes over what the cause is found to be when all is done, and returns the id of the result: not the one that
// was meant when the user's files changed meanwhile.
func (c *cause) confirm(again *cause, id snapshot.ID) snapshot.ID {
	if again.key() != c.key() {
		return unique(c.key())
	}
	c.lists = again.lists
	return id
}

// copyOf copies a path with everything beneath it to the root.
func copyOf(from plan.Ref, path string) plan.Copy {
	return plan.Copy{From: from, Src: path, Dst: "/", ContentsOnly: true, CreateDestPath: true}
}

// whole selects a path of the only input.
func whole(path string) plan.Copy { return copyOf(0, path) }

// bound selects what a bind mount of a path shows: also the owner and mode of the directory itself.
func bound(path string) plan.Copy {
	return plan.Copy{Src: path, Dst: "/bound", CreateDestPath: true, FollowSymlink: true}
}

// selection is the digest of what a copy reads. For a snapshot, which never changes, it is remembered.
func (b *build) selection(ctx context.Context, from value, c plan.Copy) (digest.Digest, error) {
	if from.tree != nil {
		return files.Digest(ctx, *from.tree, c, b.hashes)
	}
	selects := c
	selects.From = plan.Scratch
	key := newKey("selection").str(string(from.id)).bytes(plan.EncodeAction(selects)).sum()
	var d digest.Digest
	if ok, err := b.store.Fact(key, &d); err != nil || ok {
		return d, err
	}
	if b.CachedOnly {
		return "", ErrNotCached
	}
	view, err := b.store.View(ctx, from.id)
	if err != nil {
		return "", err
	}
	defer view.Close()
	d, list, err := files.DigestAndList(ctx, shownBy(view), c, nil)
	if err != nil {
		return "", err
	}
	if err := b.recordListing(d, list, from.id); err != nil {
		return "", err
	}
	return d, b.store.SetFact(key, d, snapshot.OfSnapshot(from.id))
}

// files applies file actions to a root and freezes the result. Unless everything is to be made anew, what an earlier run of
// the step has made of the same files is used. caused is false when the result is not that of c.
func (b *build) files(ctx context.Context, s plan.Step, op plan.Files, in inputs, c *cause, id snapshot.ID, ahead *filesAhead) (made snapshot.ID, caused bool, err error) {
	o := files.Options{Made: files.Sums{}, Hashes: b.hashes}
	record := b.copiedKey(op)
	var active *snapshot.Active
	if ahead != nil {
		active, o.Made, err = ahead.take()
	} else {
		if !s.NoCache {
			o.Earlier = b.earlier(record)
		}
		active, err = b.filesOver(ctx, op, in, o)
	}
	if err != nil {
		return "", false, err
	}
	defer active.Discard()
	// The context is read in place, so it may have changed since the key was made; then the result belongs to no
	// cause and must not be found again.
	again, err := b.filesCause(ctx, op, in, true)
	if err != nil {
		return "", false, err
	}
	named := c.confirm(again, id)
	if made, err = active.CommitOrFind(ctx, named, b.earlierResults(s, c, active), b.epoch()); err != nil {
		return "", false, err
	}
	if named == id && len(o.Made) > 0 {
		err = b.store.SetFact(record, copied{made, o.Made.Encode()}, snapshot.OfSnapshot(made))
	}
	return made, named == id, err
}

// filesAhead is a copy that is made while what it copies is still hashed, by a build that most likely finds no record of it.
type filesAhead struct {
	stop   context.CancelFunc
	active func() (*snapshot.Active, error)
	hashes *files.HashCache
	made   files.Sums
	later  files.Pending // what was copied before it was hashed
	taken  bool
}

// filesAhead begins to apply a step's actions, if it copies from the context and there was no build of this Dockerfile. It returns nil
// where that would not save time.
func (b *build) filesAhead(ctx context.Context, op plan.Files, in inputs) *filesAhead {
	fromContext := slices.ContainsFunc(op.Actions, func(a plan.Action) bool {
		c, ok := a.(plan.Copy)
		return ok && c.From != plan.Scratch && in.of(c.From).tree != nil
	})
	if b.CachedOnly || !b.fresh || !fromContext || in.of(op.Base).tree != nil {
		return nil
	}
	ctx, stop := context.WithCancel(ctx)
	a := &filesAhead{stop: stop, hashes: b.hashes, made: files.Sums{}, later: files.Pending{}}
	a.active = sync.OnceValues(func() (*snapshot.Active, error) {
		return b.filesOver(ctx, op, in, files.Options{Made: a.made, Hashes: b.hashes, Pending: a.later})
	})
	go a.active()
	return a
}

// take waits for the copy, which is the caller's then. What it copied has been hashed by now.
func (a *filesAhead) take() (*snapshot.Active, files.Sums, error) {
	a.taken = true
	active, err := a.active()
	a.later.Resolve(a.hashes, a.made)
	return active, a.made, err
}

// discard ends a copy that nobody took.
func (a *filesAhead) discard() {
	if a == nil {
		return
	}
	defer a.stop()
	if a.taken {
		return
	}
	a.stop()
	if active, err := a.active(); err == nil {
		active.Discard()
	}
}

// filesOver applies file actions to their root, which the caller ends.
func (b *build) filesOver(ctx context.Context, op plan.Files, in inputs, o files.Options) (*snapshot.Active, error) {
	base, err := b.snapshotOf(ctx, in.of(op.Base))
	if err != nil {
		return nil, err
	}
	active, err := b.store.Prepare(ctx, base)
	if err != nil {
		return nil, err
	}
	o.Upper = active.Upper()
	if err := b.apply(ctx, active.Dir(), op.Actions, in, o); err != nil {
		active.Discard()
		return nil, err
	}
	return active, nil
}

// copied is what a COPY has made last, and what its files contain.
type copied struct {
	ID   snapshot.ID
	Sums []byte
}

// copiedKey names what a step was before its files changed.
func (b *build) copiedKey(op plan.Files) snapshot.Key {
	dir, err := filepath.Abs(b.Plan.Context)
	if err != nil {
		dir = b.Plan.Context // as long as there is no working directory, a record too many is kept
	}
	return newKey("copied").str(dir).bytes(plan.Encode(op)).sum()
}

// earlier is what a step has made last. Without it everything is copied.
func (b *build) earlier(k snapshot.Key) files.Earlier {
	var last copied
	if ok, err := b.store.Fact(k, &last); err != nil || !ok {
		return files.Earlier{}
	}
	dir, err := b.store.ChangeSet(last.ID)
	if err != nil {
		return files.Earlier{}
	}
	return files.Earlier{Dir: dir, Sums: files.DecodeSums(last.Sums)}
}

func (b *build) apply(ctx context.Context, root string, actions []plan.Action, in inputs, o files.Options) error {
	views := map[snapshot.ID]*snapshot.View{}
	defer func() {
		for _, v := range views {
			v.Close()
		}
	}()
	tree := func(r plan.Ref) (files.Tree, error) {
		from := in.of(r)
		if from.tree != nil {
			return *from.tree, nil
		}
		v, ok := views[from.id]
		if !ok {
			var err error
			if v, err = b.store.View(ctx, from.id); err != nil {
				return files.Tree{}, err
			}
			views[from.id] = v
		}
		return shownBy(v), nil
	}
	o.Single, o.Epoch = b.single, b.epoch()
	return files.Apply(ctx, root, actions, tree, o)
}

// shownBy is a snapshot as a tree to copy from.
func shownBy(v *snapshot.View) files.Tree { return files.Tree{Dir: v.Dir(), Layers: v.Layers()} }

// identity names a value in a key: the id of a snapshot, the content of a directory.
func (b *build) identity(ctx context.Context, v value) (string, error) {
	if v.tree == nil {
		return string(v.id), nil
	}
	id, err := b.contextID(ctx, v)
	return string(id), err
}

func (b *build) contextID(ctx context.Context, v value) (snapshot.ID, error) {
	d, err := b.selection(ctx, v, whole("/"))
	return snapshot.ID(newKey("context").str(d.String()).sum()), err
}

// snapshotOf is the snapshot of a value. What the build may see of a context directory is frozen first: a RUN
// that binds it must see neither ignored files nor later changes.
func (b *build) snapshotOf(ctx context.Context, v value) (snapshot.ID, error) {
	if v.tree == nil {
		return v.id, nil
	}
	id, err := b.contextID(ctx, v)
	if err != nil || b.store.Has(id) {
		return id, err
	}
	if b.CachedOnly {
		return "", ErrNotCached
	}
	active, err := b.store.Prepare(ctx, "")
	if err != nil {
		return "", err
	}
	defer active.Discard()
	if err := b.apply(ctx, active.Dir(), []plan.Action{whole("/")}, inputs{[]value{v}}, files.Options{Upper: active.Upper()}); err != nil {
		return "", err
	}
	again, err := b.contextID(ctx, v)
	if err != nil {
		return "", err
	}
	if again != id { // it changed while it was copied: what was seen has no name
		id = unique(snapshot.Key(id))
	}
	return active.Commit(ctx, id)
}

// merge puts the change sets of its inputs on top of one another.
func (b *build) merge(ctx context.Context, op plan.Merge, in inputs) (value, bool, error) {
	id, err := b.snapshotOf(ctx, in.of(op.Inputs[0]))
	if err != nil {
		return value{}, false, err
	}
	var ran bool
	for _, r := range op.Inputs[1:] {
		chain, err := b.store.Chain(in.of(r).id)
		if err != nil {
			return value{}, false, err
		}
		for _, change := range chain {
			if id, ran, err = b.reroot(ctx, change, id, ran); err != nil {
				return value{}, false, err
			}
		}
	}
	return value{id: id}, ran, nil
}

// diff is what upper adds to lower, as a change set on nothing.
func (b *build) diff(ctx context.Context, op plan.Diff, in inputs) (value, bool, error) {
	lower, err := b.store.Chain(in.of(op.Lower).id)
	if err != nil {
		return value{}, false, err
	}
	upper, err := b.store.Chain(in.of(op.Upper).id)
	if err != nil {
		return value{}, false, err
	}
	var id snapshot.ID
	var ran bool
	for i, change := range upper {
		if i < len(lower) {
			if lower[i] != change {
				return value{}, false, fmt.Errorf("a difference between trees of which neither stands on the other is not supported")
			}
			continue
		}
		if id, ran, err = b.reroot(ctx, change, id, ran); err != nil {
			return value{}, false, err
		}
	}
	return value{id: id}, ran, nil
}

// reroot puts one snapshot's change set on another parent. ran becomes true when that was not done before.
func (b *build) reroot(ctx context.Context, change, parent snapshot.ID, ran bool) (snapshot.ID, bool, error) {
	id := snapshot.ID(newKey("reroot").str(string(change)).str(string(parent)).sum())
	if b.store.Has(id) {
		return id, ran, nil
	}
	if b.CachedOnly {
		return "", ran, ErrNotCached
	}
	created, err := b.created(change)
	if err != nil {
		return "", ran, err
	}
	if id, err = b.store.Reroot(ctx, change, parent, id); err != nil {
		return "", ran, err
	}
	return id, true, b.store.SetFact(createdKey(id), created, snapshot.OfSnapshot(id))
}
