package builder

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/cooper-build/cooper/builder/account"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/policy"
	"github.com/cooper-build/cooper/snapshot"
	"github.com/cooper-build/cooper/snapshot/layer"
)

// An assembled image: everything is in the store's content, nothing is published.
type assembled struct {
	Manifest ocispec.Descriptor
	Blobs    []ocispec.Descriptor // config and layers
	Facts    policy.Input
	Root     snapshot.ID // the final tree
}

// A builtLayer is one layer of ours, as it leaves.
type builtLayer struct {
	Blob    ocispec.Descriptor
	DiffID  digest.Digest
	Facts   policy.LayerFacts
	Created time.Time
}

// A ourLayer is a layer of ours before it is written.
type ourLayer struct {
	id   snapshot.ID
	step plan.Step
}

// assemble makes config and manifest around the base's layers, which pass through byte for byte, and ours.
// Fixes are what policy wants changed on the way.
func (b *build) assemble(ctx context.Context, g *plan.Graph, solved []value, fixes policy.Fixes) (*assembled, error) {
	in := inputs{solved}
	ours, root, err := b.ourLayers(ctx, g, in, fixes)
	if err != nil {
		return nil, err
	}
	base := in.of(g.Base).image
	key := b.imageKey(g, ours, root, fixes)
	img := &assembled{}
	ok, err := b.store.Fact(key, img)
	if err != nil {
		return nil, err
	}
	if ok && b.complete(img) {
		return img, nil
	}
	if b.CachedOnly {
		return nil, ErrNotCached
	}

	layers, err := b.writeLayers(ctx, ours, fixes)
	if err != nil {
		return nil, err
	}
	*img = assembled{Root: root}
	var manifest ocispec.Manifest
	manifest.Versioned = specs.Versioned{SchemaVersion: 2}
	manifest.MediaType = ocispec.MediaTypeImageManifest
	var diffs []digest.Digest
	if base != nil {
		if diffs, err = diffIDs(base); err != nil {
			return nil, err
		}
		for _, l := range base.Manifest.Layers {
			manifest.Layers = append(manifest.Layers, ocispec.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size})
			var known baseLayer
			if _, err := b.store.Fact(baseLayerKey(l.Digest), &known); err != nil {
				return nil, err
			}
			img.Facts.Base.Layers = append(img.Facts.Base.Layers, known.Facts)
		}
	}
	for _, l := range layers {
		manifest.Layers = append(manifest.Layers, l.Blob)
		diffs = append(diffs, l.DiffID)
		img.Facts.Layers = append(img.Facts.Layers, l.Facts)
	}
	config, err := b.config(g, layers, diffs, fixes)
	if err != nil {
		return nil, err
	}
	if manifest.Config, err = b.content.WriteBlob(ocispec.MediaTypeImageConfig, config); err != nil {
		return nil, err
	}
	text, err := json.MarshalIndent(manifest, "", "  ")
	if err != nil {
		return nil, err
	}
	if img.Manifest, err = b.content.WriteBlob(ocispec.MediaTypeImageManifest, text); err != nil {
		return nil, err
	}
	img.Manifest.Platform = &ocispec.Platform{OS: g.Platform.OS, Architecture: g.Platform.Architecture, Variant: g.Platform.Variant}
	img.Blobs = append([]ocispec.Descriptor{manifest.Config}, manifest.Layers...)
	if img.Facts.Config, err = b.configFacts(ctx, g, config, root); err != nil {
		return nil, err
	}
	return img, b.store.SetFact(key, img)
}

// complete reports whether every blob of a remembered image is still there.
func (b *build) complete(img *assembled) bool {
	for _, d := range append([]ocispec.Descriptor{img.Manifest}, img.Blobs...) {
		if !b.content.Has(d) {
			return false
		}
	}
	return true
}

// ourLayers lists the layers that this build adds, and the final tree: one for each step, or a single one
// when policy squashes them.
func (b *build) ourLayers(ctx context.Context, g *plan.Graph, in inputs, fixes policy.Fixes) ([]ourLayer, snapshot.ID, error) {
	var ours []ourLayer
	var ids []snapshot.ID
	for _, r := range g.Layers {
		id, err := b.snapshotOf(ctx, in.of(r))
		if err != nil {
			return nil, "", err
		}
		ours = append(ours, ourLayer{id: id, step: g.Steps[r]})
		ids = append(ids, id)
	}
	root, err := b.snapshotOf(ctx, in.of(g.Result))
	if err != nil {
		return nil, "", err
	}
	if !fixes.Squash || len(ours) == 0 {
		return ours, root, nil
	}
	base := in.of(g.Base).id
	squashed := snapshot.ID(newKey("squash").str(string(base)).value(ids).sum())
	if !b.store.Has(squashed) {
		if b.CachedOnly {
			return nil, "", ErrNotCached
		}
		created, err := b.created(ids[len(ids)-1])
		if err != nil {
			return nil, "", err
		}
		if squashed, err = b.store.Squash(ctx, base, ids, squashed); err != nil {
			return nil, "", err
		}
		if err := b.store.SetFact(createdKey(squashed), created); err != nil {
			return nil, "", err
		}
	}
	return []ourLayer{{id: squashed, step: ours[len(ours)-1].step}}, squashed, nil
}

// imageKey is the cause of an assembled image.
func (b *build) imageKey(g *plan.Graph, ours []ourLayer, root snapshot.ID, fixes policy.Fixes) snapshot.Key {
	k := newKey("image").str(policy.ScannerVersion).bytes(g.Config).str(string(root)).value(b.epoch()).value(fixes).value(g.Platform)
	for _, l := range ours {
		k = k.str(string(l.id)).value(l.step.Where.Lines).str(l.step.Name)
	}
	return k.str(b.scanKey).sum()
}

// writeLayers writes the layers of ours that are not written yet, on all cores.
func (b *build) writeLayers(ctx context.Context, ours []ourLayer, fixes policy.Fixes) ([]builtLayer, error) {
	layers := make([]builtLayer, len(ours))
	err := b.phase(ctx, "exporting layers", func(ctx context.Context) error {
		group, ctx := errgroup.WithContext(ctx)
		group.SetLimit(b.Jobs)
		for i, l := range ours {
			group.Go(func() error {
				var err error
				layers[i], err = b.writeLayer(ctx, l, fixes.StripPrivilege[i])
				if err != nil {
					return fmt.Errorf("layer of %s: %w", l.step.Name, err)
				}
				return nil
			})
		}
		return group.Wait()
	})
	return layers, err
}

// writeLayer tars, hashes, scans and compresses one layer in a single pass.
func (b *build) writeLayer(ctx context.Context, l ourLayer, strip map[string]bool) (builtLayer, error) {
	key := newKey("layer").str(policy.ScannerVersion).str("gzip").str(string(l.id)).value(b.epoch()).value(strip).str(b.scanKey).sum()
	var built builtLayer
	ok, err := b.store.Fact(key, &built)
	if err != nil {
		return builtLayer{}, err
	}
	if !ok || !b.content.Has(built.Blob) {
		if built, err = b.packLayer(ctx, l.id, strip); err != nil {
			return builtLayer{}, err
		}
		if built.Created, err = b.created(l.id); err != nil {
			return builtLayer{}, err
		}
		if err := b.store.SetFact(key, built); err != nil {
			return builtLayer{}, err
		}
	}
	built.Facts.Step = l.step.Name
	if len(l.step.Where.Lines) > 0 {
		built.Facts.Line = l.step.Where.Lines[0].Start
	}
	return built, nil
}

func (b *build) packLayer(ctx context.Context, id snapshot.ID, strip map[string]bool) (builtLayer, error) {
	blob, err := b.content.NewBlob()
	if err != nil {
		return builtLayer{}, err
	}
	defer blob.Discard()
	zip, err := layer.Compress(blob, layer.Gzip)
	if err != nil {
		return builtLayer{}, err
	}
	diff := digest.Canonical.Digester()
	var built builtLayer
	tar, tarErr := io.Pipe()
	go func() {
		tarErr.CloseWithError(b.store.WriteLayer(ctx, id, tarErr, layer.DiffOptions{Epoch: b.epoch(), StripPrivilege: strip}))
	}()
	err = scanning(ctx, tar, b.scan, &built.Facts, func(r io.Reader) error {
		_, err := io.Copy(io.MultiWriter(diff.Hash(), zip), r)
		return err
	})
	tar.CloseWithError(err)
	if err != nil {
		return builtLayer{}, err
	}
	if err := zip.Close(); err != nil {
		return builtLayer{}, err
	}
	built.DiffID = diff.Digest()
	built.Blob, err = blob.Commit(ocispec.MediaTypeImageLayerGzip)
	return built, err
}

// configFacts are the facts of the config that policy judges. What its user means is read from the final tree's
// own passwd, because that is what a runtime will do.
func (b *build) configFacts(ctx context.Context, g *plan.Graph, config []byte, root snapshot.ID) (policy.ConfigFacts, error) {
	view, err := b.store.View(ctx, root)
	if err != nil {
		return policy.ConfigFacts{}, err
	}
	defer view.Close()
	passwd, err := account.Passwd(view.Dir())
	if err != nil {
		return policy.ConfigFacts{}, err
	}
	return policy.ScanConfig(config, policy.ConfigOptions{Base: g.BaseConfig, Passwd: passwd, Secrets: b.scan.Secrets, Lines: g.HistoryLines})
}

// config completes the frontend's image config as BuildKit's exporter does: diff ids, creation times clamped
// to the epoch, and one history entry for each layer.
func (b *build) config(g *plan.Graph, layers []builtLayer, diffs []digest.Digest, fixes policy.Fixes) ([]byte, error) {
	fields := map[string]json.RawMessage{}
	if err := json.Unmarshal(g.Config, &fields); err != nil {
		return nil, fmt.Errorf("image config: %w", err)
	}
	var typed, base ocispec.Image
	if err := json.Unmarshal(g.Config, &typed); err != nil {
		return nil, fmt.Errorf("image config: %w", err)
	}
	if len(g.BaseConfig) > 0 {
		if err := json.Unmarshal(g.BaseConfig, &base); err != nil {
			return nil, fmt.Errorf("config of the base image: %w", err)
		}
	}
	h := history(typed.History, base.History, len(diffs)-len(layers), layers, fixes.Squash)
	var created *time.Time
	if epoch := b.epoch(); epoch != nil {
		clamp(h, base.History, *epoch)
		if typed.Created != nil && typed.Created.After(*epoch) {
			created = epoch
		}
	}
	if typed.Created == nil {
		for _, e := range h {
			if e.Created != nil {
				created = e.Created
			}
		}
	}
	set := func(name string, v any) error {
		text, err := json.Marshal(v)
		fields[name] = text
		return err
	}
	if err := set("rootfs", ocispec.RootFS{Type: "layers", DiffIDs: diffs}); err != nil {
		return nil, err
	}
	if err := set("history", h); err != nil {
		return nil, err
	}
	if created != nil || typed.Created == nil {
		if err := set("created", created); err != nil {
			return nil, err
		}
	}
	if fixes.ForceUser != "" {
		if err := forceUser(fields, fixes.ForceUser); err != nil {
			return nil, err
		}
	}
	return json.Marshal(fields)
}

// forceUser sets config.User and keeps every other field as it was.
func forceUser(fields map[string]json.RawMessage, user string) error {
	config := map[string]json.RawMessage{}
	if err := json.Unmarshal(fields["config"], &config); err != nil {
		return fmt.Errorf("image config: %w", err)
	}
	var err error
	if config["User"], err = json.Marshal(user); err != nil {
		return err
	}
	fields["config"], err = json.Marshal(config)
	return err
}

// history squares the entries with the layers, as BuildKit's normalizeLayersAndHistory does: a base whose
// history is shorter than its layers is padded, and entries without a time get the one of the layer they
// came with.
func history(h, base []ocispec.History, baseLayers int, ours []builtLayer, squashed bool) []ocispec.History {
	out := slices.Clone(h)
	own := len(base)
	if squashed {
		last := -1
		for i := own; i < len(out); i++ {
			out[i].CreatedBy = "removed by policy" // a command line may hold what the squash is there to hide
			if !out[i].EmptyLayer {
				last = i
				out[i].EmptyLayer = true
			}
		}
		if last >= 0 {
			out[last].EmptyLayer = false
			out[last].Comment = "squashed by policy"
		}
	}
	total := baseLayers + len(ours)
	described := 0
	for i := range out {
		if !out[i].EmptyLayer {
			if described == total {
				out[i].EmptyLayer = true // the base's history tells of layers that it does not have
				continue
			}
			described++
		}
	}
	var pad []ocispec.History
	for range total - described {
		pad = append(pad, ocispec.History{CreatedBy: "unknown layer of the base image", Comment: "cooper"})
	}
	out = slices.Insert(out, min(own, len(out)), pad...)

	layer := 0
	for i := range out {
		if out[i].EmptyLayer {
			continue
		}
		if out[i].Created == nil && layer >= baseLayers {
			out[i].Created = &ours[layer-baseLayers].Created
		}
		layer++
	}
	fillTimes(out)
	return out
}

// fillTimes gives entries without a time the time of the first new layer, or of the layer before them.
func fillTimes(h []ocispec.History) {
	var created *time.Time
	var missing bool
	for _, e := range h {
		if e.Created == nil {
			missing = true
			continue
		}
		created = e.Created
		if missing {
			break
		}
	}
	missing = false
	for i := range h {
		switch {
		case h[i].Created == nil:
			missing = true
			h[i].Created = created
		case missing:
			created = h[i].Created
		}
	}
}

// clamp sets times of ours to the epoch where they are later or missing; the base's entries keep theirs.
func clamp(h, base []ocispec.History, epoch time.Time) {
	for i := range h {
		if i < len(base) {
			continue
		}
		if h[i].Created == nil || h[i].Created.After(epoch) {
			h[i].Created = &epoch
		}
	}
}
