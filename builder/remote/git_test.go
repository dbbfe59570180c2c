package remote

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh/agent"
)

// fetched resolves and checks out.
func fetched(t testing.TB, c *Client, g Git) string {
	t.Helper()
	dir := t.TempDir()
	commit, err := c.ResolveGit(t.Context(), g)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Checkout(t.Context(), g, commit, dir, time.Time{}); err != nil {
		t.Fatal(err)
	}
	return dir
}

// cloned is what the git program makes of the same.
func cloned(t testing.TB, repo, rev string, args ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "clone")
	git(t, repo, "-c", "protocol.file.allow=always", "clone", "-q", repo, dir)
	git(t, dir, "fetch", "-q", "origin", "+refs/*:refs/*", "--update-head-ok")
	git(t, dir, "checkout", "-q", "--detach", rev)
	if len(args) > 0 {
		git(t, dir, args...)
	}
	return dir
}

func TestCheckoutIsWhatGitChecksOut(t *testing.T) {
	dir := t.TempDir()
	repo := sample(t, dir, "sample.git")
	v2, v0 := serveHTTP(t, dir, nil), serveHTTP(t, dir, oldProtocol)
	secure := httptest.NewTLSServer(backend(t, dir))
	t.Cleanup(secure.Close)
	roots := x509.NewCertPool()
	roots.AddCert(secure.Certificate())
	s2, s0 := serveSSH(t, dir, true), serveSSH(t, dir, false)
	agents := map[string]agent.Agent{"two": s2.agent, "zero": s0.agent}
	c := New(Options{RootCAs: roots, Agent: func(id string) (agent.Agent, error) { return agents[id], nil }})
	t.Cleanup(c.Close)
	host, port, _ := strings.Cut(s2.addr, ":")

	servers := map[string]Git{
		"http":      {Remote: v2.URL + "/sample.git"},
		"http, old": {Remote: v0.URL + "/sample.git"},
		"https":     {Remote: secure.URL + "/sample.git"},
		"git":       {Remote: "git://" + serveGit(t, dir) + "/sample.git"},
		"ssh":       {Remote: "ssh://git@" + host + ":" + port + "/sample.git", SSH: "two", KnownHosts: s2.knownHosts},
		"ssh, old":  {Remote: "ssh://git@" + s0.addr + "/sample.git", SSH: "zero", KnownHosts: s0.knownHosts},
	}
	refs := []struct{ ref, rev, full, kind string }{
		{"", "main", "refs/heads/main", "commit"},
		{"main", "main", "refs/heads/main", "commit"},
		{"refs/heads/main", "main", "refs/heads/main", "commit"},
		{"light", "light", "refs/tags/light", "commit"},
		{"v1", "v1^{}", "refs/tags/v1", "tag"},
		{"refs/tags/v1", "v1^{}", "refs/tags/v1", "tag"},
		{"refs/pull/1/head", "refs/pull/1/head", "refs/pull/1/head", "commit"},
		{"pull/1/head", "refs/pull/1/head", "refs/pull/1/head", "commit"},
		{"both", "refs/heads/both", "refs/heads/both", "commit"},
		{"refs/tags/both", "refs/tags/both", "refs/tags/both", "commit"},
		{git(t, repo, "rev-parse", "main~1"), "main~1", "", "commit"},
		{git(t, repo, "rev-parse", "v1"), "v1^{}", "", "tag's hash"},
	}
	for name, g := range servers {
		for _, r := range refs {
			t.Run(name+"/"+r.ref, func(t *testing.T) {
				g.Ref = r.ref
				commit, err := c.ResolveGit(t.Context(), g)
				if err != nil {
					t.Fatal(err)
				}
				want := Commit{Ref: r.full, Hash: git(t, repo, "rev-parse", r.rev)}
				if r.kind == "tag" {
					want.Tag = git(t, repo, "rev-parse", "v1")
				}
				if r.full == "" {
					want = Commit{Ref: r.ref, Hash: r.ref}
				}
				if diff := cmp.Diff(want, commit); diff != "" {
					t.Errorf("resolved (-want +got):\n%s", diff)
				}
				dir := t.TempDir()
				if err := c.Checkout(t.Context(), g, commit, dir, time.Time{}); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(tree(t, cloned(t, repo, r.rev)), tree(t, dir)); diff != "" {
					t.Errorf("tree (-git +ours):\n%s", diff)
				}
				if _, err := os.Lstat(dir + "/.git"); err == nil {
					t.Error("there is a .git that nobody asked for")
				}
			})
		}
	}
}

func TestModesDoNotDependOnTheUmask(t *testing.T) {
	dir := t.TempDir()
	sample(t, dir, "s.git")
	remote := serveHTTP(t, dir, nil).URL + "/s.git"
	to := t.TempDir()
	defer syscall.Umask(syscall.Umask(0o077))
	c := New(Options{})
	commit, err := c.ResolveGit(t.Context(), Git{Remote: remote})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Checkout(t.Context(), Git{Remote: remote, KeepGitDir: true}, commit, to, time.Time{}); err != nil {
		t.Fatal(err)
	}
	filepath.Walk(to, func(p string, fi os.FileInfo, err error) error {
		if err != nil {
			t.Fatal(err)
		}
		want := os.FileMode(0o644)
		switch {
		case p == to || fi.Mode()&os.ModeSymlink != 0:
			return nil
		case fi.IsDir() || fi.Name() == "run me":
			want = 0o755
		case strings.HasSuffix(p, ".pack"):
			want = 0o444
		}
		if got := fi.Mode().Perm(); got != want {
			t.Errorf("%s has %v, want %v", p, got, want)
		}
		return nil
	})
}

func TestSHA256Repository(t *testing.T) {
	dir := t.TempDir()
	repo := sample(t, dir, "s.git", "--object-format=sha256")
	for name, around := range map[string]func(http.Handler) http.Handler{"new": nil, "old": oldProtocol} {
		t.Run(name, func(t *testing.T) {
			g := Git{Remote: serveHTTP(t, dir, around).URL + "/s.git", Ref: "v1", KeepGitDir: true}
			got := fetched(t, New(Options{}), g)
			if diff := cmp.Diff(tree(t, cloned(t, repo, "v1^{}")), tree(t, got)); diff != "" {
				t.Errorf("tree (-git +ours):\n%s", diff)
			}
			if s := git(t, got, "status", "--porcelain"); s != "" {
				t.Errorf("git status is not clean:\n%s", s)
			}
			git(t, got, "fsck", "--strict")
		})
	}
}

func TestKeptGitDirIsARepository(t *testing.T) {
	dir := t.TempDir()
	repo := sample(t, dir, "sample.git")
	s := serveHTTP(t, dir, nil)
	remote := strings.Replace(s.URL, "http://", "http://user:password@", 1) + "/sample.git"
	for _, tc := range []struct{ ref, rev, refs string }{
		{"", "main", "refs/heads/main commit"},
		{"v1", "v1^{}", "refs/tags/v1 tag"},
		{"light", "light", "refs/tags/light commit"},
		{"refs/pull/1/head", "light", "refs/pull/1/head commit"},
		{git(t, repo, "rev-parse", "main~1"), "main~1", ""},
	} {
		t.Run(tc.ref, func(t *testing.T) {
			got := fetched(t, New(Options{}), Git{Remote: remote, Ref: tc.ref, KeepGitDir: true})
			rev := git(t, repo, "rev-parse", tc.rev)
			for _, q := range []struct {
				args []string
				want string
			}{
				{[]string{"status", "--porcelain"}, ""},
				{[]string{"rev-parse", "HEAD"}, rev},
				{[]string{"rev-parse", "--abbrev-ref", "HEAD"}, "HEAD"}, // detached
				{[]string{"log", "--format=%H"}, rev},                   // and without history
				{[]string{"for-each-ref", "--format=%(refname) %(objecttype)"}, tc.refs},
				{[]string{"remote", "get-url", "origin"}, strings.Replace(remote, "user:password", "xxxxx:xxxxx", 1)},
				{[]string{"diff", "HEAD"}, ""},
			} {
				if out := git(t, got, q.args...); out != q.want {
					t.Errorf("git %s: got %q, want %q", strings.Join(q.args, " "), out, q.want)
				}
			}
			git(t, got, "fsck", "--strict")
			if diff := cmp.Diff(tree(t, cloned(t, repo, tc.rev)), tree(t, got)); diff != "" {
				t.Errorf("tree (-git +ours):\n%s", diff)
			}
			write(t, got+"/README", "changed\n", 0o644)
			if out := git(t, got, "status", "--porcelain"); !strings.HasPrefix(out, "M README") {
				t.Errorf("git status after a change: %q", out)
			}
			config, _ := os.ReadFile(got + "/.git/config")
			if strings.Contains(string(config), "password") {
				t.Error("an attacker who gets the image would have the password of the repository")
			}
		})
	}
}

func TestChecksum(t *testing.T) {
	dir := t.TempDir()
	repo := sample(t, dir, "s.git")
	remote := serveHTTP(t, dir, nil).URL + "/s.git"
	c := New(Options{})
	main, tag, tagged := git(t, repo, "rev-parse", "main"), git(t, repo, "rev-parse", "v1"), git(t, repo, "rev-parse", "v1^{}")
	for _, tc := range []struct {
		name, ref, sum string
		ok             bool
	}{
		{"branch", "main", main, true},
		{"beginning", "main", main[:7], true},
		{"other", "main", tagged, false},
		{"tag object", "v1", tag, true},
		{"commit of a tag", "v1", tagged[:12], true},
		{"neither", "v1", main, false},
		{"commit", main, main, true},
		{"another commit", main, tagged, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := c.ResolveGit(t.Context(), Git{Remote: remote, Ref: tc.ref, Checksum: tc.sum})
			if (err == nil) != tc.ok || (err != nil && !strings.Contains(err.Error(), "expected checksum to match "+tc.sum)) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("fetch by commit", func(t *testing.T) {
		g := Git{Remote: remote, Ref: "elsewhere", Checksum: tagged, FetchByCommit: true, KeepGitDir: true}
		got := fetched(t, c, g)
		if out := git(t, got, "for-each-ref", "--format=%(refname) %(objectname)"); out != "refs/heads/elsewhere "+tagged {
			t.Errorf("refs: %s", out)
		}
		g.Checksum = tagged[:10]
		if _, err := c.ResolveGit(t.Context(), g); err == nil {
			t.Error("the beginning of a hash was taken for a commit")
		}
	})
	t.Run("another tag than was resolved", func(t *testing.T) {
		err := c.Checkout(t.Context(), Git{Remote: remote, Checksum: main}, Commit{Ref: tagged, Hash: tagged}, t.TempDir(), time.Time{})
		if err == nil {
			t.Error("a Checkout took a commit that the checksum does not allow")
		}
	})
}

func TestCommitObjectAndTimes(t *testing.T) {
	dir := t.TempDir()
	repo := sample(t, dir, "s.git")
	git(t, repo, "config", "uploadpack.allowFilter", "true")
	g := Git{Remote: serveHTTP(t, dir, nil).URL + "/s.git", Ref: "v1", CommitTime: true, KeepGitDir: true}
	c := New(Options{})
	commit, err := c.ResolveGit(t.Context(), g)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := c.CommitObject(t.Context(), g, commit)
	if err != nil {
		t.Fatal(err)
	}
	if got := gitIn(t, repo, raw, "hash-object", "-t", "commit", "--stdin"); got != commit.Hash {
		t.Errorf("the object has the hash %s, not %s", got, commit.Hash)
	}
	at, err := committed(raw)
	if err != nil || at.Unix() != 1700000001 {
		t.Errorf("committed at %v, %v", at, err)
	}
	check := func(dir string, want int64) {
		t.Helper()
		filepath.Walk(dir, func(p string, fi os.FileInfo, err error) error {
			if err != nil || fi.ModTime().Unix() != want {
				t.Errorf("%s is of %v, %v", p, fi.ModTime(), err)
			}
			return nil
		})
	}
	check(fetched(t, c, g), 1700000001)
	other := t.TempDir()
	g.CommitTime = false
	if err := c.Checkout(t.Context(), g, commit, other, time.Unix(1234567890, 0)); err != nil {
		t.Fatal(err)
	}
	check(other, 1234567890)
}

func TestSubdir(t *testing.T) {
	dir := t.TempDir()
	repo := sample(t, dir, "s.git")
	remote := serveHTTP(t, dir, nil).URL + "/s.git"
	got := fetched(t, New(Options{}), Git{Remote: remote, Subdir: "/a/deep/", KeepGitDir: true})
	if diff := cmp.Diff(tree(t, cloned(t, repo, "main")+"/a/deep"), tree(t, got)); diff != "" {
		t.Errorf("tree (-git +ours):\n%s", diff)
	}
	if _, err := os.Lstat(got + "/.git"); err == nil {
		t.Error("a subdirectory has a .git")
	}
	for _, bad := range []string{"README", "a/link", "absolute", "nowhere", "a/deep/nowhere"} {
		c := New(Options{})
		g := Git{Remote: remote, Subdir: bad}
		commit, err := c.ResolveGit(t.Context(), g)
		if err != nil {
			t.Fatal(err)
		}
		to := t.TempDir()
		if err := c.Checkout(t.Context(), g, commit, to, time.Time{}); err == nil {
			t.Errorf("%s was taken for a directory", bad)
		}
		if left := tree(t, to); len(left) > 0 {
			t.Errorf("%s: an error left %v", bad, left)
		}
	}
	// What climbs stays in the repository.
	if diff := cmp.Diff(tree(t, cloned(t, repo, "main")), tree(t, fetched(t, New(Options{}), Git{Remote: remote, Subdir: "../../.."}))); diff != "" {
		t.Errorf("tree (-git +ours):\n%s", diff)
	}
}

func TestSubmodules(t *testing.T) {
	dir := t.TempDir()
	sample(t, dir, "leaf.git")
	server := serveHTTP(t, dir, nil)
	middle := newRepo(t, dir, "middle.git")
	write(t, middle+"/m", "m", 0o644)
	git(t, middle, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", "--name", "odd name", dir+"/leaf.git", "in/leaf")
	git(t, middle, "config", "-f", ".gitmodules", "submodule.odd name.url", "../leaf.git")
	commitAll(t, middle, "middle")
	top := newRepo(t, dir, "top.git")
	write(t, top+"/t", "t", 0o644)
	git(t, top, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", dir+"/middle.git", "mid")
	git(t, top, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", dir+"/leaf.git", "off")
	git(t, top, "config", "-f", ".gitmodules", "submodule.mid.url", server.URL+"/middle.git")
	git(t, top, "config", "-f", ".gitmodules", "submodule.off.update", "none")
	commitAll(t, top, "top")
	// A commit that is no tip any more.
	write(t, middle+"/m", "later", 0o644)
	commitAll(t, middle, "later")

	want := filepath.Join(t.TempDir(), "clone")
	git(t, dir, "clone", "-q", server.URL+"/top.git", want)
	git(t, want, "submodule", "--quiet", "update", "--init", "--recursive")
	c := New(Options{})
	for name, url := range map[string]string{"new": server.URL, "old": serveHTTP(t, dir, oldProtocol).URL} {
		for _, keep := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s keep=%v", name, keep), func(t *testing.T) {
				got := fetched(t, c, Git{Remote: url + "/top.git", KeepGitDir: keep})
				if diff := cmp.Diff(tree(t, want), tree(t, got)); diff != "" {
					t.Errorf("tree (-git +ours):\n%s", diff)
				}
				if !keep {
					return
				}
				for _, d := range []string{"", "/mid", "/mid/in/leaf"} {
					if out := git(t, got+d, "status", "--porcelain"); out != "" {
						t.Errorf("git status in %q:\n%s", d, out)
					}
					git(t, got+d, "fsck", "--strict")
					if have, want := git(t, got+d, "rev-parse", "HEAD"), git(t, want+d, "rev-parse", "HEAD"); have != want {
						t.Errorf("HEAD in %q: %s, want %s", d, have, want)
					}
				}
				if out := git(t, got, "submodule", "status", "--recursive"); strings.Contains(out, "+") || !strings.Contains(out, "mid/in/leaf") {
					t.Errorf("submodule status:\n%s", out)
				}
			})
		}
	}
	t.Run("skipped", func(t *testing.T) {
		got := tree(t, fetched(t, c, Git{Remote: server.URL + "/top.git", SkipSubmodules: true}))
		if _, ok := got["mid"]; !ok || len(got) != 4 {
			t.Errorf("got %v", got)
		}
	})
	t.Run("subdir within", func(t *testing.T) {
		got := fetched(t, c, Git{Remote: server.URL + "/top.git", Subdir: "mid/in/leaf/a"})
		if diff := cmp.Diff(tree(t, want+"/mid/in/leaf/a"), tree(t, got)); diff != "" {
			t.Errorf("tree (-git +ours):\n%s", diff)
		}
	})
}

func TestFetchErrorsSayWhatToDo(t *testing.T) {
	dir := t.TempDir()
	repo := sample(t, dir, "s.git")
	newRepo(t, dir, "empty.git")
	base := serveHTTP(t, dir, nil).URL
	private := serveHTTP(t, dir, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(401) })
	}).URL
	dumb := httptest.NewServer(http.FileServer(http.Dir(dir)))
	t.Cleanup(dumb.Close)
	secure := httptest.NewTLSServer(backend(t, dir))
	t.Cleanup(secure.Close)
	key := serveSSH(t, dir, true)
	stranger := serveSSH(t, dir, true)
	missing := strings.Repeat("ab", 20)
	for _, tc := range []struct {
		name string
		g    Git
		want string
		hint string
	}{
		{"no such repository", Git{Remote: base + "/other.git"}, "404", "check the address"},
		{"no such ref", Git{Remote: base + "/s.git", Ref: "nope"}, "no ref nope", "ls-remote"},
		{"short hash", Git{Remote: base + "/s.git", Ref: git(t, repo, "rev-parse", "--short=8", "main")}, "no ref", "whole hash"},
		{"empty", Git{Remote: base + "/empty.git"}, "no default branch", "#main"},
		{"private", Git{Remote: private + "/s.git", AuthTokenSecret: "GIT_AUTH_TOKEN"}, "401", "--secret id=GIT_AUTH_TOKEN"},
		{"dumb", Git{Remote: dumb.URL + "/s.git/.git"}, "smart http", "often ends in .git"},
		{"certificate", Git{Remote: secure.URL + "/s.git"}, "certificate", "authority"},
		{"nobody there", Git{Remote: "http://127.0.0.1:1/s.git"}, "unreachable", "network"},
		{"nobody at git", Git{Remote: "git://127.0.0.1:1/s.git"}, "unreachable", "network"},
		{"no such commit", Git{Remote: base + "/s.git", Ref: missing}, "no branch or tag", ""},
		{"no agent", Git{Remote: "ssh://git@" + key.addr + "/s.git", KnownHosts: key.knownHosts}, "unable to authenticate", "--ssh default"},
		{"unknown host", Git{Remote: "ssh://git@" + key.addr + "/s.git", SSH: "x"}, "not known", "ssh-keyscan"},
		{"another host's key", Git{Remote: "ssh://git@" + key.addr + "/s.git", SSH: "x",
			KnownHosts: strings.Replace(stranger.knownHosts, portOf(stranger.addr), portOf(key.addr), 1)}, "do not list", "somebody else"},
		{"ssh, no repository", Git{Remote: "ssh://git@" + key.addr + "/none.git", SSH: "x", KnownHosts: key.knownHosts}, "does not appear to be a git repository", ""},
		{"file", Git{Remote: "file://" + repo}, "not a way to fetch", "https://"},
		{"path", Git{Remote: repo}, "not an address", "https://"},
		{"ext", Git{Remote: "ext::sh -c id"}, "not a way to fetch", "https://"},
		{"option", Git{Remote: "ssh://-oProxyCommand=id/x"}, "no host", ""},
		{"option in the path", Git{Remote: "git@host:--upload-pack=id"}, "begins with -", ""},
		{"option as ref", Git{Remote: base + "/s.git", Ref: "--upload-pack=id"}, "not a ref", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := New(Options{Agent: func(string) (agent.Agent, error) { return key.agent, nil }})
			commit, err := c.ResolveGit(t.Context(), tc.g)
			if err == nil {
				err = c.Checkout(t.Context(), tc.g, commit, t.TempDir(), time.Time{})
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want %q", err, tc.want)
			}
			var h interface{ Hint() string }
			if tc.hint != "" && (!errors.As(err, &h) || !strings.Contains(h.Hint(), tc.hint)) {
				t.Errorf("%v\nhas no hint with %q: %v", err, tc.hint, h)
			}
		})
	}
}

func portOf(addr string) string { return addr[strings.LastIndex(addr, ":")+1:] }

func TestFirstHostKeyIsToldAndKept(t *testing.T) {
	dir := t.TempDir()
	sample(t, dir, "s.git")
	s := serveSSH(t, dir, true)
	var told []string
	c := New(Options{
		Agent:      func(string) (agent.Agent, error) { return s.agent, nil },
		NewHostKey: func(host, print string) { told = append(told, host+" "+print) },
	})
	fetched(t, c, Git{Remote: "ssh://git@" + s.addr + "/s.git", SSH: "default"})
	if len(told) != 1 || !strings.Contains(told[0], s.addr+" SHA256:") {
		t.Errorf("told of %q, want the host once", told)
	}
	if ran := <-s.ran; ran != "git-upload-pack '/s.git'" {
		t.Errorf("ran %q", ran)
	}
}

func TestCredentialsStayWithTheirServer(t *testing.T) {
	dir := t.TempDir()
	sample(t, dir, "s.git")
	var elsewhere, here atomic.Value
	elsewhere.Store("")
	here.Store("")
	record := func(v *atomic.Value, h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if a := r.Header.Get("Authorization"); a != "" {
				v.Store(a)
			}
			h.ServeHTTP(w, r)
		})
	}
	other := serveHTTP(t, dir, func(h http.Handler) http.Handler { return record(&elsewhere, h) })
	first := serveHTTP(t, dir, func(h http.Handler) http.Handler {
		return record(&here, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, other.URL+r.URL.String(), http.StatusFound)
		}))
	})
	host := strings.TrimPrefix(first.URL, "http://")
	for name, tc := range map[string]struct {
		secret, value, remote, want string
	}{
		"token":          {"TOKEN", "t0ken\n", first.URL, "basic eC1hY2Nlc3MtdG9rZW46dDBrZW4="},
		"token of host":  {"TOKEN." + host, "t0ken", first.URL, "basic eC1hY2Nlc3MtdG9rZW46dDBrZW4="},
		"header":         {"HEADER", "Bearer xyz", first.URL, "Bearer xyz"},
		"in the address": {"", "", strings.Replace(first.URL, "//", "//u:p@", 1), "Basic dTpw"},
	} {
		t.Run(name, func(t *testing.T) {
			here.Store("")
			c := New(Options{Secret: func(id string) ([]byte, bool) { return []byte(tc.value), id == tc.secret }})
			fetched(t, c, Git{Remote: tc.remote + "/s.git", AuthTokenSecret: "TOKEN", AuthHeaderSecret: "HEADER"})
			if here.Load() != tc.want {
				t.Errorf("the server got %q, want %q", here.Load(), tc.want)
			}
			if elsewhere.Load() != "" {
				t.Errorf("an attacker behind a redirect would have %q", elsewhere.Load())
			}
		})
	}
}

func TestCancelEndsAFetch(t *testing.T) {
	dir := t.TempDir()
	cause := errors.New("enough")
	reached := make(chan bool, 9)
	stuck := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reached <- true
		<-r.Context().Done()
	}))
	t.Cleanup(stuck.Close)
	silent := listen(t, func(net.Conn) { reached <- true })
	for _, remote := range []string{stuck.URL + "/x.git", "git://" + silent + "/x.git", "ssh://" + silent + "/x.git"} {
		ctx, cancel := context.WithCancelCause(t.Context())
		go func() { <-reached; cancel(cause) }()
		err := New(Options{NewHostKey: func(string, string) {}}).Checkout(ctx, Git{Remote: remote}, Commit{Hash: hex.EncodeToString(make([]byte, 20))}, dir, time.Time{})
		if !errors.Is(err, cause) {
			t.Errorf("%s: got %v", remote, err)
		}
	}
}
