package builder

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/cooper-build/cooper/ahead"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/policy"
	"github.com/cooper-build/cooper/snapshot"
	"github.com/cooper-build/cooper/snapshot/layer"
)

// packing writes the layers that the targets of a graph need, each as soon as its step is done.
type packing struct {
	b     *build
	slots *slots
	steps map[plan.Ref]bool
}

func (b *build) newPacking(g *plan.Graph, s *slots) *packing {
	p := &packing{b: b, slots: s, steps: map[plan.Ref]bool{}}
	if b.CachedOnly || b.treesOnly() {
		return p // nothing is written
	}
	for _, t := range g.Targets {
		for _, r := range t.Layers {
			p.steps[r] = true
		}
	}
	return p
}

// pack writes the layer of a step that is done, if it is needed. When policy wants the layer otherwise, it is written
// once more. What goes wrong is not said here, because a step that runs meanwhile may be at fault, such as one that fills the disk,
// and has more to say: assemble writes what is missing, and meets again what is the layer's own fault.
func (p *packing) pack(ctx context.Context, r plan.Ref, s plan.Step, v value) {
	if !p.steps[r] {
		return
	}
	free, err := p.slots.layer(ctx)
	if err != nil {
		return
	}
	defer free()
	if id, err := p.b.snapshotOf(ctx, v); err == nil {
		_, _ = p.b.writeLayer(ctx, ourLayer{id: id, of: []snapshot.ID{id}, step: s}, nil)
	}
}

// writeLayers writes the layers of ours that are not written yet, and those of the base that must be compressed anew.
func (b *build) writeLayers(ctx context.Context, ours []ourLayer, base []finishedLayer, fixes policy.Fixes) (layers, below []finishedLayer, err error) {
	layers, below = make([]finishedLayer, len(ours)), slices.Clone(base)
	name := "exporting layers"
	if b.NoImage {
		name = "examining layers"
	}
	err = b.phase(ctx, name, func(ctx context.Context) error {
		group, ctx := errgroup.WithContext(ctx)
		group.SetLimit(min(b.Jobs, layersAtOnce))
		for i, l := range ours {
			group.Go(func() (err error) {
				if layers[i], err = b.writeLayer(ctx, l, fixes.StripPrivilege[i]); err != nil {
					return located(l.step, err)
				}
				return nil
			})
		}
		for i, l := range base {
			if b.ForceCompression && !b.NoImage {
				group.Go(func() (err error) {
					below[i], err = b.recompress(ctx, l)
					return err
				})
			}
		}
		return group.Wait()
	})
	return layers, below, err
}

// writeLayer returns a layer of ours, which is written unless it was before. Where nobody wants an image, policy looks at the layer,
// and none is kept: it has no Blob.
func (b *build) writeLayer(ctx context.Context, l ourLayer, strip map[string]bool) (finishedLayer, error) {
	kind, compression := "layer", b.Compression.String()
	if b.NoImage {
		kind, compression = "examined layer", ""
	}
	key := newKey(kind).str(policy.ScannerVersion).str(compression).str(string(l.id)).value(b.epoch()).value(strip).str(b.scanKey).sum()
	var built finishedLayer
	ok, err := b.store.Fact(key, &built)
	if err != nil {
		return finishedLayer{}, err
	}
	if !ok || !b.NoImage && !b.content.Has(built.Blob) {
		// Two platforms may have the same layer.
		made, err, _ := b.flights.Do(string(key), func() (any, error) { return b.writeAnew(ctx, key, l.id, strip) })
		if err != nil {
			return finishedLayer{}, err
		}
		built = made.(finishedLayer)
	}
	built.Facts.Step = l.step.Name
	if len(l.step.Where.Lines) > 0 {
		built.Facts.Line = l.step.Where.Lines[0].Start
	}
	return built, b.addLeaks(&built.Facts, l.of)
}

// writeAnew writes a layer and remembers it.
func (b *build) writeAnew(ctx context.Context, key snapshot.Key, id snapshot.ID, strip map[string]bool) (finishedLayer, error) {
	built, err := b.packLayer(ctx, id, layer.DiffOptions{Epoch: b.epoch(), StripPrivilege: strip})
	if err != nil {
		return finishedLayer{}, err
	}
	if built.Created, err = b.created(id); err != nil {
		return finishedLayer{}, err
	}
	if len(strip) == 0 { // the layer holds the change set as it is
		if err := b.store.SetDigest(id, keyVersion, b.epoch(), built.DiffID); err != nil {
			return finishedLayer{}, err
		}
	}
	about := []snapshot.Subject{snapshot.OfSnapshot(id)}
	if !b.NoImage {
		about = append(about, snapshot.OfBlob(built.Blob.Digest))
	}
	return built, b.store.SetFact(key, built, about...)
}

// packLayer tars, hashes, scans and compresses the change set of a snapshot in a single pass.
func (b *build) packLayer(ctx context.Context, id snapshot.ID, o layer.DiffOptions) (finishedLayer, error) {
	var l finishedLayer
	err := b.readLayer(ctx, id, o, func(tar io.Reader) error {
		return scanning(ctx, tar, b.scan, &l.Facts, func(r io.Reader) (err error) {
			if b.NoImage {
				l.DiffID, err = digest.Canonical.FromReader(contextReader{ctx, r})
				return err
			}
			l.DiffID, l.Blob, err = b.compress(ctx, r)
			return err
		})
	})
	return l, err
}

// readLayer lets use read a snapshot's layer while it is written, some buffers behind.
func (b *build) readLayer(ctx context.Context, id snapshot.ID, o layer.DiffOptions, use func(tar io.Reader) error) error {
	return readWritten(func(w io.Writer) error { return b.store.WriteLayer(ctx, id, w, o) }, use)
}

// readWritten lets use read what write writes.
func readWritten(write func(io.Writer) error, use func(io.Reader) error) error {
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		buffered := bufio.NewWriterSize(w, 256<<10) // a header alone would wake the reader
		err := write(buffered)
		if err == nil {
			err = buffered.Flush()
		}
		w.CloseWithError(err)
	}()
	tar := ahead.New(r)
	err := use(tar)
	r.CloseWithError(err)
	tar.Close()
	<-done
	return err
}

// recompress gives a layer of the base the compression of ours. One that has the codec stays as it came, whatever its
// level, as in BuildKit.
func (b *build) recompress(ctx context.Context, l finishedLayer) (finishedLayer, error) {
	switch l.Blob.MediaType {
	case b.Compression.MediaType():
		return l, nil
	case ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd:
	default:
		return l, fmt.Errorf("layer %s of the base has the media type %s, which cannot be compressed anew", l.Blob.Digest, l.Blob.MediaType)
	}
	key := newKey("recompressed").str(l.Blob.Digest.String()).str(b.Compression.String()).sum()
	var known ocispec.Descriptor
	ok, err := b.store.Fact(key, &known)
	if err != nil {
		return l, err
	}
	if !ok || !b.content.Has(known) {
		if known, err = b.compressAgain(ctx, l); err != nil {
			return l, fmt.Errorf("compress layer %s of the base anew: %w", l.Blob.Digest, err)
		}
		if err := b.store.SetFact(key, known, snapshot.OfBlob(l.Blob.Digest), snapshot.OfBlob(known.Digest)); err != nil {
			return l, err
		}
	}
	l.Blob = known
	return l, nil
}

func (b *build) compressAgain(ctx context.Context, l finishedLayer) (ocispec.Descriptor, error) {
	old, err := b.content.Open(l.Blob)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer old.Close()
	tar, err := layer.Decompress(old)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer tar.Close()
	found, blob, err := b.compress(ctx, tar)
	if err == nil && found != l.DiffID {
		err = fmt.Errorf("its content is %s, it was %s", found, l.DiffID)
	}
	return blob, err
}

// compress writes a tar as a blob of this build's compression. It also returns the digest of the tar.
func (b *build) compress(ctx context.Context, tar io.Reader) (digest.Digest, ocispec.Descriptor, error) {
	blob, err := b.content.NewBlob()
	if err != nil {
		return "", ocispec.Descriptor{}, err
	}
	defer blob.Discard()
	zip, err := layer.Compress(blob, b.Compression)
	if err != nil {
		return "", ocispec.Descriptor{}, err
	}
	found := digest.Canonical.Digester()
	hashed := ahead.New(io.TeeReader(contextReader{ctx, tar}, found.Hash()))
	_, err = io.Copy(zip, hashed)
	hashed.Close()
	if closeErr := zip.Close(); err == nil { // in any case: it has goroutines
		err = closeErr
	}
	if err != nil {
		return "", ocispec.Descriptor{}, err
	}
	d, err := blob.Commit(b.Compression.MediaType())
	return found.Digest(), d, err
}
