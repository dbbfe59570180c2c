package remote

import (
	"bytes"
	"compress/zlib"
	"context"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// raw is a tree of raw entries, which git would not make.
type raw struct{ mode, name, id string }

func rawTree(t testing.TB, repo string, entries ...raw) string {
	t.Helper()
	var b bytes.Buffer
	for _, e := range entries {
		id, err := hex.DecodeString(e.id)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s %s\x00%s", e.mode, e.name, id)
	}
	return gitIn(t, repo, b.Bytes(), "hash-object", "-t", "tree", "--literally", "-w", "--stdin")
}

func blob(t testing.TB, repo, text string) string {
	t.Helper()
	return gitIn(t, repo, []byte(text), "hash-object", "-w", "--stdin")
}

func publish(t testing.TB, repo, tree string) {
	t.Helper()
	git(t, repo, "update-ref", "refs/heads/main", git(t, repo, "commit-tree", "-m", "hostile", tree))
}

// refused says that a checkout failed for the reason, and that nothing is left of it.
func refused(t *testing.T, c *Client, g Git, want, danger string) {
	t.Helper()
	outside := t.TempDir()
	dir := filepath.Join(outside, "in", "dir")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	commit, err := c.ResolveGit(t.Context(), g)
	if err != nil {
		t.Fatal(err)
	}
	err = c.Checkout(t.Context(), g, commit, dir, time.Time{})
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q; an attacker would have %s", err, want, danger)
	}
	if diff := cmp.Diff([]string{"in", "in/dir"}, names(t, outside)); diff != "" {
		t.Errorf("left behind (-want +got):\n%s", diff)
	}
}

func names(t testing.TB, dir string) []string {
	t.Helper()
	var all []string
	filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		if rel, _ := filepath.Rel(dir, p); err == nil && rel != "." {
			all = append(all, rel)
		}
		return err
	})
	return all
}

func TestHostileTreesAreRefused(t *testing.T) {
	dir := t.TempDir()
	remote := serveHTTP(t, dir, nil).URL + "/"
	const hooks = "a hook that git runs"
	for i, tc := range []struct {
		name   string
		tree   func(repo string) string
		want   string
		danger string
	}{
		{"..", func(r string) string {
			return rawTree(t, r, raw{"40000", "..", rawTree(t, r, raw{"100644", "owned", blob(t, r, "x")})})
		}, `called ".."`, "a file outside the directory"},
		{".", func(r string) string { return rawTree(t, r, raw{"100644", ".", blob(t, r, "x")}) }, `called "."`, "confusion"},
		{"a path", func(r string) string { return rawTree(t, r, raw{"100644", "../owned", blob(t, r, "x")}) }, `called "../owned"`, "a file outside"},
		{"absolute", func(r string) string { return rawTree(t, r, raw{"100644", "/tmp/owned", blob(t, r, "x")}) }, "called", "a file outside"},
		{".git", func(r string) string {
			return rawTree(t, r, raw{"40000", ".git", rawTree(t, r, raw{"100644", "config", blob(t, r, "x")})})
		}, "called", hooks},
		{".GIT", func(r string) string { return rawTree(t, r, raw{"40000", ".GIT", rawTree(t, r)}) }, "called", hooks},
		{".git in HFS+", func(r string) string { return rawTree(t, r, raw{"40000", ".g\u200cit", rawTree(t, r)}) }, "called", hooks},
		{".git in NTFS", func(r string) string { return rawTree(t, r, raw{"40000", ".git. .", rawTree(t, r)}) }, "called", hooks},
		{".git as a stream", func(r string) string {
			return rawTree(t, r, raw{"40000", ".git::$INDEX_ALLOCATION", rawTree(t, r)})
		}, "called", hooks},
		{"git~1", func(r string) string { return rawTree(t, r, raw{"40000", "GIT~1", rawTree(t, r)}) }, "called", hooks},
		{".git deep down", func(r string) string {
			return rawTree(t, r, raw{"40000", "a", rawTree(t, r, raw{"100644", ".Git", blob(t, r, "gitdir: /x")})})
		}, "called", hooks},
		{"twice", func(r string) string {
			return rawTree(t, r, raw{"120000", "a", blob(t, r, "/tmp")}, raw{"40000", "a", rawTree(t, r, raw{"100644", "owned", blob(t, r, "x")})})
		}, "two entries", "a file behind a link"},
		{"device", func(r string) string { return rawTree(t, r, raw{"60000", "sda", blob(t, r, "x")}) }, "mode", "a device"},
		{"long name", func(r string) string {
			return rawTree(t, r, raw{"100644", strings.Repeat("n", 256), blob(t, r, "x")})
		}, "longer", "an error that nobody understands"},
		{"long link", func(r string) string {
			return rawTree(t, r, raw{"120000", "l", blob(t, r, strings.Repeat("x", 5000))})
		}, "longer", "an error that nobody understands"},
		{"link with a zero", func(r string) string { return rawTree(t, r, raw{"120000", "l", blob(t, r, "a\x00b")}) }, "l:", "confusion"},
		{"link as .gitmodules", func(r string) string {
			return rawTree(t, r, raw{"120000", ".gitmodules", blob(t, r, "/etc/passwd")})
		}, "symbolic link", "a file of the machine read as configuration"},
		{"link as gitmod~1", func(r string) string { return rawTree(t, r, raw{"120000", "GITMOD~1", blob(t, r, "x")}) }, "symbolic link", "the same"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			name := fmt.Sprintf("r%d.git", i)
			repo := newRepo(t, dir, name)
			publish(t, repo, tc.tree(repo))
			for _, keep := range []bool{false, true} {
				refused(t, New(Options{}), Git{Remote: remote + name, KeepGitDir: keep}, tc.want, tc.danger)
			}
		})
	}
}

// What git's own server would not send; another might.
func TestBrokenTreesAreRefused(t *testing.T) {
	id := strings.Repeat("i", 20)
	for _, text := range []string{"100644 \x00" + id, "9 x\x00" + id, " x\x00" + id, "100644 x\x00" + id[1:], "100644 x", "100644x\x00" + id, "0 x\x00" + id} {
		if got, err := parseTree([]byte(text), 20); err == nil {
			t.Errorf("%q became %v", text, got)
		}
	}
}

func TestHarmlessOddTreesAreTaken(t *testing.T) {
	dir := t.TempDir()
	repo := newRepo(t, dir, "odd.git")
	x := blob(t, repo, "x")
	// Not sorted, with old modes, with names that only resemble bad ones, and an executable with setuid.
	publish(t, repo, rawTree(t, repo, raw{"100664", "z", x}, raw{"104755", "suid", x}, raw{"100644", "...", x}, raw{"100644", ".gitignore", x},
		raw{"100644", "git~2x", x}, raw{"100644", "a\\b\nc", x}, raw{"040000", "d", rawTree(t, repo)}))
	got := tree(t, fetched(t, New(Options{}), Git{Remote: serveHTTP(t, dir, nil).URL + "/odd.git"}))
	want := map[string]string{"z": "-rw-r--r-- x", "suid": "-rwxr-xr-x x", "...": "-rw-r--r-- x", ".gitignore": "-rw-r--r-- x",
		"git~2x": "-rw-r--r-- x", "a\\b\nc": "-rw-r--r-- x", "d": "drwxr-xr-x "}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("tree (-want +got):\n%s", diff)
	}
}

func TestHostileSubmodulesAreRefused(t *testing.T) {
	dir := t.TempDir()
	victim := sample(t, dir, "victim.git")
	base := serveHTTP(t, dir, nil).URL
	at := git(t, victim, "rev-parse", "main")
	section := func(name, url string) string {
		return fmt.Sprintf("[submodule \"%s\"]\n\tpath = sub\n\turl = %s\n", name, url)
	}
	for i, tc := range []struct{ name, modules, want, danger string }{
		{"file", section("s", "file://"+victim), "not a way to fetch", "a repository of the machine"},
		{"path", section("s", victim), "is a path", "a repository of the machine"},
		{"ext", section("s", "ext::sh -c id"), "not a way to fetch", "a program run on the machine"},
		{"option", section("s", "-uid"), "begins with -", "an option of git"},
		{"option in ssh", section("s", "ssh://-oProxyCommand=id/x"), "no host", "a program run on the machine"},
		{"climbs out", section("s", "../../../../victim.git"), "climbs out", "another place than the server"},
		{"climbs in the middle", section("s", "../a/../../../victim.git"), "dots", "another place than the server"},
		{"line break", section("s", `"https://host/a\nb"`), "control characters", "a line of .git/config"},
		{"name climbs", section("../../x", "../victim.git"), "is called", "files outside .git/modules"},
		{"name is .git", section("a/.GIT/b", "../victim.git"), "is called", "a hook that git runs"},
		{"no section", "", "no url", "confusion"},
		{"broken", "[submodule \"s", "line 1", "confusion"},
		{"huge", strings.Repeat("# filler\n", 150000), "too large", "memory"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			name := fmt.Sprintf("m%d.git", i)
			repo := newRepo(t, dir, name)
			publish(t, repo, rawTree(t, repo, raw{"100644", ".gitmodules", blob(t, repo, tc.modules)}, raw{"160000", "sub", at}))
			for _, keep := range []bool{false, true} {
				refused(t, New(Options{}), Git{Remote: base + "/" + name, KeepGitDir: keep}, tc.want, tc.danger)
			}
		})
	}
	t.Run("git directories within each other", func(t *testing.T) {
		repo := newRepo(t, dir, "nested.git")
		text := "[submodule \"a\"]\n\tpath = a\n\turl = ../victim.git\n[submodule \"A/hooks\"]\n\tpath = b\n\turl = ../victim.git\n"
		publish(t, repo, rawTree(t, repo, raw{"100644", ".gitmodules", blob(t, repo, text)}, raw{"160000", "a", at}, raw{"160000", "b", at}))
		refused(t, New(Options{}), Git{Remote: base + "/nested.git", KeepGitDir: true}, "share a git directory", "hooks in another repository")
	})
	t.Run("quoted name", func(t *testing.T) {
		repo := newRepo(t, dir, "quoted.git")
		text := section(`x\"]\\`, "../victim.git")
		publish(t, repo, rawTree(t, repo, raw{"100644", ".gitmodules", blob(t, repo, text)}, raw{"160000", "sub", at}))
		commit, err := New(Options{}).ResolveGit(t.Context(), Git{Remote: base + "/quoted.git"})
		if err != nil {
			t.Fatal(err)
		}
		// A name with a backslash has an empty part for Windows.
		err = New(Options{}).Checkout(t.Context(), Git{Remote: base + "/quoted.git", KeepGitDir: true}, commit, t.TempDir(), time.Time{})
		if err == nil || !strings.Contains(err.Error(), "is called") {
			t.Errorf("got %v", err)
		}
	})
}

func TestBombsEnd(t *testing.T) {
	dir := t.TempDir()
	base := serveHTTP(t, dir, nil).URL
	self := newRepo(t, dir, "self.git")
	// A commit cannot contain its own hash, so each names the one before: a chain as long as the attacker likes.
	empty := rawTree(t, self)
	publish(t, self, empty)
	for range 20 {
		modules := blob(t, self, "[submodule \"s\"]\n\tpath = s\n\turl = ../self.git\n")
		publish(t, self, rawTree(t, self, raw{"100644", ".gitmodules", modules}, raw{"160000", "s", git(t, self, "rev-parse", "main")}))
	}
	refused(t, New(Options{}), Git{Remote: base + "/self.git"}, "more than 16 deep", "fetches without end")
	refused(t, New(Options{Limits: Limits{Modules: 3}}), Git{Remote: base + "/self.git"}, "more than 3 submodules", "fetches without end")

	wide := newRepo(t, dir, "wide.git")
	tree := rawTree(t, wide, raw{"100644", "f", blob(t, wide, strings.Repeat("0", 10000))})
	for range 12 {
		var entries []raw
		for i := range 10 {
			entries = append(entries, raw{"40000", fmt.Sprint(i), tree})
		}
		tree = rawTree(t, wide, entries...)
	}
	publish(t, wide, tree)
	refused(t, New(Options{Limits: Limits{Entries: 500}}), Git{Remote: base + "/wide.git"}, "more than 500 files", "10^12 files from 13 trees")
	refused(t, New(Options{Limits: Limits{Bytes: 100000}}), Git{Remote: base + "/wide.git"}, "more than 100000 bytes", "a full disk")

	deep := newRepo(t, dir, "deep.git")
	tree = rawTree(t, deep)
	for range 300 {
		tree = rawTree(t, deep, raw{"40000", "d", tree})
	}
	publish(t, deep, tree)
	refused(t, New(Options{}), Git{Remote: base + "/deep.git"}, "deep, more than 256", "no more file descriptors")

	large := newRepo(t, dir, "large.git")
	write(t, large+"/zeros", strings.Repeat("0", 3<<20), 0o644)
	commitAll(t, large, "large")
	refused(t, New(Options{Limits: Limits{Bytes: 2 << 20}}), Git{Remote: base + "/large.git"}, "more than 2097152", "a full disk")
	refused(t, New(Options{Limits: Limits{Objects: 2}}), Git{Remote: base + "/large.git"}, "3 objects, more than 2", "memory")
}

// A server can send what it likes; only what has the right hash counts.
func TestServerThatLies(t *testing.T) {
	dir := t.TempDir()
	repo := newRepo(t, dir, "s.git")
	write(t, repo+"/f", "honest", 0o644)
	id := commitAll(t, repo, "honest")
	write(t, repo+"/f", "forged", 0o644)
	commitAll(t, repo, "forged")
	good := gitRaw(t, repo, id+"\n", "pack-objects", "--revs", "--stdout", "-q")
	answer := func(body string) string {
		var b strings.Builder
		b.WriteString(packet("packfile\n"))
		for len(body) > 0 {
			n := min(len(body), 1000)
			b.WriteString(packet("\x01%s", body[:n]))
			body = body[n:]
		}
		return b.String() + "0000"
	}
	flipped := []byte(good)
	flipped[len(flipped)/2] ^= 0x10
	trailer := []byte(good)
	trailer[len(trailer)-1] ^= 1
	var huge bytes.Buffer
	huge.WriteString("PACK\x00\x00\x00\x02\x00\x00\x00\x01\x9f\xff\xff\xff\xff\x0f")
	z := zlib.NewWriter(&huge)
	z.Write(make([]byte, 10))
	z.Close()
	for name, tc := range map[string]struct{ body, want string }{
		"another commit":      {answer(packOf(t, repo, "main", id)), "did not send"},
		"a byte changed":      {answer(string(flipped)), ""},
		"wrong checksum":      {answer(string(trailer)), "damaged"},
		"cut short":           {answer(good[:len(good)-30]), "unexpected EOF"},
		"more than it says":   {answer(good + "more"), "damaged"},
		"not a pack":          {answer("hello, this is not a pack at all"), "damaged"},
		"a huge object":       {answer(huge.String()), "more than"},
		"an error":            {packet("ERR go \x1b[31maway\n"), "the server says: go  [31maway"},
		"an error in between": {packet("packfile\n") + packet("\x03out of memory") + "0000", "out of memory"},
		"not the protocol":    {"<html>welcome</html>", "protocol"},
		"nothing":             {"", "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodGet {
					w.Header().Set("Content-Type", "application/x-git-upload-pack-advertisement")
					fmt.Fprint(w, packet("version 2\n")+packet("fetch=shallow\n")+"0000")
					return
				}
				fmt.Fprint(w, tc.body)
			}))
			defer s.Close()
			to := t.TempDir()
			err := New(Options{}).Checkout(context.Background(), Git{Remote: s.URL + "/x"}, Commit{Hash: id}, to, time.Time{})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q; an attacker on the way would have another tree under the commit's name", err, tc.want)
			}
			if left := names(t, to); len(left) > 0 {
				t.Errorf("left %v", left)
			}
		})
	}
}

// packOf has what rev has and not has not.
func packOf(t testing.TB, repo, rev, not string) string {
	t.Helper()
	return gitRaw(t, repo, rev+"\n^"+not+"\n", "pack-objects", "--revs", "--stdout", "-q")
}

func FuzzModules(f *testing.F) {
	f.Add("[submodule \"a\"]\n\tpath = a\n\turl = ../b # c\n")
	f.Add("[submodule \"a\\\"\"]path=\"x \\\n y\";z\n[core]\nbare\n")
	f.Fuzz(func(t *testing.T, text string) {
		modules, err := parseModules(text)
		if err != nil {
			return
		}
		for _, m := range modules {
			for part := range strings.SplitSeq(m.name, "/") {
				if part == "" || part == "." || part == ".." || strings.EqualFold(part, ".git") || strings.Contains(part, "\x00") {
					t.Errorf("the name %q leads out of .git/modules", m.name)
				}
			}
			at := location{text: "https://host/a/b", scheme: "https", host: "host", path: "/a/b"}
			to, err := at.join(m.url)
			if err != nil {
				continue
			}
			if strings.HasPrefix(m.url, ".") && to.host != "host" {
				t.Errorf("%q leads to %s", m.url, to.host)
			}
			switch to.scheme {
			case "http", "https", "ssh", "git":
			default:
				t.Errorf("%q has the scheme %q", m.url, to.scheme)
			}
		}
	})
}

func FuzzTree(f *testing.F) {
	f.Add([]byte("100644 a\x0001234567890123456789"))
	f.Fuzz(func(t *testing.T, b []byte) {
		entries, err := parseTree(b, 20)
		if err != nil {
			return
		}
		root, err := os.OpenRoot(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		for _, e := range entries {
			if strings.ContainsAny(e.name, "/\x00") || filepath.Base(e.name) != e.name || strings.EqualFold(e.name, ".git") {
				t.Errorf("the entry %q is more than a name", e.name)
			}
			if err := root.Mkdir(e.name, 0o755); err != nil {
				t.Errorf("%q: %v", e.name, err)
			}
		}
	})
}

func FuzzPack(f *testing.F) {
	// A commit, a tree and two blobs, one of them as a delta of the other; made by git pack-objects.
	for _, seed := range packSeeds(f) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := os.Create(filepath.Join(t.TempDir(), "pack"))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		p, err := receive(t.Context(), bytes.NewReader(b), file, 20, Limits{Object: 1 << 20, Bytes: 1 << 24, Objects: 1000}.orDefault())
		if err != nil {
			return
		}
		for i := range p.packed {
			if _, err := p.content(i); err != nil {
				t.Error(err)
			}
		}
	})
}

func FuzzDelta(f *testing.F) {
	f.Add([]byte("base of it"), []byte("\x0a\x05\x90\x05"))
	f.Fuzz(func(t *testing.T, base, delta []byte) {
		if out, err := applyDelta(base, delta, 1<<16); err == nil && len(out) > 1<<16 {
			t.Errorf("%d bytes", len(out))
		}
	})
}

func packSeeds(t testing.TB) (seeds [][]byte) {
	dir := t.TempDir()
	repo := newRepo(t, dir, "s.git")
	text := "a text that is long enough to be worth a delta: 0123456789 abcdefghijklmnopqrstuvwxyz\n"
	write(t, repo+"/a", text, 0o644)
	write(t, repo+"/b", text+"more", 0o644)
	commitAll(t, repo, "two")
	for _, option := range []string{"--delta-base-offset", "--no-reuse-delta"} {
		seeds = append(seeds, []byte(gitRaw(t, repo, "", "pack-objects", "--all", "--stdout", "-q", option)))
	}
	return seeds
}
