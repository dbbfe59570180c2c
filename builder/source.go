package builder

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/policy"
	"github.com/cooper-build/cooper/snapshot"
	"github.com/cooper-build/cooper/snapshot/layer"
)

// ResolveImage answers the planner's question which image a reference means.
func (b *build) ResolveImage(ctx context.Context, ref string, p ocispec.Platform) (digest.Digest, []byte, error) {
	src, err := b.source(ctx, ref, "", p)
	if err != nil {
		return "", nil, err
	}
	return src.Descriptor.Digest, src.Config, nil
}

// source resolves a reference once per build, so that every step that names it sees the same image. Where the
// digest is known already, the image that has it is the answer.
func (b *build) source(ctx context.Context, ref string, known digest.Digest, p ocispec.Platform) (*image.Source, error) {
	b.sourcesMu.Lock()
	defer b.sourcesMu.Unlock()
	asked := ref + " for " + platforms.FormatAll(p) // an index has another image for each platform
	for _, name := range []string{known.String(), asked} {
		if src, ok := b.sources[name]; ok {
			return src, nil
		}
	}
	src, err := b.client.Resolve(ctx, ref, p)
	if err != nil {
		return nil, err
	}
	b.sources[asked] = src
	b.sources[src.Descriptor.Digest.String()] = src
	return src, nil
}

// pull makes the snapshot of a base image. Its layers are verified against their digests while they arrive
// and against the config's DiffIDs while they are unpacked; a DiffID that was only claimed is never an id.
func (b *build) pull(ctx context.Context, s plan.Step, op plan.Image, w *watch) (value, bool, error) {
	src, err := b.source(ctx, op.Ref, op.Digest, op.Platform)
	if err != nil {
		return value{}, false, err
	}
	diffIDs, err := diffIDs(src)
	if err != nil {
		return value{}, false, err
	}
	c := imageCause(op, src)
	var id snapshot.ID
	var ran bool
	for i, l := range src.Manifest.Layers {
		next := snapshot.ChainID(id, diffIDs[i])
		have, err := b.haveBase(l, diffIDs[i], next)
		if err != nil {
			return value{}, false, err
		}
		if !have {
			if b.CachedOnly {
				return value{}, false, ErrNotCached
			}
			if !ran {
				if err := b.explainMiss(ctx, s, c); err != nil {
					return value{}, false, err
				}
			}
			ran = true
			if err := b.pullLayer(ctx, src, i, id, diffIDs[i]); err != nil {
				return value{}, false, fmt.Errorf("layer %d of %s: %w", i+1, src.Name, err)
			}
		}
		if have {
			b.verifyLater(s, next, b.unpackAgain(id, l))
		}
		id = next
	}
	if ran {
		err = b.recordCause(s, c, id)
	} else {
		b.explainHit(s)
	}
	return value{id: id, image: src}, ran, err
}

func diffIDs(src *image.Source) ([]digest.Digest, error) {
	var config ocispec.Image
	if err := json.Unmarshal(src.Config, &config); err != nil {
		return nil, fmt.Errorf("config of %s: %w", src.Name, err)
	}
	if got, want := len(config.RootFS.DiffIDs), len(src.Manifest.Layers); got != want {
		return nil, fmt.Errorf("config of %s lists %d layers, its manifest %d", src.Name, got, want)
	}
	return config.RootFS.DiffIDs, nil
}

// A baseLayer is what was found out about the blob of a base layer when it was unpacked.
type baseLayer struct {
	DiffID digest.Digest // of the bytes, not as claimed
	Facts  policy.LayerFacts
}

func baseLayerKey(blob digest.Digest, id snapshot.ID) snapshot.Key {
	return newKey("base layer").str(policy.ScannerVersion).str(blob.String()).str(string(id)).sum()
}

// haveBase reports whether a layer is here: its blob, its unpacked tree, and the proof that the two belong
// together.
func (b *build) haveBase(l ocispec.Descriptor, claimed digest.Digest, id snapshot.ID) (bool, error) {
	var known baseLayer
	ok, err := b.store.Fact(baseLayerKey(l.Digest, id), &known)
	if err != nil || !ok || known.DiffID != claimed {
		return false, err
	}
	return b.content.Has(l) && b.store.Has(id), nil
}

func (b *build) pullLayer(ctx context.Context, src *image.Source, i int, parent snapshot.ID, diffID digest.Digest) error {
	l := src.Manifest.Layers[i]
	if !b.content.Has(l) {
		body, err := src.Layer(ctx, i)
		if err != nil {
			return err
		}
		defer body.Close()
		if err := b.content.Ingest(l, body); err != nil {
			return err
		}
	}
	blob, err := b.content.Open(l)
	if err != nil {
		return err
	}
	defer blob.Close()
	tar, err := layer.Decompress(blob)
	if err != nil {
		return err
	}
	defer tar.Close()
	var facts policy.LayerFacts
	found := digest.Canonical.Digester()
	err = scanning(ctx, tar, policy.ScanOptions{Light: true}, &facts, func(r io.Reader) error {
		r = io.TeeReader(r, found.Hash())
		if _, err := b.store.Import(ctx, parent, diffID, r); err != nil {
			return err
		}
		// Import reads nothing when it has the snapshot already. That the blob belongs to it must be seen all the
		// same: else an image that claims another's DiffID would get that one's tree and pass for it.
		_, err := io.Copy(io.Discard, r)
		return err
	})
	if err != nil {
		return err
	}
	if got := found.Digest(); got != diffID {
		return fmt.Errorf("its content is %s, the image promised %s", got, diffID)
	}
	id := snapshot.ChainID(parent, diffID)
	return b.store.SetFact(baseLayerKey(l.Digest, id), baseLayer{DiffID: diffID, Facts: facts}, snapshot.OfBlob(l.Digest), snapshot.OfSnapshot(id))
}

// scanning lets use read a layer's tar stream while the policy scanner reads the same bytes.
func scanning(ctx context.Context, tar io.Reader, o policy.ScanOptions, facts *policy.LayerFacts, use func(io.Reader) error) error {
	pr, pw := io.Pipe()
	scanned := make(chan error, 1)
	go func() {
		var err error
		*facts, err = policy.ScanLayer(ctx, pr, o)
		pr.CloseWithError(err)
		scanned <- err
	}()
	err := use(io.TeeReader(tar, pw))
	pw.CloseWithError(err)
	scanErr := <-scanned
	if err != nil {
		return err
	}
	return scanErr
}
