package files

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/plan"
)

// A change of a tree for the property that digests and results differ together.
type mutation struct {
	name string
	do   func(t *testing.T, root string)
}

func mutations() []mutation {
	at := func(name, p string, do func(p string) error) mutation {
		return mutation{name + " " + p, func(t *testing.T, root string) {
			t.Helper()
			must(t, do(filepath.Join(root, p)))
		}}
	}
	chmod := func(m os.FileMode) func(string) error { return func(p string) error { return os.Chmod(p, m) } }
	all := []mutation{
		{"nothing", func(*testing.T, string) {}},
		at("content", "src/a.go", func(p string) error { return os.WriteFile(p, []byte("content of src/a.gO"), 0) }),
		at("append", "main.go", func(p string) error { return os.WriteFile(p, []byte("content of main.go+"), 0) }),
		at("truncate", "go.mod", func(p string) error { return os.Truncate(p, 0) }),
		at("mode", "main.go", chmod(0o640)),
		at("setuid", "main.go", chmod(0o600|os.ModeSetuid)),
		at("sticky", "src", chmod(0o755|os.ModeSticky)),
		at("setgid", "src/b", chmod(0o755|os.ModeSetgid)),
		at("mode", "src", chmod(0o700)),
		at("mode", "node_modules", chmod(0o711)),
		at("mode", "a/b", chmod(0o711)),
		at("mode", ".", chmod(0o700)),
		at("mode", "src/pipe", chmod(0o600)),
		at("time", "main.go", func(p string) error { return lutime(p, time.Unix(1, 0)) }),
		at("time", "src", func(p string) error { return lutime(p, time.Unix(2, 0)) }),
		at("remove", "docs/b.md", os.Remove),
		at("remove", "empty/inner", os.Remove),
		at("remove", "node_modules/x", os.RemoveAll),
		at("rename", "src/a.go", func(p string) error { return os.Rename(p, p+"x") }),
		at("rename", "a/b/c", func(p string) error { return os.Rename(p, filepath.Dir(p)+"/cc") }),
		at("add", "src/new", func(p string) error { return os.WriteFile(p, nil, 0o644) }),
		at("add directory", "src/newdir", func(p string) error { return os.Mkdir(p, 0o755) }),
		at("add ignored", "node_modules/y", func(p string) error { return os.WriteFile(p, nil, 0o644) }),
		at("retarget", "link", func(p string) error { return swap(p, func() error { return os.Symlink("src/a_test.go", p) }) }),
		at("file for link", "link", func(p string) error {
			return swap(p, func() error { return os.WriteFile(p, []byte("src/a.go"), 0o777) })
		}),
		at("directory for file", "go.mod", func(p string) error { return swap(p, func() error { return os.Mkdir(p, 0o644) }) }),
		at("file for fifo", "src/pipe", func(p string) error { return swap(p, func() error { return os.WriteFile(p, nil, 0o644) }) }),
		at("xattr", "main.go", func(p string) error { return unix.Setxattr(p, "user.note", []byte("ho"), 0) }),
		at("new xattr", "src/b", func(p string) error { return unix.Setxattr(p, "user.new", nil, 0) }),
		at("less xattr", "main.go", func(p string) error { return unix.Removexattr(p, "user.note") }),
		at("book-keeping xattr", "main.go", func(p string) error { return unix.Setxattr(p, "user.overlay.origin", []byte("x"), 0) }),
		at("capability", "go.mod", func(p string) error { return unix.Setxattr(p, capability, someCapability, 0) }),
		at("unlink twins", "src/hard", func(p string) error {
			return swap(p, func() error { return os.WriteFile(p, []byte("content of hard"), 0o644) })
		}),
		{"join twins", func(t *testing.T, root string) {
			p := filepath.Join(root, "docs/b.md")
			must(t, os.WriteFile(filepath.Join(root, "docs/a.md"), []byte("content of docs/b.md"), 0o644))
			must(t, swap(p, func() error { return os.Link(filepath.Join(root, "docs/a.md"), p) }))
		}},
	}
	if !singleID() {
		all = append(all,
			at("owner", "src/a.go", func(p string) error { return os.Lchown(p, 7, 0) }),
			at("group", "src/b", func(p string) error { return os.Lchown(p, 0, 7) }),
			at("owner", "link", func(p string) error { return os.Lchown(p, 7, 8) }))
	}
	return all
}

// someCapability is cap_net_raw+ep in the form of VFS_CAP_REVISION_2.
var someCapability = []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

func swap(p string, do func() error) error {
	if err := os.RemoveAll(p); err != nil {
		return err
	}
	return do()
}

// TestDigestsDifferExactlyWhenResultsDo changes one attribute of a tree at a time. A digest that stays while the
// result changes is a stale image; one that changes while the result stays is a lost cache hit.
func TestDigestsDifferExactlyWhenResultsDo(t *testing.T) {
	owner := &plan.Owner{}
	copies := map[string]plan.Copy{
		"everything":  dockerfile("/", "/new"),
		"directory":   dockerfile("/src", "/new/"),
		"whole":       with(dockerfile("/src", "/new"), func(c *plan.Copy) { c.ContentsOnly = false }),
		"file":        dockerfile("/main.go", "/new"),
		"through":     dockerfile("/link", "/new"),
		"link itself": with(dockerfile("/link", "/new"), func(c *plan.Copy) { c.FollowSymlink = false }),
		"glob":        dockerfile("/*o*", "/new/"),
		"owner":       with(dockerfile("/", "/new"), func(c *plan.Copy) { c.Owner = owner }),
		"mode":        with(dockerfile("/", "/new"), func(c *plan.Copy) { c.Mode = &plan.Mode{Bits: 0o750} }),
		"symbolic":    with(dockerfile("/", "/new"), func(c *plan.Copy) { c.Mode = &plan.Mode{Symbolic: "u=rw,go=r"} }),
		"exclude":     with(dockerfile("/", "/new"), func(c *plan.Copy) { c.Exclude = []string{"**/*.md", "src/b"} }),
		"include":     with(dockerfile("/", "/new"), func(c *plan.Copy) { c.Include = []string{"src/b", "a/b/c/d/e"} }),
	}
	trees := map[string]Tree{
		"stage":   {},
		"context": {Local: true},
		"ignored": {Local: true, Exclude: []string{"node_modules", "!node_modules/keep", "docs", "*.mod"}},
	}
	fresh := newForest(t)
	before := plant(t, fresh.dir(), someContext...)
	type outcome struct {
		digest digest.Digest
		result picture
	}
	unchanged := map[string]outcome{}
	for treeName, tree := range trees {
		for copyName, c := range copies {
			d, p := digestAndResult(t, fresh, tree, before, c)
			unchanged[treeName+copyName] = outcome{d, p}
		}
	}
	for _, m := range mutations() {
		after := plant(t, fresh.dir(), someContext...)
		m.do(t, after)
		for treeName, tree := range trees {
			for copyName, c := range copies {
				name := m.name + ", " + treeName + ", " + copyName
				d1, p1 := unchanged[treeName+copyName].digest, unchanged[treeName+copyName].result
				d2, p2 := digestAndResult(t, fresh, tree, after, c)
				if same := slices.Equal(p1, p2); same != (d1 == d2) {
					t.Errorf("%s: results equal: %t, digests equal: %t\nbefore: %s\nafter:  %s", name, same, d1 == d2,
						strings.Join(p1, "\n        "), strings.Join(p2, "\n        "))
				}
			}
		}
		must(t, os.RemoveAll(after))
	}
}

func digestAndResult(t *testing.T, fresh *forest, tree Tree, dir string, c plan.Copy) (digest.Digest, picture) {
	t.Helper()
	tree.Dir = dir
	d, digestErr := Digest(t.Context(), tree, c, nil)
	to := fresh.dir()
	must(t, os.Mkdir(to, 0o755))
	defer os.RemoveAll(to)
	err := Apply(t.Context(), to, []plan.Action{c}, func(plan.Ref) (Tree, error) { return tree, nil }, Options{Single: singleID()})
	if (err == nil) != (digestErr == nil) {
		t.Errorf("copying says %v, digesting says %v", err, digestErr)
	}
	if err != nil {
		return digest.FromString(digestErr.Error()), picture{err.Error()}
	}
	return d, take(t, to, false)
}

func TestDigestDoesNotMixUpNeighbours(t *testing.T) {
	trees := [][]string{
		{"f ab 644 c"}, {"f a 644 bc"}, {"f a 644 b", "f c 644"}, {"d a", "f b"}, {"d a", "f a/b"}, {"l a b"}, {"f a 777 b"},
		{"f a 644 x", "f b 644 y"}, {"f a 644 y", "f b 644 x"}, {"f a 644 x", "h b a"}, {"f a 644 x", "f b 644 x"},
		{"f a 644 x", "x a user.b c"}, {"f a 644 x", "x a user.bc x"}, {},
	}
	seen := map[digest.Digest]int{}
	for i, lines := range trees {
		root := plant(t, filepath.Join(t.TempDir(), "t"), lines...)
		d, err := Digest(t.Context(), Tree{Dir: root}, dockerfile("/", "/x"), nil)
		must(t, err)
		if j, ok := seen[d]; ok {
			t.Errorf("%q and %q have the same digest", trees[j], lines)
		}
		seen[d] = i
	}
}

func TestAnUnchangedContextIsLookedAtAndNotRead(t *testing.T) {
	root := plant(t, filepath.Join(t.TempDir(), "context"), someContext...)
	tree, c := Tree{Dir: root, Local: true}, dockerfile("/", "/x")
	cache := NewHashCache()
	cache.now = func() time.Time { return time.Now().Add(time.Hour) }
	want, err := Digest(t.Context(), tree, c, cache)
	must(t, err)
	plain, err := Digest(t.Context(), tree, c, nil)
	must(t, err)
	saved, changed := cache.Save()
	if want != plain || !changed {
		t.Fatalf("digest with a cache is %s, without %s; changed: %t", want, plain, changed)
	}
	// A cache that lies shows whether it is believed, and so that nothing was read.
	loaded := LoadHashCache(saved)
	loaded.now = cache.now
	for p, k := range loaded.known {
		k.sum[0] ^= 0xff
		loaded.known[p] = k
	}
	lied, err := Digest(t.Context(), tree, c, loaded)
	must(t, err)
	if lied == want {
		t.Error("a remembered hash was not used: every build reads the whole context")
	}
	reloaded := LoadHashCache(saved)
	got, err := Digest(t.Context(), tree, c, reloaded)
	must(t, err)
	if got != want {
		t.Errorf("digest from a loaded cache is %s, want %s", got, want)
	}
	if _, changed := reloaded.Save(); changed {
		t.Error("nothing new was learnt, but the cache wants to be written")
	}
}

func TestAChangedFileIsReadAgainWhateverItsTimeSays(t *testing.T) {
	root := plant(t, filepath.Join(t.TempDir(), "context"), "f a 644 one", "f b")
	tree, c := Tree{Dir: root, Local: true}, dockerfile("/", "/x")
	cache := NewHashCache()
	cache.now = func() time.Time { return time.Now().Add(time.Hour) }
	before, err := Digest(t.Context(), tree, c, cache)
	must(t, err)
	st, err := os.Stat(filepath.Join(root, "a"))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(root, "a"), []byte("two"), 0o644))
	must(t, os.Chtimes(filepath.Join(root, "a"), st.ModTime(), st.ModTime()))
	after, err := Digest(t.Context(), tree, c, cache)
	must(t, err)
	if before == after {
		t.Error("a file of the same size and time but with another content was taken from the cache: the image is stale")
	}
}

func TestAttributesAreAskedForOnlyAfterAChange(t *testing.T) {
	root := plant(t, filepath.Join(t.TempDir(), "context"), "f a 644 one")
	tree, c := Tree{Dir: root, Local: true}, dockerfile("/", "/x")
	cache := settledCache()
	before, err := Digest(t.Context(), tree, c, cache)
	must(t, err)
	time.Sleep(20 * time.Millisecond) // the grain of times
	file := filepath.Join(root, "a")
	must(t, unix.Setxattr(file, "user.note", []byte("n"), 0))
	saved, _ := cache.Save()
	after, err := Digest(t.Context(), tree, c, cache)
	must(t, err)
	if before == after {
		t.Error("an attribute that was set meanwhile was not seen: the image is stale")
	}
	// A cache that lies shows that the file is not asked.
	lying := LoadHashCache(saved)
	var st unix.Stat_t
	must(t, unix.Stat(file, &st))
	for id, k := range lying.known {
		k.ctime = st.Ctim
		lying.known[id] = k
	}
	lied, err := Digest(t.Context(), tree, c, lying)
	must(t, err)
	if lied != before {
		t.Error("the attributes of a file that is known are listed: every build asks every file of the context")
	}
}

func TestAFileThatHasJustChangedIsNotRemembered(t *testing.T) {
	root := plant(t, filepath.Join(t.TempDir(), "context"), "f a")
	cache := NewHashCache()
	_, err := Digest(t.Context(), Tree{Dir: root, Local: true}, dockerfile("/", "/x"), cache)
	must(t, err)
	if len(cache.known) != 0 {
		t.Error("a file that may change within the grain of its times was remembered: the next image may be stale")
	}
}

func TestADamagedHashCacheIsAnEmptyOne(t *testing.T) {
	cache := NewHashCache()
	for i := range uint64(3) {
		cache.remember(&unix.Stat_t{Dev: 1, Ino: i, Size: 5}, [32]byte{byte(i)}, true)
	}
	saved, _ := cache.Save()
	if got := len(LoadHashCache(saved).known); got != 3 {
		t.Fatalf("loaded %d of 3 files", got)
	}
	for i := range saved {
		bad := slices.Clone(saved)
		bad[i] ^= 1
		if n := len(LoadHashCache(bad).known); n != 0 {
			t.Fatalf("with byte %d changed %d hashes are believed: one could be wrong", i, n)
		}
		if n := len(LoadHashCache(saved[:i]).known); n != 0 {
			t.Fatalf("cut at %d, %d hashes are believed", i, n)
		}
	}
}

func TestTheHashCacheForgetsFilesThatNobodyAsksFor(t *testing.T) {
	cache := NewHashCache()
	used, unused, edited := &unix.Stat_t{Ino: 1}, &unix.Stat_t{Ino: 2}, &unix.Stat_t{Ino: 3}
	cache.remember(used, [32]byte{1}, true)
	cache.remember(unused, [32]byte{2}, true)
	for range maxIdle + 2 {
		edited.Size++
		cache.remember(edited, [32]byte{3}, true)
		saved, changed := cache.Save()
		if !changed {
			t.Fatal("what was learnt is not worth writing")
		}
		cache = LoadHashCache(saved)
		if _, ok := cache.lookup(used); !ok {
			t.Fatal("a file in use was forgotten")
		}
	}
	if _, ok := cache.lookup(unused); ok {
		t.Error("a file that is gone stays for ever: the cache only grows")
	}
}
