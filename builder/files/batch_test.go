package files

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cooper-build/cooper/builder/plan"
)

// plantBatches makes a context of several batches, with links from one to another.
func plantBatches(t *testing.T) Tree {
	lines := []string{"f slow/a 644 " + strings.Repeat("x", 16<<20)} // the batch that takes longest is the first
	for i := range 2*batchSize + 7 {
		lines = append(lines, fmt.Sprintf("f many/f%d", i), fmt.Sprintf("f slow/f%d", i))
	}
	for i := range 20 {
		lines = append(lines, fmt.Sprintf("f d%d/a", i), fmt.Sprintf("f d%d/sub/b 640", i))
	}
	lines = append(lines, "d many/sub", "d d3/empty 700", "l many/link f1", "f first", "h many/second first", "h many/third many/f9", "h d5/sub/fourth many/f200", "p many/pipe")
	return Tree{Dir: plant(t, filepath.Join(t.TempDir(), "context"), lines...), Local: true}
}

func TestFilesThatAreCopiedInBatchesAreWhatTheyWere(t *testing.T) {
	tree := plantBatches(t)
	given := func(plan.Ref) (Tree, error) { return tree, nil }
	plain := filepath.Join(t.TempDir(), "plain")
	must(t, os.Mkdir(plain, 0o755))
	must(t, Apply(t.Context(), plain, []plan.Action{dockerfile("/", "/new")}, given, Options{Single: singleID()}))
	merged, made := copyAgain(t, tree.Dir, settledCache(), Earlier{})
	withoutRoot := func(all picture) picture { return all[1:] } // its time
	want := withoutRoot(take(t, tree.Dir, true))
	for _, copied := range []string{plain, merged} {
		if d := cmp.Diff(want, withoutRoot(take(t, filepath.Join(copied, "new"), true))); d != "" {
			t.Errorf("in batches the copy is another one (-source +copy):\n%s", d)
		}
	}
	if got, want := len(made.Sums), 2*(2*batchSize+7)+1-2+20*2; got != want {
		t.Errorf("of %d files it is known what they contain, not of %d", got, want)
	}
}

// ending is a context that ends after it was asked a number of times.
type ending struct {
	context.Context
	left *atomic.Int64
}

func (c ending) Err() error {
	if c.left.Add(-1) < 0 {
		return context.Canceled
	}
	return nil
}

func TestACopyThatEndsEarlyClosesWhatItOpened(t *testing.T) {
	tree := plantBatches(t)
	lower := plant(t, filepath.Join(t.TempDir(), "lower"))
	descriptors := func() int {
		open, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		return len(open)
	}
	for _, steps := range []int64{0, 1, 10, 50, batchSize + 50, 2*batchSize + 100, 3 * batchSize, 5 * batchSize, 7 * batchSize, 1 << 40} {
		dir := t.TempDir()
		merged := overlay(t, dir, lower)
		before := descriptors()
		ctx := ending{t.Context(), new(atomic.Int64)}
		ctx.left.Store(steps)
		o := Options{Single: singleID(), Upper: filepath.Join(dir, "upper"), Hashes: settledCache(), Made: Sums{}, Pending: Pending{}}
		err := Apply(ctx, merged, []plan.Action{dockerfile("/", "/new")}, func(plan.Ref) (Tree, error) { return tree, nil }, o)
		if whole := steps > 1<<20; whole != (err == nil) || err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("after %d steps: %v", steps, err)
		}
		if now := descriptors(); now != before {
			t.Errorf("after %d steps %d descriptors stay open", steps, now-before)
		}
	}
}

func TestTheErrorOfBatchesIsTheEarliest(t *testing.T) {
	first, second := errors.New("first"), errors.New("second")
	for _, tc := range []struct {
		name    string
		earlier func(b *batches, done chan struct{}) error
		later   func(b *batches, done chan struct{}) error
	}{
		{
			"the later one fails first",
			func(_ *batches, done chan struct{}) error { <-done; return first },
			func(_ *batches, done chan struct{}) error { close(done); return second },
		},
		{
			"the earlier one fails first",
			func(*batches, chan struct{}) error { return first },
			func(b *batches, _ chan struct{}) error {
				for b.failed() == nil {
					runtime.Gosched()
				}
				return second
			},
		},
	} {
		b, done := &batches{free: make(chan struct{}, 2)}, make(chan struct{})
		b.run(func() error { return nil })
		b.run(func() error { return tc.earlier(b, done) })
		b.run(func() error { return tc.later(b, done) })
		if err := b.wait(); err != first {
			t.Errorf("%s: %v is told: another one each time", tc.name, err)
		}
	}
}
