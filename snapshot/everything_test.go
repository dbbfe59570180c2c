package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

// keyOf is a key of the tests.
func keyOf(name string) Key { return Key(digest.FromString(name).Encoded()) }

// everything takes every way on which a build changes a store: an imported layer, a step on it, a rerooted and a squashed
// one, a key, facts, a digest and a cache mount. Done again it finds all of it.
func everything(ctx context.Context, s *Store) error {
	return errors.Join(makeAll(ctx, s), s.Close())
}

func makeAll(ctx context.Context, s *Store) error {
	if err := importOnce(ctx, s); err != nil {
		return err
	}
	imported := imported()
	step, known, err := s.Lookup(keyOf("step"))
	if err != nil {
		return err
	}
	if !known {
		if step, err = makeStep(ctx, s, imported); err != nil {
			return err
		}
		if err := s.Remember(keyOf("step"), step); err != nil {
			return err
		}
	}
	if !s.Has("next") {
		if err := commitNext(ctx, s, step); err != nil {
			return err
		}
	}
	if err := s.SetFact(keyOf("fact"), "value", OfSnapshot(step)); err != nil {
		return err
	}
	rerooted, err := s.Reroot(ctx, step, imported, "rerooted")
	if err != nil {
		return err
	}
	if _, err := s.Squash(ctx, imported, []ID{step, rerooted}, "squashed"); err != nil {
		return err
	}
	dir, unlock, err := s.CacheDir(ctx, "some cache", Shared)
	if err != nil {
		return err
	}
	err = os.WriteFile(filepath.Join(dir, "cached"), []byte("1"), 0o600)
	unlock()
	return err
}

func baseTar() []byte {
	return makeTar("d etc", "f etc/passwd=root", "f gone=1", "l bin=usr/bin")
}

func imported() ID { return ID(digest.FromBytes(baseTar())) }

func importOnce(ctx context.Context, s *Store) error {
	_, err := importLayer(ctx, s, "", digest.FromBytes(baseTar()), bytes.NewReader(baseTar()))
	return err
}

func makeStep(ctx context.Context, s *Store, on ID) (ID, error) {
	a, err := s.Prepare(ctx, on)
	if err != nil {
		return "", err
	}
	defer a.Discard()
	if err := os.Remove(filepath.Join(a.Dir(), "gone")); err != nil {
		return "", err
	}
	for i := range 3 {
		if err := os.WriteFile(filepath.Join(a.Dir(), "etc", fmt.Sprint("new", i)), []byte(strings.Repeat("n", 3000)), 0o644); err != nil {
			return "", err
		}
	}
	return a.Commit(ctx, "step")
}

// commitNext makes a step on a step.
func commitNext(ctx context.Context, s *Store, on ID) error {
	a, err := s.Prepare(ctx, on)
	if err != nil {
		return err
	}
	defer a.Discard()
	if err := os.WriteFile(filepath.Join(a.Dir(), "next"), []byte("1"), 0o644); err != nil {
		return err
	}
	_, err = a.Commit(ctx, "next")
	return err
}

// wantEverything makes it once more and compares with what an undisturbed store gives.
func wantEverything(t *testing.T, s *Store) {
	t.Helper()
	if err := makeAll(t.Context(), s); err != nil { // and not closed: what it found stays
		t.Fatalf("the next build fails: %v", err)
	}
	n := strings.Repeat("n", 3000)
	want := []string{"bin->usr/bin", "etc/", "etc/new0=" + n, "etc/new1=" + n, "etc/new2=" + n, "etc/passwd=root"}
	id, ok, err := s.Lookup(keyOf("step"))
	if id != "step" || !ok || err != nil {
		t.Fatalf("lookup = %v %v %v", id, ok, err)
	}
	for _, id := range []ID{"step", "rerooted", "squashed"} {
		got := view(t, s, id)
		slices.Sort(got)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s is wrong, and an image made of it would be (-want +got):\n%s", id, diff)
		}
	}
	got := view(t, s, "next")
	slices.Sort(got)
	if diff := cmp.Diff(append(want, "next=1"), got); diff != "" {
		t.Errorf("next is wrong, and an image made of it would be (-want +got):\n%s", diff)
	}
	var v string
	if ok, err := s.Fact(keyOf("fact"), &v); v != "value" || !ok || err != nil {
		t.Errorf("fact = %v %v %v", v, ok, err)
	}
	must(t, s.Close())
}

func wantNoDamage(t *testing.T, s *Store) {
	t.Helper()
	found, err := s.Verify(t.Context(), Proof{}, false)
	must(t, err)
	for _, d := range found {
		t.Errorf("verify: %s: %s", d.Where, d.What)
	}
	must(t, s.Close())
}

// pruneAll removes what fits, what stands on something first.
func pruneAll(s *Store, fits func(Entry) bool) error {
	entries, err := s.List()
	if err != nil {
		return err
	}
	p := s.Pruner()
	for again := true; again; {
		again = false
		for i, e := range entries {
			if e.Kind == "" || !fits(e) {
				continue
			}
			above := slices.ContainsFunc(entries, func(o Entry) bool {
				return o.Kind == KindSnapshot && slices.Contains(o.Needs, ID(e.Name)) && o.IDMap == e.IDMap
			})
			if above {
				continue
			}
			if _, err := p.Remove(e); err != nil {
				return err
			}
			entries[i] = Entry{}
			again = true
		}
	}
	return s.DropKeys()
}
