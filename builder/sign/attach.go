package sign

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"
)

// Blobs is where [Attach] leaves what it makes.
type Blobs interface {
	// WriteBlob stores the bytes and returns their descriptor.
	WriteBlob(mediaType string, b []byte) (ocispec.Descriptor, error)
}

// Artifact is a manifest that belongs to an image.
type Artifact struct {
	Descriptor ocispec.Descriptor // with the artifact type and annotations that a list of referrers shows
	Tag        string             // the tag under which cosign looks for it; empty for a referrer
	Referrer   bool               // its manifest names the image as subject
}

// SignatureTag is the tag under which cosign and containers/image look for the signatures of a manifest.
func SignatureTag(d digest.Digest) string {
	return d.Algorithm().String() + "-" + d.Encoded() + ".sig"
}

// Attach signs an image and the verdict on it: a simple signature for each name, a bundle that says the image is
// signed, and a bundle with the verdict. A verdict that did not pass is not signed. The names are complete
// references with their tags, the epoch is the only time that is written. A nil error means that the blobs hold
// everything the returned manifests refer to.
func Attach(ctx context.Context, s Signer, b Blobs, image ocispec.Descriptor, names []string, v Verdict, epoch time.Time) ([]Artifact, error) {
	if err := checkAttach(image, v); err != nil {
		return nil, fmt.Errorf("sign %s: %w", image.Digest, err)
	}
	a := attacher{signer: s, blobs: b, image: image, created: epoch.UTC()}
	var all []Artifact
	for _, write := range []func(context.Context) (Artifact, error){
		func(ctx context.Context) (Artifact, error) { return a.simple(ctx, names) },
		func(ctx context.Context) (Artifact, error) { return a.bundle(ctx, predicateSign, struct{}{}) },
		func(ctx context.Context) (Artifact, error) {
			return a.bundle(ctx, predicateVerdict, newSummary(image.Digest, names, v, epoch))
		},
	} {
		made, err := write(ctx)
		if err != nil {
			return nil, fmt.Errorf("sign %s: %w", image.Digest, err)
		}
		all = append(all, made)
	}
	return all, nil
}

func checkAttach(image ocispec.Descriptor, v Verdict) error {
	if err := checkDigest(image.Digest); err != nil {
		return err
	}
	if image.MediaType == "" || image.Size <= 0 {
		return errors.New("incomplete descriptor")
	}
	if !v.Passed {
		return errors.New("policy did not pass it")
	}
	if err := checkDigest(v.PolicyDigest); err != nil {
		return fmt.Errorf("digest of the policy: %w", err)
	}
	return nil
}

// checkDigest accepts what all readers of signatures accept.
func checkDigest(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return err
	}
	if d.Algorithm() != digest.SHA256 {
		return fmt.Errorf("%s is not SHA-256", d)
	}
	return nil
}

// attacher is the state of one Attach.
type attacher struct {
	signer  Signer
	blobs   Blobs
	image   ocispec.Descriptor
	created time.Time
}

// simple writes the manifest of simple signatures, one layer for each name: containers/image accepts a signature
// only for the very name that it pulls.
func (a attacher) simple(ctx context.Context, names []string) (Artifact, error) {
	names = slices.Compact(slices.Sorted(slices.Values(names)))
	if len(names) == 0 {
		names = []string{""}
	}
	var layers []ocispec.Descriptor
	for _, name := range names {
		text, err := newPayload(a.image.Digest, name)
		if err != nil {
			return Artifact{}, err
		}
		signature, err := a.signer.Sign(ctx, text)
		if err != nil {
			return Artifact{}, err
		}
		d, err := a.blobs.WriteBlob(mediaTypeSimpleSigning, text)
		if err != nil {
			return Artifact{}, err
		}
		layers = append(layers, ocispec.Descriptor{
			MediaType: mediaTypeSimpleSigning, Digest: d.Digest, Size: d.Size,
			Annotations: map[string]string{annotationSignature: base64.StdEncoding.EncodeToString(signature)},
		})
	}
	config, err := a.config(layers)
	if err != nil {
		return Artifact{}, err
	}
	d, err := a.manifest(ocispec.Manifest{Config: config, Layers: layers})
	return Artifact{Descriptor: d, Tag: SignatureTag(a.image.Digest)}, err
}

// config writes the image config that a manifest of simple signatures has: registries check that there is one.
func (a attacher) config(layers []ocispec.Descriptor) (ocispec.Descriptor, error) {
	img := ocispec.Image{Created: &a.created, RootFS: ocispec.RootFS{Type: "layers"}}
	for _, l := range layers {
		img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, l.Digest)
		img.History = append(img.History, ocispec.History{Created: &a.created, CreatedBy: creator})
	}
	text, err := json.Marshal(img)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d, err := a.blobs.WriteBlob(ocispec.MediaTypeImageConfig, text)
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: d.Digest, Size: d.Size}, err
}

// bundle writes a signed statement about the image as a referrer.
func (a attacher) bundle(ctx context.Context, predicateType string, predicate any) (Artifact, error) {
	body, err := newStatement(a.image.Digest, predicateType, predicate)
	if err != nil {
		return Artifact{}, err
	}
	envelopes, err := dsse.NewEnvelopeSigner(dsseKey{a.signer})
	if err != nil {
		return Artifact{}, err
	}
	envelope, err := envelopes.SignPayload(ctx, payloadTypeInToto, body)
	if err != nil {
		return Artifact{}, err
	}
	doc := bundle{MediaType: mediaTypeBundle, DSSEEnvelope: envelope}
	if doc.VerificationMaterial.PublicKey.Hint, err = keyHint(a.signer.Public()); err != nil {
		return Artifact{}, err
	}
	text, err := json.Marshal(doc)
	if err != nil {
		return Artifact{}, err
	}
	layer, err := a.blobs.WriteBlob(mediaTypeBundle, text)
	if err != nil {
		return Artifact{}, err
	}
	empty, err := a.blobs.WriteBlob(ocispec.MediaTypeEmptyJSON, []byte("{}"))
	if err != nil {
		return Artifact{}, err
	}
	annotations := map[string]string{
		annotationContent:         "dsse-envelope",
		annotationPredicateType:   predicateType,
		ocispec.AnnotationCreated: a.created.Format(time.RFC3339),
	}
	d, err := a.manifest(ocispec.Manifest{
		ArtifactType: mediaTypeBundle,
		Config:       ocispec.Descriptor{MediaType: ocispec.MediaTypeEmptyJSON, Digest: empty.Digest, Size: empty.Size},
		Layers:       []ocispec.Descriptor{{MediaType: mediaTypeBundle, Digest: layer.Digest, Size: layer.Size}},
		Subject:      &ocispec.Descriptor{MediaType: a.image.MediaType, Digest: a.image.Digest, Size: a.image.Size},
		Annotations:  annotations,
	})
	d.ArtifactType, d.Annotations = mediaTypeBundle, annotations
	return Artifact{Descriptor: d, Referrer: true}, err
}

func (a attacher) manifest(m ocispec.Manifest) (ocispec.Descriptor, error) {
	m.Versioned = specs.Versioned{SchemaVersion: 2}
	m.MediaType = ocispec.MediaTypeImageManifest
	text, err := json.Marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d, err := a.blobs.WriteBlob(ocispec.MediaTypeImageManifest, text)
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: d.Digest, Size: d.Size}, err
}

// dsseKey is a Signer as the dsse package wants it. Bundles name their key in the hint, not in the envelope.
type dsseKey struct{ Signer }

func (dsseKey) KeyID() (string, error) { return "", nil }
