package remote

import (
	"compress/gzip"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

func serve(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

func TestDownload(t *testing.T) {
	const text = "hello"
	base := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/dated":
			w.Header().Set("Last-Modified", "Tue, 14 Nov 2023 22:13:20 GMT")
			w.Header().Set("ETag", `W/"abc"`)
		case "/named":
			w.Header().Set("Content-Disposition", `attachment; filename="../../etc/passwd"`)
		case "/named/dir":
			w.Header().Set("Content-Disposition", `attachment; filename="x/"`)
		case "/moved":
			http.Redirect(w, r, "/dated/target", http.StatusMovedPermanently)
			return
		case "/zipped":
			if r.Header.Get("Accept-Encoding") != "gzip" {
				t.Errorf("asked for %q", r.Header.Get("Accept-Encoding"))
			}
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			defer z.Close()
			io.WriteString(z, text)
			return
		}
		io.WriteString(w, text)
	})
	sum := digest.FromString(text)
	long := digest.SHA512.FromString(text)
	for _, tc := range []struct {
		name     string
		h        HTTP
		file     string
		perm     os.FileMode
		modified int64
	}{
		{"plain", HTTP{URL: "/a/file.txt?x=1#y"}, "file.txt", 0o600, 0},
		{"no name", HTTP{URL: "/"}, "download", 0o600, 0},
		{"dots", HTTP{URL: "/a/%2e%2e"}, "download", 0o600, 0},
		{"escaped", HTTP{URL: "/a/b%2Fc"}, "c", 0o600, 0},
		{"control character", HTTP{URL: "/a/b%0Ac"}, "download", 0o600, 0},
		{"its own name", HTTP{URL: "/named"}, "passwd", 0o600, 0},
		{"a name that is a directory", HTTP{URL: "/named/dir"}, "dir", 0o600, 0},
		{"ours", HTTP{URL: "/named", Filename: "../mine"}, "mine", 0o600, 0},
		{"date", HTTP{URL: "/dated", Perm: 0o777}, "dated", 0o777, 1700000000},
		{"redirect keeps the first name", HTTP{URL: "/moved"}, "moved", 0o600, 0},
		{"compressed on the way", HTTP{URL: "/zipped", Checksum: sum}, "zipped", 0o600, 0},
		{"checksum", HTTP{URL: "/x", Checksum: sum}, "x", 0o600, 0},
		{"sha512", HTTP{URL: "/x", Checksum: long}, "x", 0o600, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.h.URL = base + tc.h.URL
			dir := t.TempDir()
			v, modified, err := New(Options{}).Download(t.Context(), tc.h, dir)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(map[string]string{tc.file: tc.perm.String() + " " + text}, tree(t, dir)); diff != "" {
				t.Errorf("files (-want +got):\n%s", diff)
			}
			fi, err := os.Stat(dir + "/" + tc.file)
			if err != nil {
				t.Fatal(err)
			}
			if fi.ModTime().Unix() != tc.modified || modified.Unix() != tc.modified {
				t.Errorf("modified %v, and it says %v", fi.ModTime(), modified)
			}
			if v.Digest != sum || v.Filename != tc.file {
				t.Errorf("got %+v", v)
			}
		})
	}
}

func TestDownloadThatFailsLeavesNothing(t *testing.T) {
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	base := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/missing":
			w.WriteHeader(404)
		case "/secret":
			w.WriteHeader(401)
		case "/short":
			w.Header().Set("Content-Length", "100")
			io.WriteString(w, "half of it")
		case "/loop":
			http.Redirect(w, r, "/loop", http.StatusFound)
		case "/file":
			http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
		case "/slow":
			io.WriteString(w, strings.Repeat("x", 1<<16))
			w.(http.Flusher).Flush()
			cancel(cause)
			<-r.Context().Done()
		default:
			io.WriteString(w, "hello world")
		}
	})
	secure := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(secure.Close)
	for _, tc := range []struct {
		name string
		h    HTTP
		want string
		hint string
	}{
		{"404", HTTP{URL: base + "/missing"}, "404 Not Found", "check the address"},
		{"401", HTTP{URL: base + "/secret"}, "401 Unauthorized", "--secret id=HTTP_AUTH_TOKEN_127.0.0.1"},
		{"checksum", HTTP{URL: base + "/x", Checksum: digest.FromString("other")}, "digest mismatch", "--checksum"},
		{"bad checksum", HTTP{URL: base + "/x", Checksum: "sha256:00"}, "checksum", ""},
		{"cut short", HTTP{URL: base + "/short"}, "unexpected EOF", ""},
		{"loop", HTTP{URL: base + "/loop"}, "more than 10 redirects", ""},
		{"redirect to a file", HTTP{URL: base + "/file"}, `redirect to a "file" address`, ""},
		{"cancelled", HTTP{URL: base + "/slow"}, "enough", ""},
		{"too large", HTTP{URL: base + "/x"}, "more than 5 bytes", ""},
		{"file", HTTP{URL: "file:///etc/passwd"}, "not an http", ""},
		{"unknown certificate", HTTP{URL: secure.URL}, "certificate", "authority"},
		{"not TLS", HTTP{URL: strings.Replace(base, "http:", "https:", 1)}, "HTTP", ""},
		{"nobody there", HTTP{URL: "http://127.0.0.1:1/"}, "unreachable", "network"},
		{"no such host", HTTP{URL: "http://host.invalid/"}, "host.invalid", ""},
		{"secret that is not given", HTTP{URL: base + "/x", AuthHeaderSecret: "mine"}, "mine is not given", "--secret id=mine"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := Options{}
			if tc.name == "too large" {
				o.Limits.Bytes = 5
			}
			now := t.Context()
			if tc.name == "cancelled" {
				now = ctx
			}
			dir := t.TempDir()
			_, _, err := New(o).Download(now, tc.h, dir)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			var h interface{ Hint() string }
			if tc.hint != "" && (!errors.As(err, &h) || !strings.Contains(h.Hint(), tc.hint)) {
				t.Errorf("%v\nhas no hint with %q", err, tc.hint)
			}
			if left := names(t, dir); len(left) > 0 {
				t.Errorf("left %v", left)
			}
		})
	}
}

func TestUnchanged(t *testing.T) {
	var etag, status string
	base := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodHead || r.Header.Get("If-None-Match") != `"one"` {
			t.Errorf("%s with %q", r.Method, r.Header.Get("If-None-Match"))
		}
		if etag != "" {
			w.Header().Set("ETag", etag)
		}
		if r.URL.Path == "/renamed" {
			w.Header().Set("Content-Disposition", "attachment; filename=other")
		}
		code := 200
		fmt.Sscan(status, &code)
		w.WriteHeader(code)
	})
	known := Validators{ETag: `"one"`, Digest: digest.FromString("x"), Filename: "f"}
	for _, tc := range []struct {
		name, etag, status, path string
		checksum                 digest.Digest
		known                    Validators
		want                     bool
	}{
		{"304", `"one"`, "304", "/f", "", known, true},
		{"304 without ETag", "", "304", "/f", "", known, true},
		{"200, the same", `W/"one"`, "200", "/f", "", known, true},
		{"200, another", `"two"`, "200", "/f", "", known, false},
		{"200 without ETag", "", "200", "/f", "", known, false},
		{"no HEAD", `"one"`, "405", "/f", "", known, false},
		{"another name", `"one"`, "200", "/renamed", "", known, false},
		{"never had an ETag", `"one"`, "200", "/f", "", Validators{Digest: known.Digest, Filename: "f", LastModified: "x"}, false},
		{"another checksum", `"one"`, "200", "/f", digest.FromString("y"), known, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			etag, status = tc.etag, tc.status
			got, err := New(Options{}).Unchanged(t.Context(), HTTP{URL: base + tc.path, Checksum: tc.checksum}, tc.known)
			if err != nil || got != tc.want {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
}

func TestHeadersAndSecrets(t *testing.T) {
	got := make(chan http.Header, 4)
	record := func(w http.ResponseWriter, r *http.Request) { got <- r.Header }
	other := serve(t, record)
	base := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/away" {
			got <- r.Header
			http.Redirect(w, r, other, http.StatusFound)
			return
		}
		record(w, r)
	})
	secrets := map[string]string{"HTTP_AUTH_TOKEN_127.0.0.1": "tok\n", "own": "Basic own"}
	c := New(Options{UserAgent: "cooper/1", Secret: func(id string) ([]byte, bool) { v, ok := secrets[id]; return []byte(v), ok }})
	fetch := func(h HTTP) http.Header {
		t.Helper()
		if _, _, err := c.Download(t.Context(), h, t.TempDir()); err != nil {
			t.Fatal(err)
		}
		return <-got
	}
	h := fetch(HTTP{URL: base, Header: map[string]string{"accept": "text/x", "Cookie": "a=b"}})
	if h.Get("Authorization") != "Bearer tok" || h.Get("Accept") != "text/x" || h.Get("Cookie") != "" || h.Get("User-Agent") != "cooper/1" {
		t.Errorf("sent %v", h)
	}
	if h := fetch(HTTP{URL: base, AuthHeaderSecret: "own", Header: map[string]string{"User-Agent": "me"}}); h.Get("Authorization") != "Basic own" || h.Get("User-Agent") != "me" {
		t.Errorf("sent %v", h)
	}
	for name, u := range map[string]string{"secret": base, "address": strings.Replace(base, "//", "//u:p@", 1)} {
		if h := fetch(HTTP{URL: u + "/away"}); h.Get("Authorization") == "" {
			t.Errorf("%s: no credentials for the server they are for", name)
		}
		if h := <-got; h.Get("Authorization") != "" || strings.Contains(h.Get("Referer"), "u:p") {
			t.Errorf("%s: an attacker behind a redirect would have %v", name, h)
		}
	}
	secrets["own"] = "a\r\nX-Other: b"
	_, _, err := c.Download(t.Context(), HTTP{URL: base, AuthHeaderSecret: "own"}, t.TempDir())
	if err == nil || strings.Contains(err.Error(), "X-Other") {
		t.Errorf("a secret with a line break: %v", err)
	}
	_, _, err = c.Download(t.Context(), HTTP{URL: "http://user:password@127.0.0.1:1/"}, t.TempDir())
	if err == nil || strings.Contains(err.Error(), "password") {
		t.Errorf("the log would show a password: %v", err)
	}
}

func TestProxyAndRootCAs(t *testing.T) {
	secure := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "secure") }))
	t.Cleanup(secure.Close)
	roots := x509.NewCertPool()
	roots.AddCert(secure.Certificate())
	if _, _, err := New(Options{RootCAs: roots}).Download(t.Context(), HTTP{URL: secure.URL}, t.TempDir()); err != nil {
		t.Error(err)
	}
	proxied := ""
	proxy, err := url.Parse(serve(t, func(w http.ResponseWriter, r *http.Request) { proxied = r.URL.String() }))
	if err != nil {
		t.Fatal(err)
	}
	c := New(Options{Proxy: func(*http.Request) (*url.URL, error) { return proxy, nil }})
	if _, _, err := c.Download(t.Context(), HTTP{URL: "http://host.invalid/file"}, t.TempDir()); err != nil || proxied != "http://host.invalid/file" {
		t.Errorf("the proxy got %q, %v", proxied, err)
	}
}

// A file is never in memory as a whole: a large one goes through a small heap.
func TestDownloadStreams(t *testing.T) {
	const size = 128 << 20
	base := serve(t, func(w http.ResponseWriter, r *http.Request) { io.CopyN(w, zeros{}, size) })
	dir := t.TempDir()
	var most uint64
	stop := make(chan bool)
	done := make(chan bool)
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
				most = max(most, heap())
			}
		}
	}()
	before := heap()
	_, _, err := New(Options{}).Download(t.Context(), HTTP{URL: base + "/big"}, dir)
	close(stop)
	<-done
	if err != nil {
		t.Fatal(err)
	}
	if grown := int64(most) - int64(before); grown > 32<<20 {
		t.Errorf("%d MiB of memory for a file of %d MiB", grown>>20, size>>20)
	}
}
