package snapshot

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/nstest"
	"github.com/cooper-build/cooper/snapshot/layer"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(child())
	}
	nstest.Main(m)
}

func openStore(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir, testOptions(copies(t)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { layer.RemoveAll(dir) })
	return s
}

func testOptions(copying bool) Options {
	return Options{IDMap: "test:0-0-1,1-2-3", Single: nstest.Single(), Copying: copying}
}

// copies reports whether a test is run again for trees, by TestCopying or TestCopyingDisturbed.
func copies(t *testing.T) bool { return strings.HasPrefix(t.Name(), "TestCopying") }

func newStore(t *testing.T) *Store { return openStore(t, filepath.Join(t.TempDir(), "st,or:e\\x=")) }

// entries describe a tar: "d name", "f name=content", "l name=target", "h name=target", "hard link".
func makeTar(entries ...string) []byte {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		kind, rest, _ := strings.Cut(e, " ")
		name, value, _ := strings.Cut(rest, "=")
		h := &tar.Header{Name: name, Mode: 0o644}
		switch kind {
		case "d":
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		case "f":
			h.Typeflag, h.Size = tar.TypeReg, int64(len(value))
		case "l":
			h.Typeflag, h.Linkname = tar.TypeSymlink, value
		case "h":
			h.Typeflag, h.Linkname = tar.TypeLink, value
		default:
			panic("bad entry " + e)
		}
		if err := w.WriteHeader(h); err != nil {
			panic(err)
		}
		if kind == "f" {
			io.WriteString(w, value)
		}
	}
	w.Close()
	return buf.Bytes()
}

func importTar(t *testing.T, s *Store, parent ID, entries ...string) ID {
	t.Helper()
	data := makeTar(entries...)
	id, err := importLayer(t.Context(), s, parent, digest.FromBytes(data), bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func importLayer(ctx context.Context, s *Store, parent ID, diffID digest.Digest, tar io.Reader) (ID, error) {
	u, err := s.Unpack(ctx, diffID, tar)
	if err != nil {
		return "", err
	}
	return u.Commit(ctx, parent)
}

// list describes a tree: "name" for directories with a slash, "name=content" for files.
func list(t *testing.T, dir string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || name == dir {
			return err
		}
		rel, _ := filepath.Rel(dir, name)
		switch {
		case e.IsDir():
			rel += "/"
		case e.Type().IsRegular():
			data, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			rel += "=" + string(data)
		case e.Type()&fs.ModeSymlink != 0:
			target, _ := os.Readlink(name)
			rel += "->" + target
		default:
			rel += " " + e.Type().String()
		}
		found = append(found, rel)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sort.Strings(found)
	return found
}

func view(t *testing.T, s *Store, id ID) []string {
	t.Helper()
	v, err := s.View(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	return list(t, v.Dir())
}

func wantTree(t *testing.T, got []string, want ...string) {
	t.Helper()
	sort.Strings(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("tree (-want +got):\n%s", diff)
	}
}

func change(t *testing.T, s *Store, parent, as ID, do func(dir string)) ID {
	t.Helper()
	a, err := s.Prepare(t.Context(), parent)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Discard()
	do(a.Dir())
	id, err := a.Commit(t.Context(), as)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func layerNames(t *testing.T, s *Store, id ID) []string {
	t.Helper()
	var buf bytes.Buffer
	must(t, s.WriteLayer(t.Context(), id, &buf, layer.DiffOptions{}))
	var names []string
	for r := tar.NewReader(&buf); ; {
		h, err := r.Next()
		if err == io.EOF {
			return names
		}
		must(t, err)
		names = append(names, h.Name)
	}
}

func TestAStepShowsItsParentAndKeepsOnlyWhatChanged(t *testing.T) {
	s := newStore(t)
	base := importTar(t, s, "", "d etc", "f etc/passwd=root", "d gone", "f gone/a=1", "l bin=usr/bin")
	step := change(t, s, base, "step", func(dir string) {
		wantTree(t, list(t, dir), "etc/", "etc/passwd=root", "gone/", "gone/a=1", "bin->usr/bin")
		must(t, os.RemoveAll(filepath.Join(dir, "gone")))
		must(t, os.WriteFile(filepath.Join(dir, "etc/new"), []byte("n"), 0o644))
	})
	wantTree(t, view(t, s, step), "etc/", "etc/passwd=root", "etc/new=n", "bin->usr/bin")
	wantTree(t, view(t, s, base), "etc/", "etc/passwd=root", "gone/", "gone/a=1", "bin->usr/bin")
	if diff := cmp.Diff([]string{"etc/", "etc/new", ".wh.gone"}, layerNames(t, s, step)); diff != "" {
		t.Errorf("layer (-want +got):\n%s", diff)
	}
	chain, err := s.Chain(step)
	must(t, err)
	if diff := cmp.Diff([]ID{base, step}, chain); diff != "" {
		t.Errorf("chain: %s", diff)
	}
}

func TestAResultOfBeforeIsFound(t *testing.T) {
	s := newStore(t)
	base := importTar(t, s, "", "f a=1")
	other := importTar(t, s, "", "f a=2")
	write := func(content string) func(string) {
		return func(dir string) { must(t, os.WriteFile(filepath.Join(dir, "new"), []byte(content), 0o644)) }
	}
	first := change(t, s, base, "first", write("x"))
	elsewhere := change(t, s, other, "elsewhere", write("x"))
	for _, c := range []struct {
		name    string
		content string
		earlier []ID
		want    ID
	}{
		{"equal", "x", []ID{"gone", first}, first},
		{"other-content", "y", []ID{first}, "other-content"},
		{"equal-on-another-parent", "x", []ID{elsewhere}, "equal-on-another-parent"},
		{"equal-and-not-looked-for", "x", nil, "equal-and-not-looked-for"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := s.Prepare(t.Context(), base)
			must(t, err)
			defer a.Discard()
			write(c.content)(a.Dir())
			got, err := a.CommitOrFind(t.Context(), ID(c.name), c.earlier, nil)
			must(t, err)
			if got != c.want {
				t.Errorf("the result is %q, want %q", got, c.want)
			}
			wantTree(t, view(t, s, got), "a=1", "new="+c.content)
			if got != ID(c.name) && s.Has(ID(c.name)) {
				t.Error("the new result was kept, too")
			}
		})
	}
	wantEmptyTemp(t, s)
}

func TestAStepOnNothing(t *testing.T) {
	s := newStore(t)
	id := change(t, s, "", "scratch", func(dir string) {
		wantTree(t, list(t, dir))
		must(t, os.WriteFile(filepath.Join(dir, "a"), []byte("1"), 0o600))
	})
	wantTree(t, view(t, s, id), "a=1")
	wantTree(t, view(t, s, ""))
	empty := change(t, s, id, "empty", func(string) {})
	var buf bytes.Buffer
	must(t, s.WriteLayer(t.Context(), empty, &buf, layer.DiffOptions{}))
	if !bytes.Equal(buf.Bytes(), make([]byte, 1024)) {
		t.Errorf("a step that changes nothing makes %d bytes, want an empty archive", buf.Len())
	}
}

func TestTheRootHasAnEntryOnlyWhenItChanged(t *testing.T) {
	s := newStore(t)
	base := importTar(t, s, "", "d ./", "f a=1")
	same := change(t, s, base, "same", func(dir string) { must(t, os.WriteFile(filepath.Join(dir, "b"), nil, 0o644)) })
	if got := layerNames(t, s, same); !cmp.Equal(got, []string{"b"}) {
		t.Errorf("layer: %q", got)
	}
	changed := change(t, s, same, "changed", func(dir string) { must(t, os.Chmod(dir, 0o711)) })
	if got := layerNames(t, s, changed); !cmp.Equal(got, []string{"./"}) {
		t.Errorf("layer: %q", got)
	}
	after := change(t, s, changed, "after", func(dir string) {
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o711 {
			t.Errorf("the next step sees the root as %v %v", info.Mode(), err)
		}
	})
	if got := layerNames(t, s, after); len(got) != 0 {
		t.Errorf("layer: %q", got)
	}
}

func TestDiscardLeavesNothing(t *testing.T) {
	s := newStore(t)
	a, err := s.Prepare(t.Context(), "")
	must(t, err)
	must(t, os.WriteFile(filepath.Join(a.Dir(), "a"), nil, 0o644))
	must(t, a.Discard())
	must(t, a.Discard())
	if _, err := a.Commit(t.Context(), "late"); err == nil {
		t.Error("a discarded snapshot was committed")
	}
	wantEmptyTemp(t, s)
	if s.Has("late") {
		t.Error("the store has it")
	}
}

func wantEmptyTemp(t *testing.T, s *Store) {
	t.Helper()
	left, err := os.ReadDir(s.path("tmp"))
	must(t, err)
	if len(left) != 0 {
		t.Errorf("left in tmp: %v", left)
	}
}

func TestAViewIsReadOnly(t *testing.T) {
	s := newStore(t)
	id := importTar(t, s, "", "f a=1")
	v, err := s.View(t.Context(), id)
	must(t, err)
	if err := os.WriteFile(filepath.Join(v.Dir(), "a"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing to a view: %v", err)
	}
	must(t, v.Close())
	must(t, v.Close())
	wantEmptyTemp(t, s)
}

func TestManyLayersStack(t *testing.T) {
	s := newStore(t)
	var id ID
	var want []string
	for i := range 140 {
		name := fmt.Sprintf("f%03d", i)
		id = importTar(t, s, id, "f "+name+"=x")
		want = append(want, name+"=x")
	}
	wantTree(t, view(t, s, id), want...)
	id = change(t, s, id, "top", func(dir string) { must(t, os.Remove(filepath.Join(dir, "f000"))) })
	wantTree(t, view(t, s, id), want[1:]...)
}

func TestAKernelWithoutLowerdirPlusStacksLayersToo(t *testing.T) {
	s := newStore(t)
	var id ID
	for i := range 140 {
		id = importTar(t, s, id, fmt.Sprintf("f f%03d=x", i))
	}
	lower, err := s.layers(id)
	must(t, err)
	o := overlay{target: t.TempDir()}
	for _, dir := range lower {
		f, err := os.Open(dir)
		must(t, err)
		defer f.Close()
		o.lower = append(o.lower, fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	}
	must(t, o.mountByString())
	defer unmount(o.target)
	if got := list(t, o.target); len(got) != 140 {
		t.Errorf("%d files", len(got))
	}
}

func TestAnOpaqueRootHidesTheBase(t *testing.T) {
	s := newStore(t)
	base := importTar(t, s, "", "f old=1")
	top := importTar(t, s, base, "f .wh..wh..opq=", "f new=1")
	wantTree(t, view(t, s, top), "new=1")
	change(t, s, top, "step", func(dir string) { wantTree(t, list(t, dir), "new=1") })
}

func TestImpliedParentsKeepTheBasesAttributes(t *testing.T) {
	s := newStore(t)
	base := change(t, s, "", "base", func(dir string) {
		must(t, os.Mkdir(filepath.Join(dir, "tmp"), 0o755))
		must(t, os.Chmod(filepath.Join(dir, "tmp"), 0o777|os.ModeSticky))
	})
	top := importTar(t, s, base, "f tmp/x/a=1")
	v, err := s.View(t.Context(), top)
	must(t, err)
	defer v.Close()
	info, err := os.Stat(filepath.Join(v.Dir(), "tmp"))
	must(t, err)
	if got := info.Mode(); got != fs.ModeDir|fs.ModeSticky|0o777 {
		t.Errorf("mode of /tmp is %v", got)
	}
}

func TestLayersUnpackedAtTheSameTimeEqualLayersUnpackedInOrder(t *testing.T) {
	layers := [][]byte{
		makeTar("d d", "f d/base=1", "f keep=1", "f gone=1"),
		makeTar("f d/x/one=1", "f .wh.gone="),
		makeTar("f d/x/two=2", "f d/x/.wh.one=", "f tmp/three=3"),
	}
	inOrder, atOnce := newStore(t), newStore(t)
	var want ID
	for _, data := range layers {
		var err error
		want, err = importLayer(t.Context(), inOrder, want, digest.FromBytes(data), bytes.NewReader(data))
		must(t, err)
	}
	unpacked := make([]*Unpacked, len(layers))
	for i := len(layers) - 1; i >= 0; i-- {
		var err error
		unpacked[i], err = atOnce.Unpack(t.Context(), digest.FromBytes(layers[i]), bytes.NewReader(layers[i]))
		must(t, err)
	}
	var got ID
	for _, u := range unpacked {
		var err error
		got, err = u.Commit(t.Context(), got)
		must(t, err)
	}
	if got != want {
		t.Fatalf("the chain is %s, in order it is %s", got, want)
	}
	wantTree(t, view(t, atOnce, got), view(t, inOrder, want)...)
	wantEmptyTemp(t, atOnce)
}

func TestALayerNeedsTheOneBelowItOnlyToBeCommitted(t *testing.T) {
	s := newStore(t)
	data := makeTar("f a=1")
	u, err := s.Unpack(t.Context(), digest.FromBytes(data), bytes.NewReader(data))
	must(t, err)
	if _, err := u.Commit(t.Context(), ID(digest.FromString("nothing"))); !errors.Is(err, ErrNotFound) {
		t.Errorf("a layer was committed on nothing: %v", err)
	}
	wantEmptyTemp(t, s)
}

func TestSquashEqualsTheLayersInOrder(t *testing.T) {
	s := newStore(t)
	base := importTar(t, s, "", "d d", "f d/base=1", "f keep=1")
	one := importTar(t, s, base, "f secret=s", "d d", "f d/one=1", "f .wh.keep=")
	two := importTar(t, s, one, "f .wh.secret=", "d d", "f d/.wh..wh..opq=", "f d/two=2")
	squashed, err := s.Squash(t.Context(), base, []ID{one, two}, "squashed")
	must(t, err)
	wantTree(t, view(t, s, squashed), view(t, s, two)...)
	want := []string{"d/", "d/.wh.base", "d/two", ".wh.keep"}
	if diff := cmp.Diff(want, layerNames(t, s, squashed)); diff != "" {
		t.Errorf("the squashed layer still tells of the secret (-want +got):\n%s", diff)
	}
}

func TestRerootRepeatsAChangeSetOnAnotherParent(t *testing.T) {
	s := newStore(t)
	base := importTar(t, s, "", "d app", "f app/old=1", "f etc=1")
	must(t, os.Chmod(filepath.Join(s.dir(base), "fs"), 0o711))
	copied := change(t, s, "", "copied", func(dir string) {
		must(t, os.Mkdir(filepath.Join(dir, "app"), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, "app/new"), []byte("2"), 0o644))
	})
	id, err := s.Reroot(t.Context(), copied, base, "linked")
	must(t, err)
	wantTree(t, view(t, s, id), "app/", "app/old=1", "app/new=2", "etc=1")
	if diff := cmp.Diff([]string{"app/", "app/new"}, layerNames(t, s, id)); diff != "" {
		t.Error(diff)
	}
	again, err := s.Reroot(t.Context(), id, id, "twice")
	must(t, err)
	wantTree(t, view(t, s, again), "app/", "app/old=1", "app/new=2", "etc=1")
	change(t, s, again, "after", func(dir string) {
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o711 {
			t.Errorf("root of the base lost its mode: %v", info.Mode())
		}
	})
}

func TestAWrongDiffIDLeavesNothing(t *testing.T) {
	s := newStore(t)
	data := makeTar("f a=1")
	promised := digest.FromString("something else")
	if _, err := importLayer(t.Context(), s, "", promised, bytes.NewReader(data)); err == nil || !strings.Contains(err.Error(), "promised") {
		t.Errorf("importing other content than promised: %v", err)
	}
	padded := append(bytes.Clone(data), "extra"...)
	if _, err := importLayer(t.Context(), s, "", digest.FromBytes(data), bytes.NewReader(padded)); err == nil {
		t.Error("bytes after the end of the archive were not part of the digest")
	}
	for n := 0; n < len(data); n += 97 {
		if _, err := importLayer(t.Context(), s, "", digest.FromBytes(data), bytes.NewReader(data[:n])); err == nil {
			t.Errorf("a stream cut at %d of %d was accepted", n, len(data))
		}
	}
	if s.Has(ChainID("", promised)) || s.Has(ChainID("", digest.FromBytes(data))) {
		t.Error("the store has the layer")
	}
	wantEmptyTemp(t, s)
	id, err := importLayer(t.Context(), s, "", digest.FromBytes(padded), bytes.NewReader(padded))
	must(t, err)
	wantTree(t, view(t, s, id), "a=1")
}

func TestKeysAndFacts(t *testing.T) {
	s := newStore(t)
	key := Key(digest.FromString("cause").Encoded())
	if _, ok, err := s.Lookup(key); ok || err != nil {
		t.Fatalf("lookup of an unknown key: %v %v", ok, err)
	}
	must(t, s.Remember(key, "gone"))
	if _, ok, err := s.Lookup(key); ok || err != nil {
		t.Errorf("a key leads to a snapshot that is not there: %v %v", ok, err)
	}
	id := importTar(t, s, "", "f a=1")
	must(t, s.Remember(key, id))
	if got, ok, err := s.Lookup(key); got != id || !ok || err != nil {
		t.Errorf("lookup = %v %v %v", got, ok, err)
	}
	var v struct{ N int }
	if ok, err := s.Fact(key, &v); ok || err != nil {
		t.Errorf("unknown fact: %v %v", ok, err)
	}
	v.N = 7
	must(t, s.SetFact(key, v))
	v.N = 0
	if ok, err := s.Fact(key, &v); !ok || err != nil || v.N != 7 {
		t.Errorf("fact = %v %v %v", v, ok, err)
	}
	must(t, os.WriteFile(filepath.Join(s.facts, string(key[:2]), string(key)), nil, 0o600))
	if ok, err := s.Fact(key, &v); ok || err != nil {
		t.Errorf("a torn fact must count as absent: %v %v", ok, err)
	}
	for _, bad := range []Key{"", "..", "../../x", "a/b", "abc\x00"} {
		if err := s.SetFact(bad, 1); err == nil {
			t.Errorf("key %q was accepted: it would name a file outside the store", bad)
		}
		if err := s.Remember(key, ID(bad)); err == nil {
			t.Errorf("id %q was accepted", bad)
		}
		if s.Has(ID(bad)) && bad != "" {
			t.Errorf("has %q", bad)
		}
	}
}

func TestIDMapsDoNotMix(t *testing.T) {
	s := newStore(t)
	id := importTar(t, s, "", "f a=1")
	key := Key(strings.Repeat("a", 64))
	must(t, s.Remember(key, id))
	other, err := Open(s.root, Options{IDMap: "single:0-1000-1"})
	must(t, err)
	if _, ok, _ := other.Lookup(key); ok || other.Has(id) {
		t.Error("files of other owners would be shown")
	}
}

func TestAFactMayBeBytes(t *testing.T) {
	s := newStore(t)
	id := importTar(t, s, "", "f a=1")
	for i, want := range [][]byte{{}, []byte("\n"), []byte("a\n\nb\n"), bytes.Repeat([]byte{0, '"', 0xff}, 1000)} {
		key := Key(fmt.Sprintf("bytes%d", i))
		must(t, s.SetFact(key, want, OfSnapshot(id)))
		got := []byte("before")
		if ok, err := s.Fact(key, &got); !ok || err != nil || !bytes.Equal(got, want) {
			t.Errorf("%q came back as %q: %v %v", want, got, ok, err)
		}
		name, err := entry(s.facts, key)
		must(t, err)
		text, err := os.ReadFile(name)
		must(t, err)
		for at := range text {
			bad := slices.Clone(text)
			bad[at] ^= 4
			must(t, os.WriteFile(name, bad, 0o600))
			if ok, err := s.Fact(key, &got); ok || err != nil {
				t.Fatalf("with byte %d of %d changed it is believed, error %v", at, len(text), err)
			}
		}
		must(t, os.WriteFile(name, text[:len(text)-1], 0o600))
		if ok, err := s.Fact(key, &got); ok || err != nil {
			t.Fatalf("cut short it is believed, error %v", err)
		}
	}
	found, err := s.Verify(t.Context(), Proof{}, true)
	must(t, err)
	if len(found) != 4 {
		t.Errorf("found of 4 damaged facts: %v", found)
	}
}

func TestWhatWasNotSyncedDoesNotOutliveTheBoot(t *testing.T) {
	s := newStore(t)
	safe := importTar(t, s, "", "f a=1")
	must(t, s.Close())
	lost := importTar(t, s, safe, "f b=1")
	later := openStore(t, s.root)
	later.boot = "the next boot"
	if !later.Has(safe) {
		t.Error("a synced snapshot is gone after a boot")
	}
	if later.Has(lost) {
		t.Error("a snapshot whose files may be incomplete is used after a boot")
	}
	if id := importTar(t, later, safe, "f b=1"); id != lost || !later.Has(lost) {
		t.Errorf("it cannot be made again: %v", id)
	}
}

// newer is the format file of a later version.
func newer(t *testing.T, version int) []byte {
	t.Helper()
	text, err := sealed("format", version)
	must(t, err)
	return text
}

func TestADamagedFormatFileIsRepaired(t *testing.T) {
	for _, text := range []string{"3\n", "0\n", "x\n", "", "22\n", "\x002", "gone"} {
		s := newStore(t)
		must(t, everything(t.Context(), s))
		if text == "gone" {
			must(t, os.Remove(s.path("format")))
		} else {
			must(t, os.WriteFile(s.path("format"), []byte(text), 0o600))
		}
		for what, err := range map[string]error{"Check": Check(s.root), "Open": func() error { _, err := Open(s.root, testOptions(false)); return err }()} {
			var e *Error
			if !errors.Is(err, ErrDamaged) || !errors.As(err, &e) || !strings.Contains(e.Hint(), "store verify --repair") {
				t.Errorf("format %q: %s: %v", text, what, err)
			}
		}
		for _, repair := range []bool{false, true} {
			found, err := RepairFormat(s.root, repair)
			must(t, err)
			if len(found) != 1 || found[0].Where != "format" || (found[0].Repair != "") != repair {
				t.Errorf("format %q: %v", text, found)
			}
		}
		if found, err := RepairFormat(s.root, false); len(found) != 0 || err != nil {
			t.Errorf("format %q, after the repair: %v %v", text, found, err)
		}
		wantNoDamage(t, openStore(t, s.root))
		wantEverything(t, openStore(t, s.root))
	}
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "format"), []byte("x"), 0o644))
	if found, err := RepairFormat(dir, true); err == nil || len(found) != 0 {
		t.Errorf("a file of the user was taken for a store's: %v", found)
	}
	wantTree(t, list(t, dir), "format=x")
}

func TestOpenRefusesWhatItCannotUse(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "format"), newer(t, 99), 0o600))
	_, err := Open(dir, Options{IDMap: "m"})
	var e *Error
	if !errors.As(err, &e) || e.Hint() == "" || !strings.Contains(err.Error(), "99") {
		t.Errorf("newer format: %v", err)
	}
	s := newStore(t)
	a, err := s.Prepare(t.Context(), "")
	must(t, err)
	defer a.Discard()
	if _, err := Open(filepath.Join(a.Dir(), "store"), Options{IDMap: "m"}); !errors.As(err, &e) || !strings.Contains(err.Error(), "overlay") {
		t.Errorf("store on an overlay: %v", err)
	}
}

func TestADirectoryOfSomethingElseIsLeftAsItIs(t *testing.T) {
	for _, name := range []string{"thesis.tex", "tmp/draft", "leases/flat.pdf", "cache/a/lock", "content/index.json", "content/post.md", ".format", "snapshots/m/x/meta"} {
		dir := t.TempDir()
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, name), []byte("work"), 0o644))
		must(t, os.Chmod(dir, 0o755))
		before := list(t, dir)
		for what, open := range map[string]func() error{
			"Open":  func() error { _, err := Open(dir, Options{IDMap: "m"}); return err },
			"Check": func() error { return Check(dir) },
		} {
			err := open()
			var e *Error
			if !errors.As(err, &e) || !strings.Contains(err.Error(), "no store of ours") || !strings.Contains(e.Hint(), "an empty one") {
				t.Errorf("%s of a directory with %s: %v", what, name, err)
			}
			if diff := cmp.Diff(before, list(t, dir)); diff != "" {
				t.Errorf("%s changes a directory with the user's %s: %s", what, name, diff)
			}
			if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o755 {
				t.Errorf("%s takes others' access to a directory with %s: %v %v", what, name, info.Mode(), err)
			}
		}
	}
}

func TestAStoreBeginsInAnEmptyDirectory(t *testing.T) {
	for _, left := range [][]string{nil, {".format-1", ".probe-2"}, {"lost+found/"}, {"content/.leases/"}} {
		dir := t.TempDir()
		for _, name := range left {
			if strings.HasSuffix(name, "/") {
				must(t, os.MkdirAll(filepath.Join(dir, name), 0o700))
			} else {
				must(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
			}
		}
		if err := Check(dir); !errors.Is(err, ErrNoStore) {
			t.Errorf("with %q, before it is opened: %v", left, err)
		}
		openStore(t, dir)
		if err := Check(dir); err != nil {
			t.Errorf("with %q, after it was opened: %v", left, err)
		}
	}
	missing := filepath.Join(t.TempDir(), "missing")
	if err := Check(missing); !errors.Is(err, ErrNoStore) || exists(missing) {
		t.Errorf("a directory that is not there: %v", err)
	}
}

func TestAStoreBehindALinkIsOneAsAnyOther(t *testing.T) {
	elsewhere := newStore(t)
	must(t, everything(t.Context(), elsewhere))
	link := filepath.Join(t.TempDir(), "cooper")
	must(t, os.Symlink(elsewhere.root, link))
	must(t, Check(link))
	s, err := Open(link, testOptions(false))
	must(t, err)
	found, err := s.Verify(t.Context(), Proof{}, true)
	must(t, err)
	if len(found) != 0 {
		t.Errorf("verify finds %v", found)
	}
	if to, err := os.Readlink(link); err != nil || to != elsewhere.root {
		t.Errorf("the link leads to %q (%v): the store vanished from where it is looked for", to, err)
	}
	wantEverything(t, openStore(t, link))
}

func TestAPartBehindALinkIsToldAndNotMoved(t *testing.T) {
	s := newStore(t)
	elsewhere := t.TempDir()
	must(t, os.Symlink(elsewhere, s.path("content")))
	found, err := s.Verify(t.Context(), Proof{}, true)
	must(t, err)
	if len(found) != 1 || found[0].Where != "content" || found[0].Repair != "" {
		t.Errorf("verify: %v", found)
	}
	if to, err := os.Readlink(s.path("content")); to != elsewhere {
		t.Errorf("the link leads to %q (%v): all images vanished", to, err)
	}
}

func TestOpenSaysWhatIsWrongAndWhatToDo(t *testing.T) {
	others := t.TempDir()
	if !nstest.Single() { // who has one id only cannot make a directory of somebody else, and need not: "/" is one
		must(t, os.Chown(others, 1, 1))
	} else {
		others = "/"
	}
	formats := func(text string) string {
		dir := t.TempDir()
		must(t, os.WriteFile(filepath.Join(dir, "format"), []byte(text), 0o600))
		return dir
	}
	under := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(under, nil, 0o600))
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink("/nowhere", link))
	for _, tt := range []struct{ dir, what, advice string }{
		{link, "a link to /nowhere", "make that directory"},
		{others, "not to you", "a directory of your own"},
		{formats(string(newer(t, 3))), "this program knows 2", "newer program"},
		{formats("1\n"), "knows only 2", "can push the images"},
		{formats("thesis"), "no store of ours: its format file says", "another directory"},
		{filepath.Join(under, "store"), "not a directory", "write to"},
	} {
		_, err := Open(tt.dir, Options{IDMap: "m"})
		var e *Error
		if !errors.As(err, &e) || !strings.Contains(err.Error(), tt.what) || !strings.Contains(err.Error(), tt.dir) || !strings.Contains(e.Hint(), tt.advice) {
			t.Errorf("%s: %v, want %q and advice with %q", tt.dir, err, tt.what, tt.advice)
		}
	}
}

func TestUnsuitableFileSystemsAreNamed(t *testing.T) {
	for kind, what := range map[int64]string{
		unix.OVERLAYFS_SUPER_MAGIC: "overlay", unix.NFS_SUPER_MAGIC: "NFS", unix.CIFS_SUPER_MAGIC: "Windows", unix.V9FS_MAGIC: "network",
		unix.EXT4_SUPER_MAGIC: "", unix.XFS_SUPER_MAGIC: "", unix.BTRFS_SUPER_MAGIC: "", unix.TMPFS_MAGIC: "",
	} {
		why, advice := unsuitable(kind)
		if !strings.Contains(why, what) || (what == "") != (why == "") || (what == "") != (advice == "") {
			t.Errorf("%#x: %q %q, want %q", kind, why, advice, what)
		}
	}
}

func TestTheStoreIsPrivate(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o777))
	openStore(t, dir)
	if info, _ := os.Stat(dir); info.Mode().Perm() != 0o700 {
		t.Errorf("others can reach the store: %v", info.Mode())
	}
}

func TestCancelledWorkLeavesNothing(t *testing.T) {
	s := newStore(t)
	cause := errors.New("another step failed")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	data := makeTar("f a=1")
	if _, err := importLayer(ctx, s, "", digest.FromBytes(data), bytes.NewReader(data)); !errors.Is(err, cause) {
		t.Errorf("import: %v", err)
	}
	if _, err := s.Prepare(ctx, ""); !errors.Is(err, cause) {
		t.Errorf("prepare: %v", err)
	}
	wantEmptyTemp(t, s)
}

func TestCacheDirectoriesStay(t *testing.T) {
	s := newStore(t)
	dir, unlock, err := s.CacheDir(t.Context(), "/root/.cache", Shared)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "a"), []byte("1"), 0o600))
	again, unlockAgain, err := s.CacheDir(t.Context(), "/root/.cache", Shared)
	must(t, err)
	unlock()
	unlockAgain()
	other, unlock, err := s.CacheDir(t.Context(), "other", Locked)
	must(t, err)
	defer unlock()
	if dir != again || dir == other {
		t.Errorf("directories: %s %s %s", dir, again, other)
	}
	wantTree(t, list(t, again), "a=1")
}

func TestWaitingForACacheDirectoryCanBeCalledOff(t *testing.T) {
	s := newStore(t)
	_, unlock, err := s.CacheDir(t.Context(), "id", Locked)
	must(t, err)
	cause := errors.New("the user left")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if _, _, err := s.CacheDir(ctx, "id", Shared); !errors.Is(err, cause) {
		t.Errorf("got %v, want %v: another build's RUN would keep this one from ending", err, cause)
	}
	unlock()
	_, unlock, err = s.CacheDir(t.Context(), "id", Shared)
	must(t, err)
	unlock()
}

func TestPrivateCacheDirectoriesAreNeverUsedByTwo(t *testing.T) {
	s := newStore(t)
	take := func(sharing Sharing) (string, func()) {
		dir, unlock, err := s.CacheDir(t.Context(), "id", sharing)
		must(t, err)
		return dir, unlock
	}
	first, unlockFirst := take(Private)
	second, unlockSecond := take(Private)
	third, unlockThird := take(Private)
	if first == second || second == third || first == third {
		t.Fatalf("two users at a time got one directory: %s %s %s", first, second, third)
	}
	must(t, os.WriteFile(filepath.Join(second, "a"), []byte("2"), 0o600))
	unlockSecond()
	again, unlockAgain := take(Private)
	if again != second {
		t.Errorf("got %s, want the first that is free, %s", again, second)
	}
	wantTree(t, list(t, again), "a=2")
	unlockAgain()
	unlockFirst()

	shared, unlockShared := take(Shared)
	if shared != first {
		t.Errorf("a shared user got %s, want the first, %s", shared, first)
	}
	beside, unlockBeside := take(Private)
	if beside != second {
		t.Errorf("a private user got %s beside a shared one, want %s", beside, second)
	}
	unlockBeside()
	unlockShared()
	unlockThird()
	other, unlockOther, err := s.CacheDir(t.Context(), "id#2", Private)
	must(t, err)
	defer unlockOther()
	if other == second {
		t.Errorf("another id, %q, leads to %s", "id#2", other)
	}
}
