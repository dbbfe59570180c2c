package snapshot

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/killpoint"
	"github.com/cooper-build/cooper/snapshot/layer"
)

func disturbed(t *testing.T, s *Store, what string, fault killpoint.Fault) killpoint.Result {
	t.Helper()
	r, err := killpoint.Run(killpoint.Program{Path: "/proc/self/exe", Env: childEnviron(s, what), Dir: s.root, Mounts: true}, fault)
	must(t, err)
	if !r.Hit && r.Exit != 0 {
		t.Fatalf("nothing happened to it, and it ended with %d: %s", r.Exit, r.Output)
	}
	return r
}

// TestKilledAtEveryCall kills a process at each call by which it changes the store. Whatever call it was: the next process
// removes what it left, finds nothing damaged, and gets the same results.
func TestKilledAtEveryCall(t *testing.T) {
	for _, what := range []string{"everything", "prune"} {
		t.Run(what, func(t *testing.T) { eachCall(t, what, 0) })
	}
}

// TestEveryCallFails lets each of the calls fail in turn: the process says so and leaves a store that works, or it succeeds
// and has done what it says.
func TestEveryCallFails(t *testing.T) {
	for _, errno := range []syscall.Errno{unix.EIO, unix.ENOSPC} {
		for _, what := range []string{"everything", "prune"} {
			t.Run(fmt.Sprintf("%s %s", what, unix.ErrnoName(errno)), func(t *testing.T) { eachCall(t, what, errno) })
		}
	}
}

func eachCall(t *testing.T, what string, errno syscall.Errno) {
	begin := func() *Store {
		s := newStore(t)
		if what == "prune" {
			must(t, everything(t.Context(), s))
		}
		return s
	}
	calls := disturbed(t, begin(), what, killpoint.Fault{}).Calls
	if len(calls) < 10 {
		t.Fatalf("only %d calls were seen: %v", len(calls), calls)
	}
	// Some of them each time; every one has its turn.
	step := 2
	if errno != 0 {
		step = 7
	}
	for at := 1 + rand.N(step); at <= len(calls); at += step {
		s := begin()
		r := disturbed(t, s, what, killpoint.Fault{At: at, Errno: errno})
		if errno == 0 && r.Hit && r.Exit != -1 {
			t.Fatalf("call %d: exit code %d, it was to be killed", at, r.Exit)
		}
		again := openStore(t, s.root)
		wantEmptyTemp(t, again)
		wantNoDamage(t, again)
		wantEverything(t, again)
		wantNoDamage(t, again)
		if t.Failed() {
			t.Fatalf("at call %d of %d: %v\n%s", at, len(calls), r.Calls[max(0, len(r.Calls)-3):], r.Output)
		}
		must(t, layer.RemoveAll(s.root))
	}
}

// TestAKilledFirstStartLeavesWhatTheNextAccepts kills the process that makes a store, at each call by which it does: the
// directory must not pass for one of something else after that.
func TestAKilledFirstStartLeavesWhatTheNextAccepts(t *testing.T) {
	fresh := func() *Store { return &Store{root: filepath.Join(t.TempDir(), "store")} }
	calls := disturbed(t, fresh(), "open", killpoint.Fault{}).Calls
	if len(calls) < 10 {
		t.Fatalf("only %d calls were seen: %v", len(calls), calls)
	}
	for at := 1; at <= len(calls); at++ {
		s := fresh()
		r := disturbed(t, s, "open", killpoint.Fault{At: at})
		if _, err := Open(s.root, testOptions(false)); err != nil {
			t.Fatalf("killed at call %d of %d, %v, it leaves %v: %v", at, len(calls), r.Calls[max(0, len(r.Calls)-1):], list(t, s.root), err)
		}
	}
}

// TestASyncedFileGetsItsName checks the order that a loss of power respects: what a rename makes part of the store was synced
// before, unless docs/store.md says that it may be lost, and the directory is synced after it.
func TestASyncedFileGetsItsName(t *testing.T) {
	s := newStore(t)
	calls := disturbed(t, s, "everything", killpoint.Fault{}).Calls
	metas, installed := 0, 0
	var synced bool
	for i, c := range calls {
		in := func(dir string) bool { return strings.HasPrefix(c.Path, filepath.Join(s.root, dir)+"/") }
		switch {
		case c.Name == "fsync" && strings.HasSuffix(c.Path, "/snapshot/meta"):
			synced = true
			metas++
		case c.Name == "rename" && in("snapshots") && !strings.HasSuffix(c.Path, "/meta") && !strings.HasSuffix(c.Path, "/digest"):
			if !synced {
				t.Errorf("call %d: a snapshot got its name before its meta was synced: after a loss of power it would pass for whole", i)
			}
			synced = false
			installed++
			if next := calls[i+1]; next.Name != "fsync" || next.Path != s.snapshots {
				t.Errorf("call %d: the directory is not synced after the rename, but %v", i, next)
			}
		}
	}
	if metas != 5 || installed != 5 {
		t.Errorf("%d metas were synced and %d snapshots installed, want 5: %v", metas, installed, calls)
	}
}
