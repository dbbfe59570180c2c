package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const bundleType = "application/vnd.dev.sigstore.bundle.v0.3+json"

// testArtifacts writes a referrer and a signature tag as the sign package does.
func testArtifacts(t *testing.T, l *Layout, image ocispec.Descriptor, signature string) []Artifact {
	t.Helper()
	subject := ocispec.Descriptor{MediaType: image.MediaType, Digest: image.Digest, Size: image.Size}
	bundle := mustBlob(t, l, bundleType, []byte("bundle of "+signature))
	referrer := mustBlob(t, l, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: bundleType,
		Config: mustBlob(t, l, ocispec.MediaTypeEmptyJSON, []byte("{}")), Layers: []ocispec.Descriptor{bundle},
		Subject: &subject, Annotations: map[string]string{"dev.sigstore.bundle.content": "dsse-envelope"},
	})
	payload := mustBlob(t, l, "application/vnd.dev.cosign.simplesigning.v1+json", []byte(`{"critical":{}}`))
	payload.Annotations = map[string]string{"dev.cosignproject.cosign/signature": signature}
	sig := mustBlob(t, l, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: mustBlob(t, l, ocispec.MediaTypeImageConfig, []byte(`{"rootfs":{"type":"layers","diff_ids":[]}}`)), Layers: []ocispec.Descriptor{payload},
	})
	return []Artifact{
		{Descriptor: referrer, Referrer: true},
		{Descriptor: sig, Tag: strings.Replace(image.Digest.String(), ":", "-", 1) + ".sig"},
	}
}

func signed(t *testing.T, l *Layout, names ...string) Publication {
	t.Helper()
	img := testImage(t, l, amd64, "signed")
	return Publication{Image: img, Names: names, Artifacts: testArtifacts(t, l, img, "s1")}
}

func publishLayout(t *testing.T, from *Layout, dir string, p Publication) {
	t.Helper()
	if err := NewLayoutSink(dir).Publish(t.Context(), from, p); err != nil {
		t.Fatal(err)
	}
}

func TestLayoutSinkWritesWhatCosignAndOrasLookFor(t *testing.T) {
	from := newLayout(t)
	p := signed(t, from, "registry.example/app:v1", "demo:v2", "other/app:v1")
	dir := filepath.Join(t.TempDir(), "a", "b")
	publishLayout(t, from, dir, p)
	checkLayout(t, dir)
	noTemps(t, dir)

	l, err := OpenLayout(dir)
	if err != nil {
		t.Fatal(err)
	}
	idx, err := l.Index()
	if err != nil {
		t.Fatal(err)
	}
	image := func(tag, full string) ocispec.Descriptor {
		d := p.Image
		d.Annotations = map[string]string{"kind": kindImage, ocispec.AnnotationRefName: tag, annotationImageName: full}
		return d
	}
	referrer := p.Artifacts[0].Descriptor
	referrer.ArtifactType = bundleType
	referrer.Annotations = map[string]string{"dev.sigstore.bundle.content": "dsse-envelope"}
	sig := p.Artifacts[1].Descriptor
	sig.Annotations = map[string]string{"kind": kindSignatures, ocispec.AnnotationRefName: p.Artifacts[1].Tag}
	want := []ocispec.Descriptor{image("v1", "registry.example/app:v1"), image("v2", "docker.io/library/demo:v2"), referrer, sig}
	if diff := cmp.Diff(want, idx.Manifests); diff != "" {
		t.Errorf("index.json (-want +got):\n%s", diff)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 3 {
		t.Errorf("the layout has more than blobs, index.json and oci-layout: %v", entries)
	}
}

func TestLayoutSinkWithoutNamesOrArtifacts(t *testing.T) {
	from := newLayout(t)
	p := Publication{Image: testImage(t, from, amd64, "x")}
	dir := filepath.Join(t.TempDir(), "out")
	for range 2 {
		publishLayout(t, from, dir, p)
	}
	l, err := OpenLayout(dir)
	if err != nil {
		t.Fatal(err)
	}
	idx, _ := l.Index()
	if diff := cmp.Diff([]ocispec.Descriptor{p.Image}, idx.Manifests); diff != "" {
		t.Errorf("index.json (-want +got):\n%s", diff)
	}
	p.Names = []string{"app:v1"}
	publishLayout(t, from, dir, p)
	if idx, _ = l.Index(); len(idx.Manifests) != 1 || idx.Manifests[0].Annotations[ocispec.AnnotationRefName] != "v1" {
		t.Errorf("naming an image leaves a second entry: %v", idx.Manifests)
	}
}

func TestLayoutSinkAddsToALayoutAndMovesItsTag(t *testing.T) {
	from := newLayout(t)
	old := signed(t, from, "app:v1")
	dir := filepath.Join(t.TempDir(), "out")
	publishLayout(t, from, dir, old)
	other := Publication{Image: testImage(t, from, amd64, "other"), Names: []string{"app:other"}}
	publishLayout(t, from, dir, other)
	next := Publication{Image: testImage(t, from, amd64, "next"), Names: []string{"app:v1"}}
	next.Artifacts = testArtifacts(t, from, next.Image, "s2")
	publishLayout(t, from, dir, next)
	l, err := OpenLayout(dir)
	if err != nil {
		t.Fatal(err)
	}
	for tag, want := range map[string]ocispec.Descriptor{"v1": next.Image, "other": other.Image} {
		if d, err := l.Resolve(tag); err != nil || d.Digest != want.Digest {
			t.Errorf("%s: got %s, %v, want %s", tag, d.Digest, err, want.Digest)
		}
	}
	if a, err := l.Artifacts(old.Image.Digest); err != nil || len(a) > 0 {
		t.Errorf("signatures of an image without a name pile up: %v %v", a, err)
	}
	if a, err := l.Artifacts(next.Image.Digest); err != nil || len(a) != 2 {
		t.Errorf("got %v, %v, want the two artifacts", a, err)
	}
	checkLayout(t, dir)
}

func TestSecondSignatureJoinsTheFirst(t *testing.T) {
	from := newLayout(t)
	p := signed(t, from, "app:v1")
	dir := filepath.Join(t.TempDir(), "out")
	for _, signature := range []string{"s1", "s2", "s1", "s2"} {
		p.Artifacts = testArtifacts(t, from, p.Image, signature)
		publishLayout(t, from, dir, p)
	}
	l, err := OpenLayout(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := signaturesIn(t, &layoutStore{Layout: l}, p.Artifacts[1].Tag), []string{"s1", "s2"}; !slices.Equal(got, want) {
		t.Errorf("signatures: got %q, want %q", got, want)
	}
	checkLayout(t, dir)
}

func signaturesIn(t *testing.T, st Store, tag string) []string {
	t.Helper()
	d, err := st.Resolve(t.Context(), tag)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := st.ReadManifest(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	m, err := parseManifest(raw, d.MediaType)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := readBlob(t.Context(), st, m.Config, maxConfig); err != nil {
		t.Errorf("config of merged signatures: %v", err)
	}
	var out []string
	for _, l := range m.Layers {
		if _, err := readBlob(t.Context(), st, l, maxConfig); err != nil {
			t.Errorf("payload: %v", err)
		}
		out = append(out, l.Annotations["dev.cosignproject.cosign/signature"])
	}
	return out
}

func TestLayoutSinkRefusesADirectoryOfOtherThings(t *testing.T) {
	from := newLayout(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "thesis.tex"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	var not *NotLayoutError
	if err := NewLayoutSink(dir).Publish(t.Context(), from, signed(t, from, "a:b")); !errors.As(err, &not) || !strings.Contains(err.Error(), "destination") {
		t.Errorf("got %v, want a NotLayoutError of the destination", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("the directory was changed: %v", entries)
	}
}

func TestNothingIsPublishedFromAnIncompleteStore(t *testing.T) {
	for name, pick := range map[string]func(Publication, *Layout) digest.Digest{
		"layer":     func(p Publication, l *Layout) digest.Digest { return layersOf(l, p.Image)[0].Digest },
		"image":     func(p Publication, _ *Layout) digest.Digest { return p.Image.Digest },
		"referrer":  func(p Publication, _ *Layout) digest.Digest { return p.Artifacts[0].Descriptor.Digest },
		"bundle":    func(p Publication, l *Layout) digest.Digest { return layersOf(l, p.Artifacts[0].Descriptor)[0].Digest },
		"signature": func(p Publication, _ *Layout) digest.Digest { return p.Artifacts[1].Descriptor.Digest },
	} {
		for _, corrupt := range []bool{true, false} {
			t.Run(fmt.Sprint(name, " corrupt=", corrupt), func(t *testing.T) {
				from := newLayout(t)
				host := serve(t, newRegistry())
				p := signed(t, from, host+"/app:v1")
				victim := from.path(pick(p, from))
				if b, err := os.ReadFile(victim); err != nil {
					t.Fatal(err)
				} else if corrupt {
					b[len(b)/2] ^= 1
					os.WriteFile(victim, b, 0o644)
				} else {
					os.Remove(victim)
				}
				dir := t.TempDir()
				c := quick(ClientOptions{})
				for kind, sink := range map[string]Sink{
					"layout": NewLayoutSink(filepath.Join(dir, "layout")), "archive": NewArchiveSink(filepath.Join(dir, "x.tar")),
					"registry": c.NewRegistrySink(), "store": NewStoreSink(newLayout(t)),
				} {
					if err := sink.Publish(t.Context(), from, p); err == nil || !strings.Contains(err.Error(), "source") {
						t.Errorf("%s: got %v, want an error that names the source", kind, err)
					}
				}
				if entries, _ := os.ReadDir(dir); len(entries) > 0 {
					t.Errorf("something was written: %v", entries)
				}
				if _, err := c.Resolve(t.Context(), p.Names[0], amd64); !errors.Is(err, ErrNotFound) {
					t.Errorf("an image that is incomplete or unsigned has a tag: %v", err)
				}
			})
		}
	}
}

func layersOf(l *Layout, d ocispec.Descriptor) []ocispec.Descriptor {
	raw, err := l.ReadAll(d, maxManifest)
	if err != nil {
		panic(err)
	}
	m, err := parseManifest(raw, d.MediaType)
	if err != nil {
		panic(err)
	}
	return m.Layers
}

func TestArchiveIsALayoutAndAlwaysTheSame(t *testing.T) {
	dir := t.TempDir()
	var sums [][32]byte
	for i := range 2 {
		from := newLayout(t)
		if i == 1 {
			testImage(t, from, amd64, "something else in the store")
		}
		p := signed(t, from, "app:v1")
		file := filepath.Join(dir, fmt.Sprint(i, ".tar"))
		if err := NewArchiveSink(file).Publish(t.Context(), from, p); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		sums = append(sums, sha256.Sum256(b))
		var stream bytes.Buffer
		if err := NewArchiveStream(&stream).Publish(t.Context(), from, p); err != nil || !bytes.Equal(stream.Bytes(), b) {
			t.Errorf("the stream differs from the file: %v", err)
		}
	}
	if sums[0] != sums[1] {
		t.Error("two archives of one image differ")
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 2 {
		t.Errorf("temporary files stay behind: %v", entries)
	}

	out := filepath.Join(dir, "unpacked")
	f, err := os.Open(filepath.Join(dir, "0.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var names []string
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
		if h.ModTime.Unix() != 0 || h.Uid != 0 || h.Gid != 0 || h.Uname != "" {
			t.Errorf("%s: header depends on the machine: %+v", h.Name, h)
		}
		target := filepath.Join(out, h.Name)
		if h.Typeflag == tar.TypeDir {
			os.MkdirAll(target, 0o755)
			continue
		}
		b, _ := io.ReadAll(tr)
		os.WriteFile(target, b, 0o644)
	}
	if !slices.IsSorted(names) {
		t.Errorf("not sorted: %q", names)
	}
	checkLayout(t, out)
	l, err := OpenLayout(out)
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.Resolve("v1")
	if err != nil {
		t.Fatal(err)
	}
	if a, err := l.Artifacts(d.Digest); err != nil || len(a) != 2 {
		t.Errorf("artifacts: got %v, %v, want 2", a, err)
	}
}

func TestArchiveRemovesWhatAKilledBuildLeft(t *testing.T) {
	from := newLayout(t)
	dir := t.TempDir()
	left := filepath.Join(dir, tempPrefix+"left")
	if err := os.WriteFile(left, []byte("half"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := NewArchiveSink(filepath.Join(dir, "x.tar")).Publish(t.Context(), from, signed(t, from)); err != nil {
		t.Fatal(err)
	}
	noTemps(t, dir)
}

func TestArchiveReplacesALinkAndDoesNotWriteThroughIt(t *testing.T) {
	from := newLayout(t)
	dir := t.TempDir()
	victim := filepath.Join(dir, "victim")
	if err := os.WriteFile(victim, []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "x.tar")
	if err := os.Symlink("victim", file); err != nil {
		t.Fatal(err)
	}
	if err := NewArchiveSink(file).Publish(t.Context(), from, signed(t, from)); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(victim); string(b) != "mine" {
		t.Error("a file that a link led to was overwritten")
	}
}

func TestStoreKeepsImagesUnderFullNamesAndListsThem(t *testing.T) {
	l := newLayout(t)
	p := signed(t, l, "demo", "registry.example:5000/a/b:v1")
	if err := NewStoreSink(l).Publish(t.Context(), l, p); err != nil {
		t.Fatal(err)
	}
	plain := Publication{Image: testImage(t, l, amd64, "plain")}
	if err := NewStoreSink(l).Publish(t.Context(), l, plain); err != nil {
		t.Fatal(err)
	}
	entries, err := l.List()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name+" "+e.Digest.Encoded()[:6])
		if e.Err != nil || e.Size < 40_000 || e.Created == nil || e.Created.Unix() != 1_700_000_000 {
			t.Errorf("%s: size %d created %v: %v", e.Name, e.Size, e.Created, e.Err)
		}
	}
	six := func(d ocispec.Descriptor) string { return d.Digest.Encoded()[:6] }
	want := []string{" " + six(plain.Image), "docker.io/library/demo:latest " + six(p.Image), "registry.example:5000/a/b:v1 " + six(p.Image)}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("images (-want +got):\n%s", diff)
	}

	p.Artifacts = testArtifacts(t, l, p.Image, "s2") // the same image, built and signed once more
	if err := NewStoreSink(l).Publish(t.Context(), l, p); err != nil {
		t.Fatal(err)
	}
	again, err := l.Publication("demo")
	if err != nil {
		t.Fatal(err)
	}
	if again.Image.Digest != p.Image.Digest || len(again.Artifacts) != 2 || again.Image.Annotations != nil {
		t.Errorf("publication from the store: %+v", again)
	}
	host := serve(t, newRegistry())
	again.Names = []string{host + "/pushed:later"}
	c := quick(ClientOptions{})
	push(t, c, l, again)
	st, err := c.Open(t.Context(), again.Names[0])
	if err != nil {
		t.Fatal(err)
	}
	if got := signaturesIn(t, st, p.Artifacts[1].Tag); !slices.Equal(got, []string{"s2"}) {
		t.Errorf("signatures pushed from the store: %q", got)
	}
	if _, err := l.Publication("nothing"); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
}

// withSubject says in its answers that it lists referrers, which go-containerregistry's registry forgets.
func withSubject(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") {
			body, _ := io.ReadAll(r.Body)
			r.Body = io.NopCloser(bytes.NewReader(body))
			var m ocispec.Manifest
			if json.Unmarshal(body, &m) == nil && m.Subject != nil {
				w.Header().Set("OCI-Subject", m.Subject.Digest.String())
			}
		}
		next.ServeHTTP(w, r)
	})
}

func TestReferrersInARegistryWithAndWithoutTheirAPI(t *testing.T) {
	for name, c := range map[string]struct {
		handler  http.Handler
		fallback bool
	}{
		"with":    {withSubject(newRegistry(registry.WithReferrersSupport(true))), false},
		"without": {newRegistry(), true},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLayout(t)
			host := serve(t, c.handler)
			p := signed(t, l, host+"/app:v1", host+"/app:v2", host+"/copy:v1")
			client := quick(ClientOptions{})
			push(t, client, l, p)
			push(t, client, l, p)                                  // again changes nothing
			p.Artifacts = testArtifacts(t, l, p.Image, "s2")       // another key
			p.Names = []string{host + "/app:v1", host + "/app:v3"} // and another tag
			push(t, client, l, p)

			st, err := client.Open(t.Context(), host+"/app:v3")
			if err != nil {
				t.Fatal(err)
			}
			d, err := st.Resolve(t.Context(), "")
			if err != nil || d.Digest != p.Image.Digest {
				t.Fatalf("got %v, %v, want %s", d, err, p.Image.Digest)
			}
			referrers, err := st.Referrers(t.Context(), d.Digest)
			if err != nil || len(referrers) != 2 {
				t.Fatalf("referrers: got %v, %v, want 2", referrers, err)
			}
			for _, r := range referrers {
				// Not the list's word for it: go-containerregistry's registry lists config types.
				raw, err := st.ReadManifest(t.Context(), r)
				if err != nil {
					t.Fatal(err)
				}
				if m, err := parseManifest(raw); err != nil || m.ArtifactType != bundleType || m.Subject.Digest != d.Digest {
					t.Errorf("referrer %s: %v", raw, err)
				}
			}
			if got := signaturesIn(t, st, p.Artifacts[1].Tag); !slices.Equal(got, []string{"s1", "s2"}) {
				t.Errorf("signatures: got %q, want both", got)
			}
			if _, err := st.Resolve(t.Context(), fallbackTag(d.Digest)); (err == nil) != c.fallback {
				t.Errorf("fallback tag: %v, want it: %v", err, c.fallback)
			}
			if referrers, err := st.Referrers(t.Context(), digest.FromString("nobody")); err != nil || len(referrers) != 0 {
				t.Errorf("referrers of nothing: %v, %v", referrers, err)
			}
		})
	}
}

func TestOpenGivesALayoutAsItGivesARegistry(t *testing.T) {
	from := newLayout(t)
	p := signed(t, from, "app:v1")
	dir := filepath.Join(t.TempDir(), "out")
	publishLayout(t, from, dir, p)
	for _, ref := range []string{"oci:" + dir, "oci:" + dir + ":v1", "oci:" + dir + "@" + p.Image.Digest.String(), "oci:" + dir + ":v1@" + p.Image.Digest.String()} {
		st, err := quick(ClientOptions{}).Open(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		d, err := st.Resolve(t.Context(), "")
		if err != nil || d.Digest != p.Image.Digest {
			t.Errorf("%s: got %s, %v", ref, d.Digest, err)
		}
		if r, err := st.Referrers(t.Context(), d.Digest); err != nil || len(r) != 1 || r[0].ArtifactType != bundleType {
			t.Errorf("%s: referrers %v, %v", ref, r, err)
		}
		if got := signaturesIn(t, st, p.Artifacts[1].Tag); !slices.Equal(got, []string{"s1"}) {
			t.Errorf("%s: signatures %q", ref, got)
		}
		if _, err := st.Resolve(t.Context(), "sha256-none.sig"); !errors.Is(err, ErrNotFound) {
			t.Errorf("got %v, want ErrNotFound", err)
		}
	}
}

func TestMultiPlatformImageIsPushedChildrenFirst(t *testing.T) {
	l := newLayout(t)
	arm := ocispec.Platform{OS: "linux", Architecture: "arm64"}
	idx := testIndex(t, l, withPlatform(testImage(t, l, amd64, "amd"), amd64), withPlatform(testImage(t, l, arm, "arm"), arm))
	host := serve(t, newRegistry()) // refuses an index whose manifests it does not have
	c := quick(ClientOptions{})
	push(t, c, l, Publication{Image: idx, Names: []string{host + "/multi:v1"}})
	for _, p := range []ocispec.Platform{amd64, arm} {
		src, err := c.Resolve(t.Context(), host+"/multi:v1", p)
		if err == nil {
			err = readLayers(t, src)
		}
		if err != nil {
			t.Errorf("%v: %v", p, err)
		}
	}
}

// failing refuses the n-th request that changes something, and breaks the connection instead of answering
// when abort is set.
type failing struct {
	next  http.Handler
	abort bool
	late  bool // after it was carried out

	mu     sync.Mutex
	n      int // which one; 0: none
	seen   int
	failed string
}

func (f *failing) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.seen++
	hit := f.n > 0 && f.seen >= f.n // from there on: as a registry that went away, or whose disk is full
	if hit && f.failed == "" {
		f.failed = r.Method + " " + r.URL.Path
	}
	f.mu.Unlock()
	if !hit {
		f.next.ServeHTTP(w, r)
		return
	}
	if f.late {
		f.next.ServeHTTP(discard{http.Header{}}, r)
	}
	if f.abort {
		panic(http.ErrAbortHandler)
	}
	w.WriteHeader(http.StatusForbidden)
}

type discard struct{ h http.Header }

func (d discard) Header() http.Header         { return d.h }
func (d discard) Write(p []byte) (int, error) { return len(p), nil }
func (d discard) WriteHeader(int)             {}

// TestTagComesLastHoweverThePushEnds fails a push at each of its requests in turn, in three ways. Whenever
// the tag exists afterwards, everything it leads to must exist, signatures included.
func TestTagComesLastHoweverThePushEnds(t *testing.T) {
	l := newLayout(t)
	p := signed(t, l)
	for _, mode := range []struct{ abort, late bool }{{}, {abort: true}, {abort: true, late: true}} {
		for n := 1; ; n++ {
			back := newRegistry()
			f := &failing{next: back, abort: mode.abort, late: mode.late, n: n}
			p.Names = []string{serve(t, f) + "/app:v1"}
			c := quick(ClientOptions{})
			c.patience.tries = 1
			err := c.NewRegistrySink().Publish(t.Context(), l, p)
			f.mu.Lock()
			f.n = 0
			failed := f.failed
			f.mu.Unlock()
			if failed == "" {
				if err != nil {
					t.Errorf("a push that nothing disturbed: %v", err)
				}
				if n < 15 {
					t.Errorf("only %d requests make a push; the test fails too few", n)
				}
				break
			}
			if err == nil {
				t.Errorf("%s failed and the push did not", failed)
			} else if !strings.Contains(err.Error(), "destination") {
				t.Errorf("%s failed: %v does not say that the destination is at fault", failed, err)
			}
			last := strings.HasSuffix(failed, "/manifests/v1")
			checkTagged(t, quick(ClientOptions{}), p, failed, last && mode.late)
			if c := quick(ClientOptions{}); c.NewRegistrySink().Publish(t.Context(), l, p) != nil {
				t.Errorf("a push after one that failed at %s fails", failed)
			} else {
				checkTagged(t, c, p, failed, true)
			}
		}
	}
}

func checkTagged(t *testing.T, c *Client, p Publication, failed string, want bool) {
	t.Helper()
	st, err := c.Open(t.Context(), p.Names[0])
	if err != nil {
		t.Fatal(err)
	}
	_, err = st.Resolve(t.Context(), "")
	if notFound(err) && !want {
		return
	}
	if err != nil || !want {
		t.Errorf("after a failure of %s the tag exists, and whoever pulls it gets an image that is incomplete or unsigned (%v)", failed, err)
		return
	}
	src, err := c.Resolve(t.Context(), p.Names[0], amd64)
	if err == nil {
		err = readLayers(t, src)
	}
	if err != nil {
		t.Errorf("after a failure of %s: %v", failed, err)
	}
	if r, err := st.Referrers(t.Context(), p.Image.Digest); err != nil || len(r) != 1 {
		t.Errorf("after a failure of %s the referrers are %v, %v", failed, r, err)
	}
	if got := signaturesIn(t, st, p.Artifacts[1].Tag); !slices.Equal(got, []string{"s1"}) {
		t.Errorf("after a failure of %s the signatures are %q", failed, got)
	}
}

// TestOthersWritingTheSameTagsLoseNothing lets another push come between our reading and our writing of the
// tags that several pushes share.
func TestOthersWritingTheSameTagsLoseNothing(t *testing.T) {
	l := newLayout(t)
	p := signed(t, l)
	theirs := Publication{Image: p.Image, Artifacts: testArtifacts(t, l, p.Image, "theirs")}
	back := newRegistry()
	direct := serve(t, back) // the same registry by another address
	var once sync.Map
	host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPut || !strings.Contains(r.URL.Path, "/manifests/sha256-") {
			back.ServeHTTP(w, r)
			return
		}
		_, again := once.LoadOrStore(r.URL.Path, true)
		if again {
			back.ServeHTTP(w, r)
			return
		}
		// Ours is written, and then overwritten by somebody who had not seen it.
		back.ServeHTTP(w, r)
		theirs.Names = []string{direct + "/app:theirs"}
		sink := quick(ClientOptions{})
		rem, err := sink.openRemote(theirs.Names[0])
		if err != nil {
			t.Error(err)
			return
		}
		rem.push = true
		for _, a := range theirs.Artifacts {
			nodes, err := l.closure(a.Descriptor)
			if err == nil {
				_, err = rem.putArtifact(r.Context(), l, nodes)
			}
			if err != nil {
				t.Error(err)
			}
		}
		raw, mediaType := closureManifest(t, l, theirs.Artifacts[1].Descriptor), ocispec.MediaTypeImageManifest
		if !strings.HasSuffix(r.URL.Path, ".sig") {
			d, _ := l.referrer(theirs.Artifacts[0].Descriptor, p.Image.Digest)
			idx := emptyIndex()
			idx.Manifests = append(idx.Manifests, *d)
			raw, _ = json.Marshal(idx)
			mediaType = ocispec.MediaTypeImageIndex
		}
		if _, err := rem.putManifest(r.Context(), r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:], mediaType, raw); err != nil {
			t.Error(err)
		}
	}))
	p.Names = []string{host + "/app:v1"}
	c := quick(ClientOptions{})
	push(t, c, l, p)
	st, err := c.Open(t.Context(), p.Names[0])
	if err != nil {
		t.Fatal(err)
	}
	if got := signaturesIn(t, st, p.Artifacts[1].Tag); !slices.Equal(got, []string{"theirs", "s1"}) {
		t.Errorf("signatures: got %q, want theirs and ours", got)
	}
	if r, err := st.Referrers(t.Context(), p.Image.Digest); err != nil || len(r) != 2 {
		t.Errorf("referrers: got %v, %v, want theirs and ours", r, err)
	}
}

func closureManifest(t *testing.T, l *Layout, d ocispec.Descriptor) []byte {
	t.Helper()
	raw, err := l.ReadAll(d, maxManifest)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestUploadThatNobodyTakesIsGivenUp(t *testing.T) {
	l := newLayout(t)
	big := mustBlob(t, l, ocispec.MediaTypeImageLayer, make([]byte, 32<<20)) // more than a socket buffers
	img := mustBlob(t, l, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: mustBlob(t, l, ocispec.MediaTypeImageConfig, []byte(`{}`)), Layers: []ocispec.Descriptor{big},
	})
	back := newRegistry()
	release := make(chan struct{})
	host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut && r.ContentLength == big.Size {
			<-release
			return
		}
		back.ServeHTTP(w, r)
	}))
	defer close(release)
	c := quick(ClientOptions{})
	c.patience.stall = 50 * time.Millisecond
	err := c.NewRegistrySink().Publish(t.Context(), l, Publication{Image: img, Names: []string{host + "/app:v1"}})
	if !errors.Is(err, errStalled) {
		t.Errorf("got %v, want %v", err, errStalled)
	}
}

func TestBlobsThatAreThereAreNotSentAgain(t *testing.T) {
	l := newLayout(t)
	var mu sync.Mutex
	uploads := 0
	back := newRegistry()
	host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/blobs/uploads/") {
			mu.Lock()
			uploads++
			mu.Unlock()
		}
		back.ServeHTTP(w, r)
	}))
	p := signed(t, l, host+"/app:v1")
	c := quick(ClientOptions{})
	push(t, c, l, p)
	first := uploads
	push(t, c, l, p)
	if first == 0 || uploads != first {
		t.Errorf("uploads: first push %d, second %d more, want none", first, uploads-first)
	}
}

func TestUploadLocationElsewhereGetsNoCredentials(t *testing.T) {
	l := newLayout(t)
	p := signed(t, l)
	var mu sync.Mutex
	var leaked []string
	back := newRegistry()
	storage := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		if a := r.Header.Get("Authorization"); a != "" {
			leaked = append(leaked, a)
		}
		mu.Unlock()
		back.ServeHTTP(w, r)
	}))
	host := serve(t, withAuth("me", "secret", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			w.Header().Set("Location", "http://"+storage+"/v2/app/blobs/uploads/1?state=s")
			w.WriteHeader(http.StatusAccepted)
			return
		}
		back.ServeHTTP(w, r)
	})))
	p.Names = []string{host + "/app:v1"}
	c := quick(ClientOptions{DockerConfig: dockerConfigDir(t, `{"auths":{"`+host+`":`+authEntry("me", "secret")+`}}`)})
	push(t, c, l, p)
	if len(leaked) > 0 {
		t.Errorf("the user's password went to another server: %q", leaked)
	}
}

func TestPushOfADigestOrOfNothingIsRefused(t *testing.T) {
	l := newLayout(t)
	p := signed(t, l)
	for _, names := range [][]string{nil, {"localhost:1/x@" + p.Image.Digest.String()}, {"NOT A NAME"}} {
		p.Names = names
		if err := quick(ClientOptions{}).NewRegistrySink().Publish(t.Context(), l, p); err == nil || strings.Contains(err.Error(), "refused") {
			t.Errorf("%q: got %v", names, err)
		}
	}
}

func TestCancelledPublishEndsAndShowsNothing(t *testing.T) {
	from := newLayout(t)
	p := signed(t, from, "app:v1")
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("the user pressed ^C")
	cancel(stop)
	dir := t.TempDir()
	for name, sink := range map[string]Sink{"layout": NewLayoutSink(filepath.Join(dir, "l")), "archive": NewArchiveSink(filepath.Join(dir, "a.tar"))} {
		if err := sink.Publish(ctx, from, p); !errors.Is(err, stop) {
			t.Errorf("%s: got %v, want %v", name, err, stop)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "a.tar")); err == nil {
		t.Error("the archive is there")
	}
	if l, err := OpenLayout(filepath.Join(dir, "l")); err == nil {
		t.Errorf("a layout is there: %v", l.dir)
	}
	publishLayout(t, from, filepath.Join(dir, "l"), p) // the next try is not refused
	checkLayout(t, filepath.Join(dir, "l"))
}

// TestOtherToolsReadOurLayouts asks skopeo and umoci, and Debian's registry for what we push.
func TestOtherToolsReadOurLayouts(t *testing.T) {
	from := newLayout(t)
	img := testImage(t, from, amd64, "x")
	p := Publication{Image: img, Names: []string{"app:v1"}, Artifacts: testArtifacts(t, from, img, "s1")}
	dir := filepath.Join(t.TempDir(), "out")
	publishLayout(t, from, dir, p)
	var inspected struct{ Digest string }
	if err := json.Unmarshal(tool(t, "skopeo", "inspect", "oci:"+dir+":v1"), &inspected); err != nil || inspected.Digest != img.Digest.String() {
		t.Errorf("skopeo inspect: got %q, %v, want %s", inspected.Digest, err, img.Digest)
	}
	tool(t, "umoci", "stat", "--image", dir+":v1")
	file := filepath.Join(t.TempDir(), "x.tar")
	if err := NewArchiveSink(file).Publish(t.Context(), from, p); err != nil {
		t.Fatal(err)
	}
	tool(t, "skopeo", "inspect", "oci-archive:"+file+":v1")
}

func tool(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr.String())
	}
	return out
}

func TestDebiansRegistryTakesAPushAndSkopeoPullsIt(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yml")
	err := os.WriteFile(config, []byte("version: 0.1\nlog: {level: info, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: "+dir+"/data}}\nhttp: {addr: '127.0.0.1:0'}\n"), 0o644)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "docker-registry", "serve", config)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	host := listeningOn(t, stderr)

	l := newLayout(t)
	p := signed(t, l, host+"/app:v1")
	c := quick(ClientOptions{})
	push(t, c, l, p)
	push(t, c, l, p)
	checkTagged(t, c, p, "nothing", true)
	out := filepath.Join(dir, "pulled")
	tool(t, "skopeo", "copy", "--src-tls-verify=false", "docker://"+host+"/app:v1", "oci:"+out+":v1")
	pulled, err := OpenLayout(out)
	if err != nil {
		t.Fatal(err)
	}
	if d, err := pulled.Resolve("v1"); err != nil || d.Digest != p.Image.Digest {
		t.Errorf("skopeo pulled %s, %v, want %s", d.Digest, err, p.Image.Digest)
	}
}

// listeningOn reads the address from the registry's log.
func listeningOn(t *testing.T, log io.Reader) string {
	t.Helper()
	address := make(chan string, 1)
	go func() {
		defer close(address)
		lines := bufio.NewScanner(log)
		for lines.Scan() {
			if _, rest, ok := strings.Cut(lines.Text(), "listening on "); ok {
				address <- rest[:strings.IndexAny(rest+" ", "\" ,")]
				io.Copy(io.Discard, log)
				return
			}
		}
	}()
	host := <-address
	if host == "" {
		t.Fatal("docker-registry ended without listening")
	}
	return host
}
