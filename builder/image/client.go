package image

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/platforms"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ClientOptions say where images come from. The zero value asks registries over https without credentials.
type ClientOptions struct {
	DockerConfig string                                // directory of docker's config.json; "": no credentials
	PlainHTTP    []string                              // host[:port] of registries that may be asked over plain http; loopback may always
	Layouts      map[string]string                     // NAME to DIR[:TAG][@DIGEST], for oci-layout://NAME
	UserAgent    string                                // as registries shall see us
	Proxy        func(*http.Request) (*url.URL, error) // usually http.ProxyFromEnvironment; nil: none
	RootCAs      *x509.CertPool                        // nil: those of the system
	Documents    Documents                             // nil: none are kept
}

// Documents keep the manifests and configs of images, so that what a repository names by its digest is fetched once from it. What they give is
// checked; losing it only costs time. They are kept for each repository: that one has a document says nothing of another.
type Documents interface {
	Document(repository string, d digest.Digest) []byte // nil: not kept
	Keep(repository string, d digest.Digest, b []byte)
}

// A Client talks to registries and reads the OCI layouts it was told of. It may be used by many goroutines.
type Client struct {
	options  ClientOptions
	base     http.RoundTripper
	patience patience

	mu       sync.Mutex
	sessions map[string]*session
}

// A session is a registry's consent to what we do in one repository.
type session struct {
	mu      sync.Mutex
	http    *http.Client // nil until the handshake succeeded
	problem error        // why we have no credentials, told when the registry wants some
}

// NewClient returns a client. It connects to nothing before it must.
func NewClient(o ClientOptions) *Client {
	c := &Client{options: o, patience: usualPatience, sessions: map[string]*session{}}
	c.base = &guard{inner: newTransport(o), plainHTTP: c.plainHTTP, userAgent: o.UserAgent}
	return c
}

func tlsConfig(roots *x509.CertPool) *tls.Config { return &tls.Config{RootCAs: roots} }

func (c *Client) plainHTTP(host string) bool {
	return isLoopback(host) || slices.Contains(c.options.PlainHTTP, host)
}

// parse reads a docker reference.
func (c *Client) parse(ref string) (name.Reference, error) {
	r, err := name.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	if c.plainHTTP(r.Context().RegistryStr()) {
		return name.ParseReference(ref, name.Insecure)
	}
	return r, nil
}

// session returns an HTTP client that is allowed to pull from a repository, or to push to it as well. Each
// has its own token, so that a pull never asks for more than it needs.
func (c *Client) session(ctx context.Context, repo name.Repository, push bool) (*session, error) {
	scope := repo.Scope(transport.PullScope)
	if push {
		scope = repo.Scope(transport.PushScope)
	}
	key := repo.RegistryStr() + " " + scope
	c.mu.Lock()
	s := c.sessions[key]
	if s == nil {
		s = &session{}
		c.sessions[key] = s
	}
	c.mu.Unlock()

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.http != nil {
		return s, nil
	}
	auth, problem, err := credentials(ctx, c.options.DockerConfig, repo.RegistryStr(), repo.RepositoryStr())
	if err != nil {
		return nil, err
	}
	s.problem = problem
	rt, err := c.handshake(ctx, repo.Registry, auth, scope)
	var answer *transport.Error
	if errors.As(err, &answer) {
		return nil, s.explain(&statusError{answer: answer})
	}
	if errors.Is(err, http.ErrSchemeMismatch) {
		return nil, fmt.Errorf("%s speaks no https: %w", repo.RegistryStr(), &PlainHTTPError{repo.RegistryStr()})
	}
	if err != nil {
		return nil, err
	}
	s.http = &http.Client{Transport: rt, CheckRedirect: redirectPolicy(repo.RegistryStr())}
	return s, nil
}

// handshake asks a registry which credentials it wants. On this machine nearly all speak plain http, so that is tried first there: it was
// always allowed, and nobody else sees it.
func (c *Client) handshake(ctx context.Context, registry name.Registry, auth authn.Authenticator, scope string) (http.RoundTripper, error) {
	if isLoopback(registry.RegistryStr()) {
		plain := &plainFirst{inner: c.base}
		rt, err := transport.NewWithContext(ctx, registry, auth, plain, []string{scope})
		var answer *transport.Error
		if refused := errors.As(err, &answer) && (answer.StatusCode == http.StatusUnauthorized || answer.StatusCode == http.StatusForbidden); err == nil || refused {
			plain.known.Store(true)
			return rt, err
		}
	}
	return transport.NewWithContext(ctx, registry, auth, c.base, []string{scope})
}

// plainFirst fails what is https until it is known that the registry speaks plain http. It may still send us to one that does not.
type plainFirst struct {
	inner http.RoundTripper
	known atomic.Bool
}

func (p *plainFirst) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme == "https" && !p.known.Load() {
		return nil, http.ErrSchemeMismatch
	}
	return p.inner.RoundTrip(r)
}

// explain adds to a refusal why we came without credentials.
func (s *session) explain(err error) error {
	var status *statusError
	if err != nil && s.problem != nil && errors.As(err, &status) &&
		(status.answer.StatusCode == http.StatusUnauthorized || status.answer.StatusCode == http.StatusForbidden) {
		return fmt.Errorf("%w (no credentials: %w)", err, s.problem)
	}
	return err
}

// Normalize returns the full form of an image name: demo becomes docker.io/library/demo:latest. It is the
// form in which the store keeps names.
func Normalize(ref string) (string, error) {
	r, err := name.ParseReference(ref)
	if err != nil {
		return "", err
	}
	return strings.Replace(r.Name(), dockerHub+"/", "docker.io/", 1), nil
}

// A Source is one image for one platform, somewhere else: its documents are here, its layers are fetched
// when asked for.
type Source struct {
	Name       string             // for messages
	Descriptor ocispec.Descriptor // of the platform's manifest, as it was served
	Manifest   ocispec.Manifest   // with OCI media types, whatever was served
	Config     []byte

	store Store
}

// Layer returns the compressed bytes of layer i. The reader verifies them, resumes a torn transfer, and
// ends with an error, not with EOF, when they are wrong.
func (s *Source) Layer(ctx context.Context, i int) (io.ReadCloser, error) {
	if i < 0 || i >= len(s.Manifest.Layers) {
		return nil, fmt.Errorf("source %s: no layer %d", s.Name, i)
	}
	d := s.Manifest.Layers[i]
	r, err := s.store.Open(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("source %s: layer %s: %w", s.Name, d.Digest, err)
	}
	return readCloser{explained{r, "source " + s.Name + ": layer"}, r}, nil
}

// explained says in front of every error whose it is.
type explained struct {
	r      io.Reader
	prefix string
}

func (e explained) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("%s: %w", e.prefix, err)
	}
	return n, err
}

const layoutScheme = "oci-layout://"

// Resolve finds the image a reference means for a platform: a docker reference, or oci-layout://NAME
// [:TAG][@DIGEST] with a NAME of ClientOptions.Layouts. With a digest in the reference, nothing but the
// bytes with this digest is accepted.
func (c *Client) Resolve(ctx context.Context, ref string, p ocispec.Platform) (*Source, error) {
	st, err := c.source(ref)
	if err != nil {
		return nil, fmt.Errorf("source %s: %w", ref, err)
	}
	s := &search{store: st, platform: p, match: platforms.Only(p)}
	d, err := s.find(ctx, c.options.Documents)
	if err != nil {
		return nil, fmt.Errorf("source %s: %w", ref, err)
	}
	src, err := s.image(ctx, d, 0)
	if err != nil {
		return nil, fmt.Errorf("source %s: %w", ref, err)
	}
	src.Name = ref
	return src, nil
}

func (c *Client) source(ref string) (Store, error) {
	rest, ok := strings.CutPrefix(ref, layoutScheme)
	if !ok {
		return c.openRemote(ref)
	}
	name, dig, _ := strings.Cut(rest, "@")
	place, ok := c.options.Layouts[name]
	tag := ""
	if !ok {
		if i := strings.LastIndexByte(name, ':'); i >= 0 {
			place, ok = c.options.Layouts[name[:i]]
			tag = name[i+1:]
		}
	}
	if !ok {
		return nil, errors.New("no such OCI layout was given")
	}
	return openLayoutStore(place, tag, dig)
}

// splitPlace takes DIR[:TAG][@DIGEST] apart. A directory whose name has a colon is meant when it exists.
func splitPlace(place string) (dir, tag, dig string) {
	if isDir(place) {
		return place, "", ""
	}
	dir = place
	if i := strings.LastIndex(dir, "@sha256:"); i >= 0 {
		dir, dig = dir[:i], dir[i+1:]
	}
	if i := strings.LastIndexByte(dir, ':'); i >= 0 && !isDir(dir) && !strings.Contains(dir[i:], "/") {
		dir, tag = dir[:i], dir[i+1:]
	}
	return dir, tag, dig
}

func isDir(name string) bool {
	fi, err := os.Stat(name)
	return err == nil && fi.IsDir()
}

// search looks for the image of one platform below a descriptor.
type search struct {
	store    Store
	platform ocispec.Platform
	match    platforms.MatchComparer

	documents  Documents // nil where they are as near as those of the store
	repository string
}

const (
	maxIndexDepth = 4  // indexes in indexes
	maxUnlabelled = 16 // manifests without a platform whose config is looked at

	maxKept = 256 << 10 // bytes of a document that is kept
)

// A PlatformError says that an image exists, but not for the wanted platform.
type PlatformError struct {
	Want string
	Have []string
}

func (e *PlatformError) Error() string {
	if len(e.Have) == 0 {
		return "no image for " + e.Want
	}
	return fmt.Sprintf("no image for %s, only for %s", e.Want, strings.Join(e.Have, ", "))
}

// Hint names the next step.
func (e *PlatformError) Hint() string {
	return "choose another base image, or name the platform with FROM --platform"
}

// find is what the reference means. A registry is only asked for the digest where the rest may be kept.
func (s *search) find(ctx context.Context, kept Documents) (ocispec.Descriptor, error) {
	r, ok := s.store.(*remote)
	if ok && kept != nil {
		s.documents, s.repository = kept, r.repo.Name()
		if d, ok := r.recall(ctx, kept); ok {
			return d, nil
		}
	}
	return s.store.Resolve(ctx, "")
}

// manifest reads a manifest or index, fetching it only if it is not kept.
func (s *search) manifest(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	return s.document(d, func() ([]byte, error) { return s.store.ReadManifest(ctx, d) })
}

func (s *search) config(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	return s.document(d, func() ([]byte, error) { return readBlob(ctx, s.store, d, maxConfig) })
}

func (s *search) document(d ocispec.Descriptor, fetch func() ([]byte, error)) ([]byte, error) {
	if s.documents == nil {
		return fetch()
	}
	if b := recall(s.documents, s.repository, d.Digest); b != nil && int64(len(b)) == d.Size {
		return b, nil
	}
	b, err := fetch()
	if err == nil && len(b) <= maxKept {
		s.documents.Keep(s.repository, d.Digest, b)
	}
	return b, err
}

// recall returns a document that is kept, if it is what its digest says.
func recall(kept Documents, repository string, d digest.Digest) []byte {
	if b := kept.Document(repository, d); b != nil && pinned(b, d) == nil {
		return b
	}
	return nil
}

func (s *search) image(ctx context.Context, d ocispec.Descriptor, depth int) (*Source, error) {
	raw, err := s.manifest(ctx, d)
	if err != nil {
		return nil, err
	}
	mediaType, err := classify(raw, d.MediaType)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d.Digest, err)
	}
	if isIndex(mediaType) {
		if depth == maxIndexDepth {
			return nil, fmt.Errorf("%s: more than %d indexes inside each other", d.Digest, maxIndexDepth)
		}
		return s.choose(ctx, raw, d, depth)
	}
	m, err := parseManifest(raw, d.MediaType)
	if err == nil {
		err = normalise(m)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d.Digest, err)
	}
	config, err := s.config(ctx, m.Config)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	d.MediaType = mediaType
	return &Source{Descriptor: d, Manifest: *m, Config: config, store: s.store}, nil
}

// choose takes the best of an index: first among those that say their platform, then among those that do
// not, by their configs.
func (s *search) choose(ctx context.Context, raw []byte, d ocispec.Descriptor, depth int) (*Source, error) {
	idx, err := parseIndex(raw, d.MediaType)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d.Digest, err)
	}
	var labelled, unlabelled []ocispec.Descriptor
	failure := &PlatformError{Want: platforms.Format(s.platform)}
	for _, m := range idx.Manifests {
		switch {
		case !isImageEntry(m):
		case m.Platform == nil || m.Platform.OS == "" || m.Platform.Architecture == "":
			unlabelled = append(unlabelled, m)
		case s.match.Match(*m.Platform):
			labelled = append(labelled, m)
		default:
			failure.Have = append(failure.Have, platforms.Format(*m.Platform))
		}
	}
	if len(labelled) > 0 {
		slices.SortStableFunc(labelled, func(a, b ocispec.Descriptor) int {
			switch {
			case s.match.Less(*a.Platform, *b.Platform):
				return -1
			case s.match.Less(*b.Platform, *a.Platform):
				return 1
			}
			return 0
		})
		return s.image(ctx, labelled[0], depth+1)
	}
	for _, m := range unlabelled[:min(len(unlabelled), maxUnlabelled)] {
		src, err := s.image(ctx, m, depth+1)
		var other *PlatformError
		if errors.As(err, &other) {
			failure.Have = append(failure.Have, other.Have...)
			continue
		}
		if err != nil {
			return nil, err
		}
		have, err := configPlatform(src.Config)
		if err != nil {
			return nil, fmt.Errorf("%s: config: %w", m.Digest, err)
		}
		if s.match.Match(have) {
			return src, nil
		}
		failure.Have = append(failure.Have, platforms.Format(have))
	}
	return nil, failure
}

// isImageEntry leaves out what stands beside images in an index: attestations and other artifacts.
func isImageEntry(d ocispec.Descriptor) bool {
	switch d.ArtifactType {
	case "", ocispec.MediaTypeImageConfig, dockerConfig: // as crane and ko write it
	default:
		return false
	}
	if d.Annotations["vnd.docker.reference.type"] != "" {
		return false
	}
	if d.Platform != nil && d.Platform.OS == "unknown" {
		return false
	}
	return isManifest(d.MediaType) || isIndex(d.MediaType)
}

// pinned checks a document that was asked for by digest.
func pinned(b []byte, want digest.Digest) error {
	if got := digest.FromBytes(b); want != "" && got != want {
		return &ContentError{want, "the bytes have digest " + got.String()}
	}
	return nil
}
