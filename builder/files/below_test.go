package files

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/plan"
)

// stacked shows two layers, each with large files, as a view of a snapshot does.
func stacked(t *testing.T) Tree {
	t.Helper()
	large := func(c string) string { return strings.Repeat(c, worthFinding) }
	dir := t.TempDir()
	low := plant(t, filepath.Join(dir, "low"), "f both 644 "+large("a"), "f dir/low 600 "+large("b"), "f opaque/file 644 "+large("d"), "f opaque/hidden 644 "+large("e"))
	top := plant(t, filepath.Join(dir, "top"), "f both 640 "+large("f"), "f dir/top 644 "+large("g"), "f opaque/file 644 "+large("h"), "f small 644 x", "l link both")
	must(t, unix.Setxattr(filepath.Join(top, "opaque"), "user.overlay.opaque", []byte("y"), 0))
	merged := filepath.Join(dir, "merged")
	must(t, os.Mkdir(merged, 0o755))
	must(t, unix.Mount("overlay", merged, "overlay", unix.MS_RDONLY, "userxattr,lowerdir="+top+":"+low))
	t.Cleanup(func() { must(t, unix.Unmount(merged, unix.MNT_DETACH)) })
	return Tree{Dir: merged, Layers: []string{top, low}}
}

// inLayer opens a path of a tree in its layers; nil if it is to be read through the overlay.
func inLayer(t *testing.T, tree Tree, p string) *os.File {
	t.Helper()
	s, err := openSource(tree)
	must(t, err)
	defer s.close()
	n, err := s.find(p, false)
	must(t, err)
	defer n.close()
	f := s.layers.open(&entry{node: n})
	if f != nil {
		t.Cleanup(func() { f.Close() })
	}
	return f
}

func TestALargeFileIsReadInTheLayerThatAnOverlayShows(t *testing.T) {
	tree := stacked(t)
	for p, layer := range map[string]int{"both": 0, "dir/top": 0, "dir/low": 1, "opaque/file": 0} {
		f := inLayer(t, tree, p)
		if f == nil {
			t.Errorf("%s is read through the overlay, out of which the kernel copies no blocks", p)
			continue
		}
		var st unix.Stat_t
		must(t, unix.Fstat(int(f.Fd()), &st))
		if want := inodeOf(t, filepath.Join(tree.Layers[layer], p)); (inode{st.Dev, st.Ino}) != want {
			t.Errorf("%s is another file than that of layer %d", p, layer)
		}
		got, err := io.ReadAll(f)
		must(t, err)
		want, err := os.ReadFile(filepath.Join(tree.Dir, p))
		must(t, err)
		if string(got) != string(want) {
			t.Errorf("%s begins with %.1s, want %.1s: what the overlay hides is copied", p, got, want)
		}
	}
	for _, p := range []string{"small", "link"} {
		if inLayer(t, tree, p) != nil {
			t.Errorf("%s is opened in a layer", p)
		}
	}
}

// TestWhatTheOverlayDoesNotShowIsNotCopied changes the layers, or says what they are wrongly. The overlay has the last word.
func TestWhatTheOverlayDoesNotShowIsNotCopied(t *testing.T) {
	for name, change := range map[string]func(tree *Tree){
		"a layer too few": func(tree *Tree) { tree.Layers = tree.Layers[1:] },
		"no such layer":   func(tree *Tree) { tree.Layers = append([]string{tree.Layers[0] + "x"}, tree.Layers[1]) },
		"another file": func(tree *Tree) {
			p := filepath.Join(tree.Layers[0], "both")
			must(t, os.Rename(p, p+".old"))
			must(t, os.WriteFile(p, []byte(strings.Repeat("z", worthFinding)), 0o640))
			st, err := os.Stat(p + ".old")
			must(t, err)
			must(t, os.Chtimes(p, st.ModTime(), st.ModTime()))
		},
		"a link":         func(tree *Tree) { replaceByLink(t, tree.Layers[0], "both") },
		"a link above":   func(tree *Tree) { replaceByLink(t, tree.Layers[0], "opaque") },
		"nothing listed": func(tree *Tree) { tree.Layers = nil },
	} {
		tree := stacked(t)
		p := "both"
		if name == "a link above" {
			p = "opaque/file"
		}
		s, err := openSource(tree)
		must(t, err)
		n, err := s.find(p, false)
		must(t, err)
		change(&tree)
		s.layers.dirs = tree.Layers
		if f := s.layers.open(&entry{node: n}); f != nil {
			t.Errorf("%s: a file of a layer is opened that the overlay does not show there", name)
			f.Close()
		}
		n.close()
		s.close()
	}
}

func replaceByLink(t *testing.T, dir, name string) {
	t.Helper()
	p := filepath.Join(dir, name)
	must(t, os.Rename(p, p+".old"))
	must(t, os.Symlink(name+".old", p))
}

func TestCopiesOfLayersAreTheSameAsOfTheOverlay(t *testing.T) {
	tree := stacked(t)
	plain := tree
	plain.Layers = nil
	for _, action := range []plan.Action{dockerfile("/", "/x"), dockerfile("/opaque/*", "/x/"), dockerfile("/link", "/x")} {
		want, got := t.TempDir(), t.TempDir()
		o := Options{Single: singleID()}
		must(t, Apply(t.Context(), want, []plan.Action{action}, func(plan.Ref) (Tree, error) { return plain, nil }, o))
		must(t, Apply(t.Context(), got, []plan.Action{action}, func(plan.Ref) (Tree, error) { return tree, nil }, o))
		if d := cmp.Diff(take(t, want, true), take(t, got, true)); d != "" {
			t.Errorf("%+v: a copy out of the layers differs (-overlay +layers):\n%s", action, d)
		}
	}
}
