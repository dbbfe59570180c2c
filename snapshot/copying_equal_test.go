package snapshot

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/nstest"
	"github.com/cooper-build/cooper/snapshot/layer"
)

func newCopyingStore(t *testing.T) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "copying"), testOptions(true))
	must(t, err)
	t.Cleanup(func() { layer.RemoveAll(s.root) })
	return s
}

// layerBytes is the layer with the times of a build that clamps them: those of two runs differ.
func layerBytes(t *testing.T, s *Store, id ID) []byte {
	t.Helper()
	var buf bytes.Buffer
	epoch := time.Unix(1e9, 0)
	must(t, s.WriteLayer(t.Context(), id, &buf, layer.DiffOptions{Epoch: &epoch}))
	return buf.Bytes()
}

// describe tells all that a tree has, and which names are one file.
func describe(t *testing.T, dir string, exactTimes bool) []string {
	t.Helper()
	var lines []string
	first := map[uint64]string{}
	must(t, filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, name)
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("%s %o %d:%d %d", rel, st.Mode, st.Uid, st.Gid, st.Rdev)
		if when := time.Unix(st.Mtim.Unix()); exactTimes {
			line += fmt.Sprintf(" %d", when.UnixNano())
		} else if when.Unix() < 1e9 {
			line += fmt.Sprintf(" %d", when.Unix())
		}
		switch {
		case e.Type().IsRegular():
			data, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %x", sha256.Sum256(data))
		case e.Type()&fs.ModeSymlink != 0:
			target, _ := os.Readlink(name)
			line += " ->" + target
		}
		if !e.IsDir() && st.Nlink > 1 {
			if _, known := first[st.Ino]; !known {
				first[st.Ino] = rel
			}
			line += " =" + first[st.Ino]
		}
		value := make([]byte, 100)
		if n, err := unix.Lgetxattr(name, "user.x", value); err == nil {
			line += " user.x=" + string(value[:n])
		}
		lines = append(lines, line)
		return nil
	}))
	slices.Sort(lines)
	return lines
}

// both makes the same steps with mounts and with trees, and compares the layers and what the next step sees.
type both struct {
	mounted, copied *Store
	on              ID
	step            int
}

func newBoth(t *testing.T, base ...string) *both {
	b := &both{mounted: newStore(t), copied: newCopyingStore(t)}
	b.on = importTar(t, b.mounted, "", base...)
	importTar(t, b.copied, "", base...)
	return b
}

func (b *both) change(t *testing.T, do func(t *testing.T, dir string)) {
	t.Helper()
	b.step++
	as := ID(fmt.Sprintf("step%d", b.step))
	for _, s := range []*Store{b.copied, b.mounted} {
		change(t, s, b.on, as, func(dir string) { do(t, dir) })
	}
	b.on = as
	want, got := layerBytes(t, b.mounted, as), layerBytes(t, b.copied, as)
	if !bytes.Equal(want, got) {
		t.Errorf("step %d: another layer than with an overlay, and so another image (-overlay +copied):\n%s", b.step,
			cmp.Diff(layerNames(t, b.mounted, as), layerNames(t, b.copied, as)))
		t.Logf("overlay %q", tarText(t, want))
		t.Logf("copied  %q", tarText(t, got))
	}
	b.compareTrees(t)
}

func tarText(t *testing.T, data []byte) string {
	cmd := exec.Command("tar", "-tv")
	cmd.Stdin = bytes.NewReader(data)
	out, _ := cmd.CombinedOutput()
	return string(out)
}

// compareTrees compares the tree that moved on with a new copy of the layers and with a mount of them.
func (b *both) compareTrees(t *testing.T) {
	t.Helper()
	first, err := b.copied.View(t.Context(), b.on)
	must(t, err)
	second, err := b.copied.View(t.Context(), b.on) // the kept tree is taken: this one is new
	must(t, err)
	if diff := cmp.Diff(describe(t, second.Dir(), true), describe(t, first.Dir(), true)); diff != "" {
		t.Errorf("step %d: the next step sees something that the layers do not say (-layers +seen):\n%s", b.step, diff)
	}
	must(t, first.Close())
	must(t, second.Close())
	wantEmptyTemp(t, b.copied)
}

func TestAStepGivesTheSameLayerWithoutMounts(t *testing.T) {
	base := []string{
		"d d", "f d/a=1", "f d/b=2", "d d/e", "f d/e/c=3", "f one=x", "h two=one", "h d/three=one", "l link=one", "f big=" + strings.Repeat("b", 100000),
	}
	at := func(do func(in func(string) string) error) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			must(t, do(func(name string) string { return filepath.Join(dir, name) }))
		}
	}
	for _, tt := range []struct {
		name string
		do   func(in func(string) string) error
	}{
		{"nothing", func(func(string) string) error { return nil }},
		{"read", func(in func(string) string) error { _, err := os.ReadFile(in("d/a")); return err }},
		{"write in place, time restored", func(in func(string) string) error {
			if err := os.WriteFile(in("d/a"), []byte("9"), 0); err != nil {
				return err
			}
			return os.Chtimes(in("d/a"), time.Unix(0, 0), time.Unix(0, 0))
		}},
		{"same content, other time", func(in func(string) string) error { return os.WriteFile(in("d/a"), []byte("1"), 0) }},
		{"replaced by the same", func(in func(string) string) error {
			if err := os.Remove(in("d/a")); err != nil {
				return err
			}
			if err := os.WriteFile(in("d/a"), []byte("1"), 0o644); err != nil {
				return err
			}
			return os.Chtimes(in("d/a"), time.Unix(0, 0), time.Unix(0, 0))
		}},
		{"chmod there and back", func(in func(string) string) error {
			if err := os.Chmod(in("d/a"), 0o4711); err != nil {
				return err
			}
			return os.Chmod(in("d/a"), 0o644)
		}},
		{"setuid", func(in func(string) string) error { return os.Chmod(in("d/a"), 0o755|fs.ModeSetuid) }},
		{"chmod of a directory", func(in func(string) string) error { return os.Chmod(in("d/e"), 0o700) }},
		{"attribute", func(in func(string) string) error { return unix.Setxattr(in("d/a"), "user.x", []byte("1"), 0) }},
		{"a directory made and removed", func(in func(string) string) error {
			if err := os.Mkdir(in("d/new"), 0o755); err != nil {
				return err
			}
			return os.Remove(in("d/new"))
		}},
		{"a directory anew", func(in func(string) string) error {
			if err := os.RemoveAll(in("d")); err != nil {
				return err
			}
			if err := os.MkdirAll(in("d/e"), 0o755); err != nil {
				return err
			}
			return os.WriteFile(in("d/e/new"), nil, 0o644)
		}},
		{"file to directory", func(in func(string) string) error {
			if err := os.Remove(in("big")); err != nil {
				return err
			}
			return os.MkdirAll(in("big/x"), 0o755)
		}},
		{"directory to file", func(in func(string) string) error {
			if err := os.RemoveAll(in("d")); err != nil {
				return err
			}
			return os.WriteFile(in("d"), nil, 0o644)
		}},
		{"directory to link", func(in func(string) string) error {
			if err := os.RemoveAll(in("d")); err != nil {
				return err
			}
			return os.Symlink("big", in("d"))
		}},
		{"directory renamed", func(in func(string) string) error { return move(in("d/e"), in("moved")) }},
		{"directories swapped", func(in func(string) string) error {
			if err := os.Mkdir(in("f"), 0o711); err != nil {
				return err
			}
			if err := move(in("d/e"), in("f/e")); err != nil {
				return err
			}
			return os.Symlink("../f/e", in("d/e"))
		}},
		{"one of three names removed", func(in func(string) string) error { return os.Remove(in("two")) }},
		{"all but one name removed", func(in func(string) string) error {
			return errorsOf(os.Remove(in("two")), os.Remove(in("one")))
		}},
		{"a name of three renamed", func(in func(string) string) error { return os.Rename(in("two"), in("four")) }},
		{"a name of three replaced", func(in func(string) string) error {
			return errorsOf(os.Remove(in("two")), os.WriteFile(in("two"), []byte("y"), 0o644))
		}},
		{"chmod of each name", func(in func(string) string) error {
			return errorsOf(os.Chmod(in("one"), 0o600), os.Chmod(in("two"), 0o600), os.Chmod(in("d/three"), 0o600))
		}},
		{"a second name", func(in func(string) string) error { return os.Link(in("d/a"), in("linked")) }},
		{"a name moved by link and unlink", func(in func(string) string) error {
			return errorsOf(os.Link(in("d/a"), in("linked")), os.Remove(in("d/a")))
		}},
		{"links anew", func(in func(string) string) error {
			return errorsOf(os.Remove(in("one")), os.Remove(in("two")), os.Remove(in("d/three")),
				os.WriteFile(in("one"), []byte("x"), 0o644), os.Link(in("one"), in("two")))
		}},
		{"pipe", func(in func(string) string) error { return unix.Mkfifo(in("pipe"), 0o640) }},
		{"sparse", func(in func(string) string) error {
			return errorsOf(os.WriteFile(in("sparse"), []byte("begin"), 0o644), os.Truncate(in("sparse"), 5<<20))
		}},
		{"root", func(in func(string) string) error { return os.Chmod(in(""), 0o711) }},
		{"odd names", func(in func(string) string) error {
			return errorsOf(os.WriteFile(in("a\xff\nb"), nil, 0o644), os.WriteFile(in("d-x"), nil, 0o644), os.Mkdir(in("d.d"), 0o755))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBoth(t, base...)
			b.change(t, at(tt.do))
			// What stands on it is right, too.
			b.change(t, at(func(in func(string) string) error { return os.WriteFile(in("later"), nil, 0o644) }))
			b.change(t, func(*testing.T, string) {})
		})
	}
}

func errorsOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// move is what mv does: copying where rename is refused, as overlay refuses it for a directory of a lower layer.
func move(from, to string) error {
	out, err := exec.Command("mv", "-fT", from, to).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%v: %s", err, out)
	}
	return nil
}

// TestRandomStepsGiveTheSameLayersWithoutMounts makes random changes. Left out is what the two cannot do alike: to write in place to one
// of several names that a lower layer holds (docs/decisions/chroot.md).
func TestRandomStepsGiveTheSameLayersWithoutMounts(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			b := newBoth(t, "d d0", "f d0/f0=0", "f f1=1", "d d1", "d d1/d0", "f d1/d0/f2=2", "h d1/f3=f1", "l l0=f1", "f d1/f0=same")
			random := rand.New(rand.NewPCG(seed, 4))
			for range 5 {
				var script []operation
				b.change(t, func(t *testing.T, dir string) {
					if script == nil {
						script = perform(t, dir, random)
						return
					}
					for _, op := range script {
						must(t, op.do(dir))
					}
				})
				if t.Failed() {
					t.Fatalf("seed %d: %v", seed, script)
				}
			}
		})
	}
}

type operation struct {
	what, name, other string
	n                 int
}

// perform makes random operations and returns those that were possible.
func perform(t *testing.T, dir string, random *rand.Rand) []operation {
	script := []operation{}
	start := map[uint64]bool{} // files that have several names in the layers
	must(t, filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && unix.Lstat(name, &st) == nil && !e.IsDir() && st.Nlink > 1 {
			start[st.Ino] = true
		}
		return err
	}))
	whats := []string{"write", "write", "append", "mkdir", "remove", "remove", "symlink", "link", "chmod", "move", "move", "touch", "attribute", "anew", "copy", "fifo"}
	if !nstest.Single() {
		whats = append(whats, "chown")
	}
	for range 10 {
		op := operation{whats[random.IntN(len(whats))], randomName(random), randomName(random), random.IntN(4)}
		if !alike(dir, op, start) || op.do(dir) != nil {
			continue
		}
		script = append(script, op)
	}
	return script
}

func randomName(random *rand.Rand) string {
	var parts []string
	for random.IntN(3) > 0 && len(parts) < 3 {
		parts = append(parts, fmt.Sprint("d", random.IntN(3)))
	}
	return filepath.Join(append(parts, []string{"f", "d", "l"}[random.IntN(3)]+fmt.Sprint(random.IntN(3)))...)
}

// alike reports whether an operation means the same with and without mounts.
func alike(dir string, op operation, start map[uint64]bool) bool {
	for _, name := range []string{op.name, op.other} {
		var st unix.Stat_t
		err := unix.Lstat(filepath.Join(dir, name), &st)
		switch {
		case err != nil:
		case st.Mode&unix.S_IFMT == unix.S_IFLNK && op.what != "move" && op.what != "remove":
			return false // leads anywhere
		case st.Mode&unix.S_IFMT != unix.S_IFDIR && start[st.Ino] && op.what != "remove":
			return false
		case st.Mode&unix.S_IFMT == unix.S_IFDIR && op.what == "move" && leaves(filepath.Join(dir, name)):
			return false // mv would copy and so tear names apart
		}
	}
	rel, err := filepath.Rel(op.name, op.other)
	if err != nil || op.what == "move" || op.what == "copy" {
		inner, _ := filepath.Rel(op.other, op.name)
		return err == nil && strings.HasPrefix(rel, "..") && strings.HasPrefix(inner, "..")
	}
	return true
}

// leaves reports whether a file below dir has names elsewhere, too.
func leaves(dir string) bool {
	seen, links := map[uint64]uint64{}, map[uint64]uint64{}
	filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && !e.IsDir() && unix.Lstat(name, &st) == nil {
			seen[st.Ino]++
			links[st.Ino] = uint64(st.Nlink)
		}
		return nil
	})
	for ino, n := range seen {
		if links[ino] != n {
			return true
		}
	}
	return false
}

func (o operation) do(dir string) error {
	name, other := filepath.Join(dir, o.name), filepath.Join(dir, o.other)
	switch o.what {
	case "write":
		info, err := os.Lstat(name)
		if err == nil && !info.Mode().IsRegular() {
			return syscall.EISDIR
		}
		return os.WriteFile(name, []byte(strings.Repeat(fmt.Sprint(o.n), o.n)), 0o644)
	case "append":
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteString("more")
		return errorsOf(err, f.Close())
	case "mkdir":
		return os.MkdirAll(name, 0o755)
	case "remove":
		if _, err := os.Lstat(name); err != nil {
			return err
		}
		return os.RemoveAll(name)
	case "symlink":
		return os.Symlink("f1", name)
	case "link":
		if info, err := os.Lstat(name); err != nil || !info.Mode().IsRegular() {
			return syscall.EINVAL
		}
		return os.Link(name, other)
	case "chmod":
		return os.Chmod(name, []fs.FileMode{0o600, 0o755, 0o755 | fs.ModeSetuid, 0o700 | fs.ModeSticky}[o.n])
	case "chown":
		return os.Lchown(name, o.n, 1)
	case "move":
		return move(name, other)
	case "copy":
		return exec.Command("cp", "-aT", name, other).Run()
	case "touch":
		return os.Chtimes(name, time.Time{}, time.Unix(int64(o.n)*1000, 0))
	case "attribute":
		if info, err := os.Lstat(name); err != nil || !info.Mode().IsRegular() && !info.IsDir() {
			return syscall.EINVAL
		}
		return unix.Lsetxattr(name, "user.x", []byte(fmt.Sprint(o.n)), 0)
	case "anew":
		info, err := os.Lstat(name)
		if err != nil || !info.IsDir() {
			return syscall.ENOTDIR
		}
		return errorsOf(os.RemoveAll(name), os.Mkdir(name, 0o755))
	case "fifo":
		return unix.Mkfifo(name, 0o600)
	}
	panic(o.what)
}
