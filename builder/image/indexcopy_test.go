package image

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

// withNames returns a store's layout of two images, and what its frame says.
func withNames(t *testing.T) (l *Layout, index, version []byte) {
	t.Helper()
	l = newLayout(t)
	for _, name := range []string{"docker.io/library/a:1", "docker.io/library/b:2"} {
		if _, _, err := storeImage(l, name, name); err != nil {
			t.Fatal(err)
		}
	}
	return l, readFile(t, l, "index.json"), readFile(t, l, "oci-layout")
}

func readFile(t *testing.T, l *Layout, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(l.dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func overwrite(t *testing.T, l *Layout, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(l.dir, name), b, 0o644); err != nil {
		t.Fatal(err)
	}
}

func frameDamage(t *testing.T, l *Layout, repair bool) (where []string) {
	t.Helper()
	found, err := RepairFrame(l.dir, repair)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range found {
		where = append(where, d.Where)
		if repair && d.Repair == "" {
			t.Errorf("%s: %s: not repaired", d.Where, d.What)
		}
	}
	return where
}

// TestAFlippedBitInTheFrameChangesNothing flips a bit here and there in each file without which no image is found. Names and
// types stay what they were for a process that runs, verify tells, and the next that opens the store mends.
func TestAFlippedBitInTheFrameChangesNothing(t *testing.T) {
	l, index, _ := withNames(t)
	want, err := l.Index()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"index.json", ".index", "oci-layout"} {
		whole := readFile(t, l, name)
		for i := 0; i < len(whole); i += 1 + len(whole)/60 {
			broken := append([]byte(nil), whole...)
			broken[i] ^= 1 << (i % 7)
			overwrite(t, l, name, broken)
			if got := frameDamage(t, l, false); len(got) != 1 || got[0] != name {
				// The spelling of a key does not matter to JSON.
				if name != "oci-layout" || l.checkVersion() != nil {
					t.Fatalf("byte %d of %s: verify finds %q", i, name, got)
				}
			}
			if got, err := l.Index(); err != nil || !cmp.Equal(got, want) {
				t.Fatalf("byte %d of %s: a running build sees %v (%v): images lose their names", i, name, got, err)
			}
			again, err := CreateLayout(l.dir)
			if err != nil {
				t.Fatalf("byte %d of %s: %v", i, name, err)
			}
			again.Close()
			if got := frameDamage(t, l, false); len(got) != 0 {
				t.Fatalf("byte %d of %s: after the next build %q is damaged", i, name, got)
			}
			if got := readFile(t, l, "index.json"); string(got) != string(index) {
				t.Fatalf("byte %d of %s: others read %s", i, name, got)
			}
		}
	}
}

func TestRepairKeepsTheNamesOfImages(t *testing.T) {
	l, index, version := withNames(t)
	for name, content := range map[string]string{"index.json": "{", ".index": "x", "oci-layout": `{"imageLayoutVersion":"1.0.1"}`} {
		overwrite(t, l, name, []byte(content))
		if got := frameDamage(t, l, true); !cmp.Equal(got, []string{name}) {
			t.Errorf("repaired %q, want %s", got, name)
		}
		if got := frameDamage(t, l, false); len(got) != 0 {
			t.Errorf("%s: after the repair: %q", name, got)
		}
		if string(readFile(t, l, "index.json")) != string(index) || string(readFile(t, l, "oci-layout")) != string(version) {
			t.Errorf("the repair of %s changed what the store holds", name)
		}
	}
	if err := os.Remove(filepath.Join(l.dir, "index.json")); err != nil {
		t.Fatal(err)
	}
	if got := frameDamage(t, l, true); !cmp.Equal(got, []string{"index.json"}) || string(readFile(t, l, "index.json")) != string(index) {
		t.Errorf("an index that is gone: %q", got)
	}
}

// TestAnIndexThatWasReplacedIsBelieved replaces it as a process does that is killed before it writes the copy, or as a version
// that knew of no copy did. The copy must not take the new name away.
func TestAnIndexThatWasReplacedIsBelieved(t *testing.T) {
	for _, sameInode := range []bool{false, true} {
		l, _, _ := withNames(t)
		old := readFile(t, l, ".index")
		d, err := l.Resolve("docker.io/library/a:1")
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second file may well have the inode of the one before the first
			if err := l.Tag("docker.io/library/new:3", d); err != nil {
				t.Fatal(err)
			}
			d.Annotations = map[string]string{"x": digest.FromBytes(old).String()}
			if !sameInode {
				break
			}
		}
		if err := l.replace(indexCopyFile, old); err != nil {
			t.Fatal(err)
		}
		if got := frameDamage(t, l, false); len(got) != 0 {
			t.Errorf("verify takes it for damage: %q", got)
		}
		again, err := CreateLayout(l.dir)
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		if _, err := again.Resolve("docker.io/library/new:3"); err != nil {
			t.Errorf("the name is gone: %v", err)
		}
		if s, err := again.readIndex(); err != nil || s.copyStale {
			t.Errorf("the copy is still that of another index: %v", err)
		}
	}
}

func TestAStrangersLayoutIsNotMended(t *testing.T) {
	l, _, _ := withNames(t)
	wrong := []byte(`{"imageLayoutVersion":"1.0.1"}`)
	overwrite(t, l, "oci-layout", wrong)
	if _, err := OpenLayout(l.dir); err == nil {
		t.Error("a layout of an unknown version was opened")
	}
	if _, err := create(l.dir, false); err == nil {
		t.Error("a layout of an unknown version was written to")
	}
	if string(readFile(t, l, "oci-layout")) != string(wrong) {
		t.Error("a file of the user was changed")
	}
	out := t.TempDir()
	if err := NewLayoutSink(filepath.Join(out, "l")).Publish(t.Context(), newLayout(t), Publication{}); err == nil {
		if _, err := os.Stat(filepath.Join(out, "l", indexCopyFile)); err == nil {
			t.Error("an output has the store's copy of an index")
		}
	}
}
