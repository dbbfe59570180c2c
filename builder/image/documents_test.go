package image

import (
	"crypto/x509"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A shelf is Documents in memory.
type shelf map[string][]byte

func (s shelf) Document(repository string, d digest.Digest) []byte {
	return s[repository+"@"+d.String()]
}

func (s shelf) Keep(repository string, d digest.Digest, b []byte) {
	s[repository+"@"+d.String()] = b
}

func TestWhatIsKeptOfAnImageIsNotFetchedAgain(t *testing.T) {
	l := newLayout(t)
	img := testImage(t, l, amd64, "x")
	idx := testIndex(t, l, withPlatform(img, amd64))
	other := testImage(t, l, amd64, "y")
	var mu sync.Mutex
	var asked []string
	inner := newRegistry()
	noHead := false
	host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		kind := strings.Split(r.URL.Path, "/")
		mu.Lock()
		asked = append(asked, r.Method+" "+kind[max(0, len(kind)-2)])
		refuse := noHead && r.Method == http.MethodHead
		mu.Unlock()
		if refuse {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	publisher := quick(ClientOptions{})
	push(t, publisher, l, Publication{Image: idx, Names: []string{host + "/a:v1"}})
	manifest, config := "GET manifests", "GET blobs"
	kept := shelf{}

	for _, c := range []struct {
		name  string
		ref   string
		setUp func()
		want  ocispec.Descriptor
		asked []string
	}{
		{"the first time", host + "/a:v1", nil, img, []string{"GET v2", "HEAD manifests", manifest, manifest, config}},
		{"by its tag", host + "/a:v1", nil, img, []string{"GET v2", "HEAD manifests"}},
		{"by its digest", host + "/a:v1@" + idx.Digest.String(), nil, img, nil},
		{"from a repository that never had it", host + "/b@" + idx.Digest.String(), nil, ocispec.Descriptor{}, []string{"GET v2", manifest}},
		{"from a registry that refuses HEAD", host + "/a:v1", func() { noHead = true }, img, []string{"GET v2", "HEAD manifests", manifest}},
		{"after somebody wrote another config into the store", host + "/a:v1", func() {
			noHead = false
			for d := range kept {
				kept[d] = []byte(strings.Repeat("x", len(kept[d])))
			}
		}, img, []string{"GET v2", "HEAD manifests", manifest, manifest, config}},
		{"after the tag moved", host + "/a:v1", func() {
			push(t, publisher, l, Publication{Image: other, Names: []string{host + "/a:v1"}})
		}, other, []string{"GET v2", "HEAD manifests", manifest, config}},
	} {
		if c.setUp != nil {
			c.setUp()
		}
		mu.Lock()
		asked = nil
		mu.Unlock()
		src, err := quick(ClientOptions{Documents: kept}).Resolve(t.Context(), c.ref, amd64)
		switch {
		case c.want.Digest == "":
			if !errors.Is(err, ErrNotFound) {
				t.Errorf("%s: got %v, want ErrNotFound: a name that has not the image is taken for one that has", c.name, err)
			}
		case err != nil:
			t.Fatalf("%s: %v", c.name, err)
		case src.Descriptor.Digest != c.want.Digest || digest.FromBytes(src.Config) != src.Manifest.Config.Digest:
			t.Errorf("%s: got %s with config %.40s, want %s", c.name, src.Descriptor.Digest, src.Config, c.want.Digest)
		}
		mu.Lock()
		if d := cmp.Diff(c.asked, asked); d != "" {
			t.Errorf("%s: requests (-want +got):\n%s", c.name, d)
		}
		mu.Unlock()
	}
}

func TestARegistryOnThisMachineMaySendUsToHTTPS(t *testing.T) {
	s := newStub(t)
	storage := httptest.NewTLSServer(s)
	defer storage.Close()
	roots := x509.NewCertPool()
	roots.AddCert(storage.Certificate())
	host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if isBlobRequest(r) {
			http.Redirect(w, r, storage.URL+r.URL.Path, http.StatusTemporaryRedirect)
			return
		}
		s.ServeHTTP(w, r)
	}))
	src, err := quick(ClientOptions{RootCAs: roots}).Resolve(t.Context(), host+"/x", amd64)
	if err == nil {
		err = readLayers(t, src)
	}
	if err != nil {
		t.Error(err)
	}
}
