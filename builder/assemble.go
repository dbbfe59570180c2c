package builder

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/cooper-build/cooper/builder/account"
	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/policy"
	"github.com/cooper-build/cooper/snapshot"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// An assembled image: everything is in the store's content, nothing is published.
type assembled struct {
	Manifest ocispec.Descriptor
	Blobs    []ocispec.Descriptor // config and layers
	Facts    policy.Input
	Root     snapshot.ID // the final tree, in which privileges are as the Dockerfile made them
	Stripped []string    // the files that policy takes the privileges of, as paths in Root
}

// A finishedLayer is one layer as it leaves. Created is set for ours.
type finishedLayer struct {
	Blob    ocispec.Descriptor
	DiffID  digest.Digest
	Facts   policy.LayerFacts
	Created time.Time
}

// An ourLayer is a layer of ours before it is written.
type ourLayer struct {
	id   snapshot.ID
	of   []snapshot.ID // the steps' snapshots that it holds: itself, unless squashed
	step plan.Step
}

// finished is what a build publishes.
type finished struct {
	Image   ocispec.Descriptor // an index, or the manifest of the only target; zero when only files were asked for
	Index   bool
	Targets []*assembled // as in the graph
}

// assemble makes config and manifest of a target around the base's layers, which pass through byte for byte unless they are to be compressed anew, and ours.
// Fixes are what policy wants changed on the way. Where nobody wants an image, only what policy judges is made: there are no manifest and no blobs.
func (b *build) assemble(ctx context.Context, steps []plan.Step, t plan.Target, solved []value, fixes policy.Fixes) (*assembled, error) {
	in := inputs{solved}
	ours, root, err := b.ourLayers(ctx, steps, t, in, fixes)
	if err != nil {
		return nil, err
	}
	base := in.of(t.Base).image
	key := b.imageKey(t, base, ours, root, fixes)
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

	below, err := b.baseLayers(base)
	if err != nil {
		return nil, err
	}
	layers, below, err := b.writeLayers(ctx, ours, below, fixes)
	if err != nil {
		return nil, err
	}
	*img = assembled{Root: root, Stripped: strippedPaths(fixes)}
	var diffs []digest.Digest
	for _, l := range slices.Concat(below, layers) {
		img.Blobs = append(img.Blobs, l.Blob)
		diffs = append(diffs, l.DiffID)
	}
	for _, l := range below {
		img.Facts.Base.Layers = append(img.Facts.Base.Layers, l.Facts)
	}
	for _, l := range layers {
		img.Facts.Layers = append(img.Facts.Layers, l.Facts)
	}
	config, err := b.config(t, layers, diffs, fixes)
	if err != nil {
		return nil, err
	}
	if img.Facts.Config, err = b.configFacts(ctx, t, config, root); err != nil {
		return nil, err
	}
	if err := b.writeManifest(img, t, config); err != nil {
		return nil, err
	}
	return img, b.store.SetFact(key, img, b.imageSubjects(img)...)
}

// writeManifest makes an image of its layers and its config.
func (b *build) writeManifest(img *assembled, t plan.Target, config []byte) error {
	platform := &ocispec.Platform{OS: t.Platform.OS, Architecture: t.Platform.Architecture, Variant: t.Platform.Variant}
	if b.NoImage {
		img.Blobs, img.Manifest.Platform = nil, platform
		return nil
	}
	manifest := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Annotations: b.annotations(OnManifest, t.Platform),
		Layers: img.Blobs,
	}
	var err error
	if manifest.Config, err = b.content.WriteBlob(ocispec.MediaTypeImageConfig, config); err != nil {
		return err
	}
	text, err := json.MarshalIndent(manifest, "", "  ")
	if err != nil {
		return err
	}
	if img.Manifest, err = b.content.WriteBlob(ocispec.MediaTypeImageManifest, text); err != nil {
		return err
	}
	img.Manifest.Platform = platform
	img.Blobs = append([]ocispec.Descriptor{manifest.Config}, manifest.Layers...)
	return nil
}

// imageSubjects are what an assembled image is made of: without one of them it has to be assembled again.
func (b *build) imageSubjects(img *assembled) []snapshot.Subject {
	about := []snapshot.Subject{snapshot.OfSnapshot(img.Root)}
	for _, d := range b.blobsOf(img) {
		about = append(about, snapshot.OfBlob(d.Digest))
	}
	return about
}

// strippedPaths are the files of all layers that lose their privileges, sorted.
func strippedPaths(fixes policy.Fixes) []string {
	all := map[string]bool{}
	for _, paths := range fixes.StripPrivilege {
		maps.Copy(all, paths)
	}
	return slices.Sorted(maps.Keys(all))
}

// baseLayers are the layers of the base, as they came and as they were found to be.
func (b *build) baseLayers(base *image.Source) ([]finishedLayer, error) {
	if base == nil {
		return nil, nil
	}
	claimed, err := diffIDs(base)
	if err != nil {
		return nil, err
	}
	var out []finishedLayer
	var chain snapshot.ID
	for i, l := range base.Manifest.Layers {
		var known baseLayer
		chain = snapshot.ChainID(chain, claimed[i])
		ok, err := b.store.Fact(baseLayerKey(l.Digest, chain), &known)
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, fmt.Errorf("what was found out about layer %s of %s is gone from the store", l.Digest, base.Name)
		}
		out = append(out, finishedLayer{
			Blob:   ocispec.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size},
			DiffID: known.DiffID,
			Facts:  known.Facts,
		})
	}
	return out, nil
}

// complete reports whether every blob of a remembered image is still there.
func (b *build) complete(img *assembled) bool {
	for _, d := range b.blobsOf(img) {
		if !b.content.Has(d) {
			return false
		}
	}
	return true
}

// blobsOf are all blobs of an assembled image.
func (b *build) blobsOf(img *assembled) []ocispec.Descriptor {
	if b.NoImage {
		return nil
	}
	return append([]ocispec.Descriptor{img.Manifest}, img.Blobs...)
}

// ourLayers lists the layers that this build adds, and the final tree: one for each step, or a single one
// when policy squashes them.
func (b *build) ourLayers(ctx context.Context, steps []plan.Step, t plan.Target, in inputs, fixes policy.Fixes) ([]ourLayer, snapshot.ID, error) {
	var ours []ourLayer
	var ids []snapshot.ID
	for _, r := range t.Layers {
		id, err := b.snapshotOf(ctx, in.of(r))
		if err != nil {
			return nil, "", err
		}
		ours = append(ours, ourLayer{id: id, of: []snapshot.ID{id}, step: steps[r]})
		ids = append(ids, id)
	}
	root, err := b.snapshotOf(ctx, in.of(t.Result))
	if err != nil {
		return nil, "", err
	}
	if !fixes.Squash || len(ours) == 0 {
		return ours, root, nil
	}
	base := in.of(t.Base).id
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
		if err := b.store.SetFact(createdKey(squashed), created, snapshot.OfSnapshot(squashed)); err != nil {
			return nil, "", err
		}
	}
	return []ourLayer{{id: squashed, of: ids, step: ours[len(ours)-1].step}}, squashed, nil
}

// imageKey is the cause of an assembled image.
func (b *build) imageKey(t plan.Target, base *image.Source, ours []ourLayer, root snapshot.ID, fixes policy.Fixes) snapshot.Key {
	kind := "image"
	if b.NoImage {
		kind = "examined image"
	}
	k := newKey(kind).str(policy.ScannerVersion).bytes(t.Config).str(string(root)).value(b.epoch()).value(fixes).value(t.Platform).value(t.HistoryLines).value(b.annotations(OnManifest, t.Platform))
	if base != nil {
		k = k.str(base.Descriptor.Digest.String()) // equal trees may be compressed differently
	}
	for _, l := range ours {
		k = k.str(string(l.id)).value(l.step.Where.Lines).str(l.step.Name)
	}
	return k.str(b.Compression.String()).value(b.ForceCompression).value(b.examines()).str(b.scanKey).sum()
}

// configFacts are the facts of the config that policy judges. What its user means is read from the final tree's
// own passwd, because that is what a runtime will do.
func (b *build) configFacts(ctx context.Context, t plan.Target, config []byte, root snapshot.ID) (policy.ConfigFacts, error) {
	view, err := b.store.View(ctx, root)
	if err != nil {
		return policy.ConfigFacts{}, err
	}
	defer view.Close()
	passwd, err := account.Passwd(view.Dir())
	if err != nil {
		return policy.ConfigFacts{}, err
	}
	return policy.ScanConfig(config, policy.ConfigOptions{Base: t.BaseConfig, Passwd: passwd, Secrets: b.scan.Secrets, Lines: t.HistoryLines})
}
