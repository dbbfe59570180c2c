package builder

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cooper-build/cooper/ahead"
	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/policy"
	"github.com/cooper-build/cooper/snapshot"
)

// ResolveImage answers the planner's question which image a reference means.
func (b *build) ResolveImage(ctx context.Context, ref string, p ocispec.Platform) (digest.Digest, []byte, error) {
	src, err := b.source(ctx, ref, "", p)
	if err != nil {
		return "", nil, err
	}
	return src.Descriptor.Digest, src.Config, nil
}

// documents keep the manifests and configs of base images as facts.
type documents struct{ store *snapshot.Store }

func documentKey(repository string, d digest.Digest) snapshot.Key {
	return newKey("document").str(repository).str(d.String()).sum()
}

func (d documents) Document(repository string, of digest.Digest) []byte {
	var b []byte
	if ok, err := d.store.Fact(documentKey(repository, of), &b); err != nil || !ok {
		return nil
	}
	return b
}

func (d documents) Keep(repository string, of digest.Digest, b []byte) {
	_ = d.store.SetFact(documentKey(repository, of), b)
}

// source resolves a reference once per build, so that every step that names it sees the same image. Where the
// digest is known already, the image that has it is the answer.
func (b *build) source(ctx context.Context, ref string, known digest.Digest, p ocispec.Platform) (*image.Source, error) {
	asked := ref + " for " + platforms.FormatAll(p) // an index has another image for each platform
	for _, name := range []string{known.String(), asked} {
		if src, ok := b.sources.Load(name); ok {
			return src.(*image.Source), nil
		}
	}
	for {
		found, err, _ := b.flights.Do("source "+asked, func() (any, error) {
			src, err := b.client.Resolve(ctx, ref, p)
			if err != nil {
				return nil, err
			}
			b.sources.Store(src.Descriptor.Digest.String(), src)
			found, _ := b.sources.LoadOrStore(asked, src)
			return found, nil
		})
		if errors.Is(err, context.Canceled) && ctx.Err() == nil {
			continue // that was the end of another's context
		}
		if err != nil {
			return nil, err
		}
		return found.(*image.Source), nil
	}
}

// pull makes the snapshot of a base image. Each layer is verified against its digest and against the config's DiffID
// while it arrives; a DiffID that was only claimed is never an id.
func (b *build) pull(ctx context.Context, s plan.Step, op plan.Image) (value, bool, error) {
	src, err := b.source(ctx, op.Ref, op.Digest, op.Platform)
	if err != nil {
		return value{}, false, err
	}
	layers, missing, err := b.layersOf(src)
	if err != nil {
		return value{}, false, err
	}
	v := value{image: src}
	for _, l := range layers {
		v.id = l.id
		if !slices.ContainsFunc(missing, func(m sourceLayer) bool { return m.index == l.index }) {
			b.verifyLater(s, l.id, b.unpackAgain(l))
		}
	}
	if len(missing) == 0 {
		b.explainHit(s)
		return v, false, nil
	}
	if b.CachedOnly {
		return value{}, false, ErrNotCached
	}
	c := imageCause(op, src)
	if err := b.explainMiss(ctx, s, c); err != nil {
		return value{}, false, err
	}
	if err := b.pullLayers(ctx, src, layers, missing); err != nil {
		return value{}, false, err
	}
	return v, true, b.recordCause(s, c, v.id)
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

// scanning searches what write writes, a layer's tar stream, in a goroutine of its own.
func scanning(ctx context.Context, o policy.ScanOptions, write func(io.Writer) error) (policy.LayerFacts, error) {
	tar, to := ahead.Pipe()
	var facts policy.LayerFacts
	scanned := make(chan error, 1)
	go func() {
		var err error
		facts, err = policy.ScanLayer(ctx, tar, o)
		tar.Close()
		scanned <- err
	}()
	err := write(to)
	to.CloseWithError(err)
	if scanErr := <-scanned; err == nil || errors.Is(err, io.ErrClosedPipe) { // the scanner wants no more
		err = scanErr
	}
	return facts, err
}
