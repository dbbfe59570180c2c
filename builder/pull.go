package builder

import (
	"context"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/cooper-build/cooper/ahead"
	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/builder/policy"
	"github.com/cooper-build/cooper/snapshot"
	"github.com/cooper-build/cooper/snapshot/layer"
)

// pullsAtOnce bounds the memory of base layers that are unpacked, whatever the machine.
const pullsAtOnce = 8

// A sourceLayer is a layer of a base image and the place that it has.
type sourceLayer struct {
	index  int
	blob   ocispec.Descriptor
	diffID digest.Digest // as the config claims
	below  snapshot.ID
	id     snapshot.ID // what it is if the claim holds
}

// layersOf lists the layers of an image, and which of them are not here.
func (b *build) layersOf(src *image.Source) (all, missing []sourceLayer, err error) {
	claimed, err := diffIDs(src)
	if err != nil {
		return nil, nil, err
	}
	var below snapshot.ID
	for i, blob := range src.Manifest.Layers {
		l := sourceLayer{index: i, blob: blob, diffID: claimed[i], below: below, id: snapshot.ChainID(below, claimed[i])}
		have, err := b.haveBase(l.blob, l.diffID, l.id)
		if err != nil {
			return nil, nil, err
		}
		if !have {
			missing = append(missing, l)
		}
		all, below = append(all, l), l.id
	}
	return all, missing, nil
}

// pullLayers brings the layers that are missing, several at a time. Each becomes a snapshot when the one below it is one.
func (b *build) pullLayers(ctx context.Context, src *image.Source, all, missing []sourceLayer) error {
	group, ctx := errgroup.WithContext(ctx)
	committed := make([]chan struct{}, len(all)) // nil: it was here
	for _, l := range missing {
		committed[l.index] = make(chan struct{})
	}
	for _, l := range missing {
		group.Go(func() error {
			stands := func() error { return nil }
			if l.index > 0 && committed[l.index-1] != nil {
				stands = func() error { return wait(ctx, committed[l.index-1]) }
			}
			// Another image of this build may bring the same layer.
			_, err, _ := b.flights.Do("base "+l.blob.Digest.String()+" "+string(l.id), func() (any, error) { return nil, b.pullLayer(ctx, src, l, stands) })
			if err != nil {
				return fmt.Errorf("layer %d of %s: %w", l.index+1, src.Name, err)
			}
			close(committed[l.index])
			return nil
		})
	}
	return group.Wait()
}

func wait(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// pullLayer brings one layer: unpacked and scanned while it arrives, and kept when its bytes were found to be what
// manifest and config promise. stands returns when the layer below is a snapshot.
func (b *build) pullLayer(ctx context.Context, src *image.Source, l sourceLayer, stands func() error) error {
	if have, err := b.haveBase(l.blob, l.diffID, l.id); err != nil || have {
		return err
	}
	in, err := b.content.Receive(ctx, src, l.index)
	if err != nil {
		return err
	}
	defer in.Discard()
	got, err := b.receiveLayer(ctx, in, l)
	if err != nil && ctx.Err() == nil {
		err = in.Cause(err)
	}
	if err != nil {
		return err
	}
	defer got.discard()
	if err := in.Commit(); err != nil {
		return err
	}
	if err := stands(); err != nil {
		return err
	}
	if got.tree != nil {
		if _, err := got.tree.Commit(ctx, l.below); err != nil {
			return err
		}
	}
	known := baseLayer{DiffID: l.diffID, Facts: got.facts}
	return b.store.SetFact(baseLayerKey(l.blob.Digest, l.id), known, snapshot.OfBlob(l.blob.Digest), snapshot.OfSnapshot(l.id))
}

// A receivedLayer has the DiffID that was promised.
type receivedLayer struct {
	tree  *snapshot.Unpacked // nil: the store has it
	facts policy.LayerFacts
}

func (r *receivedLayer) discard() {
	if r.tree != nil {
		r.tree.Discard()
	}
}

// receiveLayer reads a layer to its end in one pipeline: a goroutine for what comes in, one that decompresses, one that
// scans, and this one, which hashes and unpacks. A slot is taken meanwhile.
func (b *build) receiveLayer(ctx context.Context, in *image.Arrival, l sourceLayer) (r *receivedLayer, err error) {
	select {
	case b.layerSlots <- struct{}{}:
		defer func() { <-b.layerSlots }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	blob := ahead.New(in)
	defer blob.Close()
	plain, err := layer.Decompress(blob)
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	tar := ahead.New(plain)
	defer tar.Close()
	r = &receivedLayer{}
	r.facts, err = scanning(ctx, policy.ScanOptions{Light: true}, func(scanner io.Writer) (err error) {
		scanned := io.TeeReader(tar, scanner)
		if b.store.Has(l.id) {
			return sameContent(scanned, l.diffID)
		}
		r.tree, err = b.store.Unpack(ctx, l.diffID, scanned)
		return err
	})
	if err != nil {
		r.discard()
		return nil, err
	}
	return r, nil
}

// sameContent sees that a blob belongs to a tree that is here already: else an image that claims another's DiffID would
// get that one's tree and pass for it.
func sameContent(tar io.Reader, want digest.Digest) error {
	found := digest.Canonical.Digester()
	if _, err := io.Copy(found.Hash(), tar); err != nil {
		return err
	}
	if got := found.Digest(); got != want {
		return fmt.Errorf("its content is %s, the image promised %s", got, want)
	}
	return nil
}
