package files

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/patternmatcher"
	"github.com/tonistiigi/fsutil"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/plan"
)

var someContext = []string{
	"f Dockerfile", "f .dockerignore", "f README.md", "f main.go 600", "f go.mod", "d src", "f src/a.go", "f src/a_test.go", "f src/b/c.go 755",
	"f src/b/c_test.go", "f src/b/data.bin", "d node_modules 700", "f node_modules/x/index.js", "f node_modules/x/package.json", "f node_modules/keep/me.js",
	"d docs", "f docs/a.md", "f docs/b.md", "f docs/deep/er/c.md", "l link src/a.go", "l dirlink src/b", "l modlink node_modules/x", "l abslink /docs",
	"l self .", "f .git/config", "f .git/objects/aa/bb", "d empty", "d empty/inner", "f secret.pem 600", "f src/secret.pem", "f hard", "h src/hard hard",
	"o main.go 1000 1000", "o src 1000 1000", "o link 5 5", "x main.go user.note hi", "f dir.d/f", "f a/b/c/d/e", "f a/b/x", "p src/pipe",
}

var ignores = [][]string{
	nil, {"node_modules"}, {"**/*_test.go"}, {"*"}, {"*", "!src"}, {"*", "!src/b/c.go"}, {"**", "!**/*.go"}, {"**/*.pem", ".git"}, {"src/*", "!src/b"},
	{"docs/**", "!docs/deep/er/c.md"}, {"node_modules", "!node_modules/keep"}, {"*", "!*.go", "!go.*", "main.go"}, {"link"}, {"dirlink", "modlink"},
	{"/docs/"}, {"./src/b/.."}, {"a/*/c", "!a/b/c/d"}, {"a/**/e"}, {"[rR]*"}, {"s?c"}, {"**/b"}, {"!src", "src"}, {"src", "!src/a.go", "src/a.go"},
	{"*", "!a/b"}, {"a/b", "!a/b/c/d/e"}, {"src/b", "!**/c.go"}, {"**/**"}, {"*.md", "!README.md", "docs"}, {"empty/*"}, {"hard"}, {".*"}, {"src/secret.pem/"},
}

// TestDockerignoreHidesWhatBuildKitHides copies from a context in place, and compares with BuildKit's library run on
// a context that BuildKit's library for sending contexts has filtered.
func TestDockerignoreHidesWhatBuildKitHides(t *testing.T) {
	context := plant(t, filepath.Join(t.TempDir(), "context"), someContext...)
	fresh := newForest(t)
	includes := [][]string{nil, {"src"}, {"src/b", "docs/*.md"}, {"**/*.go"}, {"a/b/c", "link"}}
	for i, ignore := range ignores {
		for j, include := range includes {
			if j > 0 && i%4 != 0 {
				continue
			}
			sent := send(t, context, fresh.dir(), include, ignore)
			for _, c := range []plan.Copy{
				dockerfile("/", "/"), dockerfile("/src", "/x/"), dockerfile("/src/b/c.go", "/x"), dockerfile("/link", "/x/"), dockerfile("/dirlink", "/x/"),
				dockerfile("/dirlink/c.go", "/x/"), dockerfile("/modlink", "/x/"), dockerfile("/abslink/a.md", "/x/"), dockerfile("/*", "/x/"),
				dockerfile("/*.go", "/x/"), dockerfile("/node_modules", "/x"), dockerfile("/*/*.md", "/x/"), dockerfile("/self/src", "/x/"), dockerfile("/docs/../main.go", "/"),
				dockerfile("/a", "/y"), dockerfile("/empty", "/y"),
				with(dockerfile("/", "/x"), func(c *plan.Copy) { c.Exclude = []string{"src/b", "**/*.md"} }),
				with(dockerfile("/", "/x"), func(c *plan.Copy) { c.Include = []string{"src/*.go", "a"} }),
				with(dockerfile("/node_modules", "/x"), func(c *plan.Copy) { c.Exclude = []string{"keep/me.js"} }),
				with(dockerfile("/src", "/x"), func(c *plan.Copy) { c.ContentsOnly = false }),
			} {
				want, got := fresh.dir(), fresh.dir()
				must(t, os.Mkdir(want, 0o755))
				must(t, os.Mkdir(got, 0o755))
				wantErr := reference(t.Context(), sent, want, c, nil)
				tree := Tree{Dir: context, Local: true, Include: include, Exclude: ignore}
				gotErr := Apply(t.Context(), got, []plan.Action{c}, func(plan.Ref) (Tree, error) { return tree, nil }, Options{Single: singleID()})
				if (wantErr == nil) != (gotErr == nil) {
					t.Errorf("%s with .dockerignore %q, include %q: got error %v, BuildKit %v", show(c, nil), ignore, include, gotErr, wantErr)
				} else if gotErr == nil {
					if d := cmp.Diff(take(t, want, false), take(t, got, false)); d != "" {
						t.Errorf("%s with .dockerignore %q, include %q: differs from BuildKit (-want +got):\n%s", show(c, nil), ignore, include, d)
					}
				}
			}
		}
	}
}

// send makes the copy of a context that a BuildKit daemon would get.
func send(t *testing.T, context, to string, include, exclude []string) string {
	t.Helper()
	from, err := fsutil.NewFS(context)
	must(t, err)
	from, err = fsutil.NewFilterFS(from, &fsutil.FilterOpt{IncludePatterns: include, ExcludePatterns: exclude})
	must(t, err)
	must(t, os.MkdirAll(to, 0o755))
	first := map[uint64]string{}
	must(t, from.Walk(t.Context(), "/", func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		sendOne(t, filepath.Join(context, p), filepath.Join(to, p), first)
		return nil
	}))
	return to
}

func sendOne(t *testing.T, from, to string, first map[uint64]string) {
	t.Helper()
	fi, err := os.Lstat(from)
	must(t, err)
	st := fi.Sys().(*syscall.Stat_t)
	switch {
	case fi.IsDir():
		must(t, os.Mkdir(to, 0o755))
	case fi.Mode()&os.ModeSymlink != 0:
		target, err := os.Readlink(from)
		must(t, err)
		must(t, os.Symlink(target, to))
		return
	case fi.Mode()&os.ModeNamedPipe != 0:
		must(t, unix.Mkfifo(to, 0o600))
	case first[st.Ino] != "":
		must(t, os.Link(first[st.Ino], to))
		return
	default:
		first[st.Ino] = to
		content, err := os.ReadFile(from)
		must(t, err)
		must(t, os.WriteFile(to, content, 0o600))
	}
	must(t, os.Chmod(to, fi.Mode()))
	names, err := listXattrs(from)
	must(t, err)
	for _, n := range names {
		v, err := getXattr(from, n)
		must(t, err)
		must(t, unix.Setxattr(to, n, []byte(v), 0))
	}
}

// paths lists what a source has, directories included.
func paths(t testing.TB, tree Tree) []string {
	t.Helper()
	s, err := openSource(tree)
	must(t, err)
	defer s.close()
	var all []string
	var walk func(n node, fd int)
	walk = func(n node, fd int) {
		children, err := s.list(n, fd)
		must(t, err)
		for _, c := range children {
			all = append(all, c.path)
			if c.isDir() {
				sub, err := openDirAt(fd, c.name)
				must(t, err)
				walk(c, sub)
				unix.Close(sub)
			}
		}
	}
	walk(node{}, s.dir)
	slices.Sort(all)
	return all
}

// FuzzPatterns compares what is there of a context with the plain definition: a file is there if patternmatcher, asked
// from the root downwards, does not exclude it, a directory also if something in it is.
func FuzzPatterns(f *testing.F) {
	owned := func(line string) bool { return strings.HasPrefix(line, "o ") }
	context := plant(f, filepath.Join(f.TempDir(), "context"), slices.DeleteFunc(slices.Clone(someContext), owned)...)
	all := paths(f, Tree{Dir: context})
	for _, ignore := range ignores {
		f.Add(strings.Join(ignore, "\n"), "")
		f.Add("", strings.Join(ignore, "\n"))
	}
	f.Add("*\n!a/b/[c]", "a\n!a/b")
	f.Add("", "a/b\n!a")
	f.Fuzz(func(t *testing.T, exclude, include string) {
		tree := Tree{Dir: context, Local: true, Exclude: lines(exclude), Include: lines(include)}
		ex, exErr := patternmatcher.New(tree.Exclude)
		in, inErr := patternmatcher.New(tree.Include)
		s, err := openSource(tree)
		if exErr != nil || inErr != nil {
			if err == nil {
				t.Errorf("patterns %q, %q are not valid but were taken", exclude, include)
			}
			return
		}
		if err != nil {
			return // patternmatcher finds some bad patterns only when it uses them
		}
		s.close()
		there := map[string]bool{}
		for _, p := range slices.Backward(all) {
			out, err1 := matchesDownTo(ex, p)
			admitted, err2 := matchesDownTo(in, p)
			if err1 != nil || err2 != nil {
				return
			}
			if !out && (admitted || len(tree.Include) == 0) {
				for ; p != "."; p = filepath.Dir(p) {
					there[p] = true
				}
			}
		}
		var want []string
		for _, p := range all {
			if there[p] {
				want = append(want, p)
			}
		}
		if d := cmp.Diff(want, paths(t, tree)); d != "" {
			t.Errorf("exclude %q, include %q: differs from the definition (-want +got):\n%s", exclude, include, d)
		}
	})
}

func matchesDownTo(m *patternmatcher.PatternMatcher, p string) (matches bool, err error) {
	var info patternmatcher.MatchInfo
	for i, c := range p + "/" {
		if c == '/' && err == nil {
			matches, info, err = m.MatchesUsingParentResults(p[:i], info)
		}
	}
	return matches, err
}

func lines(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, "\n")
}

// stopAt is a visitor that fails at a path.
type stopAt struct{ rel string }

func (v stopAt) enter(e *entry) error {
	if e.rel == v.rel {
		return errStopped
	}
	return nil
}

func (stopAt) leave(*entry) error { return nil }

var errStopped = errors.New("stopped")

func TestAWalkThatEndsEarlyClosesWhatItListedAhead(t *testing.T) {
	root := plant(t, filepath.Join(t.TempDir(), "context"), "f a/x/1", "f a/y/1", "f b/x/1", "f b/y/1", "f c/1")
	descriptors := func() int {
		open, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		return len(open)
	}
	before := descriptors()
	for _, at := range []string{"a", "a/x", "a/x/1", "a/y", "b", "b/y/1", "c", "c/1", "nowhere"} {
		src, err := openSource(Tree{Dir: root, Local: true})
		must(t, err)
		sel, err := newSelection(src, dockerfile("/", "/x"))
		must(t, err)
		err = sel.starts(func(s start) error { return sel.walk(t.Context(), s, stopAt{at}) })
		if (at == "nowhere") != (err == nil) || err != nil && !errors.Is(err, errStopped) {
			t.Errorf("stopped at %s: %v", at, err)
		}
		src.close()
		if now := descriptors(); now != before {
			t.Errorf("stopped at %s: %d descriptors stay open", at, now-before)
		}
	}
}
