package builder

import (
	"cmp"
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

// examines says that policy has something to look for in the layers.
func (b *build) examines() bool { return !b.Policy.ForbidsNothing() }

// A packedLayer is what became of a change set: a blob of the build's compression.
type packedLayer struct {
	DiffID digest.Digest
	Blob   ocispec.Descriptor
}

// An examinedLayer is what policy has to know of a change set, however it is compressed.
type examinedLayer struct {
	DiffID digest.Digest
	Facts  policy.LayerFacts
}

// writeLayer returns a layer of ours. It is written unless it was before, or nobody wants an image: then it has no Blob. It is examined
// unless it was before, or policy has nothing to look for: then it has no Facts.
func (b *build) writeLayer(ctx context.Context, l ourLayer, strip map[string]bool) (finishedLayer, error) {
	of := newKey("layer").str(string(l.id)).value(b.epoch()).value(strip).sum()
	// Two platforms may have the same layer.
	done, err, _ := b.flights.Do(string(of), func() (any, error) { return b.finishLayer(ctx, of, l.id, strip) })
	if err != nil {
		return finishedLayer{}, err
	}
	made := done.(finishedLayer)
	made.Facts.Step = l.step.Name
	if len(l.step.Where.Lines) > 0 {
		made.Facts.Line = l.step.Where.Lines[0].Start
	}
	if made.Created, err = b.created(l.id); err != nil {
		return finishedLayer{}, err
	}
	return made, b.addLeaks(&made.Facts, l.of)
}

// finishLayer does with the layer that is called of what was not done before.
func (b *build) finishLayer(ctx context.Context, of snapshot.Key, id snapshot.ID, strip map[string]bool) (finishedLayer, error) {
	packedKey := newKey("packed layer").str(string(of)).str(b.Compression.String()).sum()
	examinedKey := newKey("examined layer").str(string(of)).str(policy.ScannerVersion).str(b.scanKey).sum()
	var p packedLayer
	var e examinedLayer
	pack, examine := !b.NoImage, b.examines()
	if pack {
		ok, err := b.store.Fact(packedKey, &p)
		if err != nil {
			return finishedLayer{}, err
		}
		if pack = !ok || !b.content.Has(p.Blob); pack {
			p = packedLayer{}
		}
	}
	if examine {
		ok, err := b.store.Fact(examinedKey, &e)
		if err != nil {
			return finishedLayer{}, err
		}
		examine = !ok
	}
	if pack || examine {
		known := cmp.Or(p.DiffID, e.DiffID)
		made, err := b.packLayer(ctx, id, strip, pack, examine)
		if err == nil && known != "" && known != made.DiffID {
			// The files are not what they were: what is known of the others says nothing of these.
			pack, examine = true, true
			made, err = b.packLayer(ctx, id, strip, pack, examine)
		}
		if err == nil && len(strip) == 0 { // the layer holds the change set as it is
			err = b.store.SetDigest(id, keyVersion, b.epoch(), made.DiffID)
		}
		if err != nil {
			return finishedLayer{}, err
		}
		if pack {
			p = packedLayer{made.DiffID, made.Blob}
			if err := b.store.SetFact(packedKey, p, snapshot.OfSnapshot(id), snapshot.OfBlob(p.Blob.Digest)); err != nil {
				return finishedLayer{}, err
			}
		}
		if examine {
			e = examinedLayer{made.DiffID, made.Facts}
			if err := b.store.SetFact(examinedKey, e, snapshot.OfSnapshot(id)); err != nil {
				return finishedLayer{}, err
			}
		}
	}
	return finishedLayer{Blob: p.Blob, DiffID: cmp.Or(p.DiffID, e.DiffID), Facts: e.Facts}, nil
}

// packLayer tars and hashes the change set of a snapshot, and compresses and examines the tar on the way.
func (b *build) packLayer(ctx context.Context, id snapshot.ID, strip map[string]bool, pack, examine bool) (l finishedLayer, err error) {
	o := layer.DiffOptions{Epoch: b.epoch(), StripPrivilege: strip}
	tarTo := func(w io.Writer) error {
		return readWritten(func(w io.Writer) error { return b.store.WriteLayer(ctx, id, w, o) }, func(tar io.Reader) error {
			_, err := io.Copy(w, tar)
			return err
		})
	}
	write := func(scanner io.Writer) (err error) {
		if pack {
			l.DiffID, l.Blob, err = b.compress(func(zip io.Writer) error { return tarTo(io.MultiWriter(scanner, zip)) })
			return err
		}
		found := digest.Canonical.Digester()
		err = tarTo(io.MultiWriter(scanner, found.Hash()))
		l.DiffID = found.Digest()
		return err
	}
	if examine {
		l.Facts, err = scanning(ctx, b.scan, write)
	} else {
		err = write(io.Discard)
	}
	return l, err
}

// readWritten lets use read what write writes, some buffers behind.
func readWritten(write func(io.Writer) error, use func(io.Reader) error) error {
	r, w := ahead.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.CloseWithError(write(w))
	}()
	err := use(r)
	r.Close()
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
	plain, err := layer.Decompress(contextReader{ctx, old})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer plain.Close()
	tar := ahead.New(plain)
	defer tar.Close()
	found, blob, err := b.compress(func(zip io.Writer) error {
		_, err := io.Copy(zip, tar)
		return err
	})
	if err == nil && found != l.DiffID {
		err = fmt.Errorf("its content is %s, it was %s", found, l.DiffID)
	}
	return blob, err
}

// compress makes a blob of this build's compression of the tar that write writes. It also returns the digest of the tar.
func (b *build) compress(write func(io.Writer) error) (digest.Digest, ocispec.Descriptor, error) {
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
	err = write(io.MultiWriter(found.Hash(), zip))
	if closeErr := zip.Close(); err == nil { // in any case: it has goroutines
		err = closeErr
	}
	if err != nil {
		return "", ocispec.Descriptor{}, err
	}
	d, err := blob.Commit(b.Compression.MediaType())
	return found.Digest(), d, err
}
