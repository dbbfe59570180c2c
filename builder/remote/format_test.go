package remote

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The index is git's own to the last byte, so offsets, checksums and the objects behind deltas are right.
func TestPackIndexIsGits(t *testing.T) {
	for _, format := range []string{"sha1", "sha256"} {
		for name, option := range map[string]string{"offset deltas": "--delta-base-offset", "named deltas": "--no-reuse-delta"} {
			t.Run(format+", "+name, func(t *testing.T) {
				dir := t.TempDir()
				repo := sample(t, dir, "s.git", "--object-format="+format)
				text := gitRaw(t, repo, "", "pack-objects", "--all", "--stdout", "-q", "--window=50", option)
				pack := filepath.Join(dir, "p.pack")
				write(t, pack, text, 0o644)
				git(t, repo, "index-pack", "--index-version=2", "-o", filepath.Join(dir, "p.idx"), pack)
				want, err := os.ReadFile(filepath.Join(dir, "p.idx"))
				if err != nil {
					t.Fatal(err)
				}
				f, err := os.Create(filepath.Join(dir, "ours"))
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				size := map[string]int{"sha1": 20, "sha256": 32}[format]
				p, err := receive(t.Context(), &slow{[]byte(text)}, f, size, Limits{}.orDefault())
				if err != nil {
					t.Fatal(err)
				}
				deltas := 0
				for _, o := range p.packed {
					if o.delta {
						deltas++
					}
				}
				if deltas == 0 {
					t.Fatal("the pack has no deltas, so this shows nothing")
				}
				got, err := p.index()
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, want) {
					t.Error("the index is not what git index-pack makes")
				}
				if stored, _ := os.ReadFile(f.Name()); string(stored) != text {
					t.Error("the stored pack is not what was received")
				}
			})
		}
	}
}

// slow gives a few bytes at a time.
type slow struct{ rest []byte }

func (s *slow) Read(b []byte) (int, error) {
	n, err := bytes.NewReader(s.rest).Read(b[:min(len(b), 7)])
	s.rest = s.rest[n:]
	return n, err
}

func TestLocations(t *testing.T) {
	for _, tc := range []struct{ remote, scheme, host, path string }{
		{"https://host/a/b.git", "https", "host", "/a/b.git"},
		{"HTTPS://host:8443/a", "https", "host:8443", "/a"},
		{"github.com/a/b", "https", "github.com", "/a/b"},
		{"ssh://me@host:2222/~x/a", "ssh", "host:2222", "/~x/a"},
		{"git@host:a/b.git", "ssh", "host", "a/b.git"},
		{"git@host:/a", "ssh", "host", "/a"},
		{"git://host/a", "git", "host", "/a"},
	} {
		l, err := parseLocation(tc.remote)
		if err != nil || l.scheme != tc.scheme || l.host != tc.host || l.path != tc.path {
			t.Errorf("%s: got %+v, %v", tc.remote, l, err)
		}
	}
	for _, bad := range []string{"", "/a", "./a", "../a", "-a", "file:///a", "ftp://host/a", "https:///a", "https://host", "https://host/", "ext::sh",
		"https://host/a?x=y", "https://host/a#b", "https://host/a\nb", "git@host:", "ssh://-x/a", "git@host:-x", "C:\\a"} {
		if l, err := parseLocation(bad); err == nil {
			t.Errorf("%q became %+v", bad, l)
		}
	}
}

func TestSubmoduleAddresses(t *testing.T) {
	for _, tc := range []struct{ parent, url, want string }{
		{"https://u:p@host/a/b.git", "../c.git", "https://u:p@host/a/c.git"},
		{"https://host/a/b.git/", "../../c", "https://host/c"},
		{"https://host/a/b", "./c", "https://host/a/b/c"},
		{"https://host/a/b", "../../../c", ""},
		{"https://host/a/b", "../..", ""},
		{"git@host:a/b", "../c", "git@host:a/c"},
		{"git@host:a/b", "../../c", "git@host:c"},
		{"git@host:a/b", "../../../c", ""},
		{"git@host:a/b", "../../-c", ""},
		{"git@host:/a/b", "../c", "git@host:/a/c"},
		{"ssh://x@host:22/a/b", "../c", "ssh://x@host:22/a/c"},
		{"https://host/a/b", "https://other/c", "https://other/c"},
		{"https://host/a/b", "git@other:c", "git@other:c"},
		{"https://host/a/b", "c", ""},
		{"https://host/a/b", "/c", ""},
		{"https://host/a/b", "..", ""},
	} {
		parent, err := parseLocation(tc.parent)
		if err != nil {
			t.Fatal(err)
		}
		got, err := parent.join(tc.url)
		if (err == nil) != (tc.want != "") || (err == nil && got.text != tc.want) {
			t.Errorf("%s in %s: got %s, %v", tc.url, tc.parent, got.text, err)
		}
	}
}

func TestWhoGetsTheToken(t *testing.T) {
	for _, tc := range []struct {
		remote, other string
		want          bool
	}{
		{"https://host/a/b", "https://host/a/b", true},
		{"https://host/a/b", "https://host/a/b/", true},
		{"https://host/a/b", "https://HOST:443/a/b/c", true},
		{"https://host/a/b", "https://host/a/bc", false},
		{"https://host/a/b", "https://host/a/b/../c", false},
		{"https://host/a/b", "http://host/a/b", false},
		{"https://host/a/b", "https://host:8443/a/b", false},
		{"https://host/a/b", "https://sub.host/a/b", false},
		{"https://github.com/a/b", "https://github.com/c/d", true},
		{"https://github.com/a/b", "https://github.com.evil/c/d", false},
		{"http://github.com/a/b", "http://github.com/c/d", false},
	} {
		a, err1 := parseLocation(tc.remote)
		b, err2 := parseLocation(tc.other)
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		if got := a.covers(b); got != tc.want {
			t.Errorf("the token for %s goes to %s: %v", tc.remote, tc.other, got)
		}
	}
}

func TestRedact(t *testing.T) {
	for in, want := range map[string]string{
		"https://host/a":             "https://host/a",
		"https://u:secret@host/a":    "https://xxxxx:xxxxx@host/a",
		"https://secret@host/a":      "https://xxxxx@host/a",
		"git@host:a":                 "git@host:a",
		"https://u:sec ret%zz@host/": "https://xxxxx@host/",
	} {
		if got := redact(in); got != want {
			t.Errorf("%s became %s", in, got)
		}
	}
}

func TestKnownHosts(t *testing.T) {
	s := serveSSH(t, t.TempDir(), true)
	_, key, _ := strings.Cut(s.knownHosts, " ")
	for _, tc := range []struct {
		hosts, addr string
		want        bool
	}{
		{"host", "host:22", true},
		{"HOST", "host:22", true},
		{"host", "host:2222", false},
		{"[host]:2222", "host:2222", true},
		{"a,host", "host:22", true},
		{"*.example.com", "git.example.com:22", true},
		{"*.example.com,!git.example.com", "git.example.com:22", false},
		{"ho?t", "host:22", true},
		{"::1", "[::1]:22", true},
		{"|1|c2FsdHNhbHRzYWx0c2FsdHNhbHQ=|" + "AAAA", "host:22", false},
		{hashed("host"), "host:22", true},
		{hashed("[host]:2222"), "host:2222", true},
		{hashed("host"), "other:22", false},
		{"@cert-authority *", "host:22", false},
	} {
		good, _, err := keysOf("# a comment\n\n"+tc.hosts+" "+key, tc.addr)
		if err != nil || (len(good) == 1) != tc.want {
			t.Errorf("%s for %s: %d keys, %v", tc.hosts, tc.addr, len(good), err)
		}
	}
	_, revoked, err := keysOf("@revoked host "+key+"host "+key, "host:22")
	if err != nil || len(revoked) != 1 {
		t.Errorf("%d revoked keys, %v", len(revoked), err)
	}
	callback, _, err := New(Options{}).trust("@revoked "+s.knownHosts+s.knownHosts, s.addr)
	if err != nil {
		t.Fatal(err)
	}
	good, _, _ := keysOf(s.knownHosts, s.addr)
	if err := callback(s.addr, nil, good[0]); err == nil || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("a revoked key: %v; whoever stole it would be believed", err)
	}
}
