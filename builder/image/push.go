package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

const (
	parallelUploads = 4
	updateTries     = 4 // of a tag that others may be updating too
)

// NewRegistrySink returns a sink that pushes to the registry of each name. All blobs go first, then
// manifests by digest, then what refers to them, then signature tags, and the image's own tags last: a tag
// never leads to something that is missing or unsigned, however the push ends.
func (c *Client) NewRegistrySink() Sink { return registrySink{c} }

type registrySink struct{ client *Client }

// A destination is one repository with the tags it is to get.
type destination struct {
	*remote
	tags []string
}

func (s registrySink) Publish(ctx context.Context, from *Layout, p Publication) error {
	if len(p.Names) == 0 {
		return errors.New("push: an image without a name has no registry to go to")
	}
	destinations, err := s.destinations(p.Names)
	if err != nil {
		return fmt.Errorf("push: %w", err)
	}
	content, err := from.closure(p.Image)
	if err != nil {
		return err
	}
	// Content goes to all repositories before the first tag moves in any.
	for _, d := range destinations {
		if err := d.putContent(ctx, from, p, content); err != nil {
			return fmt.Errorf("destination %s: %w", d, err)
		}
	}
	raw := content[len(content)-1].manifest
	for _, d := range destinations {
		for _, tag := range d.tags {
			if _, err := d.putManifest(ctx, tag, p.Image.MediaType, raw); err != nil {
				return fmt.Errorf("destination %s: tag %s: %w", d, tag, err)
			}
		}
	}
	return nil
}

func (s registrySink) destinations(names []string) ([]destination, error) {
	var out []destination
	for _, n := range names {
		parsed, err := s.client.parse(n)
		if err != nil {
			return nil, err
		}
		tag, ok := parsed.(name.Tag)
		if !ok {
			return nil, fmt.Errorf("%s names a digest, not a tag to push to", n)
		}
		at := slices.IndexFunc(out, func(d destination) bool { return d.repo.Name() == tag.Context().Name() })
		if at < 0 {
			r := &remote{client: s.client, repo: tag.Context(), push: true, seen: map[digest.Digest][]byte{}}
			out = append(out, destination{remote: r})
			at = len(out) - 1
		}
		if !slices.Contains(out[at].tags, tag.TagStr()) {
			out[at].tags = append(out[at].tags, tag.TagStr())
		}
	}
	return out, nil
}

func (r *remote) putContent(ctx context.Context, from *Layout, p Publication, content []node) error {
	if err := r.putNodes(ctx, from, content); err != nil {
		return err
	}
	unlisted := map[digest.Digest][]ocispec.Descriptor{}
	for _, a := range p.Artifacts {
		nodes, err := from.closure(a.Descriptor)
		if err != nil {
			return err
		}
		listed, err := r.putArtifact(ctx, from, nodes)
		if err != nil {
			return fmt.Errorf("artifact %s: %w", a.Descriptor.Digest, err)
		}
		if a.Referrer && !listed {
			subject := p.subject(a)
			d, err := from.referrer(a.Descriptor, subject)
			if err != nil {
				return err
			}
			if d == nil {
				return fmt.Errorf("artifact %s does not refer to %s", a.Descriptor.Digest, subject)
			}
			unlisted[subject] = append(unlisted[subject], *d)
		}
	}
	for _, subject := range slices.Sorted(maps.Keys(unlisted)) {
		if err := r.listUnderTag(ctx, subject, unlisted[subject]); err != nil {
			return fmt.Errorf("tag %s: %w", fallbackTag(subject), err)
		}
	}
	for _, a := range p.Artifacts {
		if a.Tag == "" {
			continue
		}
		if err := r.addSignatures(ctx, from, a); err != nil {
			return fmt.Errorf("tag %s: %w", a.Tag, err)
		}
	}
	return nil
}

// putNodes uploads blobs, some at a time, and then manifests by digest, children first.
func (r *remote) putNodes(ctx context.Context, from *Layout, nodes []node) error {
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(parallelUploads)
	for _, n := range nodes {
		if n.manifest != nil {
			continue
		}
		group.Go(func() error {
			if err := r.putBlob(groupCtx, n.Descriptor, func() (io.ReadCloser, error) { return from.Open(n.Descriptor) }); err != nil {
				return fmt.Errorf("blob %s: %w", n.Digest, err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	for _, n := range nodes {
		if n.manifest == nil {
			continue
		}
		if _, err := r.putManifest(ctx, n.Digest.String(), n.MediaType, n.manifest); err != nil {
			return fmt.Errorf("manifest %s: %w", n.Digest, err)
		}
	}
	return nil
}

// putArtifact uploads an artifact; listed says whether the registry lists it with its subject.
func (r *remote) putArtifact(ctx context.Context, from *Layout, nodes []node) (listed bool, err error) {
	last := len(nodes) - 1
	if err := r.putNodes(ctx, from, nodes[:last]); err != nil {
		return false, err
	}
	n := nodes[last]
	return r.putManifest(ctx, n.Digest.String(), n.MediaType, n.manifest)
}

// listUnderTag enters referrers in the index under the fallback tag. The distribution protocol has no
// compare-and-swap, so the tag is read again after it was written, and written again when somebody else came
// in between.
func (r *remote) listUnderTag(ctx context.Context, subject digest.Digest, referrers []ocispec.Descriptor) error {
	for range updateTries {
		_, idx, err := r.fallbackIndex(ctx, subject)
		if err != nil {
			return err
		}
		missing := slices.DeleteFunc(slices.Clone(referrers), func(d ocispec.Descriptor) bool {
			return slices.ContainsFunc(idx.Manifests, func(m ocispec.Descriptor) bool { return m.Digest == d.Digest })
		})
		if len(missing) == 0 {
			return nil
		}
		updated := ocispec.Index{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
			Manifests: append(idx.Manifests, missing...), Annotations: maps.Clone(idx.Annotations),
		}
		raw, err := json.Marshal(updated)
		if err != nil {
			return err
		}
		if _, err := r.putManifest(ctx, fallbackTag(subject), ocispec.MediaTypeImageIndex, raw); err != nil {
			return err
		}
	}
	return errBusyTag
}

var errBusyTag = errors.New("others keep replacing it")

// addSignatures lets a signature tag mean an artifact, merged with the signatures that it means already.
func (r *remote) addSignatures(ctx context.Context, from *Layout, a Artifact) error {
	ours, err := from.ReadAll(a.Descriptor, maxManifest)
	if err != nil {
		return err
	}
	for range updateTries {
		old, mediaType, err := r.manifest(ctx, a.Tag)
		if err != nil && !notFound(err) {
			return err
		}
		manifest := ours
		if err == nil {
			if !isManifest(mediaType) {
				return errors.New("is an index, not a signature")
			}
			var config []byte
			if manifest, config, err = mergeSignatures(old, ours); err != nil {
				return err
			}
			if string(manifest) == string(old) {
				return nil
			}
			if config != nil {
				d := ocispec.Descriptor{Digest: digest.FromBytes(config), Size: int64(len(config))}
				if err := r.putBlob(ctx, d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(config)), nil }); err != nil {
					return err
				}
			}
		}
		if _, err := r.putManifest(ctx, a.Tag, ocispec.MediaTypeImageManifest, manifest); err != nil {
			return err
		}
	}
	return errBusyTag
}
