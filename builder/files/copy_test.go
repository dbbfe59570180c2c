package files

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/continuity/fs"
	"github.com/google/go-cmp/cmp"
	fscopy "github.com/tonistiigi/fsutil/copy"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/plan"
)

// reference does a copy as BuildKit's solver/llbsolver/file does, with the very library that it uses.
func reference(ctx context.Context, src, dst string, c plan.Copy, own *ids) error {
	if !c.CreateDestPath {
		p, err := fs.RootPath(dst, filepath.Join("/", c.Dst))
		if err != nil {
			return err
		}
		if _, err := os.Lstat(filepath.Dir(p)); err != nil {
			return err
		}
	}
	matches := []string{cleanPath(c.Src)}
	if c.Wildcard {
		var err error
		if matches, err = fscopy.ResolveWildcards(src, cleanPath(c.Src), c.FollowSymlink); err != nil {
			return err
		}
		if len(matches) == 0 && c.AllowEmptyWildcard {
			return nil
		}
		if len(matches) == 0 {
			return errors.New("not found")
		}
	}
	options := func(ci *fscopy.CopyInfo) {
		ci.IncludePatterns, ci.ExcludePatterns = c.Include, c.Exclude
		ci.Utime = c.Timestamp
		ci.Chown = func(old *fscopy.User) (*fscopy.User, error) {
			if own != nil {
				return &fscopy.User{UID: own.uid, GID: own.gid}, nil
			}
			return old, nil
		}
		if c.Mode != nil && c.Mode.Symbolic != "" {
			ci.ModeStr = c.Mode.Symbolic
		} else if c.Mode != nil {
			bits := int(c.Mode.Bits)
			ci.Mode = &bits
		}
		ci.CopyDirContents, ci.FollowLinks = c.ContentsOnly, c.FollowSymlink
		ci.AlwaysReplaceExistingDestPaths = c.ReplaceExisting
	}
	for _, m := range matches {
		if err := fscopy.Copy(ctx, src, m, dst, cleanPath(c.Dst), options, fscopy.AllowXAttrErrors); err != nil {
			return err
		}
	}
	return nil
}

// dockerfile is a copy as the frontend makes it of COPY.
func dockerfile(src, dst string) plan.Copy {
	return plan.Copy{
		Src: src, Dst: dst, FollowSymlink: true, ContentsOnly: true, CreateDestPath: true, Wildcard: true, AllowEmptyWildcard: true,
	}
}

func with(c plan.Copy, change func(*plan.Copy)) plan.Copy {
	change(&c)
	return c
}

// someTree has one of everything that a stage can have.
var someTree = []string{
	"f a.txt", "f b.txt 600", "f c.go 644", "f run.sh 755", "f suid 4755", "f sticky 1644", "f empty 644",
	"d dir 750", "f dir/x 640", "f dir/y 644", "d dir/sub 700", "f dir/sub/z.txt", "d dir/sub/deep/er 2755", "f dir/sub/deep/er/w.go",
	"d hollow 711", "l link a.txt", "l dirlink dir", "l abs /dir/sub", "l dangling nowhere", "l up ../../../../a.txt", "l loop loop",
	"f hard1", "h hard2 hard1", "h dir/hard3 hard1", "p fifo 622", "f sp%20ace", "f [x]", `f back\slash`, "f .dot", "d .hid", "f .hid/in",
	"d m1", "f m1/src/main.go", "d m2", "f m2/src/main.go", "f m2/src/other.go", "f m3", "l chain link", "l dir/back ../a.txt",
	"o a.txt 1000 1001", "o suid 5 6", "o dir 7 8", "o dir/sub/z.txt 9 10", "o link 11 12", "o fifo 13 14", "o dir/sub 15 0",
	"x a.txt user.note hello", "x dir user.colour blue", "x dir/sub user.colour red",
}

func TestCopyDoesWhatBuildKitDoes(t *testing.T) {
	type patterns = []string
	owner := &plan.Owner{UID: 0, GID: 0}
	if !singleID() {
		owner = &plan.Owner{UID: 33, GID: 44}
	}
	octal := func(bits uint32) func(*plan.Copy) { return func(c *plan.Copy) { c.Mode = &plan.Mode{Bits: bits} } }
	symbolic := func(s string) func(*plan.Copy) { return func(c *plan.Copy) { c.Mode = &plan.Mode{Symbolic: s} } }
	include := func(p ...string) func(*plan.Copy) { return func(c *plan.Copy) { c.Include = p } }
	exclude := func(p ...string) func(*plan.Copy) { return func(c *plan.Copy) { c.Exclude = p } }
	chown := func(c *plan.Copy) { c.Owner = owner }
	whole := func(c *plan.Copy) { c.ContentsOnly = false }
	nofollow := func(c *plan.Copy) { c.FollowSymlink = false }
	literal := func(c *plan.Copy) { c.Wildcard = false }
	someExists := func(c *plan.Copy) { c.CreateDestPath = false }
	strict := func(c *plan.Copy) { c.AllowEmptyWildcard = false }
	replace := func(c *plan.Copy) { c.ReplaceExisting = true }
	stamp := func(c *plan.Copy) { at := planted.Add(99 * 24 * time.Hour); c.Timestamp = &at }

	existing := patterns{
		"d app 700", "f app/a.txt 600 old", "d app/sub 711", "f app/sub/old", "f file 640 old", "l applink app", "l abslink /app",
		"l filelink file", "l broken gone/there", "l escape ../../../../app", "d app/dir 700", "l app/link elsewhere", "d app/x", "d usr/bin",
		"l bin usr/bin", "h file2 file", "d sg 2775", "f app/sub/z.txt 600 old", "d app/hard1/in", "l looped looped", "p app/empty",
		"o app 3 4", "o app/sub 5 6", "o sg 7 8", "x app/sub user.colour old", "l app/b.txt ../file",
	}
	type testCase struct {
		src, dst string
		change   []func(*plan.Copy)
		to       patterns
	}
	var tests []testCase
	add := func(src, dst string, change ...func(*plan.Copy)) {
		for _, to := range []patterns{nil, existing} {
			tests = append(tests, testCase{src: src, dst: dst, change: change, to: to})
		}
	}
	for _, src := range []string{
		"/a.txt", "/suid", "/dir", "/dir/", "/dir/.", "/", "/.", "/hollow", "/link", "/dirlink", "/dirlink/", "/dirlink/x", "/abs", "/abs/z.txt",
		"/dangling", "/up", "/loop", "/fifo", "/missing", "/dir/missing", "/a.txt/x", "/sp ace", "/chain", "/hard2", "/dir/../a.txt", "/../a.txt",
		"/*", "/*.txt", "/?.txt", "/[ab].txt", "/[^ab]*", "/m*", "/*/src", "/*/src/*.go", "/m*/src/main.go", "/dir*", "/dirlink/*", "/abs/*",
		"/no*", "/.*", "/[[]x]", `/\[x\]`, `/back\\slash`, "/*/", "/d*r", "/hard*", "/loop/*", "/a.txt/*", "/**/main.go", "/m?[/]src",
	} {
		for _, dst := range []string{"/", "/new", "/new/", "/new/.", "/app", "/app/", "/file", "/deep/er/new"} {
			add(src, dst)
		}
	}
	for _, dst := range []string{
		"/applink", "/applink/", "/abslink/q", "/filelink", "/broken", "/broken/", "/escape/", "/bin/", "/app/sub", "/file/x", "/sg/n", "/looped", "/looped/x",
		"/app/../up", "/../out", "/app/x", "/file2", "/sg/n/",
	} {
		for _, src := range []string{"/a.txt", "/dir", "/*.txt"} {
			add(src, dst)
			add(src, dst, whole)
			add(src, dst, replace)
		}
	}
	for _, change := range []func(*plan.Copy){
		whole, nofollow, literal, someExists, strict, replace, stamp, chown, octal(0o600), octal(0o4755), octal(0o7777), octal(0),
		symbolic("u=rwX,go=rX"), symbolic("a-w"), symbolic("g+s"), symbolic("+x"), symbolic("u+s,o="),
		include("*.txt"), include("**/*.go"), include("dir/sub"), include("dir/*/deep"), include("none"), include("*", "!dir"), include("sub/deep/er"),
		exclude("*.txt"), exclude("**/*.go"), exclude("dir"), exclude("dir", "!dir/sub/z.txt"), exclude("*"), exclude("**", "!**/w.go"), exclude("sub"),
		func(c *plan.Copy) { c.Include, c.Exclude = patterns{"dir", "sub"}, patterns{"**/*.go", "**/x"} },
		func(c *plan.Copy) { include("sub/deep")(c); octal(0o700)(c); chown(c) },
		func(c *plan.Copy) { whole(c); replace(c) },
		func(c *plan.Copy) { whole(c); chown(c); octal(0o640)(c) },
		func(c *plan.Copy) { nofollow(c); whole(c) },
	} {
		for _, src := range []string{"/a.txt", "/dir", "/", "/*", "/link", "/dirlink", "/no*", "/missing"} {
			tests = append(tests,
				testCase{src: src, dst: "/new/er", change: []func(*plan.Copy){change}},
				testCase{src: src, dst: "/app", change: []func(*plan.Copy){change}, to: existing})
		}
	}
	fresh := newForest(t)
	src := plant(t, filepath.Join(t.TempDir(), "src"), someTree...)
	for i, tt := range tests {
		c := dockerfile(tt.src, tt.dst)
		for _, change := range tt.change {
			change(&c)
		}
		compareCopies(t, i, src, fresh, tt.to, c)
	}
	t.Logf("%d copies compared", len(tests))
}

// overlay mounts a writable view of lower, as a build step gets it.
func overlay(t *testing.T, dir, lower string) string {
	t.Helper()
	for _, d := range []string{"upper", "work", "merged"} {
		must(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	// The root of an overlay is that of its upper directory.
	st, err := os.Stat(lower)
	must(t, err)
	must(t, lutime(filepath.Join(dir, "upper"), st.ModTime()))
	merged := filepath.Join(dir, "merged")
	options := "userxattr,lowerdir=" + lower + ",upperdir=" + dir + "/upper,workdir=" + dir + "/work"
	must(t, unix.Mount("overlay", merged, "overlay", 0, options))
	t.Cleanup(func() { must(t, unix.Unmount(merged, unix.MNT_DETACH)) })
	return merged
}

// TestAnOverlayIsADirectoryLikeOthers copies from one overlay to another, as a build does, and compares with plain
// directories.
func TestAnOverlayIsADirectoryLikeOthers(t *testing.T) {
	existing := []string{
		"d app 700", "f app/a.txt 600 old", "d app/sub 711", "f app/sub/z.txt 600 old", "f app/sub/old", "l applink app", "f hard1 600 x", "h hard2 hard1",
		"d sg 2775", "p app/empty", "f app/fifo", "x app/sub user.colour old",
	}
	for _, actions := range [][]plan.Action{
		{dockerfile("/", "/app")}, {dockerfile("/[a-cm-s]*", "/applink/")}, {dockerfile("/hard*", "/")}, {dockerfile("/dir", "/sg/new"), dockerfile("/dir", "/sg/new")},
		{with(dockerfile("/", "/app"), func(c *plan.Copy) { c.ReplaceExisting = true; c.Owner = &plan.Owner{} })},
		{plan.Remove{Path: "/app"}, dockerfile("/dir", "/app")}, {plan.Mkfile{Path: "/hard1", Mode: 0o600, Data: []byte("y")}},
		{plan.Remove{Path: "/app/sub/*", Wildcard: true}, plan.Mkdir{Path: "/app/sub/new", Mode: 0o711}},
		// What was made in the upper directory is there for what follows.
		{dockerfile("/", "/new"), dockerfile("/dir", "/new/dir"), plan.Remove{Path: "/new/dir/sub/deep"}, dockerfile("/a.txt", "/new/b.txt")},
		{dockerfile("/dir", "/new/er"), dockerfile("/m1", "/new/er"), plan.Mkfile{Path: "/new/er/src/main.go", Data: []byte("y")}},
		{dockerfile("/m*", "/new/"), dockerfile("/hard*", "/new/m1/"), plan.Remove{Path: "/new"}, dockerfile("/dir", "/new")},
		{dockerfile("/large", "/app/large"), dockerfile("/large", "/new"), plan.Mkdir{Path: "/app/sub/x/y", Mode: 0o755, MakeParents: true}},
	} {
		for _, direct := range []bool{false, true} {
			dir := t.TempDir()
			lower := plant(t, filepath.Join(dir, "lower"), existing...)
			plain := plant(t, filepath.Join(dir, "plain"), existing...)
			src := plant(t, filepath.Join(dir, "src"), append(someTree, "f large 640 "+strings.Repeat("x", 100<<10))...)
			from := overlay(t, filepath.Join(dir, "from"), src)
			to := overlay(t, filepath.Join(dir, "to"), lower)
			o := Options{Single: singleID()}
			below := o
			if direct {
				below.Upper = filepath.Join(dir, "to", "upper")
			}
			must(t, Apply(t.Context(), plain, actions, func(plan.Ref) (Tree, error) { return Tree{Dir: src}, nil }, o))
			must(t, Apply(t.Context(), to, actions, func(plan.Ref) (Tree, error) { return Tree{Dir: from}, nil }, below))
			if d := cmp.Diff(take(t, plain, true), take(t, to, true)); d != "" {
				t.Errorf("%+v, in the upper directory %t: on an overlay the result differs (-plain +overlay):\n%s", actions, direct, d)
			}
			d1, err := Digest(t.Context(), Tree{Dir: src}, dockerfile("/", "/x"), nil)
			must(t, err)
			d2, err := Digest(t.Context(), Tree{Dir: from}, dockerfile("/", "/x"), nil)
			must(t, err)
			if d1 != d2 {
				t.Error("on an overlay the digest differs")
			}
		}
	}
}

// forest gives fresh directories quickly.
type forest struct {
	root string
	n    int
}

func newForest(t *testing.T) *forest { return &forest{root: t.TempDir()} }

func (f *forest) dir() string {
	f.n++
	return filepath.Join(f.root, strconv.Itoa(f.n))
}

func compareCopies(t *testing.T, i int, src string, fresh *forest, existing []string, c plan.Copy) {
	t.Helper()
	want, got := plant(t, fresh.dir(), existing...), plant(t, fresh.dir(), existing...)
	defer os.RemoveAll(want)
	defer os.RemoveAll(got)
	var own *ids
	if c.Owner != nil {
		own = &ids{c.Owner.UID, c.Owner.GID}
	}
	// BuildKit runs without a mask; ours must not matter.
	mask := unix.Umask(0)
	wantErr := reference(t.Context(), src, want, c, own)
	unix.Umask(0o077)
	gotErr := Apply(t.Context(), got, []plan.Action{c}, func(plan.Ref) (Tree, error) { return Tree{Dir: src}, nil }, Options{Single: singleID()})
	unix.Umask(mask)
	if (wantErr == nil) != (gotErr == nil) {
		t.Errorf("case %d: %s: got error %v, BuildKit %v", i, show(c, existing), gotErr, wantErr)
		return
	}
	if gotErr != nil {
		if s := gotErr.Error(); strings.Contains(s, src) || strings.Contains(s, got) {
			t.Errorf("case %d: %s: the error shows a path of this machine: %v", i, show(c, existing), gotErr)
		}
		return
	}
	wanted, have := take(t, want, true), take(t, got, true)
	if c.Include != nil || c.Exclude != nil {
		keepImpliedTimes(wanted, have)
	}
	if d := cmp.Diff(wanted, have); d != "" {
		t.Errorf("case %d: %s: differs from BuildKit (-want +got):\n%s", i, show(c, existing), d)
	}
}

// keepImpliedTimes allows one difference: a directory that is copied only because something in it is has the time of
// the build in BuildKit, and the time of its source with us.
func keepImpliedTimes(want, got picture) {
	for i := range min(len(want), len(got)) {
		if s, ok := strings.CutSuffix(want[i], " now"); ok && strings.HasPrefix(got[i], s) && strings.Contains(s, " d") {
			want[i] = got[i]
		}
	}
}

func show(c plan.Copy, existing []string) string {
	var s strings.Builder
	s.WriteString("COPY " + c.Src + " " + c.Dst)
	if existing != nil {
		s.WriteString(" (over an existing tree)")
	}
	for name, on := range map[string]bool{
		"nofollow": !c.FollowSymlink, "whole": !c.ContentsOnly, "literal": !c.Wildcard, "must exist": !c.CreateDestPath,
		"strict": !c.AllowEmptyWildcard, "replace": c.ReplaceExisting, "owner": c.Owner != nil, "time": c.Timestamp != nil,
	} {
		if on {
			s.WriteString(" [" + name + "]")
		}
	}
	if c.Mode != nil {
		s.WriteString(" mode " + c.Mode.String())
	}
	if c.Include != nil {
		s.WriteString(" include " + strings.Join(c.Include, ","))
	}
	if c.Exclude != nil {
		s.WriteString(" exclude " + strings.Join(c.Exclude, ","))
	}
	return s.String()
}
