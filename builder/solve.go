package builder

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cooper-build/cooper/builder/files"
	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/sandbox"
	"github.com/cooper-build/cooper/snapshot"
)

// A value is what a step gives to its readers: a snapshot, or the build context.
type value struct {
	id    snapshot.ID   // the empty id is an empty root
	tree  *files.Tree   // set for a local source
	image *image.Source // set for a base image

	name  string // of the step, for people
	place place
}

type counters struct{ executed atomic.Int64 }

// eventSink hands events to the watcher one at a time.
type eventSink struct {
	mu    sync.Mutex
	watch func(Event)
}

func (s *eventSink) send(e Event) {
	if s.watch == nil {
		return
	}
	e.Time = time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watch(e)
}

// solve computes every step of the graph, each as soon as its inputs are there and a slot is free, and meanwhile writes
// the layers of those that had to run. The first error stops the rest and is the one returned.
func (b *build) solve(ctx context.Context, g *plan.Graph) ([]value, error) {
	values := make([]value, len(g.Steps))
	if !b.CachedOnly && slices.ContainsFunc(g.Steps, func(s plan.Step) bool { _, runs := s.Op.(plan.Exec); return runs }) {
		go sandbox.Warm()
	}
	slots := newSlots(b.Jobs)
	packing := b.newPacking(g, slots)
	order := newOrder(g)
	group, ctx := errgroup.WithContext(ctx)
	one := func(i plan.Ref) error {
		free, err := slots.step(ctx)
		if err != nil {
			return err
		}
		defer free()
		v, ran, err := b.step(ctx, g.Steps[i], inputs{values})
		if err != nil {
			return err
		}
		values[i] = v
		if ran { // else its layer is there, or assemble writes it
			group.Go(func() error {
				packing.pack(ctx, i, g.Steps[i], v)
				return nil
			})
		}
		return nil
	}
	var from func(ready []plan.Ref) error
	from = func(ready []plan.Ref) error {
		for len(ready) > 0 && ctx.Err() == nil {
			for _, i := range ready[1:] {
				group.Go(func() error { return from([]plan.Ref{i}) })
			}
			// One goes on where it is: to wake another goroutine for each step takes longer than to look one up.
			if err := one(ready[0]); err != nil {
				return err
			}
			ready = order.done(ready[0])
		}
		return context.Cause(ctx)
	}
	group.Go(func() error { return from(order.first()) })
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return values, order.complete()
}

// An order tells which steps have all their inputs.
type order struct {
	mu      sync.Mutex
	missing []int // how many inputs of each step are not there
	readers [][]plan.Ref
	left    int
}

func newOrder(g *plan.Graph) *order {
	o := &order{missing: make([]int, len(g.Steps)), readers: make([][]plan.Ref, len(g.Steps)), left: len(g.Steps)}
	for i, s := range g.Steps {
		in := plan.Inputs(s.Op)
		o.missing[i] = len(in)
		for _, r := range in {
			o.readers[r] = append(o.readers[r], plan.Ref(i))
		}
	}
	return o
}

// first are the steps without inputs.
func (o *order) first() []plan.Ref {
	var ready []plan.Ref
	for i, n := range o.missing {
		if n == 0 {
			ready = append(ready, plan.Ref(i))
		}
	}
	return ready
}

// done notes that a step has its value, and returns those that were missing this one only.
func (o *order) done(i plan.Ref) []plan.Ref {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.left--
	var ready []plan.Ref
	for _, r := range o.readers[i] {
		if o.missing[r]--; o.missing[r] == 0 {
			ready = append(ready, r)
		}
	}
	return ready
}

// complete makes sure that no step was left out.
func (o *order) complete() error {
	if o.left > 0 {
		return fmt.Errorf("%d steps of the plan wait for one another", o.left)
	}
	return nil
}

// inputs are the values of the steps that are done.
type inputs struct{ values []value }

func (in inputs) of(r plan.Ref) value {
	if r == plan.Scratch {
		return value{}
	}
	return in.values[r]
}

// step computes one step, if it has to run, and tells the watcher, unless it was told before: a source that had to be read for
// planning is a step of the plan as well.
func (b *build) step(ctx context.Context, s plan.Step, in inputs) (v value, ran bool, err error) {
	_, told := b.told.LoadOrStore(s.ID, true)
	w := &watch{b: b, step: s.ID, name: s.Name, silent: told}
	if op, ok := s.Op.(plan.Local); ok { // nothing happens, and nothing is shown: its readers read it in place
		tree := &files.Tree{Dir: op.Dir, Include: op.Include, Exclude: op.Exclude, Follow: op.Follow, Local: true}
		return value{tree: tree, name: op.Name, place: placeOf(s)}, false, nil
	}
	w.send(Event{Kind: Started})
	v, ran, err = b.compute(ctx, s, in, w)
	switch {
	case errors.Is(err, ErrNotCached):
		return value{}, false, err
	case err != nil:
		err = located(s, err)
		w.send(Event{Kind: Failed, Err: err})
		return value{}, false, err
	case ran:
		w.send(Event{Kind: Done})
	default:
		w.send(Event{Kind: Cached})
	}
	v.name, v.place = s.Name, placeOf(s)
	return v, ran, nil
}

// located says which step failed and where the Dockerfile has it.
func located(s plan.Step, err error) error {
	var where *plan.Error
	if errors.As(err, &where) || errors.Is(err, context.Canceled) {
		return err
	}
	return &plan.Error{Where: s.Where, Err: fmt.Errorf("%s: %w", s.Name, err)}
}

// compute returns a step's value and whether it had to run.
func (b *build) compute(ctx context.Context, s plan.Step, in inputs, w *watch) (value, bool, error) {
	switch op := s.Op.(type) {
	case plan.Image:
		return b.pull(ctx, s, op)
	case plan.Git:
		return b.pullGit(ctx, s, op)
	case plan.HTTP:
		return b.pullHTTP(ctx, s, op)
	case plan.Upload:
		return b.receive(ctx, s, op)
	case plan.Exec:
		c, err := b.execCause(ctx, op, in, b.Explain)
		if err != nil {
			return value{}, false, err
		}
		again := func(ctx context.Context, w *watch) (*snapshot.Active, error) {
			return b.execOver(ctx, op, in, w, (*mounter).emptyCaches)
		}
		return b.cached(ctx, s, c, again, func(id snapshot.ID) (snapshot.ID, bool, error) { return b.exec(ctx, s, op, in, c, id, w) })
	case plan.Files:
		ahead := b.filesAhead(ctx, op, in)
		defer ahead.discard()
		c, err := b.filesCause(ctx, op, in, b.Explain)
		if err != nil {
			return value{}, false, err
		}
		again := func(ctx context.Context, _ *watch) (*snapshot.Active, error) {
			return b.filesOver(ctx, op, in, files.Options{})
		}
		return b.cached(ctx, s, c, again, func(id snapshot.ID) (snapshot.ID, bool, error) { return b.files(ctx, s, op, in, c, id, ahead) })
	case plan.Merge:
		v, ran, err := b.merge(ctx, op, in)
		return v, ran, b.explainJoin(s, in, ran, err)
	case plan.Diff:
		v, ran, err := b.diff(ctx, op, in)
		return v, ran, b.explainJoin(s, in, ran, err)
	}
	return value{}, false, fmt.Errorf("no way to run a %T", s.Op)
}

// cached answers a step from the store, or runs it and remembers the result under its cause. run is given the id
// that a new result gets, and tells which one it is and whether it is that of the cause. again does the same work for a
// comparison.
func (b *build) cached(ctx context.Context, s plan.Step, c *cause, again rerun, run func(snapshot.ID) (id snapshot.ID, caused bool, err error)) (value, bool, error) {
	key := c.key()
	want := snapshot.ID(key)
	if s.NoCache {
		want = unique(key)
	} else {
		found, ok, err := b.store.Lookup(key)
		if err == nil && ok {
			ok, err = b.searched(s, found)
		}
		if err != nil {
			return value{}, false, err
		}
		if ok {
			b.explainHit(s)
			b.verifyLater(s, found, again)
			return value{id: found}, false, nil
		}
		if readsSecrets(s.Op) && b.store.Has(want) {
			// Its layer was made with values that nobody knows now, and what was found in it is lost.
			want = unique(key)
		}
	}
	if b.CachedOnly {
		return value{}, false, ErrNotCached
	}
	b.executed.Add(1)
	if err := b.explainMiss(ctx, s, c); err != nil {
		return value{}, false, err
	}
	id, caused, err := run(want)
	if err != nil {
		return value{}, false, err
	}
	if _, err := b.created(id); err != nil {
		return value{}, false, err
	}
	if caused {
		if err := b.store.Remember(key, id); err != nil {
			return value{}, false, err
		}
		if err := b.recordCause(s, c, id); err != nil {
			return value{}, false, err
		}
	}
	return value{id: id}, true, nil
}

// unique is an id for a result that the key alone does not determine. Ids never change what they mean.
func unique(key snapshot.Key) snapshot.ID {
	return snapshot.ID(newKey("unique").str(string(key)).str(rand.Text()).sum())
}

// created is when a snapshot of ours was made, or first asked about: the time that its history entry carries.
func (b *build) created(id snapshot.ID) (time.Time, error) {
	var t time.Time
	ok, err := b.store.Fact(createdKey(id), &t)
	if err != nil || ok {
		return t, err
	}
	t = time.Now().UTC()
	return t, b.store.SetFact(createdKey(id), t, snapshot.OfSnapshot(id))
}

// watch reports the events of one step.
type watch struct {
	b          *build
	step, name string
	silent     bool
}

func (w *watch) send(e Event) {
	if w.silent {
		return
	}
	e.Step, e.Name = w.step, w.name
	w.b.events.send(e)
}

func (b *build) warn(ws []plan.Warning) {
	for _, w := range ws {
		out := Warning{Rule: w.Rule, Message: w.Message, URL: w.URL, File: w.Where.File}
		if len(w.Where.Lines) > 0 {
			out.Line = w.Where.Lines[0].Start
		}
		b.events.send(Event{Kind: Warned, Warning: &out})
	}
}

// phase runs one stage of the build that no Dockerfile line stands for, and shows it like a step.
func (b *build) phase(ctx context.Context, name string, do func(context.Context) error) error {
	w := &watch{b: b, step: name, name: name}
	w.send(Event{Kind: Started})
	if err := do(ctx); err != nil {
		if !errors.Is(err, ErrNotCached) {
			w.send(Event{Kind: Failed, Err: err})
		}
		return err
	}
	w.send(Event{Kind: Done})
	return nil
}
