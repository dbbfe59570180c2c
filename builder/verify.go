package builder

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/snapshot"
	"github.com/cooper-build/cooper/snapshot/layer"
)

// VerifyStore checks the store at root against docs/store.md and returns what is wrong with it. With repair, what is
// broken is moved to its quarantine with all that depends on it, and the next build makes it again. It must run
// inside [userns.Enter].
func VerifyStore(ctx context.Context, root string, repair bool) (found []snapshot.Damage, err error) {
	// Layers are unpacked once more to compare them, also without a repair.
	if err := snapshot.CheckWritable(root); err != nil {
		return nil, err
	}
	// The format comes first: nothing is moved in a directory of anything else.
	found, err = snapshot.RepairFormat(root, repair)
	if err != nil || len(found) > 0 && !repair {
		return found, err
	}
	frame, err := image.RepairFrame(filepath.Join(root, "content"), repair)
	found = append(found, inContent(frame)...)
	if err != nil || len(frame) > 0 && !repair {
		return found, err // nothing beneath can be opened
	}
	h, err := keepHouse(root)
	if err != nil {
		return found, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	blobs, err := h.content.Verify(ctx, repair)
	found = append(found, inContent(blobs)...)
	if err != nil {
		return found, err
	}
	if err := h.content.Release(); err != nil {
		return found, err
	}
	layers, err := h.importedLayers()
	if err != nil {
		return found, err
	}
	proof := snapshot.Proof{Writer: keyVersion, Layer: func(_ context.Context, id snapshot.ID) (io.ReadCloser, error) {
		d, ok := layers[id]
		if !ok {
			return nil, nil
		}
		return h.openLayer(d)
	}}
	rest, err := h.store.Verify(ctx, proof, repair)
	return append(found, rest...), err
}

func inContent(found []image.Damage) []snapshot.Damage {
	var all []snapshot.Damage
	for _, d := range found {
		all = append(all, snapshot.Damage{Where: "content/" + d.Where, What: d.What, Repair: d.Repair})
	}
	return all
}

// importedLayers are the blobs of the snapshots that were unpacked from some, as far as they are here and good.
func (h *housekeeper) importedLayers() (map[snapshot.ID]ocispec.Descriptor, error) {
	blobs, err := h.content.Blobs()
	if err != nil {
		return nil, err
	}
	sizes := map[string]int64{}
	for _, b := range blobs {
		sizes[b.Digest.String()] = b.Bytes
	}
	entries, err := h.store.List()
	if err != nil {
		return nil, err
	}
	layers := map[snapshot.ID]ocispec.Descriptor{}
	for _, e := range entries {
		// Only the fact of a base layer is about one snapshot with a chain id and one blob: which it was found to be.
		if e.Kind != snapshot.KindFact || !e.Usable || len(e.About) != 2 {
			continue
		}
		var d ocispec.Descriptor
		var id snapshot.ID
		for _, a := range e.About {
			if size, ok := sizes[a.Blob.String()]; ok {
				d = ocispec.Descriptor{Digest: a.Blob, Size: size}
			}
			if a.Snapshot != "" {
				id = a.Snapshot
			}
		}
		if d.Digest != "" && strings.HasPrefix(string(id), "sha256:") && h.content.Has(d) {
			layers[id] = d
		}
	}
	return layers, h.content.Release()
}

func (h *housekeeper) openLayer(d ocispec.Descriptor) (io.ReadCloser, error) {
	blob, err := h.content.Open(d)
	if err != nil {
		return nil, err
	}
	tar, err := layer.Decompress(blob)
	if err != nil {
		return nil, errors.Join(err, blob.Close())
	}
	return &layerReader{tar, blob}, nil
}

// layerReader closes what it decompresses, too.
type layerReader struct {
	io.ReadCloser
	blob io.Closer
}

func (r *layerReader) Close() error { return errors.Join(r.ReadCloser.Close(), r.blob.Close()) }
