package files

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/plan"
)

// prison is a root and a source inside a directory that has sentinels beside them. What a hostile tree reaches of
// the sentinels, an attacker reaches of the machine.
type prison struct {
	outside, root, src string
	before             picture
}

func newPrison(t *testing.T, root, src []string) *prison {
	t.Helper()
	p := &prison{outside: filepath.Join(t.TempDir(), "machine")}
	plant(t, p.outside, "f secret 600 the%20builder's%20key", "f etc/passwd 644 root:x:0:0", "d home/user 700", "f home/user/.ssh/id 600", "f writable 666")
	p.before = take(t, p.outside, false)
	inside := filepath.Join(t.TempDir(), "store")
	p.root, p.src = filepath.Join(inside, "root"), filepath.Join(inside, "src")
	expand := func(lines []string) (out []string) {
		for _, l := range lines {
			out = append(out, strings.NewReplacer("OUTSIDE", p.outside, "CLIMB", strings.Repeat("../", 30)+p.outside[1:]).Replace(l))
		}
		return out
	}
	plant(t, p.root, expand(root)...)
	plant(t, p.src, expand(src)...)
	return p
}

func (p *prison) apply(t *testing.T, actions ...plan.Action) error {
	t.Helper()
	return Apply(t.Context(), p.root, actions, func(plan.Ref) (Tree, error) { return Tree{Dir: p.src}, nil }, Options{Single: singleID()})
}

// check fails if the machine was changed or if anything of it came into the root.
func (p *prison) check(t *testing.T) {
	t.Helper()
	after := take(t, p.outside, false)
	if strings.Join(after, "\n") != strings.Join(p.before, "\n") {
		t.Errorf("files of the machine were changed: an image can write anywhere\nbefore: %q\nafter:  %q", p.before, after)
	}
	for _, line := range take(t, p.root, false) {
		if strings.Contains(line, "key") || strings.Contains(line, "root:x") {
			t.Errorf("a file of the machine came into the image: %s", line)
		}
	}
}

func TestLinksInTheRootLeadNowhereElse(t *testing.T) {
	ways := []string{"l way OUTSIDE", "l way CLIMB", "l way /proc/self/root/OUTSIDE", "l way /proc/1/cwd", "l way ../../../machine", "l way hop", "l way /"}
	for _, way := range ways {
		for _, dst := range []string{"/way", "/way/", "/way/etc/passwd", "/way/secret", "/way/home/user/", "/way/../secret", "/x/way/new"} {
			root := []string{way, "l x .", "l hop OUTSIDE"}
			src := []string{"f f 666 evil", "d d 777", "f d/passwd 666 evil", "f d/secret 666 evil", "f d/etc/passwd"}
			for _, action := range []plan.Action{
				dockerfile("/f", dst), dockerfile("/d", dst), dockerfile("/d/*", dst),
				with(dockerfile("/d", dst), func(c *plan.Copy) { c.ReplaceExisting = true; c.Owner = &plan.Owner{} }),
				plan.Mkdir{Path: dst + "/made", Mode: 0o777, MakeParents: true},
				plan.Mkdir{Path: dst, Mode: 0o777, MakeParents: true},
				plan.Mkfile{Path: dst, Mode: 0o666, Data: []byte("evil")},
				plan.Symlink{Old: "evil", New: dst},
				plan.Remove{Path: dst, AllowNotFound: true}, plan.Remove{Path: dst + "/*", AllowNotFound: true, Wildcard: true},
				plan.Remove{Path: dst + "/secret", AllowNotFound: true}, plan.Remove{Path: "/*/secret", AllowNotFound: true, Wildcard: true},
			} {
				p := newPrison(t, root, src)
				_ = p.apply(t, action) // whether it works is not the question
				p.check(t)
			}
		}
	}
}

func TestLinksInTheSourceLeadNowhereElse(t *testing.T) {
	src := []string{
		"l abs OUTSIDE", "l climb CLIMB", "l file OUTSIDE/secret", "l proc /proc/self/root/OUTSIDE/secret", "l up ../../machine/secret",
		"d d", "l d/abs OUTSIDE", "l d/file OUTSIDE/secret", "l cwd /proc/self/cwd", "l fd /proc/self/fd",
	}
	for _, from := range []string{
		"/abs", "/abs/secret", "/abs/etc/passwd", "/climb", "/climb/secret", "/file", "/proc", "/up", "/d/abs/secret", "/d", "/d/file", "/*", "/*/secret",
		"/abs/*", "/climb/*", "/cwd/*", "/fd/*", "/../../machine/secret", "/d/../../../machine/secret",
	} {
		p := newPrison(t, nil, src)
		_ = p.apply(t, dockerfile(from, "/x/"))
		p.check(t)
		p = newPrison(t, nil, src)
		_ = p.apply(t, with(dockerfile(from, "/x/"), func(c *plan.Copy) { c.Unpack = true }))
		p.check(t)
	}
}

// TestWhatIsThereIsReplacedAndNeverWrittenThrough puts things at the destination that pass on what is written to them.
func TestWhatIsThereIsReplacedAndNeverWrittenThrough(t *testing.T) {
	for _, there := range []string{"p x 666", "s x", "l x OUTSIDE/writable", "f x 666"} {
		for name, action := range map[string]plan.Action{
			"copy":   dockerfile("/f", "/x"),
			"nested": dockerfile("/d", "/"),
			"mkfile": plan.Mkfile{Path: "/x", Mode: 0o644, Data: []byte("new")},
		} {
			p := newPrison(t, []string{there, "h twin x"}, []string{"f f 644 new", "f d/x 644 new"})
			linkOut := strings.HasPrefix(there, "l ")
			if err := p.apply(t, action); err != nil && !linkOut {
				t.Errorf("%s over %q: %v", name, there, err)
				continue
			}
			p.check(t)
			st, err := os.Lstat(filepath.Join(p.root, "x"))
			must(t, err)
			if linkOut {
				continue
			}
			if !st.Mode().IsRegular() {
				t.Errorf("%s over %q left %v", name, there, st.Mode())
			}
			if twin, err := os.Lstat(filepath.Join(p.root, "twin")); err == nil && os.SameFile(st, twin) {
				t.Errorf("%s over %q wrote through a hard link: every name of the file changed", name, there)
			}
		}
	}
}

// TestSpecialFilesAreNeverOpened would hang if a FIFO was opened.
func TestSpecialFilesAreNeverOpened(t *testing.T) {
	src := []string{"p fifo", "s sock", "d d", "p d/fifo", "l link fifo"}
	for _, from := range []string{"/fifo", "/sock", "/d", "/link", "/*", "/"} {
		for _, unpack := range []bool{false, true} {
			p := newPrison(t, nil, src)
			c := with(dockerfile(from, "/x/"), func(c *plan.Copy) { c.Unpack = unpack })
			if err := p.apply(t, c); err != nil {
				t.Errorf("COPY %s: %v", from, err)
			}
			if _, err := Digest(t.Context(), Tree{Dir: p.src}, c, NewHashCache()); err != nil {
				t.Errorf("digest of %s: %v", from, err)
			}
		}
	}
}

// TestASwappedSourceIsAnError swaps a directory for a link between two looks at it, as a process that shares the
// context could.
func TestASwappedSourceIsAnError(t *testing.T) {
	p := newPrison(t, nil, []string{"f d/secret 644 harmless", "l evil OUTSIDE"})
	done := make(chan struct{})
	ctx, stop := context.WithCancel(t.Context())
	go func() {
		defer close(done)
		d, evil := filepath.Join(p.src, "d"), filepath.Join(p.src, "evil")
		for ctx.Err() == nil {
			_ = unix.Renameat2(unix.AT_FDCWD, d, unix.AT_FDCWD, evil, unix.RENAME_EXCHANGE)
		}
	}()
	for range 2000 {
		_ = p.apply(t, plan.Remove{Path: "/x", AllowNotFound: true}, plan.Remove{Path: "/y", AllowNotFound: true}, dockerfile("/d/secret", "/x"))
		_ = p.apply(t, dockerfile("/d", "/y"))
		if y, err := os.Lstat(filepath.Join(p.root, "y")); err == nil && !y.IsDir() {
			t.Fatalf("a link was copied that COPY follows: %v", y.Mode())
		}
		for _, name := range []string{"x", "y/secret"} {
			content, err := os.ReadFile(filepath.Join(p.root, name))
			if err == nil && string(content) != "harmless" {
				t.Fatalf("a race in the context brought %q into the image", content)
			}
		}
	}
	stop()
	<-done
	p.check(t)
}

func TestOwnersOutOfRangeAreRefused(t *testing.T) {
	p := newPrison(t, []string{"f etc/passwd 644 big:x:4294967295:0::/:"}, []string{"f f"})
	for _, o := range []plan.Owner{{UID: -1}, {GID: -1}, {UID: 1 << 31}, {GID: 1<<32 - 1}, {UserName: "big", NamesFrom: 0}} {
		c := with(dockerfile("/f", "/f"), func(c *plan.Copy) { c.Owner = &o })
		err := Apply(t.Context(), p.root, []plan.Action{c}, func(plan.Ref) (Tree, error) { return Tree{Dir: p.root}, nil }, Options{Single: singleID()})
		if err == nil {
			t.Errorf("owner %+v was accepted: to chown -1 means to leave root", o)
		}
	}
}

func TestAnEndedBuildStopsCopying(t *testing.T) {
	p := newPrison(t, nil, someTree)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("another step failed")
	cancel(why)
	err := Apply(ctx, p.root, []plan.Action{dockerfile("/", "/")}, func(plan.Ref) (Tree, error) { return Tree{Dir: p.src}, nil }, Options{})
	if !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
	if _, err := Digest(ctx, Tree{Dir: p.src}, dockerfile("/", "/"), nil); !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
}

func TestErrorsSayWhatTheUserWrote(t *testing.T) {
	p := newPrison(t, []string{"f file", "d dir/sub"}, []string{"f a.txt", "d sub", "f sub/keep", "l loop loop"})
	local := Tree{Dir: p.src, Local: true, Exclude: []string{"*.txt", "!b.txt", "sub", "!sub/keep"}}
	stage := Tree{Dir: p.src}
	for _, tt := range []struct {
		tree        Tree
		action      plan.Action
		error, hint string
	}{
		{local, dockerfile("/missing.txt", "/x"), `"missing.txt" not found in the context`, ""},
		{local, dockerfile("/a.txt", "/x"), `"a.txt" not found in the context`, `the pattern "*.txt" in .dockerignore excludes it`},
		{local, dockerfile("/a.txt/b", "/x"), `"a.txt/b" not found in the context`, ""},
		{stage, dockerfile("/etc/nope", "/x"), `"/etc/nope" not found in the stage or image it is copied from`, ""},
		{stage, dockerfile("/loop", "/x"), `read /loop: too many levels of symbolic links`, ""},
		{stage, dockerfile("/[a", "/x"), `"[a" is no valid pattern`, ""},
		{stage, dockerfile("/sub", "/file"), `copy to /file: what is there is no directory and cannot become one`, ""},
		{stage, dockerfile("/a.txt", "/file/"), `make directory /file: not a directory`, ""},
		{stage, with(dockerfile("/a.txt", "/"), func(c *plan.Copy) { c.Required = []string{"/b"} }), `"/b" not found in the stage or image it is copied from`, ""},
		{stage, with(dockerfile("/", "/"), func(c *plan.Copy) { c.Mode = &plan.Mode{Symbolic: "u=q"} }), `mode "u=q": invalid syntax`, ""},
		{stage, with(dockerfile("/", "/"), func(c *plan.Copy) { c.Exclude = []string{"[a"} }), `patterns ["[a"]: syntax error in pattern`, ""},
		{stage, with(dockerfile("/a.txt", "/no/x"), func(c *plan.Copy) { c.CreateDestPath = false }), `copy to /no/x: no such file or directory`, ""},
		{stage, plan.Mkfile{Path: "/dir"}, `write /dir: is a directory`, ""},
		{stage, plan.Mkfile{Path: "/"}, `write /: is a directory`, ""},
		{stage, plan.Mkfile{Path: "/no/x"}, `open /no: no such file or directory`, ""},
		{stage, plan.Mkdir{Path: "/file", MakeParents: true}, `make directory /file: not a directory`, ""},
		{stage, plan.Remove{Path: "/no"}, `remove /no: no such file or directory`, ""},
		{stage, plan.Remove{Path: "/dir/.."}, `remove /: it is the root directory`, ""},
		{stage, plan.Symlink{Old: "x", New: "/file"}, `make link /file: file exists`, ""},
	} {
		err := Apply(t.Context(), p.root, []plan.Action{tt.action}, func(plan.Ref) (Tree, error) { return tt.tree, nil }, Options{Single: singleID()})
		if err == nil || err.Error() != tt.error {
			t.Errorf("%+v:\n got %v\nwant %s", tt.action, err, tt.error)
		}
		var hint interface{ Hint() string }
		if errors.As(err, &hint) != (tt.hint != "") || hint != nil && hint.Hint() != tt.hint {
			t.Errorf("%v: hint %v is not %q", err, hint, tt.hint)
		}
	}
}

func TestACapabilityGoesWithItsFile(t *testing.T) {
	p := newPrison(t, nil, []string{"f ping 755"})
	must(t, unix.Setxattr(filepath.Join(p.src, "ping"), capability, someCapability, 0))
	must(t, p.apply(t, dockerfile("/ping", "/bin/ping")))
	got, err := getXattr(filepath.Join(p.root, "bin/ping"), capability)
	if err != nil || !bytes.Equal([]byte(portableCapability(got)), someCapability) {
		t.Errorf("got %x, %v", got, err)
	}
}

// TestOpenRegularJudgesBeforeItOpens stands for a file that became something else after the walk had looked at it.
// It would hang if the FIFO was opened.
func TestOpenRegularJudgesBeforeItOpens(t *testing.T) {
	p := newPrison(t, nil, []string{"p fifo", "s sock", "d dir", "l link OUTSIDE/secret", "f file"})
	fd, err := unix.Open(p.src, unix.O_DIRECTORY|unix.O_RDONLY, 0)
	must(t, err)
	defer unix.Close(fd)
	for _, name := range []string{"fifo", "sock", "dir", "link"} {
		if f, err := openRegular(fd, name); err == nil {
			t.Errorf("opened the %s: %v", name, f.Close())
		}
	}
	f, err := openRegular(fd, "file")
	must(t, err)
	must(t, f.Close())
}

// TestCreateAtTakesNothingThatIsThere stands for an attacker who is faster than makeRoom.
func TestCreateAtTakesNothingThatIsThere(t *testing.T) {
	p := newPrison(t, []string{"p fifo", "f file", "l link OUTSIDE/writable", "l dangling OUTSIDE/new"}, nil)
	fd, err := unix.Open(p.root, unix.O_DIRECTORY|unix.O_RDONLY, 0)
	must(t, err)
	defer unix.Close(fd)
	for _, name := range []string{"fifo", "file", "link", "dangling"} {
		if f, err := createAt(fd, name); err == nil {
			t.Errorf("wrote through the %s: %v", name, f.Close())
		}
	}
	p.check(t)
}
