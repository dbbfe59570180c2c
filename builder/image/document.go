package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The media types of Docker's image format, schema 2, which registries still serve.
const (
	dockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	dockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig       = "application/vnd.docker.container.image.v1+json"
	dockerLayer        = "application/vnd.docker.image.rootfs.diff.tar"
	dockerForeignLayer = "application/vnd.docker.image.rootfs.foreign.diff.tar"
	dockerSchema1      = "application/vnd.docker.distribution.manifest.v1"
)

func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == dockerManifestList
}

func isManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == dockerManifest
}

// classify says which kind of manifest a document is, and refuses one that another reader might take for
// another kind (CVE-2021-41190): with the fields of both, with a field twice, or with a media type that is
// not what its content, its descriptor or its server say. Claims are what the latter two said; empty and
// unspecific ones do not count.
func classify(b []byte, claims ...string) (string, error) {
	fields, err := topLevel(b)
	if err != nil {
		return "", err
	}
	_, config := fields["config"]
	_, layers := fields["layers"]
	_, manifests := fields["manifests"]
	_, fsLayers := fields["fslayers"]
	switch {
	case fsLayers:
		return "", errors.New("is a Docker image of schema 1, a format nobody should use any more")
	case manifests && (config || layers):
		return "", errors.New("is both a manifest and an index")
	case !manifests && !(config && layers):
		return "", errors.New("is neither an image manifest nor an image index")
	}
	var stated string
	if raw, ok := fields["mediatype"]; ok {
		if err := json.Unmarshal(raw, &stated); err != nil {
			return "", fmt.Errorf("mediaType: %w", err)
		}
	}
	mediaType := stated
	for _, claim := range claims {
		claim, _, _ = strings.Cut(claim, ";")
		claim = strings.TrimSpace(claim)
		if !isIndex(claim) && !isManifest(claim) && !strings.HasPrefix(claim, dockerSchema1) {
			continue
		}
		if mediaType == "" {
			mediaType = claim
		}
		if claim != mediaType {
			return "", fmt.Errorf("says it is %.100q, but was announced as %.100q", mediaType, claim)
		}
	}
	switch {
	case mediaType == "" && manifests:
		return ocispec.MediaTypeImageIndex, nil
	case mediaType == "":
		return ocispec.MediaTypeImageManifest, nil
	case manifests && isIndex(mediaType), !manifests && isManifest(mediaType):
		return mediaType, nil
	}
	return "", fmt.Errorf("its content does not fit its media type %.100q", mediaType)
}

// topLevel returns the fields of a JSON object by lower-case name. Readers differ in which of two equal
// names wins and whether case matters, so names that differ in case only are refused.
func topLevel(b []byte) (map[string]json.RawMessage, error) {
	dec := json.NewDecoder(bytes.NewReader(b))
	t, err := dec.Token()
	if err != nil {
		return nil, fmt.Errorf("is not JSON: %w", err)
	}
	if t != json.Delim('{') {
		return nil, errors.New("is not a JSON object")
	}
	fields := map[string]json.RawMessage{}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return nil, fmt.Errorf("is not JSON: %w", err)
		}
		name := strings.ToLower(t.(string))
		if strings.ContainsFunc(name, func(r rune) bool { return r > unicode.MaxASCII }) {
			// encoding/json takes U+017F for an s and the Kelvin sign for a k.
			return nil, fmt.Errorf("has the field %.100q, which some take for another", name)
		}
		if _, twice := fields[name]; twice {
			return nil, fmt.Errorf("has the field %.100q twice", name)
		}
		var v json.RawMessage
		if err := dec.Decode(&v); err != nil {
			return nil, fmt.Errorf("is not JSON: %w", err)
		}
		fields[name] = v
	}
	if !json.Valid(b) {
		return nil, errors.New("is not JSON: something follows the object")
	}
	return fields, nil
}

func parseIndex(b []byte, claims ...string) (*ocispec.Index, error) {
	mediaType, err := classify(b, claims...)
	if err != nil {
		return nil, err
	}
	if !isIndex(mediaType) {
		return nil, errors.New("is an image manifest where an index is expected")
	}
	var idx ocispec.Index
	if err := json.Unmarshal(b, &idx); err != nil {
		return nil, err
	}
	if idx.SchemaVersion != 2 {
		return nil, fmt.Errorf("schema version %d is not 2", idx.SchemaVersion)
	}
	for _, d := range idx.Manifests {
		if err := checkDescriptor(d); err != nil {
			return nil, err
		}
	}
	return &idx, nil
}

func parseManifest(b []byte, claims ...string) (*ocispec.Manifest, error) {
	mediaType, err := classify(b, claims...)
	if err != nil {
		return nil, err
	}
	if !isManifest(mediaType) {
		return nil, errors.New("is an index where an image manifest is expected")
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, err
	}
	if m.SchemaVersion != 2 {
		return nil, fmt.Errorf("schema version %d is not 2", m.SchemaVersion)
	}
	m.MediaType = mediaType
	for _, d := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		if err := checkDescriptor(d); err != nil {
			return nil, err
		}
	}
	if m.Subject != nil {
		if err := checkDescriptor(*m.Subject); err != nil {
			return nil, err
		}
	}
	return &m, nil
}

// A ForeignLayerError refuses a layer that is to be fetched from another place than the image.
type ForeignLayerError struct{ Layer ocispec.Descriptor }

func (e *ForeignLayerError) Error() string {
	if len(e.Layer.URLs) > 0 {
		return fmt.Sprintf("layer %s lies elsewhere (%.100q): such foreign layers are not supported", e.Layer.Digest, e.Layer.URLs[0])
	}
	return fmt.Sprintf("layer %s may not be distributed (%s): such foreign layers are not supported", e.Layer.Digest, e.Layer.MediaType)
}

// Hint names the next step.
func (e *ForeignLayerError) Hint() string {
	return "use a base image that carries all its layers; credentials are never sent to the URLs that an image names"
}

// normalise turns the manifest of a base image into one with OCI media types. Only descriptors change:
// Docker's layers are the same bytes under another name, and an OCI manifest may not name them its way.
func normalise(m *ocispec.Manifest) error {
	switch m.Config.MediaType {
	case dockerConfig, ocispec.MediaTypeImageConfig:
		m.Config.MediaType = ocispec.MediaTypeImageConfig
	default:
		return fmt.Errorf("is not a container image: its config is %.100q", m.Config.MediaType)
	}
	m.MediaType = ocispec.MediaTypeImageManifest
	for i := range m.Layers {
		l := &m.Layers[i]
		if len(l.URLs) > 0 || strings.HasPrefix(l.MediaType, dockerForeignLayer) || strings.Contains(l.MediaType, ".nondistributable.") {
			return &ForeignLayerError{*l}
		}
		switch l.MediaType {
		case dockerLayer:
			l.MediaType = ocispec.MediaTypeImageLayer
		case dockerLayer + ".gzip":
			l.MediaType = ocispec.MediaTypeImageLayerGzip
		case dockerLayer + ".zstd":
			l.MediaType = ocispec.MediaTypeImageLayerZstd
		case ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd:
		default:
			return fmt.Errorf("layer %s is not a file system layer but %.100q", l.Digest, l.MediaType)
		}
	}
	return nil
}
