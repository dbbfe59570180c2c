package snapshot

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// Tests with several processes start this test binary again as a child, inside the same namespace.
const childEnv = "COOPER_STORE_TEST_CHILD"

func startChild(t *testing.T, s *Store, what string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = childEnviron(s, what)
	cmd.Stderr = os.Stderr
	// As for a build: its mounts die with it, and no one else sees them.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	return cmd
}

func childEnviron(s *Store, what string) []string {
	env := append(os.Environ(), childEnv+"="+what, childEnv+"_ROOT="+s.root)
	if s.copying {
		env = append(env, childEnv+"_COPYING=1")
	}
	return env
}

func child() int {
	err := runChild(os.Getenv(childEnv), os.Getenv(childEnv+"_ROOT"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		return 1
	}
	return 0
}

func runChild(what, root string) error {
	s, err := Open(root, testOptions(os.Getenv(childEnv+"_COPYING") != ""))
	if err != nil {
		return err
	}
	switch what {
	case "open":
		return nil
	case "everything":
		return everything(context.Background(), s)
	case "everything forever":
		fmt.Println("waiting")
		for {
			if err := everything(context.Background(), s); err != nil {
				return err
			}
		}
	case "next":
		return commitNext(context.Background(), s, "first")
	case "prune":
		return pruneAll(s, func(Entry) bool { return true })
	case "prune forever":
		fmt.Println("waiting")
		for {
			// Facts go with what they are about.
			if err := pruneAll(s, func(e Entry) bool { return e.Kind != KindFact || !e.Usable }); err != nil {
				return err
			}
		}
	case "commit":
		for i := range 20 {
			if err := commitOnce(s, ID(fmt.Sprintf("id%d", i))); err != nil {
				return err
			}
		}
		return nil
	case "import forever":
		r, w := io.Pipe()
		go func() {
			w.Write(bigLayer()[:200<<10]) // and no more: we are killed while we wait for it
			fmt.Println("waiting")
			select {}
		}()
		_, err := importLayer(context.Background(), s, "", digest.FromString("x"), r)
		return err
	case "work forever":
		for i := 0; ; i++ {
			if err := commitOnce(s, ID(fmt.Sprintf("loop%d", i))); err != nil {
				return err
			}
			if i == 2 {
				fmt.Println("waiting")
			}
		}
	}
	return fmt.Errorf("unknown child %q", what)
}

func commitOnce(s *Store, id ID) error {
	a, err := s.Prepare(context.Background(), "")
	if err != nil {
		return err
	}
	defer a.Discard()
	for i := range 10 {
		if err := os.WriteFile(filepath.Join(a.Dir(), fmt.Sprint("f", i)), []byte(id), 0o644); err != nil {
			return err
		}
	}
	if _, err = a.Commit(context.Background(), id); err != nil {
		return err
	}
	if err := s.SetFact(Key("fact-"+string(id)), id); err != nil {
		return err
	}
	return s.Remember(Key("key-"+string(id)), id)
}

func bigLayer() []byte {
	entries := []string{"d d"}
	for i := range 200 {
		entries = append(entries, fmt.Sprintf("f d/%d=%s", i, strings.Repeat("x", 5000)))
	}
	return makeTar(entries...)
}

func TestManyProcessesAndGoroutinesCommitTheSameIDs(t *testing.T) {
	s := newStore(t)
	var children []*exec.Cmd
	for range 2 {
		cmd := startChild(t, s, "commit")
		must(t, cmd.Start())
		children = append(children, cmd)
	}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for i := range 20 {
				if err := commitOnce(s, ID(fmt.Sprintf("id%d", i))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for _, cmd := range children {
		if err := cmd.Wait(); err != nil {
			t.Errorf("the other process did not succeed: %v", err)
		}
	}
	for i := range 20 {
		id := ID(fmt.Sprintf("id%d", i))
		if got := view(t, s, id); len(got) != 10 {
			t.Errorf("%s shows %d files", id, len(got))
		}
		if got, ok, err := s.Lookup(Key("key-" + string(id))); got != id || !ok || err != nil {
			t.Errorf("lookup = %v %v %v", got, ok, err)
		}
	}
	wantEmptyTemp(t, s)
}

func TestAKilledProcessLeavesAValidStore(t *testing.T) {
	for _, what := range []string{"import forever", "work forever"} {
		t.Run(what, func(t *testing.T) {
			s := newStore(t)
			for i := range 8 {
				cmd := startChild(t, s, what)
				out, err := cmd.StdoutPipe()
				must(t, err)
				must(t, cmd.Start())
				if _, err := out.Read(make([]byte, 16)); err != nil {
					t.Fatalf("the child ended early: %v", err)
				}
				time.Sleep(time.Duration(i*7) * time.Millisecond) // another moment each time
				must(t, cmd.Process.Kill())
				cmd.Wait()
				reopened := openStore(t, s.root)
				wantEmptyTemp(t, reopened)
				wantEverySnapshotWhole(t, reopened)
			}
		})
	}
}

func wantEverySnapshotWhole(t *testing.T, s *Store) {
	t.Helper()
	dirs, err := os.ReadDir(s.snapshots)
	must(t, err)
	for _, d := range dirs {
		if got := view(t, s, ID(d.Name())); len(got) != 10 {
			t.Errorf("snapshot %s is broken: %q", d.Name(), got)
		}
	}
}

func TestOpenLeavesTheTemporariesOfTheLivingAlone(t *testing.T) {
	s := newStore(t)
	a, err := s.Prepare(t.Context(), "")
	must(t, err)
	defer a.Discard()
	dir, cleanup, err := s.Temp()
	must(t, err)
	defer cleanup()
	openStore(t, s.root)
	must(t, os.WriteFile(filepath.Join(a.Dir(), "a"), []byte("1"), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "a"), []byte("1"), 0o644))
	id, err := a.Commit(t.Context(), "survivor")
	must(t, err)
	wantTree(t, view(t, s, id), "a=1")
}

func TestAnInterruptedStreamLeavesNothing(t *testing.T) {
	s := newStore(t)
	data := bigLayer()
	id := digest.FromBytes(data)
	for n := 0; n < len(data); n += 128<<10 + 77 {
		broken := io.MultiReader(bytes.NewReader(data[:n]), &failing{})
		if _, err := importLayer(t.Context(), s, "", id, broken); err == nil {
			t.Errorf("a stream that failed at %d was accepted", n)
		}
	}
	wantEmptyTemp(t, s)
	if s.Has(ID(id)) {
		t.Error("the store has a part of the layer")
	}
}

type failing struct{}

func (*failing) Read([]byte) (int, error) { return 0, fmt.Errorf("connection reset") }
