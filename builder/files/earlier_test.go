package files

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/plan"
)

// copyAgain copies the context to /new of an overlay, and returns the overlay and what it has made.
func copyAgain(t *testing.T, context string, h *HashCache, earlier Earlier) (merged string, made Earlier) {
	t.Helper()
	dir := t.TempDir()
	merged = overlay(t, dir, plant(t, filepath.Join(dir, "lower")))
	tree := Tree{Dir: context, Local: true}
	_, err := Digest(t.Context(), tree, dockerfile("/", "/new"), h)
	must(t, err)
	made = Earlier{Dir: filepath.Join(dir, "upper"), Sums: Sums{}}
	o := Options{Single: singleID(), Upper: made.Dir, Hashes: h, Earlier: earlier, Made: made.Sums}
	must(t, Apply(t.Context(), merged, []plan.Action{dockerfile("/", "/new")}, func(plan.Ref) (Tree, error) { return tree, nil }, o))
	return merged, made
}

func settledCache() *HashCache {
	h := NewHashCache()
	h.now = func() time.Time { return time.Now().Add(time.Hour) }
	return h
}

func TestOnlyWhatIsTheSameAgainBecomesALink(t *testing.T) {
	context := plant(t, filepath.Join(t.TempDir(), "context"),
		"f same 644 s", "f dir/same 755 s", "f dir/content 644 old", "f mode 644 m", "f time 644 t", "f moved 644 a", "f other 644 b", "f attribute 644 x",
		"f one 644 1", "h two one", "f alone 644 2", "l link same")
	h := settledCache()
	_, made := copyAgain(t, context, h, Earlier{})

	in := func(p string) string { return filepath.Join(context, p) }
	keep := func(p string, change func()) { // the modification time, which proves nothing
		st, err := os.Stat(in(p))
		must(t, err)
		change()
		must(t, os.Chtimes(in(p), st.ModTime(), st.ModTime()))
	}
	keep("dir/content", func() { must(t, os.WriteFile(in("dir/content"), []byte("new"), 0o644)) })
	keep("mode", func() { must(t, os.Chmod(in("mode"), 0o600)) })
	must(t, os.Chtimes(in("time"), planted, planted))
	keep("attribute", func() { must(t, unix.Setxattr(in("attribute"), "user.note", []byte("n"), 0)) })
	must(t, os.Rename(in("moved"), in("was")))
	must(t, os.Rename(in("other"), in("moved")))
	keep("two", func() { // no link any more
		must(t, os.Remove(in("two")))
		must(t, os.WriteFile(in("two"), []byte("1"), 0o644))
	})

	second, madeAgain := copyAgain(t, context, h, made)
	plain := filepath.Join(t.TempDir(), "plain")
	must(t, os.Mkdir(plain, 0o755))
	tree := func(plan.Ref) (Tree, error) { return Tree{Dir: context, Local: true}, nil }
	must(t, Apply(t.Context(), plain, []plan.Action{dockerfile("/", "/new")}, tree, Options{Single: singleID()}))
	unlinked := func(all picture) picture { return all[1:] } // the root's time
	if d := cmp.Diff(unlinked(take(t, plain, true)), unlinked(take(t, second, true))); d != "" {
		t.Errorf("with links to an earlier copy the result is another one (-plain +links):\n%s", d)
	}

	var linked []string
	for p := range maps.Keys(madeAgain.Sums) {
		if _, err := os.Lstat(filepath.Join(made.Dir, p)); err != nil {
			continue
		}
		if inodeOf(t, filepath.Join(made.Dir, p)) == inodeOf(t, filepath.Join(madeAgain.Dir, p)) {
			linked = append(linked, p)
		}
	}
	slices.Sort(linked)
	if d := cmp.Diff([]string{"new/alone", "new/dir/same", "new/same"}, linked); d != "" {
		t.Errorf("linked to the earlier copy (-want +got):\n%s", d)
	}
	if inodeOf(t, filepath.Join(madeAgain.Dir, "new/one")) == inodeOf(t, filepath.Join(madeAgain.Dir, "new/two")) {
		t.Error("two files of the context are hard links in the image")
	}

	above := filepath.Join(overlay(t, t.TempDir(), made.Dir), "new/same")
	must(t, os.WriteFile(above, []byte("a RUN was here"), 0o644))
	must(t, os.Chmod(above, 0o777))
	if got, err := os.ReadFile(filepath.Join(second, "new/same")); err != nil || string(got) != "s" {
		t.Errorf("a RUN on the earlier copy changes a file of the later one, which another image is made of: %q, %v", got, err)
	}
}

func TestAFileWithTooManyNamesIsCopied(t *testing.T) {
	context := plant(t, filepath.Join(t.TempDir(), "context"), "f a 644 a")
	h := settledCache()
	_, made := copyAgain(t, context, h, Earlier{})
	must(t, os.Remove(filepath.Join(made.Dir, "new/a"))) // a link fails, for whatever reason
	second, _ := copyAgain(t, context, h, made)
	if got, err := os.ReadFile(filepath.Join(second, "new/a")); err != nil || string(got) != "a" {
		t.Errorf("a file that could not be linked to: %q, %v", got, err)
	}
}

func TestSumsComeBackAsTheyWere(t *testing.T) {
	s := Sums{}
	for i := range 300 {
		s[fmt.Sprintf("dir/f%d", i)] = [32]byte{0: byte(i), 31: byte(i >> 8)}
	}
	saved := s.Encode()
	if d := cmp.Diff(s, DecodeSums(saved)); d != "" {
		t.Errorf("decoded (-want +got):\n%s", d)
	}
	for _, bad := range [][]byte{nil, []byte("x"), saved[:len(saved)-1], saved[1:]} {
		if got := DecodeSums(bad); got != nil {
			t.Errorf("%d bytes of something else were taken for %d sums", len(bad), len(got))
		}
	}
}

func inodeOf(t *testing.T, p string) inode {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(p, &st))
	return inode{st.Dev, st.Ino}
}

func TestWhatWasCopiedBeforeItWasHashedIsKnownAfterwards(t *testing.T) {
	context := plant(t, filepath.Join(t.TempDir(), "context"), "f a 644 one", "f dir/b 755 two", "f changes 644 three", "f links 644 x", "h linked links")
	h, dir := settledCache(), t.TempDir()
	merged := overlay(t, dir, plant(t, filepath.Join(dir, "lower")))
	tree := Tree{Dir: context, Local: true}
	o := Options{Single: singleID(), Upper: filepath.Join(dir, "upper"), Hashes: h, Made: Sums{}, Pending: Pending{}}
	must(t, Apply(t.Context(), merged, []plan.Action{dockerfile("/", "/new")}, func(plan.Ref) (Tree, error) { return tree, nil }, o))
	if len(o.Made) != 0 {
		t.Fatalf("something is known of files that nobody has read: %v", o.Made)
	}
	must(t, os.WriteFile(filepath.Join(context, "changes"), []byte("after the copy"), 0o644))
	_, err := Digest(t.Context(), tree, dockerfile("/", "/new"), h)
	must(t, err)
	o.Pending.Resolve(h, o.Made)
	want := Sums{"new/a": sha256.Sum256([]byte("one")), "new/dir/b": sha256.Sum256([]byte("two"))}
	if d := cmp.Diff(want, o.Made); d != "" {
		t.Errorf("a file is taken for another one, or copied again for nothing (-want +got):\n%s", d)
	}
}
