package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Store is one repository of images, for reading: in a registry, or an OCI layout.
type Store interface {
	// Resolve returns what a tag or a digest means, ErrNotFound when it means nothing here. The empty
	// string stands for what the reference said that the Store was opened with.
	Resolve(ctx context.Context, tagOrDigest string) (ocispec.Descriptor, error)
	// ReadManifest returns a manifest or an index, verified.
	ReadManifest(ctx context.Context, d ocispec.Descriptor) ([]byte, error)
	// Open returns the bytes of a blob; the reader verifies them.
	Open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error)
	// Referrers returns the manifests that name d as their subject, in the order in which they are kept.
	Referrers(ctx context.Context, d digest.Digest) ([]ocispec.Descriptor, error)
}

// Open opens the repository of a docker reference, or the layout of oci:DIR[:TAG][@DIGEST].
func (c *Client) Open(_ context.Context, ref string) (Store, error) {
	place, ok := strings.CutPrefix(ref, "oci:")
	if !ok {
		return c.openRemote(ref)
	}
	return openLayoutStore(place, "", "")
}

func readBlob(ctx context.Context, st Store, d ocispec.Descriptor, max int64) ([]byte, error) {
	if d.Size > max {
		return nil, &ContentError{d.Digest, fmt.Sprintf("%d bytes are more than the %d allowed here", d.Size, max)}
	}
	r, err := st.Open(ctx, d)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return readAll(r, d, max)
}

func configPlatform(config []byte) (ocispec.Platform, error) {
	var img ocispec.Image
	err := json.Unmarshal(config, &img)
	return img.Platform, err
}

// layoutStore is a Store in a directory.
type layoutStore struct {
	*Layout
	tag    string
	digest digest.Digest
}

// openLayoutStore opens DIR[:TAG][@DIGEST]; a tag or digest given apart counts for more.
func openLayoutStore(place, tag, dig string) (*layoutStore, error) {
	dir, placeTag, placeDigest := splitPlace(place)
	if tag == "" && dig == "" {
		tag, dig = placeTag, placeDigest
	}
	if dig != "" {
		if _, err := hexOf(digest.Digest(dig)); err != nil {
			return nil, err
		}
	}
	l, err := OpenLayout(dir)
	if err != nil {
		return nil, err
	}
	return &layoutStore{l, tag, digest.Digest(dig)}, nil
}

func (s *layoutStore) Resolve(_ context.Context, tagOrDigest string) (ocispec.Descriptor, error) {
	switch {
	case tagOrDigest != "":
		return s.Layout.Resolve(tagOrDigest)
	case s.digest != "":
		return s.Layout.Resolve(s.digest.String())
	case s.tag != "":
		return s.Layout.Resolve(s.tag)
	}
	return s.only()
}

// only returns the image of a layout for which no tag was given: latest, or the one that there is.
func (s *layoutStore) only() (ocispec.Descriptor, error) {
	idx, err := s.Index()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var found []ocispec.Descriptor
	var names []string
	for _, d := range idx.Manifests {
		ref := d.Annotations[ocispec.AnnotationRefName]
		if !isImageEntry(d) || isArtifactTag(ref) {
			continue
		}
		if ref == "latest" {
			return d, nil
		}
		names = append(names, ref)
		if !slices.ContainsFunc(found, func(f ocispec.Descriptor) bool { return f.Digest == d.Digest }) {
			found = append(found, d)
		}
	}
	switch len(found) {
	case 0:
		return ocispec.Descriptor{}, fmt.Errorf("OCI layout %s: an image: %w", s.dir, ErrNotFound)
	case 1:
		return found[0], nil
	}
	slices.Sort(names)
	return ocispec.Descriptor{}, fmt.Errorf("OCI layout %s has %d images, name one of the tags %q", s.dir, len(found), names)
}

func (s *layoutStore) ReadManifest(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	return s.ReadAll(d, maxManifest)
}

func (s *layoutStore) Open(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	return s.Layout.Open(d)
}

func (s *layoutStore) Referrers(_ context.Context, subject digest.Digest) ([]ocispec.Descriptor, error) {
	return s.referrers(subject)
}

const maxReferrers = 10_000 // entries of an index.json that are looked at

// referrers finds the manifests in index.json that name subject, and those in the index that a registry's
// fallback tag would name, which tools that copy whole repositories leave in a layout.
func (l *Layout) referrers(subject digest.Digest) ([]ocispec.Descriptor, error) {
	idx, err := l.Index()
	if err != nil {
		return nil, err
	}
	if len(idx.Manifests) > maxReferrers {
		return nil, fmt.Errorf("OCI layout %s: more than %d entries", l.dir, maxReferrers)
	}
	var found []ocispec.Descriptor
	fallback := fallbackTag(subject)
	entries := slices.Clone(idx.Manifests)
	for _, d := range idx.Manifests {
		if d.Annotations[ocispec.AnnotationRefName] != fallback || !isIndex(d.MediaType) {
			continue
		}
		raw, err := l.ReadAll(d, maxManifest)
		if err != nil {
			return nil, err
		}
		more, err := parseIndex(raw, d.MediaType)
		if err != nil {
			return nil, fmt.Errorf("OCI layout %s: %s: %w", l.dir, fallback, err)
		}
		entries = append(entries, more.Manifests...)
	}
	for _, d := range entries {
		if d.Digest == subject || !isManifest(d.MediaType) || slices.ContainsFunc(found, func(f ocispec.Descriptor) bool { return f.Digest == d.Digest }) {
			continue
		}
		r, err := l.referrer(d, subject)
		if err != nil {
			return nil, err
		}
		if r != nil {
			found = append(found, *r)
		}
	}
	return found, nil
}

// referrer returns the descriptor of d as a referrer, nil when it does not refer to subject.
func (l *Layout) referrer(d ocispec.Descriptor, subject digest.Digest) (*ocispec.Descriptor, error) {
	raw, err := l.ReadAll(d, maxManifest)
	if err != nil {
		return nil, err
	}
	m, err := parseManifest(raw, d.MediaType)
	if err != nil {
		return nil, fmt.Errorf("OCI layout %s: %s: %w", l.dir, d.Digest, err)
	}
	if m.Subject == nil || m.Subject.Digest != subject {
		return nil, nil
	}
	r := referrerDescriptor(d, m)
	return &r, nil
}

// referrerDescriptor is how a registry lists a manifest among the referrers of its subject.
func referrerDescriptor(d ocispec.Descriptor, m *ocispec.Manifest) ocispec.Descriptor {
	r := ocispec.Descriptor{
		MediaType: m.MediaType, Digest: d.Digest, Size: d.Size,
		ArtifactType: m.ArtifactType, Annotations: m.Annotations,
	}
	if r.ArtifactType == "" {
		r.ArtifactType = m.Config.MediaType
	}
	return r
}

// fallbackTag names the index of referrers where a registry lists none itself.
func fallbackTag(subject digest.Digest) string {
	return strings.Replace(subject.String(), ":", "-", 1)
}

// taggedSubject is the manifest that an artifact's tag is made out of, "" for other tags.
func taggedSubject(tag string) digest.Digest {
	const length = len("sha256-") + 64
	if len(tag) < length || !strings.HasPrefix(tag, "sha256-") {
		return ""
	}
	return digest.Digest(strings.Replace(tag[:length], "-", ":", 1))
}

// isArtifactTag reports whether a tag is one that signing tools make out of a digest.
func isArtifactTag(tag string) bool {
	hx, ok := strings.CutPrefix(tag, "sha256-")
	if !ok {
		return false
	}
	for _, suffix := range []string{".sig", ".att", ".sbom"} {
		hx = strings.TrimSuffix(hx, suffix)
	}
	_, err := hexOf(digest.Digest("sha256:" + hx))
	return err == nil
}

// notFound is for callers that can do without.
func notFound(err error) bool { return errors.Is(err, ErrNotFound) }
