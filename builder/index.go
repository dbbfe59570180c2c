package builder

import (
	"encoding/json"
	"maps"

	"github.com/containerd/platforms"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cooper-build/cooper/builder/plan"
)

// An Annotation is a key and a value on a manifest, an index, or the descriptor with which an index lists one.
type Annotation struct {
	On         AnnotationPlace
	Platform   *ocispec.Platform // of a manifest or its descriptor; nil is every one
	Key, Value string
}

// AnnotationPlace says what an annotation is on.
type AnnotationPlace int

// The places that docker buildx build --annotation knows.
const (
	OnManifest AnnotationPlace = iota
	OnIndex
	OnManifestDescriptor
	OnIndexDescriptor
)

// annotations are those on one thing; nil when there are none.
func (b *build) annotations(on AnnotationPlace, p ocispec.Platform) map[string]string {
	var out map[string]string
	for _, a := range b.Annotations {
		if a.On == on && (a.Platform == nil || platforms.Only(*a.Platform).Match(p)) {
			if out == nil {
				out = map[string]string{}
			}
			out[a.Key] = a.Value
		}
	}
	return out
}

// combine makes the index of the images, or leaves a single one as it is.
func (b *build) combine(g *plan.Graph, images []*assembled) (*finished, error) {
	f := &finished{Targets: images, Index: g.Index}
	if !g.Index {
		f.Image = images[0].Manifest
		f.Image.Annotations = merged(f.Image.Annotations, b.annotations(OnManifestDescriptor, g.Targets[0].Platform))
		return f, nil
	}
	index := ocispec.Index{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   ocispec.MediaTypeImageIndex,
		Annotations: b.annotations(OnIndex, ocispec.Platform{}),
	}
	for i, img := range images {
		d := img.Manifest
		d.Annotations = merged(d.Annotations, b.annotations(OnManifestDescriptor, g.Targets[i].Platform))
		index.Manifests = append(index.Manifests, d)
	}
	text, err := json.MarshalIndent(index, "", "  ")
	if err != nil {
		return nil, err
	}
	f.Image, err = b.content.WriteBlob(ocispec.MediaTypeImageIndex, text)
	f.Image.Annotations = merged(f.Image.Annotations, b.annotations(OnIndexDescriptor, ocispec.Platform{}))
	return f, err
}

func merged(a, b map[string]string) map[string]string {
	if len(b) == 0 {
		return a
	}
	out := maps.Clone(a)
	if out == nil {
		out = map[string]string{}
	}
	maps.Copy(out, b)
	return out
}
