package lease

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func used(t *testing.T, dir string) []string {
	t.Helper()
	var names []string
	err := Exclude(dir, func(used map[string]bool) error {
		names = slices.Sorted(maps.Keys(used))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func use(t *testing.T, l *Lease, names ...string) {
	t.Helper()
	for _, n := range names {
		if err := l.Use(n); err != nil {
			t.Fatal(err)
		}
	}
}

func TestALeaseEndsWithItsHolder(t *testing.T) {
	dir := t.TempDir()
	a, b, killed := New(dir), New(dir), New(dir)
	use(t, a, "1", "2", "1")
	use(t, b, "2")
	use(t, killed, "3")
	if diff := cmp.Diff([]string{"1", "2", "3"}, used(t, dir)); diff != "" {
		t.Error(diff)
	}
	killed.file.Close() // as the end of its process does
	if diff := cmp.Diff([]string{"1", "2"}, used(t, dir)); diff != "" {
		t.Errorf("a killed process still uses something, for ever: %s", diff)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"2"}, used(t, dir)); diff != "" {
		t.Error(diff)
	}
	use(t, a, "4") // again
	if diff := cmp.Diff([]string{"2", "4"}, used(t, dir)); diff != "" {
		t.Error(diff)
	}
	if err := errors.Join(a.Close(), a.Close(), b.Close()); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left: %v %v", left, err)
	}
}

func TestNobodyBeginsAUseMeanwhile(t *testing.T) {
	dir := t.TempDir()
	l := New(dir)
	defer l.Close()
	began := make(chan struct{})
	err := Exclude(dir, func(map[string]bool) error {
		go func() {
			if err := l.Use("x"); err != nil {
				t.Error(err)
			}
			close(began)
		}()
		select {
		case <-began:
			return errors.New("a use began: what it found could be removed under its hands")
		case <-time.After(100 * time.Millisecond):
			return nil
		}
	})
	if err != nil {
		t.Error(err)
	}
	<-began
}

// TestFoundIsKept lets users look for a file after they said that they use it, while another removes it when nobody does.
func TestFoundIsKept(t *testing.T) {
	dir, thing := t.TempDir(), filepath.Join(t.TempDir(), "thing")
	stop := make(chan struct{})
	var wg, pruner sync.WaitGroup
	pruner.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			err := Exclude(dir, func(used map[string]bool) error {
				if !used["thing"] {
					os.Remove(thing)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		}
	})
	for range 4 {
		wg.Go(func() {
			for range 300 {
				l := New(dir)
				use(t, l, "thing")
				if _, err := os.Stat(thing); err != nil {
					if err := os.WriteFile(thing, nil, 0o600); err != nil {
						t.Error(err)
					}
				}
				time.Sleep(10 * time.Microsecond)
				if _, err := os.Stat(thing); err != nil {
					t.Errorf("it was removed while it was used: %v", err)
				}
				if err := l.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	pruner.Wait()
}

func TestANameIsOneLine(t *testing.T) {
	l := New(t.TempDir())
	for _, name := range []string{"", "a\nb"} {
		if err := l.Use(name); err == nil {
			t.Errorf("%q was accepted: it would stand for another thing", name)
		}
	}
}

func TestSweepLeavesTheLivingAlone(t *testing.T) {
	dir := t.TempDir()
	living, dead := New(dir), New(dir)
	defer living.Close()
	use(t, living, "1")
	use(t, dead, "2")
	dead.file.Close()
	Sweep(dir)
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 {
		t.Errorf("left: %v %v", left, err)
	}
	if got := fmt.Sprint(used(t, dir)); got != "[1]" {
		t.Error(got)
	}
}
