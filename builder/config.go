package builder

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/policy"
)

// config completes the frontend's image config as BuildKit's exporter does: diff ids, creation times clamped
// to the epoch, and one history entry for each layer.
func (b *build) config(t plan.Target, layers []finishedLayer, diffs []digest.Digest, fixes policy.Fixes) ([]byte, error) {
	fields := map[string]json.RawMessage{}
	if err := json.Unmarshal(t.Config, &fields); err != nil {
		return nil, fmt.Errorf("image config: %w", err)
	}
	var typed, base ocispec.Image
	if err := json.Unmarshal(t.Config, &typed); err != nil {
		return nil, fmt.Errorf("image config: %w", err)
	}
	if len(t.BaseConfig) > 0 {
		if err := json.Unmarshal(t.BaseConfig, &base); err != nil {
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
func history(h, base []ocispec.History, baseLayers int, ours []finishedLayer, squashed bool) []ocispec.History {
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
