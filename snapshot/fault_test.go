package snapshot

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/snapshot/layer"
)

// records are the files of a store that have checksums.
func records(t *testing.T, s *Store) []string {
	t.Helper()
	var found []string
	must(t, filepath.WalkDir(s.root, func(name string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() && (e.Name() == "fs" || e.Name() == "tmp" || e.Name() == "merged") {
			return fs.SkipDir
		}
		if err == nil && e.Type().IsRegular() && e.Name() != "format" && e.Name() != "lock" {
			found = append(found, name)
		}
		return err
	}))
	return found
}

// TestAFlippedBitInAnyRecordIsFound flips one bit of every byte of every record in turn. What was written is found, or
// nothing; never something else.
func TestAFlippedBitInAnyRecordIsFound(t *testing.T) {
	s := newStore(t)
	must(t, everything(t.Context(), s))
	must(t, s.SetDigest("step", "w", nil, "sha256:x"))
	must(t, s.Close())
	must(t, s.Measured(1))
	files := records(t, s)
	if len(files) < 9 {
		t.Fatalf("only %q", files)
	}
	for _, file := range files {
		whole, err := os.ReadFile(file)
		must(t, err)
		for i := range whole {
			broken := append([]byte(nil), whole...)
			broken[i] ^= 1 << (i % 8)
			must(t, os.WriteFile(file, broken, 0o600))
			again := s.of(s.idMap)
			if again.Has("step") && strings.HasSuffix(file, "/step/meta") {
				t.Fatalf("byte %d of %s: a meta with a flipped bit is believed", i, file)
			}
			id, ok, err := again.Lookup(keyOf("step"))
			if err != nil || ok && id != "step" {
				t.Fatalf("byte %d of %s: the key leads to %q (%v): a build would use another's result", i, file, id, err)
			}
			var v string
			if ok, err := again.Fact(keyOf("fact"), &v); err != nil || ok && v != "value" {
				t.Fatalf("byte %d of %s: the fact says %q (%v)", i, file, v, err)
			}
			must(t, again.Close())
		}
		found, err := openStore(t, s.root).Verify(t.Context(), Proof{}, false)
		must(t, err)
		if len(found) == 0 {
			t.Errorf("verify finds nothing in %s", file)
		}
		must(t, os.WriteFile(file, whole, 0o600))
	}
	wantNoDamage(t, openStore(t, s.root))
	wantEverything(t, openStore(t, s.root))
}

func TestVerifyRepairsWhatTheNextBuildMakesAgain(t *testing.T) {
	for _, file := range []string{"meta", "fs/etc/new1", "fs"} {
		t.Run(file, func(t *testing.T) {
			s := newStore(t)
			must(t, everything(t.Context(), s))
			must(t, s.Close())
			path := filepath.Join(s.dir("step"), file)
			if file == "fs" {
				must(t, layer.RemoveAll(path))
			} else {
				must(t, os.WriteFile(path, []byte("shorter"), 0o600))
			}
			again := openStore(t, s.root)
			found, err := again.Verify(t.Context(), Proof{}, true)
			must(t, err)
			repaired := map[string]bool{}
			for _, d := range found {
				if d.Repair == "" {
					t.Errorf("%s: %s: not repaired", d.Where, d.What)
				}
				repaired[filepath.Base(d.Where)] = true
			}
			// "rerooted" shows the change set of "step", "squashed" stands on the base alone.
			if !repaired["step"] || !repaired["rerooted"] || repaired["squashed"] {
				t.Errorf("repaired: %v", found)
			}
			kept, err := os.ReadDir(s.path("quarantine"))
			must(t, err)
			if len(kept) != 3 { // and "next", which stands on "step"
				t.Errorf("quarantine has %v: data was deleted without being asked for", kept)
			}
			wantNoDamage(t, openStore(t, s.root))
			wantEverything(t, openStore(t, s.root))
		})
	}
}

func TestVerifyComparesWithWhatWasExported(t *testing.T) {
	s := newStore(t)
	must(t, everything(t.Context(), s))
	epoch := time.Unix(1000, 0)
	var exported bytes.Buffer
	must(t, s.WriteLayer(t.Context(), "step", &exported, layer.DiffOptions{Epoch: &epoch}))
	must(t, s.SetDigest("step", "w", &epoch, digest.FromBytes(exported.Bytes())))
	if found, err := openStore(t, s.root).Verify(t.Context(), Proof{Writer: "w"}, false); err != nil || len(found) != 0 {
		t.Errorf("nothing happened, and verify finds %v %v", found, err)
	}
	// A bit that flipped on the disk changes neither size nor times.
	file := filepath.Join(s.dir("step"), "fs/etc/new0")
	data, err := os.ReadFile(file)
	must(t, err)
	data[7] ^= 1
	must(t, os.WriteFile(file, data, 0o644))
	found, err := openStore(t, s.root).Verify(t.Context(), Proof{Writer: "w"}, false)
	must(t, err)
	if len(found) != 3 || !strings.Contains(found[0].What, "its layer is") {
		t.Errorf("found %v: the next image would have other files than the last", found)
	}
	if found, err := openStore(t, s.root).Verify(t.Context(), Proof{Writer: "another"}, false); err != nil || len(found) != 0 {
		t.Errorf("digests of another writer were compared: %v %v", found, err)
	}
}

// TestALossOfPower loses what was not synced: the files of snapshots whose build had not ended, keys and facts.
func TestALossOfPower(t *testing.T) {
	for _, lose := range []string{"empty", "half", "gone"} {
		t.Run(lose, func(t *testing.T) {
			s := newStore(t)
			must(t, importOnce(t.Context(), s)) // and ended: it must survive
			must(t, s.Close())
			must(t, makeAll(t.Context(), s)) // and did not
			must(t, s.lease.Close())
			must(t, filepath.WalkDir(s.root, func(name string, e fs.DirEntry, err error) error {
				if err != nil || !e.Type().IsRegular() || strings.Contains(name, string(imported())) {
					return err
				}
				inStep := strings.Contains(name, "/fs/") && strings.HasPrefix(name, s.snapshots)
				if !inStep && !strings.HasPrefix(name, s.keys) && !strings.HasPrefix(name, s.facts) {
					return nil
				}
				switch lose {
				case "empty":
					return os.Truncate(name, 0)
				case "half":
					return os.Truncate(name, 20)
				}
				return os.Remove(name)
			}))
			later := openStore(t, s.root)
			later.boot = "the next boot"
			if !later.Has(imported()) {
				t.Error("what a build that ended had is gone")
			}
			if later.Has("step") {
				t.Error("a snapshot whose files are lost is used: the image would lack them")
			}
			must(t, later.Close())
			wantEverything(t, later)
			if found, err := later.Verify(t.Context(), Proof{}, true); err != nil {
				t.Errorf("verify: %v %v", found, err)
			}
			wantNoDamage(t, later)
		})
	}
}

// TestAFullDisk makes everything on file systems of many sizes. It works, or says what is missing and works once there is room.
func TestAFullDisk(t *testing.T) {
	at := t.TempDir()
	size := func(option string, remount uintptr) {
		t.Helper()
		must(t, unix.Mount("tmpfs", at, "tmpfs", remount, option))
	}
	var failed, worked int
	for _, unit := range []struct {
		option      string
		least, most int
		step        int
	}{{"size=%dk", 40, 360, 24}, {"nr_inodes=%d", 20, 140, 9}} {
		for n := unit.least; n <= unit.most; n += unit.step {
			size(fmt.Sprintf(unit.option, n), 0)
			dir := filepath.Join(at, "store")
			s, err := Open(dir, Options{IDMap: "m", Single: false})
			if err == nil {
				err = everything(t.Context(), s)
			}
			switch {
			case err == nil:
				worked++
			case errors.Is(err, unix.ENOSPC):
				failed++
			default:
				t.Errorf("%d: %v: it does not say that the disk is full", n, err)
			}
			if s != nil {
				if err := pruneAll(s, func(e Entry) bool { return e.Kind == KindCache }); err != nil {
					t.Errorf("%d: prune on a full disk: %v", n, err)
				}
			}
			size("size=64m,nr_inodes=10000", unix.MS_REMOUNT)
			again, err := Open(dir, Options{IDMap: "m", Single: false})
			must(t, err)
			wantEmptyTemp(t, again)
			wantNoDamage(t, again)
			wantEverything(t, again)
			must(t, unix.Unmount(at, unix.MNT_DETACH))
			if t.Failed() {
				t.Fatalf("with "+unit.option, n)
			}
		}
	}
	if failed < 5 || worked < 2 {
		t.Errorf("%d sizes were too small and %d large enough: this tests nothing", failed, worked)
	}
}

func TestAReadOnlyStoreIsRead(t *testing.T) {
	s := newStore(t)
	must(t, everything(t.Context(), s))
	must(t, unix.Mount(s.root, s.root, "", unix.MS_BIND, ""))
	defer unix.Unmount(s.root, unix.MNT_DETACH)
	must(t, unix.Mount("", s.root, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
	again, err := Open(s.root, Options{IDMap: s.idMap, Single: s.single})
	must(t, err)
	if id, ok, err := again.Lookup(keyOf("step")); id != "step" || !ok || err != nil {
		t.Errorf("lookup = %v %v %v", id, ok, err)
	}
	if err := again.SetFact(keyOf("fact"), 1); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing: %v", err)
	}
	must(t, again.Close())
}

// TestWrongClocks lets everything have happened in 1970 or 2106.
func TestWrongClocks(t *testing.T) {
	for _, at := range []time.Time{time.Unix(0, 0), time.Date(2106, 2, 7, 6, 28, 16, 0, time.UTC)} {
		s := newStore(t)
		must(t, everything(t.Context(), s))
		for _, file := range records(t, s) {
			must(t, os.Chtimes(file, at, at))
		}
		wantNoDamage(t, openStore(t, s.root))
		wantEverything(t, openStore(t, s.root))
		entries, err := s.List()
		must(t, err)
		for _, e := range entries {
			if e.Name == "step" && time.Since(e.Used).Abs() > time.Hour {
				t.Errorf("used at %v, although just now: prune would take it for the oldest, or for ever young", e.Used)
			}
		}
		must(t, s.writeRecord(s.path("usage"), "usage", usage{1, at}))
		if _, ok := s.Estimate(); ok {
			t.Errorf("an estimate of %v is believed", at)
		}
	}
}

// TestAMadeAgainParentTakesItsChildrenWithIt covers a result that is not the same when its step runs again.
func TestAMadeAgainParentTakesItsChildrenWithIt(t *testing.T) {
	s := newStore(t)
	write := func(content string) func(string) {
		return func(dir string) { must(t, os.WriteFile(filepath.Join(dir, "f"), []byte(content), 0o644)) }
	}
	change(t, s, "", "parent", write("1"))
	change(t, s, "parent", "child", func(string) {})
	must(t, s.SetFact(keyOf("about"), "1", OfSnapshot("parent")))
	must(t, s.Close())
	must(t, os.WriteFile(filepath.Join(s.dir("parent"), "meta"), nil, 0o600))
	again := openStore(t, s.root)
	change(t, again, "", "parent", write("2"))
	if again.Has("child") {
		t.Error("what stood on the first result passes for standing on the second")
	}
	var v string
	if ok, err := again.Fact(keyOf("about"), &v); ok || err != nil {
		t.Errorf("a fact about the first result is told of the second: %v %v", v, err)
	}
}

// TestWhatIsUsedStays prunes all the time while a process uses what it has found.
func TestWhatIsUsedStays(t *testing.T) {
	s := newStore(t)
	must(t, everything(t.Context(), s))
	must(t, s.Close())
	user := openStore(t, s.root)
	if !user.Has("rerooted") {
		t.Fatal("it is not there")
	}
	dir, unlock, err := user.CacheDir(t.Context(), "some cache", Shared)
	must(t, err)
	must(t, pruneAll(openStore(t, s.root), func(Entry) bool { return true }))
	if got := view(t, user, "rerooted"); len(got) != 6 {
		t.Errorf("prune removed what is in use: %q", got)
	}
	wantTree(t, list(t, dir), "cached=1")
	if exists(s.dir("squashed")) {
		t.Error("prune left what nobody uses")
	}
	unlock()
	must(t, user.Close())
	must(t, pruneAll(openStore(t, s.root), func(Entry) bool { return true }))
	entries, err := s.List()
	must(t, err)
	if len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
	wantEmptyTemp(t, s)
	wantEverything(t, openStore(t, s.root))
}

// TestBuildsPrunesAndKillsTogether runs processes that make everything, over and over, beside others that remove everything, and
// kills one of them every now and then.
func TestBuildsPrunesAndKillsTogether(t *testing.T) {
	s := newStore(t)
	start := func(what string) *exec.Cmd {
		cmd := startChild(t, s, what)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		if _, err := out.Read(make([]byte, 16)); err != nil {
			t.Fatalf("%s ended early: %v", what, err)
		}
		return cmd
	}
	for round := range 12 {
		victims := []*exec.Cmd{start("prune forever"), start("everything forever"), start("everything forever")}
		for i := range 4 {
			again := openStore(t, s.root)
			wantEverything(t, again)
			if i == 2 {
				must(t, victims[round%3].Process.Kill())
			}
		}
		for i, cmd := range victims {
			cmd.Process.Kill()
			err := cmd.Wait()
			if status := cmd.ProcessState.Sys().(interface{ Signaled() bool }); !status.Signaled() {
				t.Errorf("round %d: process %d ended by itself: %v", round, i, err)
			}
		}
		again := openStore(t, s.root)
		wantEmptyTemp(t, again)
		wantNoDamage(t, again)
	}
}
