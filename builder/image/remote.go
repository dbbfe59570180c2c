package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	maxReferrerPages  = 10
	maxResumes        = 100 // of one blob, each after some progress
	acceptedManifests = ocispec.MediaTypeImageManifest + ", " + ocispec.MediaTypeImageIndex + ", " + dockerManifest + ", " + dockerManifestList
)

// remote is one repository in a registry.
type remote struct {
	client *Client
	repo   name.Repository
	target string // tag or digest of the reference it was opened with
	push   bool

	mu   sync.Mutex
	seen map[digest.Digest][]byte // manifests that a tag led to, so that they are not fetched twice
}

func (c *Client) openRemote(ref string) (*remote, error) {
	r, err := c.parse(ref)
	if err != nil {
		return nil, err
	}
	return &remote{client: c, repo: r.Context(), target: r.Identifier(), seen: map[digest.Digest][]byte{}}, nil
}

func (r *remote) String() string { return r.repo.Name() }

func (r *remote) url(path string) string {
	return "https://" + r.repo.RegistryStr() + "/v2/" + r.repo.RepositoryStr() + "/" + path
}

// do sends one request. The caller checks the status and closes the body.
func (r *remote) do(ctx context.Context, method, url string, header http.Header, body func() (io.ReadCloser, int64, error)) (*http.Response, error) {
	s, err := r.client.session(ctx, r.repo, r.push)
	if err != nil {
		return nil, err
	}
	w := newWatch(ctx, r.client.patience.stall)
	req, err := newRequest(w, method, url, header, body)
	if err != nil {
		w.end()
		return nil, err
	}
	resp, err := s.http.Do(req)
	if err != nil {
		err = w.explain(err)
		w.end()
		return nil, err
	}
	resp.Body = watchedAnswer{resp.Body, w}
	return resp, nil
}

func newRequest(w *watch, method, url string, header http.Header, body func() (io.ReadCloser, int64, error)) (*http.Request, error) {
	req, err := http.NewRequestWithContext(w.ctx, method, url, nil)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	if body == nil {
		return req, nil
	}
	req.GetBody = func() (io.ReadCloser, error) {
		b, _, err := body()
		return watchedUpload{b, w}, err
	}
	first, size, err := body()
	if err != nil {
		return nil, err
	}
	req.Body, req.ContentLength = watchedUpload{first, w}, size
	return req, nil
}

// status is checkStatus that also says why we had no credentials.
func (r *remote) status(ctx context.Context, resp *http.Response, want ...int) error {
	err := checkStatus(resp, want...)
	if err == nil {
		return nil
	}
	if s, sessionErr := r.client.session(ctx, r.repo, r.push); sessionErr == nil {
		err = s.explain(err)
	}
	return err
}

func (r *remote) Resolve(ctx context.Context, tagOrDigest string) (ocispec.Descriptor, error) {
	if tagOrDigest == "" {
		tagOrDigest = r.target
	}
	raw, mediaType, err := r.manifest(ctx, tagOrDigest)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	r.mu.Lock()
	r.seen[d.Digest] = raw
	r.mu.Unlock()
	return d, nil
}

// recall resolves the reference to a manifest that is kept of this repository, if it leads to one. Of a tag only the digest is asked for, which
// registries do not count as a pull; a digest is not asked for at all. Whatever goes wrong is found and told by [remote.Resolve].
func (r *remote) recall(ctx context.Context, kept Documents) (ocispec.Descriptor, bool) {
	want, served := digest.Digest(r.target), ""
	if !strings.Contains(r.target, ":") {
		resp, err := r.do(ctx, http.MethodHead, r.url("manifests/"+r.target), http.Header{"Accept": {acceptedManifests}}, nil)
		if err != nil {
			return ocispec.Descriptor{}, false
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return ocispec.Descriptor{}, false
		}
		want, served = digest.Digest(resp.Header.Get("Docker-Content-Digest")), resp.Header.Get("Content-Type")
	}
	if _, err := hexOf(want); err != nil {
		return ocispec.Descriptor{}, false
	}
	raw := recall(kept, r.repo.Name(), want)
	if raw == nil {
		return ocispec.Descriptor{}, false
	}
	mediaType, err := classify(raw, served)
	if err != nil {
		return ocispec.Descriptor{}, false
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: want, Size: int64(len(raw))}, true
}

func (r *remote) ReadManifest(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if err := checkDescriptor(d); err != nil {
		return nil, err
	}
	r.mu.Lock()
	raw := r.seen[d.Digest]
	r.mu.Unlock()
	if raw == nil {
		var served string
		var err error
		if raw, served, err = r.manifest(ctx, d.Digest.String()); err != nil {
			return nil, err
		}
		if _, err := classify(raw, d.MediaType, served); err != nil {
			return nil, fmt.Errorf("%s: %w", d.Digest, err)
		}
	}
	if d.Size != int64(len(raw)) {
		return nil, &ContentError{d.Digest, fmt.Sprintf("has %d bytes, its descriptor promises %d", len(raw), d.Size)}
	}
	return raw, nil
}

// manifest fetches a manifest or index by tag or digest and returns what it is.
func (r *remote) manifest(ctx context.Context, tagOrDigest string) (raw []byte, mediaType string, err error) {
	var want digest.Digest
	if strings.Contains(tagOrDigest, ":") {
		want = digest.Digest(tagOrDigest)
		if _, err := hexOf(want); err != nil {
			return nil, "", err
		}
	}
	err = r.client.patience.retry(ctx, func() error {
		var err error
		raw, mediaType, err = r.manifestOnce(ctx, tagOrDigest, want)
		return err
	})
	return raw, mediaType, err
}

func (r *remote) manifestOnce(ctx context.Context, tagOrDigest string, want digest.Digest) ([]byte, string, error) {
	resp, err := r.do(ctx, http.MethodGet, r.url("manifests/"+tagOrDigest), http.Header{"Accept": {acceptedManifests}}, nil)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	if err := r.status(ctx, resp, http.StatusOK); err != nil {
		return nil, "", err
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxManifest+1))
	if err != nil {
		return nil, "", err
	}
	if len(raw) > maxManifest {
		return nil, "", fmt.Errorf("manifest %s has more than %d bytes", tagOrDigest, maxManifest)
	}
	if err := pinned(raw, want); err != nil {
		return nil, "", err
	}
	if err := pinned(raw, digest.Digest(resp.Header.Get("Docker-Content-Digest"))); err != nil {
		return nil, "", fmt.Errorf("manifest %s: the registry's own digest is wrong: %w", tagOrDigest, err)
	}
	mediaType, err := classify(raw, resp.Header.Get("Content-Type"))
	if err != nil {
		return nil, "", fmt.Errorf("manifest %s: %w", tagOrDigest, err)
	}
	return raw, mediaType, nil
}

func (r *remote) Open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	if err := checkDescriptor(d); err != nil {
		return nil, err
	}
	b := &blobReader{ctx: ctx, remote: r, want: d}
	if err := r.client.patience.retry(ctx, b.connect); err != nil {
		return nil, err
	}
	return readCloser{verify(b, d), b}, nil
}

// A blobReader is the body of a blob, in as many pieces as the network makes of it.
type blobReader struct {
	ctx    context.Context // of the call that opened it; a reader has no other way to learn of its end
	remote *remote
	want   ocispec.Descriptor

	body    io.ReadCloser // nil: connect first
	off     int64
	resumes int
	futile  int // failures without progress since
}

// connect asks for the blob from where we are.
func (b *blobReader) connect() error {
	body, err := b.request(b.ctx)
	if err == nil {
		b.body = body
	}
	return err
}

func (b *blobReader) request(ctx context.Context) (io.ReadCloser, error) {
	var header http.Header
	if b.off > 0 {
		header = http.Header{"Range": {fmt.Sprintf("bytes=%d-", b.off)}}
	}
	resp, err := b.remote.do(ctx, http.MethodGet, b.remote.url("blobs/"+b.want.Digest.String()), header, nil)
	if err != nil {
		return nil, err
	}
	if err := b.remote.status(ctx, resp, http.StatusOK, http.StatusPartialContent); err != nil {
		return nil, err
	}
	if err := b.align(resp); err != nil {
		resp.Body.Close()
		return nil, err
	}
	return resp.Body, nil
}

// align brings an answer to the byte that we want next, also when the registry knows no ranges.
func (b *blobReader) align(resp *http.Response) error {
	start := int64(0)
	if resp.StatusCode == http.StatusPartialContent {
		var end int64
		if _, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-%d/", &start, &end); err != nil || start != b.off {
			return fmt.Errorf("%s: asked for bytes from %d on, got Content-Range %.100q", b.want.Digest, b.off, resp.Header.Get("Content-Range"))
		}
	}
	if n := resp.ContentLength; n >= 0 && start+n != b.want.Size {
		return &ContentError{b.want.Digest, fmt.Sprintf("the registry has %d bytes, the descriptor promises %d", start+n, b.want.Size)}
	}
	_, err := io.CopyN(io.Discard, resp.Body, b.off-start)
	return err
}

func (b *blobReader) Read(p []byte) (int, error) {
	for {
		if b.body == nil {
			if err := b.connect(); err != nil {
				if err := b.pause(err); err != nil {
					return 0, err
				}
				continue
			}
		}
		n, err := b.body.Read(p)
		b.off += int64(n)
		if n > 0 {
			b.futile = 0
		}
		if err == nil || err == io.EOF {
			return n, err
		}
		b.Close()
		if n > 0 {
			return n, nil
		}
		if err := b.pause(err); err != nil {
			return 0, err
		}
	}
}

// pause waits before the transfer is taken up again, or returns the error that ends it.
func (b *blobReader) pause(err error) error {
	b.resumes++
	b.futile++
	p := b.remote.client.patience
	if !temporary(err) || b.futile >= p.tries || b.resumes > maxResumes {
		return fmt.Errorf("transfer stopped after %d of %d bytes: %w", b.off, b.want.Size, err)
	}
	return p.wait(b.ctx, b.futile, err)
}

func (b *blobReader) Close() error {
	if b.body == nil {
		return nil
	}
	err := b.body.Close()
	b.body = nil
	return err
}

// Referrers asks the registry, and when it keeps no list, reads the index under the fallback tag.
func (r *remote) Referrers(ctx context.Context, subject digest.Digest) ([]ocispec.Descriptor, error) {
	if _, err := hexOf(subject); err != nil {
		return nil, err
	}
	found, err := r.listReferrers(ctx, subject)
	var status *statusError
	if errors.As(err, &status) && status.answer.StatusCode/100 == 4 && status.answer.StatusCode != http.StatusTooManyRequests {
		// Registries without the API answer with 404, 405 or 400; one that forbids reading forbids the tag too.
		_, idx, err := r.fallbackIndex(ctx, subject)
		if err != nil {
			return nil, err
		}
		return idx.Manifests, nil
	}
	return found, err
}

func (r *remote) listReferrers(ctx context.Context, subject digest.Digest) ([]ocispec.Descriptor, error) {
	var all []ocispec.Descriptor
	at := r.url("referrers/" + subject.String())
	for range maxReferrerPages {
		var page *ocispec.Index
		next := ""
		err := r.client.patience.retry(ctx, func() error {
			var err error
			page, next, err = r.referrersPage(ctx, at)
			return err
		})
		if err != nil {
			return nil, err
		}
		all = append(all, page.Manifests...)
		if next == "" {
			return all, nil
		}
		at = next
	}
	return nil, fmt.Errorf("%s has more than %d pages of referrers", subject, maxReferrerPages)
}

func (r *remote) referrersPage(ctx context.Context, at string) (page *ocispec.Index, next string, err error) {
	resp, err := r.do(ctx, http.MethodGet, at, http.Header{"Accept": {ocispec.MediaTypeImageIndex}}, nil)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	if err := r.status(ctx, resp, http.StatusOK); err != nil {
		return nil, "", err
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxManifest+1))
	if err != nil {
		return nil, "", err
	}
	if len(raw) > maxManifest {
		return nil, "", fmt.Errorf("list of referrers has more than %d bytes", maxManifest)
	}
	if page, err = parseIndex(raw, resp.Header.Get("Content-Type")); err != nil {
		return nil, "", fmt.Errorf("list of referrers: %w", err)
	}
	next, err = nextPage(resp)
	if err == nil && next != "" {
		var u *url.URL
		if u, err = url.Parse(next); err == nil {
			err = checkTarget(r.repo.RegistryStr(), u)
		}
	}
	return page, next, err
}

// nextPage reads a header like: Link: </v2/x/referrers/sha256:...?last=y>; rel="next"
func nextPage(resp *http.Response) (string, error) {
	link := resp.Header.Get("Link")
	if !strings.Contains(link, `rel="next"`) && !strings.Contains(link, "rel=next") {
		return "", nil
	}
	target, _, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(link), "<"), ">")
	if !ok {
		return "", fmt.Errorf("header Link %.100q has no target", link)
	}
	u, err := resp.Request.URL.Parse(target)
	if err != nil {
		return "", err
	}
	return u.String(), nil
}

// fallbackIndex returns the index under the fallback tag, an empty one when there is none.
func (r *remote) fallbackIndex(ctx context.Context, subject digest.Digest) (raw []byte, idx *ocispec.Index, err error) {
	raw, mediaType, err := r.manifest(ctx, fallbackTag(subject))
	if notFound(err) {
		return nil, emptyIndex(), nil
	}
	if err != nil {
		return nil, nil, err
	}
	idx, err = parseIndex(raw, mediaType)
	if err != nil {
		return nil, nil, fmt.Errorf("tag %s: %w", fallbackTag(subject), err)
	}
	return raw, idx, nil
}

// hasBlob reports whether the registry has a blob of this digest and size.
func (r *remote) hasBlob(ctx context.Context, d ocispec.Descriptor) (bool, error) {
	var has bool
	err := r.client.patience.retry(ctx, func() error {
		resp, err := r.do(ctx, http.MethodHead, r.url("blobs/"+d.Digest.String()), nil, nil)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		err = r.status(ctx, resp, http.StatusOK)
		if notFound(err) {
			has = false
			return nil
		}
		has = err == nil && (resp.ContentLength < 0 || resp.ContentLength == d.Size)
		return err
	})
	return has, err
}

// putBlob uploads a blob unless it is there. A nil error means the registry has it under its digest.
func (r *remote) putBlob(ctx context.Context, d ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	has, err := r.hasBlob(ctx, d)
	if err != nil || has {
		return err
	}
	return r.client.patience.retry(ctx, func() error {
		at, err := r.startUpload(ctx)
		if err != nil {
			return err
		}
		return r.upload(ctx, at, d, open)
	})
}

func (r *remote) startUpload(ctx context.Context) (*url.URL, error) {
	resp, err := r.do(ctx, http.MethodPost, r.url("blobs/uploads/"), nil, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if err := r.status(ctx, resp, http.StatusAccepted); err != nil {
		return nil, err
	}
	at, err := resp.Location()
	if err != nil {
		return nil, fmt.Errorf("begin upload: %w", err)
	}
	return at, checkTarget(r.repo.RegistryStr(), at)
}

func (r *remote) upload(ctx context.Context, at *url.URL, d ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	query := at.Query()
	query.Set("digest", d.Digest.String())
	at.RawQuery = query.Encode()
	ours := &sourceError{}
	header := http.Header{"Content-Type": {"application/octet-stream"}}
	resp, err := r.do(ctx, http.MethodPut, at.String(), header, func() (io.ReadCloser, int64, error) {
		body, err := open()
		if err != nil {
			return nil, 0, ours.note(err)
		}
		return readCloser{noting{body, ours}, body}, d.Size, nil
	})
	if local := ours.get(); local != nil {
		if err == nil {
			resp.Body.Close()
		}
		return fmt.Errorf("source: %w", local)
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := r.status(ctx, resp, http.StatusCreated, http.StatusOK, http.StatusNoContent); err != nil {
		return err
	}
	if got := resp.Header.Get("Docker-Content-Digest"); got != "" && got != d.Digest.String() {
		return fmt.Errorf("blob %s was stored as %.100q", d.Digest, got)
	}
	return nil
}

// A sourceError remembers that reading what we send failed: not the registry is at fault then, and trying
// again does not help. The transport's own goroutine reads the body.
type sourceError struct {
	mu  sync.Mutex
	err error
}

func (e *sourceError) note(err error) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err == nil {
		e.err = err
	}
	return err
}

func (e *sourceError) get() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.err
}

type noting struct {
	r io.Reader
	e *sourceError
}

func (n noting) Read(p []byte) (int, error) {
	k, err := n.r.Read(p)
	var content *ContentError
	if errors.As(err, &content) {
		n.e.note(err) // other errors come from a body that was closed because the registry hung up
	}
	return k, err
}

// putManifest stores a manifest under a tag or its digest. listed says that the registry will name it among
// the referrers of its subject.
func (r *remote) putManifest(ctx context.Context, tagOrDigest, mediaType string, raw []byte) (listed bool, err error) {
	want := digest.FromBytes(raw)
	err = r.client.patience.retry(ctx, func() error {
		resp, err := r.do(ctx, http.MethodPut, r.url("manifests/"+tagOrDigest), http.Header{"Content-Type": {mediaType}},
			func() (io.ReadCloser, int64, error) {
				return io.NopCloser(strings.NewReader(string(raw))), int64(len(raw)), nil
			})
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if err := r.status(ctx, resp, http.StatusCreated, http.StatusOK, http.StatusAccepted); err != nil {
			return err
		}
		if got := resp.Header.Get("Docker-Content-Digest"); got != "" && got != want.String() {
			return fmt.Errorf("manifest %s was stored as %.100q", want, got)
		}
		listed = resp.Header.Get("OCI-Subject") != ""
		return nil
	})
	return listed, err
}
