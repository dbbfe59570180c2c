package sign

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"
)

const (
	maxCandidates = 100     // signatures and attestations that are looked at, each of the two kinds
	maxDocument   = 8 << 20 // bytes of one of them
	maxManifest   = 8 << 20
	maxBlobs      = 10_000
	maxDepth      = 4 // of indexes in indexes
)

// Source is one repository, in a registry or an OCI layout, as far as [Verify] reads it.
type Source interface {
	// Resolve returns what a tag means.
	Resolve(ctx context.Context, tag string) (ocispec.Descriptor, error)
	// ReadManifest returns a manifest or an index.
	ReadManifest(ctx context.Context, d ocispec.Descriptor) ([]byte, error)
	// Open returns the bytes of a blob.
	Open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error)
	// Referrers lists the manifests whose subject is d.
	Referrers(ctx context.Context, d digest.Digest) ([]ocispec.Descriptor, error)
}

// Evidence is an artifact that satisfied a demand.
type Evidence struct {
	Kind      string        `json:"kind"`                // simple signature, signature bundle or verdict bundle
	Manifest  digest.Digest `json:"manifest"`            // of the artifact
	Reference string        `json:"reference,omitempty"` // the name that a simple signature is for
}

// Rejection is an artifact that satisfied nothing, and why.
type Rejection struct {
	Artifact string `json:"artifact"`
	Reason   string `json:"reason"`
}

// Report says which artifact satisfied what.
type Report struct {
	Image      ocispec.Descriptor `json:"image"`
	Signatures []Evidence         `json:"signatures"`
	Verdicts   []Evidence         `json:"verdicts"`
	Verdict    Verdict            `json:"verdict"` // what the first of Verdicts says
	Rejected   []Rejection        `json:"rejected,omitempty"`
	Blobs      int                `json:"blobs"` // of the image, manifests included, whose digest was checked
	Bytes      int64              `json:"bytes"`
}

// Verify checks an image: that the key signed its digest, that the key signed the verdict of a policy that it
// passes, and that every blob of it is what its digest says. A nil error means all three. The report is filled as
// far as verification came, also when it failed. "Signed" and "approved" are separate demands: no attestation
// stands in for a signature. What others attached counts for nothing and harms nothing, but an attached artifact
// of ours that is damaged fails the image: somebody changed what we wrote.
func Verify(ctx context.Context, key *ecdsa.PublicKey, image ocispec.Descriptor, src Source) (Report, error) {
	v := verifier{key: key, src: src, report: Report{Image: image}, seen: make(map[blob]bool)}
	if err := checkDigest(image.Digest); err != nil {
		return v.report, fmt.Errorf("verify: %w", err)
	}
	v.simple(ctx)
	listErr := v.bundles(ctx)
	problems := v.damaged
	if listErr != nil {
		problems = append(problems, listErr)
	}
	if len(v.report.Signatures) == 0 {
		problems = append(problems, errors.New("no signature by this key"+v.reasons()))
	}
	switch {
	case v.failed:
		problems = append(problems, errors.New("a signed verdict says that policy did not pass it"))
	case len(v.report.Verdicts) == 0:
		problems = append(problems, errors.New("no verdict of a policy signed by this key"+v.reasons()))
	}
	if err := v.image(ctx, image, 0); err != nil {
		problems = append(problems, err)
	}
	if len(problems) > 0 {
		return v.report, &Error{Image: image.Digest, Problems: problems}
	}
	return v.report, nil
}

// Error lists everything for which an image does not verify.
type Error struct {
	Image    digest.Digest
	Problems []error
}

func (e *Error) Error() string {
	var text []string
	for _, p := range e.Problems {
		text = append(text, p.Error())
	}
	return fmt.Sprintf("verify %s: %s", e.Image, strings.Join(text, "; "))
}

// Unwrap returns the problems.
func (e *Error) Unwrap() []error { return e.Problems }

// verifier is the state of one Verify.
type verifier struct {
	key    *ecdsa.PublicKey
	src    Source
	report Report
	failed bool // a verdict of ours is signed and is not a pass
	seen   map[blob]bool

	damaged []error // artifacts whose bytes could not be had as their digests promise
}

// damage is the error for bytes that are not there or not what their digest says.
type damage struct{ error }

func (d damage) Unwrap() error { return d.error }

// blob is what a descriptor claims; the same digest with another size or type is another claim.
type blob struct {
	digest    digest.Digest
	size      int64
	mediaType string
}

// reasons adds why what was there did not count. It stays one line; the report has all of them.
func (v *verifier) reasons() string {
	switch n := len(v.report.Rejected); n {
	case 0:
		return ""
	case 1:
		return fmt.Sprintf(" (%s: %s)", v.report.Rejected[0].Artifact, v.report.Rejected[0].Reason)
	default:
		return fmt.Sprintf(" (%s: %s; and %d more)", v.report.Rejected[0].Artifact, v.report.Rejected[0].Reason, n-1)
	}
}

func (v *verifier) reject(artifact string, err error) {
	if d := (damage{}); errors.As(err, &d) {
		v.damaged = append(v.damaged, fmt.Errorf("%s: %w", artifact, err))
	}
	v.report.Rejected = append(v.report.Rejected, Rejection{artifact, err.Error()})
}

// simple looks at the simple signatures.
func (v *verifier) simple(ctx context.Context) {
	tag := SignatureTag(v.report.Image.Digest)
	d, err := v.src.Resolve(ctx, tag)
	if err != nil {
		v.reject(tag, err)
		return
	}
	m, err := v.manifest(ctx, d)
	if err != nil {
		v.reject(tag, err)
		return
	}
	if err := v.config(ctx, m); err != nil {
		v.reject(tag, err)
	}
	for i, l := range m.Layers {
		name := fmt.Sprintf("%s layer %d", tag, i)
		if i == maxCandidates {
			v.reject(name, fmt.Errorf("only the first %d signatures are looked at", maxCandidates))
			return
		}
		reference, err := v.simpleLayer(ctx, l)
		if err != nil {
			v.reject(name, err)
			continue
		}
		v.report.Signatures = append(v.report.Signatures, Evidence{"simple signature", d.Digest, reference})
	}
}

func (v *verifier) simpleLayer(ctx context.Context, l ocispec.Descriptor) (reference string, err error) {
	text, err := v.document(ctx, l)
	if err != nil {
		return "", err
	}
	if l.MediaType != mediaTypeSimpleSigning {
		return "", fmt.Errorf("media type %q is no simple signature", l.MediaType)
	}
	signature, err := base64.StdEncoding.DecodeString(l.Annotations[annotationSignature])
	if err != nil {
		return "", fmt.Errorf("signature: %w", err)
	}
	if err := verifySignature(v.key, text, signature); err != nil {
		return "", err
	}
	var p payload
	if err := json.Unmarshal(text, &p); err != nil {
		return "", fmt.Errorf("payload: %w", err)
	}
	if p.Critical.Type != simpleSigningType {
		return "", fmt.Errorf("type %q is no image signature", p.Critical.Type)
	}
	if got := p.Critical.Image.DockerManifestDigest; got != v.report.Image.Digest {
		return "", fmt.Errorf("signed for another image, %s", got)
	}
	return p.Critical.Identity.DockerReference, nil
}

// bundles looks at the referrers. Its error means that there is no knowing what they are.
func (v *verifier) bundles(ctx context.Context) error {
	referrers, err := v.src.Referrers(ctx, v.report.Image.Digest)
	if err != nil {
		return fmt.Errorf("list referrers: %w", err)
	}
	for i, d := range referrers {
		name := "referrer " + d.Digest.String()
		if i == maxCandidates {
			v.reject(name, fmt.Errorf("only the first %d of %d referrers are looked at", maxCandidates, len(referrers)))
			return nil
		}
		if err := v.bundle(ctx, d); err != nil {
			v.reject(name, err)
		}
	}
	return nil
}

// bundle checks one referrer and records what it satisfies. The list's artifact type is not used to sort out
// candidates, because registries disagree about it; the manifest's own is.
func (v *verifier) bundle(ctx context.Context, d ocispec.Descriptor) error {
	m, err := v.manifest(ctx, d)
	if err != nil {
		return err
	}
	if m.ArtifactType != mediaTypeBundle || len(m.Layers) != 1 || m.Layers[0].MediaType != mediaTypeBundle {
		return fmt.Errorf("artifact type %q with %d layers is no signature bundle", m.ArtifactType, len(m.Layers))
	}
	if m.Subject == nil || m.Subject.Digest != v.report.Image.Digest {
		return errors.New("its subject is another image")
	}
	if err := v.config(ctx, m); err != nil {
		return err
	}
	text, err := v.document(ctx, m.Layers[0])
	if err != nil {
		return err
	}
	st, err := v.openBundle(ctx, text)
	if err != nil {
		return err
	}
	switch st.PredicateType {
	case predicateSign:
		v.report.Signatures = append(v.report.Signatures, Evidence{Kind: "signature bundle", Manifest: d.Digest})
	case predicateVerdict:
		return v.verdict(d, st)
	default:
		return fmt.Errorf("signed, but predicate type %q is neither a signature nor a verdict", st.PredicateType)
	}
	return nil
}

// openBundle returns the statement of a bundle that the key signed for the image.
func (v *verifier) openBundle(ctx context.Context, text []byte) (statement, error) {
	var b bundle
	if err := json.Unmarshal(text, &b); err != nil {
		return statement{}, fmt.Errorf("bundle: %w", err)
	}
	switch {
	case b.MediaType != mediaTypeBundle:
		return statement{}, fmt.Errorf("bundle of type %q", b.MediaType)
	case b.DSSEEnvelope == nil:
		return statement{}, errors.New("bundle without an envelope")
	case len(b.DSSEEnvelope.Signatures) != 1:
		return statement{}, fmt.Errorf("envelope with %d signatures, not one", len(b.DSSEEnvelope.Signatures))
	case b.DSSEEnvelope.PayloadType != payloadTypeInToto:
		return statement{}, fmt.Errorf("payload type %q is no in-toto statement", b.DSSEEnvelope.PayloadType)
	}
	envelopes, err := dsse.NewEnvelopeVerifier(dssePublic{v.key})
	if err != nil {
		return statement{}, err
	}
	_, body, err := envelopes.VerifyAndDecode(ctx, b.DSSEEnvelope)
	if err != nil {
		return statement{}, fmt.Errorf("not signed by this key: %w", err)
	}
	var st statement
	if err := json.Unmarshal(body, &st); err != nil {
		return statement{}, fmt.Errorf("statement: %w", err)
	}
	if st.Type != statementType {
		return statement{}, fmt.Errorf("statement of type %q", st.Type)
	}
	if !st.about(v.report.Image.Digest) {
		return statement{}, errors.New("signed for another image")
	}
	return st, nil
}

func (s statement) about(d digest.Digest) bool {
	return len(s.Subject) == 1 && s.Subject[0].Digest[d.Algorithm().String()] == d.Encoded()
}

func (v *verifier) verdict(d ocispec.Descriptor, st statement) error {
	var s summary
	if err := json.Unmarshal(st.Predicate, &s); err != nil {
		return fmt.Errorf("verdict: %w", err)
	}
	if s.Verifier.ID != verifierID {
		return fmt.Errorf("signed, but a verdict of another verifier, %q", s.Verifier.ID)
	}
	verdict, err := s.verdict()
	if err != nil {
		return fmt.Errorf("verdict: %w", err)
	}
	if !verdict.Passed {
		v.failed = true
		return fmt.Errorf("the verdict is %q", s.VerificationResult)
	}
	if len(v.report.Verdicts) == 0 {
		v.report.Verdict = verdict
	}
	v.report.Verdicts = append(v.report.Verdicts, Evidence{Kind: "verdict bundle", Manifest: d.Digest})
	return nil
}

// manifest reads an artifact's manifest.
func (v *verifier) manifest(ctx context.Context, d ocispec.Descriptor) (ocispec.Manifest, error) {
	var m ocispec.Manifest
	if d.MediaType != ocispec.MediaTypeImageManifest {
		return m, fmt.Errorf("media type %q is no image manifest", d.MediaType)
	}
	text, err := v.readManifest(ctx, d)
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("manifest: %w", err)
	}
	return m, nil
}

// config checks the config of an artifact, which nobody reads.
func (v *verifier) config(ctx context.Context, m ocispec.Manifest) error {
	_, err := v.document(ctx, m.Config)
	return err
}

// readManifest does not trust the source with the digest: what verifies is the place to check it.
func (v *verifier) readManifest(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if err := checkSize(d, maxManifest); err != nil {
		return nil, err
	}
	text, err := v.src.ReadManifest(ctx, d)
	if err != nil {
		return nil, damage{fmt.Errorf("manifest %s: %w", d.Digest, err)}
	}
	if int64(len(text)) != d.Size || digest.FromBytes(text) != d.Digest {
		return nil, damage{fmt.Errorf("manifest %s: content does not match its digest", d.Digest)}
	}
	return text, nil
}

// document reads a signed document.
func (v *verifier) document(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if err := checkSize(d, maxDocument); err != nil {
		return nil, err
	}
	var text strings.Builder
	if err := v.read(ctx, d, &text); err != nil {
		return nil, err
	}
	return []byte(text.String()), nil
}

func checkSize(d ocispec.Descriptor, most int64) error {
	if err := checkDigest(d.Digest); err != nil {
		return err
	}
	if d.Size <= 0 || d.Size > most {
		return fmt.Errorf("%s has %d bytes, more than %d or none", d.Digest, d.Size, most)
	}
	return nil
}

// read copies a blob and checks its size and digest.
func (v *verifier) read(ctx context.Context, d ocispec.Descriptor, w io.Writer) error {
	if err := checkDigest(d.Digest); err != nil {
		return err
	}
	if err := v.copy(ctx, d, w); err != nil {
		return damage{fmt.Errorf("blob %s: %w", d.Digest, err)}
	}
	return nil
}

func (v *verifier) copy(ctx context.Context, d ocispec.Descriptor, w io.Writer) (err error) {
	r, err := v.src.Open(ctx, d)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(w, sum), io.LimitReader(r, d.Size+1))
	if err != nil {
		return err
	}
	if n != d.Size || digest.NewDigest(digest.SHA256, sum) != d.Digest {
		return errors.New("content does not match its digest")
	}
	return nil
}

// image checks every blob that the descriptor leads to.
func (v *verifier) image(ctx context.Context, d ocispec.Descriptor, depth int) error {
	claim := blob{d.Digest, d.Size, d.MediaType}
	if v.seen[claim] {
		return nil
	}
	if depth > maxDepth || len(v.seen) >= maxBlobs {
		return errors.New("the image is nested too deeply or has too many blobs")
	}
	v.seen[claim] = true
	children, err := v.children(ctx, d)
	if err != nil {
		return err
	}
	v.report.Blobs++
	v.report.Bytes += d.Size
	for _, c := range children {
		if err := v.image(ctx, c, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// children checks one blob and returns what it refers to.
func (v *verifier) children(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	switch d.MediaType {
	case ocispec.MediaTypeImageManifest, "application/vnd.docker.distribution.manifest.v2+json",
		ocispec.MediaTypeImageIndex, "application/vnd.docker.distribution.manifest.list.v2+json":
	default:
		return nil, v.read(ctx, d, io.Discard)
	}
	text, err := v.readManifest(ctx, d)
	if err != nil {
		return nil, err
	}
	var m struct {
		MediaType string               `json:"mediaType"`
		Config    *ocispec.Descriptor  `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	if m.MediaType != "" && m.MediaType != d.MediaType || m.Manifests != nil && (m.Config != nil || m.Layers != nil) {
		// CVE-2021-41190: bytes that are one thing for us and another for who runs the image.
		return nil, fmt.Errorf("manifest %s is ambiguous: manifest and index, or not of the type %s", d.Digest, d.MediaType)
	}
	if m.Config != nil {
		return append([]ocispec.Descriptor{*m.Config}, m.Layers...), nil
	}
	return m.Manifests, nil
}

func verifySignature(key *ecdsa.PublicKey, message, signature []byte) error {
	sum := sha256.Sum256(message)
	if !ecdsa.VerifyASN1(key, sum[:], signature) {
		return errors.New("not signed by this key")
	}
	return nil
}

// dssePublic is a public key as the dsse package wants it.
type dssePublic struct{ key *ecdsa.PublicKey }

func (d dssePublic) Verify(_ context.Context, message, signature []byte) error {
	return verifySignature(d.key, message, signature)
}

func (dssePublic) KeyID() (string, error)     { return "", nil }
func (d dssePublic) Public() crypto.PublicKey { return d.key }
