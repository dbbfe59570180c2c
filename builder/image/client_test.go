package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var amd64 = ocispec.Platform{OS: "linux", Architecture: "amd64"}

func mustBlob(t *testing.T, l *Layout, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	b, ok := v.([]byte)
	if !ok {
		var err error
		if b, err = json.Marshal(v); err != nil {
			t.Fatal(err)
		}
	}
	d, err := l.WriteBlob(mediaType, b)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// testLayer is a layer with one file of 20 kB that does not compress.
func testLayer(t *testing.T, seed string) []byte {
	t.Helper()
	var noise []byte
	for i := range 20_000 / 32 {
		sum := sha256.Sum256([]byte(fmt.Sprint(seed, i)))
		noise = append(noise, sum[:]...)
	}
	var out bytes.Buffer
	tw := tar.NewWriter(&out)
	tw.WriteHeader(&tar.Header{Name: "file-" + seed, Mode: 0o644, Size: int64(len(noise))})
	tw.Write(noise)
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// testImage writes a small image; content makes its layers differ from those of other images.
func testImage(t *testing.T, l *Layout, p ocispec.Platform, content string) ocispec.Descriptor {
	t.Helper()
	created := time.Unix(1_700_000_000, 0).UTC()
	config := ocispec.Image{Platform: p, Created: &created}
	config.RootFS.Type = "layers"
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for i := range 2 {
		body := testLayer(t, fmt.Sprint(content, i))
		var packed bytes.Buffer
		zw := gzip.NewWriter(&packed)
		zw.Write(body)
		zw.Close()
		m.Layers = append(m.Layers, mustBlob(t, l, ocispec.MediaTypeImageLayerGzip, packed.Bytes()))
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(body))
	}
	m.Config = mustBlob(t, l, ocispec.MediaTypeImageConfig, config)
	return mustBlob(t, l, ocispec.MediaTypeImageManifest, m)
}

func testIndex(t *testing.T, l *Layout, manifests ...ocispec.Descriptor) ocispec.Descriptor {
	t.Helper()
	return mustBlob(t, l, ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests,
	})
}

func withPlatform(d ocispec.Descriptor, p ocispec.Platform) ocispec.Descriptor {
	d.Platform = &p
	return d
}

func newRegistry(o ...registry.Option) http.Handler {
	return registry.New(append(o, registry.Logger(log.New(io.Discard, "", 0)))...)
}

// serve starts a server on loopback and returns its host and port.
func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// quick is a client that does not wait long between tries.
func quick(o ClientOptions) *Client {
	c := NewClient(o)
	c.patience = patience{tries: 3, first: time.Millisecond, limit: 20 * time.Millisecond, stall: 2 * time.Second}
	return c
}

func push(t *testing.T, c *Client, l *Layout, p Publication) {
	t.Helper()
	if err := c.NewRegistrySink().Publish(t.Context(), l, p); err != nil {
		t.Fatal(err)
	}
}

func readLayers(t *testing.T, src *Source) error {
	t.Helper()
	for i := range src.Manifest.Layers {
		r, err := src.Layer(t.Context(), i)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, r)
		r.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func TestResolveFromRegistryByTagAndDigest(t *testing.T) {
	l := newLayout(t)
	img := testImage(t, l, amd64, "x")
	host := serve(t, newRegistry())
	c := quick(ClientOptions{})
	push(t, c, l, Publication{Image: img, Names: []string{host + "/a/b:v1"}})

	for _, ref := range []string{host + "/a/b:v1", host + "/a/b@" + img.Digest.String(), host + "/a/b:other@" + img.Digest.String()} {
		src, err := c.Resolve(t.Context(), ref, amd64)
		if err != nil {
			t.Fatalf("%s: %v", ref, err)
		}
		if src.Descriptor.Digest != img.Digest || src.Name != ref || len(src.Manifest.Layers) != 2 {
			t.Errorf("%s: got %+v", ref, src)
		}
		if err := readLayers(t, src); err != nil {
			t.Errorf("%s: %v", ref, err)
		}
		to := newLayout(t)
		r, err := src.Layer(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := to.Ingest(src.Manifest.Layers[0], r); err != nil {
			t.Errorf("tee into the store: %v", err)
		}
		r.Close()
	}
	if _, err := c.Resolve(t.Context(), host+"/a/b:v2", amd64); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "source "+host) {
		t.Errorf("got %v, want ErrNotFound that names the source", err)
	}
}

func TestResolveFromLayout(t *testing.T) {
	l := newLayout(t)
	img := testImage(t, l, amd64, "amd")
	arm := testImage(t, l, ocispec.Platform{OS: "linux", Architecture: "arm64"}, "arm")
	attestation := withPlatform(testImage(t, l, amd64, "attestation"), ocispec.Platform{OS: "unknown", Architecture: "unknown"})
	inner := testIndex(t, l, attestation, withPlatform(arm, ocispec.Platform{OS: "linux", Architecture: "arm64"}), withPlatform(img, amd64))
	outer := testIndex(t, l, inner) // as some tools nest them
	typed := withPlatform(img, amd64)
	typed.ArtifactType = ocispec.MediaTypeImageConfig // as crane and ko list them
	for tag, d := range map[string]ocispec.Descriptor{"plain": img, "multi": inner, "nested": outer, "typed": testIndex(t, l, typed), "unlabelled": testIndex(t, l, arm, img)} {
		if err := l.Tag(tag, d); err != nil {
			t.Fatal(err)
		}
	}
	c := quick(ClientOptions{Layouts: map[string]string{
		"base": l.dir, "one": l.dir + ":plain", "alpine:3.20": l.dir + ":multi", "pinned": l.dir + "@" + img.Digest.String(),
	}})
	for _, ref := range []string{
		"oci-layout://base:plain", "oci-layout://base:multi", "oci-layout://base:nested", "oci-layout://base:typed", "oci-layout://base:unlabelled",
		"oci-layout://one", "oci-layout://alpine:3.20", "oci-layout://pinned", "oci-layout://base@" + img.Digest.String(),
		"oci-layout://base:plain@" + inner.Digest.String(), "oci-layout://one:multi",
	} {
		src, err := c.Resolve(t.Context(), ref, amd64)
		if err != nil {
			t.Errorf("%s: %v", ref, err)
			continue
		}
		if src.Descriptor.Digest != img.Digest {
			t.Errorf("%s: got %s, want %s", ref, src.Descriptor.Digest, img.Digest)
		}
		if err := readLayers(t, src); err != nil {
			t.Errorf("%s: %v", ref, err)
		}
	}
	var platform *PlatformError
	_, err := c.Resolve(t.Context(), "oci-layout://base:multi", ocispec.Platform{OS: "linux", Architecture: "riscv64"})
	if !errors.As(err, &platform) || !strings.Contains(err.Error(), "linux/arm64, linux/amd64") || platform.Hint() == "" {
		t.Errorf("got %v, want a PlatformError that lists what there is", err)
	}
	for _, ref := range []string{"oci-layout://base", "oci-layout://base:gone", "oci-layout://nobody", "oci-layout://base@sha256:../../x"} {
		if src, err := c.Resolve(t.Context(), ref, amd64); err == nil {
			t.Errorf("%s: got %s", ref, src.Descriptor.Digest)
		}
	}
}

func TestResolveTakesTheBestVariant(t *testing.T) {
	l := newLayout(t)
	var entries []ocispec.Descriptor
	for _, v := range []string{"v5", "v7", "v6"} {
		p := ocispec.Platform{OS: "linux", Architecture: "arm", Variant: v}
		entries = append(entries, withPlatform(testImage(t, l, p, v), p))
	}
	if err := l.Tag("latest", testIndex(t, l, entries...)); err != nil {
		t.Fatal(err)
	}
	c := quick(ClientOptions{Layouts: map[string]string{"base": l.dir}})
	src, err := c.Resolve(t.Context(), "oci-layout://base", ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v7"})
	if err != nil || src.Descriptor.Digest != entries[1].Digest {
		t.Errorf("got %v, %v, want the v7 image", src, err)
	}
}

func TestDockerMediaTypesBecomeOCIInDescriptorsOnly(t *testing.T) {
	l := newLayout(t)
	config := mustBlob(t, l, dockerConfig, []byte(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}`))
	a := mustBlob(t, l, dockerLayer+".gzip", []byte("a"))
	b := mustBlob(t, l, ocispec.MediaTypeImageLayerZstd, []byte("b"))
	for name, mediaType := range map[string]string{"docker": dockerManifest, "mixed": ocispec.MediaTypeImageManifest} {
		t.Run(name, func(t *testing.T) {
			d := mustBlob(t, l, mediaType, ocispec.Manifest{
				Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: mediaType, Config: config, Layers: []ocispec.Descriptor{a, b},
			})
			if err := l.Tag("latest", d); err != nil {
				t.Fatal(err)
			}
			src, err := quick(ClientOptions{Layouts: map[string]string{"base": l.dir + ":latest"}}).Resolve(t.Context(), "oci-layout://base", amd64)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := src.Manifest.Layers[0].MediaType, ocispec.MediaTypeImageLayerGzip; got != want {
				t.Errorf("layer: got %s, want %s", got, want)
			}
			if got, want := src.Manifest.Config.MediaType, ocispec.MediaTypeImageConfig; got != want {
				t.Errorf("config: got %s, want %s", got, want)
			}
			if src.Manifest.Layers[0].Digest != a.Digest || src.Descriptor.Digest != d.Digest || src.Descriptor.MediaType != mediaType {
				t.Errorf("bytes were renamed too: %+v", src)
			}
		})
	}
}

func TestLayersThatLieElsewhereAreRefused(t *testing.T) {
	asked := make(chan string, 10)
	canary := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { asked <- r.URL.String() }))
	l := newLayout(t)
	config := mustBlob(t, l, ocispec.MediaTypeImageConfig, []byte(`{}`))
	layer := mustBlob(t, l, ocispec.MediaTypeImageLayerGzip, []byte("layer"))
	for name, change := range map[string]func(*ocispec.Descriptor){
		"urls":             func(d *ocispec.Descriptor) { d.URLs = []string{"http://" + canary + "/layer"} },
		"docker foreign":   func(d *ocispec.Descriptor) { d.MediaType = dockerForeignLayer + ".gzip" },
		"nondistributable": func(d *ocispec.Descriptor) { d.MediaType = "application/vnd.oci.image.layer.nondistributable.v1.tar" },
	} {
		t.Run(name, func(t *testing.T) {
			d := layer
			change(&d)
			m := mustBlob(t, l, ocispec.MediaTypeImageManifest, ocispec.Manifest{
				Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{d},
			})
			if err := l.Tag("latest", m); err != nil {
				t.Fatal(err)
			}
			var foreign *ForeignLayerError
			_, err := quick(ClientOptions{Layouts: map[string]string{"base": l.dir}}).Resolve(t.Context(), "oci-layout://base", amd64)
			if !errors.As(err, &foreign) || foreign.Hint() == "" {
				t.Errorf("got %v, want a ForeignLayerError", err)
			}
		})
	}
	select {
	case u := <-asked:
		t.Errorf("an image made us ask a third host for %s, and would get our credentials with a 401", u)
	default:
	}
}

// stub is a registry with one image, in which tests change single answers.
type stub struct {
	t      *testing.T
	layout *Layout
	image  ocispec.Descriptor
	change func(w http.ResponseWriter, r *http.Request, body []byte, mediaType string) bool // true: it has answered
	mu     sync.Mutex
	log    []string
}

func newStub(t *testing.T) *stub {
	l := newLayout(t)
	return &stub{t: t, layout: l, image: testImage(t, l, amd64, "stub")}
}

func (s *stub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.log = append(s.log, r.Method+" "+r.URL.Path+" "+r.Header.Get("Range"))
	s.mu.Unlock()
	if r.URL.Path == "/v2/" {
		return
	}
	last := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	mediaType := "application/octet-stream"
	if strings.Contains(r.URL.Path, "/manifests/") {
		mediaType = ocispec.MediaTypeImageManifest
		if !strings.Contains(last, ":") {
			last = s.image.Digest.String()
		}
	}
	body, err := os.ReadFile(s.layout.path(digest.Digest(last)))
	if err != nil {
		http.NotFound(w, r)
		return
	}
	if s.change != nil && s.change(w, r, body, mediaType) {
		return
	}
	w.Header().Set("Content-Type", mediaType)
	if mediaType == "application/octet-stream" {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body)) // with ranges
		return
	}
	w.Write(body)
}

func isBlobRequest(r *http.Request) bool { return strings.Contains(r.URL.Path, "/blobs/") }

func TestWrongBytesFromARegistryAreRefused(t *testing.T) {
	isManifestRequest := func(r *http.Request, _ []byte) bool { return !isBlobRequest(r) }
	isConfig := func(r *http.Request, b []byte) bool { return isBlobRequest(r) && b[0] == '{' }
	isLayer := func(r *http.Request, b []byte) bool { return isBlobRequest(r) && b[0] != '{' }
	changed := func(w http.ResponseWriter, b []byte) { b[len(b)-1]++; w.Write(b) }
	for name, c := range map[string]struct {
		where  func(*http.Request, []byte) bool
		answer func(w http.ResponseWriter, body []byte)
	}{
		"manifest changed":     {isManifestRequest, func(w http.ResponseWriter, b []byte) { w.Write(append(b, ' ')) }},
		"manifest without end": {isManifestRequest, func(w http.ResponseWriter, b []byte) { w.Write(append(b, bytes.Repeat([]byte(" "), maxManifest)...)) }},
		"config changed":       {isConfig, changed},
		"layer changed":        {isLayer, changed},
		"layer short":          {isLayer, func(w http.ResponseWriter, b []byte) { w.Write(b[:len(b)-1]) }},
		"layer long":           {isLayer, func(w http.ResponseWriter, b []byte) { w.Write(append(b, 'x')) }},
		"layer changed, chunked": {isLayer, func(w http.ResponseWriter, b []byte) {
			w.(http.Flusher).Flush()
			changed(w, b)
		}},
		"layer short, chunked": {isLayer, func(w http.ResponseWriter, b []byte) {
			w.(http.Flusher).Flush()
			w.Write(b[:len(b)-1])
		}},
		"layer endless": {isLayer, func(w http.ResponseWriter, b []byte) {
			w.(http.Flusher).Flush()
			for err := error(nil); err == nil; {
				_, err = w.Write(b)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStub(t)
			s.change = func(w http.ResponseWriter, r *http.Request, body []byte, mediaType string) bool {
				if !c.where(r, body) {
					return false
				}
				w.Header().Set("Content-Type", mediaType)
				c.answer(w, body)
				return true
			}
			host := serve(t, s)
			src, err := quick(ClientOptions{}).Resolve(t.Context(), host+"/x:tag@"+s.image.Digest.String(), amd64)
			if (err == nil) != strings.HasPrefix(name, "layer") {
				t.Errorf("Resolve: %v", err)
			}
			if err == nil {
				err = readLayers(t, src)
			}
			if err == nil || !strings.Contains(err.Error(), "source "+host+"/x") {
				t.Errorf("got %v: the registry decides what a pinned FROM runs; want an error that names the source", err)
			}
		})
	}
}

func TestTornTransferIsTakenUpWhereItBroke(t *testing.T) {
	for name, ranges := range map[string]bool{"with ranges": true, "without ranges": false} {
		t.Run(name, func(t *testing.T) {
			s := newStub(t)
			left := 12
			s.change = func(w http.ResponseWriter, r *http.Request, body []byte, _ string) bool {
				if !isBlobRequest(r) || len(body) < 1000 || left == 0 {
					return false
				}
				left--
				start := 0
				if rng := r.Header.Get("Range"); rng != "" && ranges {
					start, _ = strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(rng, "bytes="), "-"))
					w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", start, len(body)-1, len(body)))
				}
				w.Header().Set("Content-Length", strconv.Itoa(len(body)-start))
				if start > 0 {
					w.WriteHeader(http.StatusPartialContent)
				}
				n := 1000 * (13 - left)
				if ranges {
					n = start + 1000
				}
				w.Write(body[start:min(n, len(body)-1)])
				w.(http.Flusher).Flush()
				panic(http.ErrAbortHandler) // closes the connection in the middle
			}
			src, err := quick(ClientOptions{}).Resolve(t.Context(), serve(t, s)+"/x", amd64)
			if err == nil {
				err = readLayers(t, src)
			}
			if err != nil || left > 0 {
				t.Errorf("got %v with %d breaks left", err, left)
			}
		})
	}
}

func TestTransferThatNeverMovesOnIsGivenUp(t *testing.T) {
	s := newStub(t)
	s.change = func(w http.ResponseWriter, r *http.Request, body []byte, _ string) bool {
		if !isBlobRequest(r) || len(body) < 1000 {
			return false
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return true
	}
	c := quick(ClientOptions{})
	c.patience.stall = 20 * time.Millisecond
	src, err := c.Resolve(t.Context(), serve(t, s)+"/x", amd64)
	if err != nil {
		t.Fatal(err)
	}
	if err := readLayers(t, src); !errors.Is(err, errStalled) {
		t.Errorf("got %v, want %v", err, errStalled)
	}
}

func TestResumeThatAnswersWithOtherBytesIsRefused(t *testing.T) {
	s := newStub(t)
	s.change = func(w http.ResponseWriter, r *http.Request, body []byte, _ string) bool {
		if !isBlobRequest(r) || len(body) < 1000 {
			return false
		}
		if r.Header.Get("Range") != "" {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 7-%d/%d", len(body)-1, len(body)))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(body[7:])
			return true
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.Write(body[:500])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	src, err := quick(ClientOptions{}).Resolve(t.Context(), serve(t, s)+"/x", amd64)
	if err != nil {
		t.Fatal(err)
	}
	if err := readLayers(t, src); err == nil || !strings.Contains(err.Error(), "Content-Range") {
		t.Errorf("got %v, want a complaint about Content-Range", err)
	}
}

func TestBusyRegistryIsAskedAgainAndOthersNot(t *testing.T) {
	for status, tries := range map[int]int{429: 3, 500: 3, 502: 3, 503: 3, 400: 1, 403: 1, 404: 1, 501: 1} {
		t.Run(strconv.Itoa(status), func(t *testing.T) {
			s := newStub(t)
			asked := 0
			s.change = func(w http.ResponseWriter, r *http.Request, _ []byte, _ string) bool {
				asked++
				w.Header().Set("Retry-After", "1000000000")
				w.WriteHeader(status)
				return true
			}
			_, err := quick(ClientOptions{}).Resolve(t.Context(), serve(t, s)+"/x", amd64)
			if err == nil || asked != tries {
				t.Errorf("asked %d times, want %d: %v", asked, tries, err)
			}
			if got := errors.Is(err, ErrNotFound); got != (status == 404) {
				t.Errorf("ErrNotFound: %v for %d", got, status)
			}
		})
	}
}

func TestWaitForABusyRegistryEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("the user pressed ^C")
	p := patience{tries: 3, first: time.Hour, limit: time.Hour}
	err := p.retry(ctx, func() error {
		cancel(stop)
		return errStalled
	})
	if !errors.Is(err, stop) || !errors.Is(err, errStalled) {
		t.Errorf("got %v, want both %v and %v", err, stop, errStalled)
	}
}

func TestConfusedManifestFromARegistryIsRefused(t *testing.T) {
	for name, contentType := range map[string]string{"as index": ocispec.MediaTypeImageIndex, "as docker": dockerManifest} {
		t.Run(name, func(t *testing.T) {
			s := newStub(t)
			s.change = func(w http.ResponseWriter, r *http.Request, body []byte, _ string) bool {
				if isBlobRequest(r) {
					return false
				}
				w.Header().Set("Content-Type", contentType)
				w.Write(body)
				return true
			}
			if src, err := quick(ClientOptions{}).Resolve(t.Context(), serve(t, s)+"/x", amd64); err == nil {
				t.Errorf("got %s: two tools may see two images in one digest", src.Descriptor.Digest)
			}
		})
	}
}

func TestTLSFailureIsNotAnsweredInTheClear(t *testing.T) {
	var clear bool
	plain := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { clear = true }))
	defer plain.Close()
	s := newStub(t)
	server := httptest.NewTLSServer(s)
	defer server.Close()
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	for _, host := range []string{"registry.example", "10.1.2.3", "registry.local:5000", "192.168.7.7:5000"} {
		t.Run(host, func(t *testing.T) {
			c := quick(ClientOptions{})
			rt := newTransport(ClientOptions{})
			rt.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
				to := server.Listener.Addr()
				if strings.HasSuffix(address, ":80") {
					to = plain.Listener.Addr()
				}
				return (&net.Dialer{}).DialContext(ctx, network, to.String())
			}
			c.base.(*guard).inner = rt
			_, err := c.Resolve(t.Context(), host+"/x", amd64)
			if err == nil || !strings.Contains(err.Error(), "certificate") {
				t.Errorf("got %v, want a certificate error", err)
			}
			for _, line := range s.log {
				t.Errorf("%s was asked in spite of its certificate", line)
			}
			if clear {
				t.Error("after a TLS failure the registry was asked in the clear, where anybody can answer")
			}
		})
	}
}

func TestTLSWithAKnownAuthority(t *testing.T) {
	s := newStub(t)
	server := httptest.NewTLSServer(s)
	defer server.Close()
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	src, err := quick(ClientOptions{RootCAs: roots}).Resolve(t.Context(), strings.TrimPrefix(server.URL, "https://")+"/x", amd64)
	if err == nil {
		err = readLayers(t, src)
	}
	if err != nil {
		t.Error(err)
	}
}

func TestPlainHTTPNeedsPermissionForTheExactHost(t *testing.T) {
	s := newStub(t)
	target := serve(t, s)
	resolve := func(o ClientOptions, ref string) error {
		c := quick(o)
		rt := newTransport(o)
		rt.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, target)
		}
		c.base.(*guard).inner = rt
		_, err := c.Resolve(t.Context(), ref, amd64)
		return err
	}
	allowed := ClientOptions{PlainHTTP: []string{"registry.example:5000"}}
	if err := resolve(allowed, "registry.example:5000/x"); err != nil {
		t.Errorf("allowed host: %v", err)
	}
	for _, ref := range []string{"registry.example/x", "registry.example:5001/x", "evil.example:5000/x"} {
		err := resolve(allowed, ref)
		if err == nil {
			t.Errorf("%s was asked in the clear", ref)
		}
		var plain *PlainHTTPError
		if !errors.As(err, &plain) || !strings.Contains(plain.Hint(), plain.Host) {
			t.Errorf("%s: got %v, want a PlainHTTPError that says how to allow it", ref, err)
		}
	}
}

// withAuth lets requests through that have the right credentials.
func withAuth(user, password string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != user || p != password {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func dockerConfigDir(t *testing.T, config string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func authEntry(user, password string) string {
	return `{"auth":"` + base64.StdEncoding.EncodeToString([]byte(user+":"+password)) + `"}`
}

func TestCredentialsBelongToOneHostAndPort(t *testing.T) {
	s := newStub(t)
	host := serve(t, withAuth("me", "secret", s))
	_, port, _ := net.SplitHostPort(host)
	for name, c := range map[string]struct {
		key string
		ok  bool
	}{
		"exact":        {host, true},
		"url":          {"http://" + host + "/v2/", true},
		"repository":   {host + "/x", true},
		"other repo":   {host + "/y", false},
		"without port": {"127.0.0.1", false},
		"other port":   {"127.0.0.1:1", false},
		"other host":   {"localhost:" + port, false},
		"suffix":       {"evil" + host, false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := dockerConfigDir(t, `{"auths":{"`+c.key+`":`+authEntry("me", "secret")+`}}`)
			_, err := quick(ClientOptions{DockerConfig: dir}).Resolve(t.Context(), host+"/x", amd64)
			if (err == nil) != c.ok {
				t.Errorf("credentials of %s for %s: got %v, want success %v", c.key, host, err, c.ok)
			}
		})
	}
}

func TestCredentialHelper(t *testing.T) {
	s := newStub(t)
	host := serve(t, withAuth("me", "secret", s))
	bin := t.TempDir()
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	write := func(name, script string) {
		if err := os.WriteFile(filepath.Join(bin, "docker-credential-"+name), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write("good", `read s; [ "$1 $s" = "get `+host+`" ] && echo '{"Username":"me","Secret":"secret"}'`)
	write("none", `echo "credentials not found in native keychain"; exit 1`)
	write("broken", `echo "keyring is locked"; exit 1`)
	write("huge", `exec head -c 100000 /dev/zero`)
	auths := `"auths":{"` + host + `":` + authEntry("me", "secret") + `}`
	for name, c := range map[string]struct{ config, want string }{
		"helper of the host":      {`{"credHelpers":{"` + host + `":"good"}}`, ""},
		"store":                   {`{"credsStore":"good"}`, ""},
		"store has none, file":    {`{"credsStore":"none",` + auths + `}`, ""},
		"store broken, file":      {`{"credsStore":"broken",` + auths + `}`, ""},
		"broken":                  {`{"credsStore":"broken"}`, "keyring is locked"},
		"missing":                 {`{"credsStore":"gone"}`, "docker-credential-gone"},
		"too much output":         {`{"credsStore":"huge"}`, "more than 65536 bytes"},
		"helper of another host":  {`{"credHelpers":{"other":"good"}}`, "401"},
		"helper that is a path":   {`{"credsStore":"../evil"}`, "is not a name"},
		"config that is not JSON": {`{`, "docker config"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := quick(ClientOptions{DockerConfig: dockerConfigDir(t, c.config)}).Resolve(t.Context(), host+"/x", amd64)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	open := serve(t, s)
	if _, err := quick(ClientOptions{DockerConfig: dockerConfigDir(t, `{"credsStore":"broken"}`)}).Resolve(t.Context(), open+"/x", amd64); err != nil {
		t.Errorf("a registry that wants no credentials, with a broken helper: %v", err)
	}
}

// TestRedirectsLeakNoCredentials sends blobs to a second server, as registries with an object store do, and
// back again.
func TestRedirectsLeakNoCredentials(t *testing.T) {
	var mu sync.Mutex
	var leaked []string
	note := func(r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if a := r.Header.Get("Authorization"); a != "" {
			leaked = append(leaked, r.Host+" "+a)
		}
	}
	s := newStub(t)
	var registryHost string
	var back bool
	storage := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		note(r)
		if r.Header.Get("Authorization") == "" && r.URL.Query().Get("asked") == "" {
			w.Header().Set("WWW-Authenticate", `Basic realm="give me"`)
			if strings.Contains(r.URL.Path, "bearer") {
				w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token"`)
			}
		}
		if back {
			http.Redirect(w, r, "http://"+registryHost+r.URL.Path+"?direct=1", http.StatusTemporaryRedirect)
			return
		}
		s.ServeHTTP(w, r)
	}))
	redirecting := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v2/" && r.URL.Query().Get("direct") == "" {
			http.Redirect(w, r, "http://"+storage+r.URL.Path, http.StatusTemporaryRedirect)
			return
		}
		s.ServeHTTP(w, r)
	})
	registryHost = serve(t, withAuth("me", "secret", redirecting))
	dir := dockerConfigDir(t, `{"auths":{"`+registryHost+`":`+authEntry("me", "secret")+`}}`)
	for name, b := range map[string]bool{"away": false, "away and back": true} {
		t.Run(name, func(t *testing.T) {
			back = b
			src, err := quick(ClientOptions{DockerConfig: dir}).Resolve(t.Context(), registryHost+"/x", amd64)
			if err == nil {
				err = readLayers(t, src)
			}
			if err != nil {
				t.Error(err)
			}
			if len(leaked) > 0 {
				t.Errorf("the user's password went to another server: %q", leaked)
			}
		})
	}
}

func TestRegistryCannotSendUsIntoOurOwnNetwork(t *testing.T) {
	for _, to := range []string{
		"http://127.0.0.1:2375/x", "https://127.0.0.1/x", "https://localhost/x", "https://a.localhost./x", "https://10.0.0.1/x", "https://[::1]/x",
		"https://169.254.169.254/latest", "https://[fe80::1%25eth0]/x", "https://0.0.0.0/", "https://2130706433/", "https://0x7f.1/", "https://127.1/",
		"https://[::ffff:127.0.0.1]/", "file:///etc/passwd", "gopher://registry.example/",
	} {
		req, err := http.NewRequest(http.MethodGet, to, nil)
		if err != nil {
			t.Fatal(err)
		}
		if redirectPolicy("registry.example")(req, nil) == nil {
			t.Errorf("a redirect to %s is followed", to)
		}
	}
	for _, to := range []string{"https://cdn.example/x", "https://8.8.8.8/x", "https://1e100.net/"} {
		req, _ := http.NewRequest(http.MethodGet, to, nil)
		if err := redirectPolicy("registry.example")(req, nil); err != nil {
			t.Errorf("a redirect to %s is refused: %v", to, err)
		}
	}
	for _, a := range []string{"169.254.169.254:80", "[fe80::1]:443", "[::ffff:169.254.169.254]:80", "[fd00:ec2::254]:80"} {
		if refuseLinkLocal("tcp", a, nil) == nil {
			t.Errorf("%s is dialled when a DNS name leads there", a)
		}
	}
	if err := refuseLinkLocal("tcp", "10.0.0.1:443", nil); err != nil {
		t.Error(err)
	}
}

func TestBearerTokenFromARealm(t *testing.T) {
	s := newStub(t)
	var realm string
	var askedRealm int
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/token":
			askedRealm++
			if u, p, _ := r.BasicAuth(); u != "me" || p != "secret" {
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			fmt.Fprint(w, `{"token":"t"}`)
		case r.Header.Get("Authorization") != "Bearer t":
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+realm+`",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		default:
			s.ServeHTTP(w, r)
		}
	})
	host := serve(t, handler)
	dir := dockerConfigDir(t, `{"auths":{"`+host+`":`+authEntry("me", "secret")+`}}`)
	realm = "http://" + host + "/token"
	if _, err := quick(ClientOptions{DockerConfig: dir}).Resolve(t.Context(), host+"/x", amd64); err != nil || askedRealm == 0 {
		t.Errorf("the registry's own realm: %v", err)
	}
	for _, realm = range []string{"http://169.254.169.254/latest/meta-data", "http://[::1]:1/", "http://0.0.0.0/", "http://auth.example/token", "ftp://x/"} {
		askedRealm = 0
		if _, err := quick(ClientOptions{DockerConfig: dir}).Resolve(t.Context(), host+"/x", amd64); err == nil {
			t.Errorf("realm %s got the user's password", realm)
		}
	}
}

func TestOversizedAndOverNestedImagesAreRefused(t *testing.T) {
	l := newLayout(t)
	huge := descriptorOf(ocispec.MediaTypeImageConfig, []byte("{}"))
	huge.Size = maxConfig + 1
	tags := map[string]ocispec.Descriptor{
		"huge config": mustBlob(t, l, ocispec.MediaTypeImageManifest, ocispec.Manifest{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: huge, Layers: []ocispec.Descriptor{},
		}),
		"huge manifest": mustBlob(t, l, ocispec.MediaTypeImageManifest, bytes.Repeat([]byte(" "), maxManifest+1)),
	}
	nested := testImage(t, l, amd64, "x")
	for range maxIndexDepth + 1 {
		nested = testIndex(t, l, nested)
	}
	tags["nested"] = nested
	c := quick(ClientOptions{Layouts: map[string]string{"base": l.dir}})
	for tag, d := range tags {
		if err := l.Tag(tag, d); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Resolve(t.Context(), "oci-layout://base:"+tag, amd64); err == nil || !strings.Contains(err.Error(), "more than") {
			t.Errorf("%s: got %v, want a refusal before it costs memory", tag, err)
		}
	}
}

func TestEndlessListOfReferrersIsGivenUp(t *testing.T) {
	for name, next := range map[string]string{
		"relative":                           `</v2/x/referrers/%s?page=%d>; rel="next"`,
		"to a host of the attacker's choice": `<http://169.254.169.254/%s?%d>; rel="next"`,
	} {
		t.Run(name, func(t *testing.T) {
			asked := 0
			host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if !strings.Contains(r.URL.Path, "/referrers/") {
					return
				}
				asked++
				w.Header().Set("Link", fmt.Sprintf(next, r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:], asked))
				w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
				fmt.Fprint(w, `{"schemaVersion":2,"manifests":[]}`)
			}))
			st, err := quick(ClientOptions{}).Open(t.Context(), host+"/x")
			if err != nil {
				t.Fatal(err)
			}
			if got, err := st.Referrers(t.Context(), digest.FromString("x")); err == nil {
				t.Errorf("got %v after %d pages", got, asked)
			}
			if asked > maxReferrerPages {
				t.Errorf("asked for %d pages", asked)
			}
		})
	}
}

// TestBearerTokensStayWithTheirRegistry sends blobs to a second server that asks for a token too.
func TestBearerTokensStayWithTheirRegistry(t *testing.T) {
	s := newStub(t)
	var mu sync.Mutex
	var leaked []string
	storage := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if a := r.Header.Get("Authorization"); a != "" {
			mu.Lock()
			leaked = append(leaked, r.URL.Path+" "+a)
			mu.Unlock()
		}
		if strings.HasSuffix(r.URL.Path, "/token") {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		s.ServeHTTP(w, r)
	}))
	var host string
	host = serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/token":
			fmt.Fprint(w, `{"token":"t"}`)
		case r.Header.Get("Authorization") != "Bearer t":
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+host+`/token",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		case isBlobRequest(r):
			http.Redirect(w, r, "http://"+storage+r.URL.Path, http.StatusTemporaryRedirect)
		default:
			s.ServeHTTP(w, r)
		}
	}))
	dir := dockerConfigDir(t, `{"auths":{"`+host+`":`+authEntry("me", "secret")+`}}`)
	src, err := quick(ClientOptions{DockerConfig: dir}).Resolve(t.Context(), host+"/x", amd64)
	if err == nil {
		err = readLayers(t, src)
	}
	if err != nil {
		t.Error(err)
	}
	if len(leaked) > 0 {
		t.Errorf("the registry's token went to another server: %q", leaked)
	}
}
