package builder

import (
	"encoding/json"
	"testing"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cooper-build/cooper/builder/image"
)

func TestAnIndexIsAskedForEachPlatform(t *testing.T) {
	dir := t.TempDir()
	layout, err := image.CreateLayout(dir)
	if err != nil {
		t.Fatal(err)
	}
	write := func(mediaType string, v any) ocispec.Descriptor {
		t.Helper()
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		d, err := layout.WriteBlob(mediaType, text)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	wanted := map[string]ocispec.Descriptor{}
	for _, arch := range []string{"amd64", "arm64"} {
		p := ocispec.Platform{OS: "linux", Architecture: arch}
		m := write(ocispec.MediaTypeImageManifest, ocispec.Manifest{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{},
			Config: write(ocispec.MediaTypeImageConfig, ocispec.Image{Platform: p, RootFS: ocispec.RootFS{Type: "layers"}}),
		})
		m.Platform = &p
		wanted[arch] = m
		index.Manifests = append(index.Manifests, m)
	}
	if err := layout.Tag("latest", write(ocispec.MediaTypeImageIndex, index)); err != nil {
		t.Fatal(err)
	}
	b := &build{client: image.NewClient(image.ClientOptions{Layouts: map[string]string{"base": dir + ":latest"}})}
	for _, arch := range []string{"amd64", "arm64", "amd64"} {
		got, _, err := b.ResolveImage(t.Context(), "oci-layout://base", ocispec.Platform{OS: "linux", Architecture: arch})
		if err != nil {
			t.Fatal(err)
		}
		if want := wanted[arch].Digest; got != want {
			t.Errorf("image for %s is %s, want %s: a stage stands on another machine's image", arch, got, want)
		}
	}
}
