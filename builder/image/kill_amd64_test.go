package image

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/killpoint"
)

// TestDisturbedAtEveryCall kills a process at each call by which it changes the layout, or lets that call fail.
func TestDisturbedAtEveryCall(t *testing.T) {
	run := func(dir string, fault killpoint.Fault) killpoint.Result {
		t.Helper()
		env := append(os.Environ(), "COOPER_TEST_CHILD=everything")
		r, err := killpoint.Run(killpoint.Program{Path: "/proc/self/exe", Args: []string{dir}, Env: env, Dir: dir}, fault)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	undisturbed := run(filepath.Join(t.TempDir(), "layout"), killpoint.Fault{})
	if undisturbed.Exit != 0 || len(undisturbed.Calls) < 50 {
		t.Fatalf("%d calls, exit code %d: %s", len(undisturbed.Calls), undisturbed.Exit, undisturbed.Output)
	}
	for _, errno := range []syscall.Errno{0, unix.EIO, unix.ENOSPC} {
		step := 2 // some of them each time; every one has its turn
		if errno != 0 {
			step = 7
		}
		for at := 1 + rand.N(step); at <= len(undisturbed.Calls); at += step {
			dir := filepath.Join(t.TempDir(), "layout")
			r := run(dir, killpoint.Fault{At: at, Errno: errno})
			if _, err := os.Stat(filepath.Join(dir, blobsDir)); err == nil {
				l, err := CreateLayout(dir)
				if err != nil {
					t.Fatal(err)
				}
				if found, err := l.Verify(t.Context(), false); err != nil || len(found) != 0 {
					t.Errorf("verify: %v %v", found, err)
				}
				l.Close()
			}
			if err := storeEverything(dir); err != nil {
				t.Errorf("the next build fails: %v", err)
			}
			checkLayout(t, dir)
			noTemps(t, dir)
			if t.Failed() {
				t.Fatalf("%v at call %d of %d: %v\n%s", errno, at, len(undisturbed.Calls), r.Calls[max(0, len(r.Calls)-3):], r.Output)
			}
		}
	}
}

// TestABlobIsSyncedBeforeItHasItsName checks the order that a loss of power respects.
func TestABlobIsSyncedBeforeItHasItsName(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "layout")
	env := append(os.Environ(), "COOPER_TEST_CHILD=everything")
	r, err := killpoint.Run(killpoint.Program{Path: "/proc/self/exe", Args: []string{dir}, Env: env, Dir: dir}, killpoint.Fault{})
	if err != nil {
		t.Fatal(err)
	}
	names, unsynced := 0, false // blobs whose directory was not synced since
	for i, c := range r.Calls {
		if c.Name == "fsync" && strings.HasSuffix(c.Path, blobsDir) {
			unsynced = false
		}
		if c.Name != "rename" || strings.HasPrefix(c.Path, tempPrefix) { // which takes one away
			continue
		}
		before, after := r.Calls[i-1], r.Calls[i+1]
		if before.Name == "write" && after.Name != "fsync" {
			continue // a mark of a verified blob, which may be lost
		}
		names++
		blob := len(c.Path) == 64 // its digest
		if before.Name != "fsync" || !blob && after.Name != "fsync" {
			t.Errorf("call %d, rename to %s, stands between %v and %v: after a loss of power the name may lead to nothing", i, c.Path, before, after)
		}
		if !blob && unsynced {
			t.Errorf("call %d, rename to %s: after a loss of power it may lead to blobs whose names are lost", i, c.Path)
		}
		unsynced = unsynced || blob
	}
	if names < 8 {
		t.Errorf("only %d renames were seen: %v", names, r.Calls)
	}
}
