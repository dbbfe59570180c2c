package sign

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	vsa "github.com/in-toto/attestation/go/predicates/vsa/v1"
	intoto "github.com/in-toto/attestation/go/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	"google.golang.org/protobuf/encoding/protojson"
)

// repo is a repository in memory: it writes and reads blobs and believes everything.
type repo struct {
	blobs map[digest.Digest][]byte
	tags  map[string]ocispec.Descriptor
	refs  []ocispec.Descriptor
}

func newRepo() *repo {
	return &repo{blobs: make(map[digest.Digest][]byte), tags: make(map[string]ocispec.Descriptor)}
}

func (r *repo) WriteBlob(mediaType string, b []byte) (ocispec.Descriptor, error) {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	r.blobs[d.Digest] = b
	return d, nil
}

func (r *repo) Resolve(_ context.Context, tag string) (ocispec.Descriptor, error) {
	d, ok := r.tags[tag]
	if !ok {
		return d, errors.New("not found")
	}
	return d, nil
}

func (r *repo) ReadManifest(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	b, ok := r.blobs[d.Digest]
	if !ok {
		return nil, errors.New("not found")
	}
	return b, nil
}

func (r *repo) Open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	b, err := r.ReadManifest(ctx, d)
	return io.NopCloser(bytes.NewReader(b)), err
}

func (r *repo) Referrers(context.Context, digest.Digest) ([]ocispec.Descriptor, error) {
	return r.refs, nil
}

func (r *repo) add(artifacts []Artifact) {
	for _, a := range artifacts {
		if a.Referrer {
			r.refs = append(r.refs, a.Descriptor)
		}
		if a.Tag != "" {
			r.tags[a.Tag] = a.Descriptor
		}
	}
}

func (r *repo) write(t testing.TB, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	b, ok := v.([]byte)
	if !ok {
		var err error
		if b, err = json.Marshal(v); err != nil {
			t.Fatal(err)
		}
	}
	d, err := r.WriteBlob(mediaType, b)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// image writes an image of two layers.
func (r *repo) image(t testing.TB, text string) ocispec.Descriptor {
	t.Helper()
	return r.write(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: r.write(t, ocispec.MediaTypeImageConfig, []byte(`{"comment":"`+text+`"}`)),
		Layers: []ocispec.Descriptor{
			r.write(t, ocispec.MediaTypeImageLayerGzip, []byte("one "+text)), r.write(t, ocispec.MediaTypeImageLayerGzip, []byte("two "+text)),
		},
	})
}

var (
	epoch   = time.Unix(1700000000, 0)
	verdict = Verdict{Policy: "profile default", PolicyDigest: digest.FromString("p"), Passed: true, Findings: []string{"P01 warn: runs as root"}}
	names   = []string{"reg.example/a/b:2", "reg.example/a/b:1"}
)

func newKey(t testing.TB) *Key {
	t.Helper()
	private, _, err := GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	k, err := LoadPrivate(private, nil)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func signed(t testing.TB, k *Key) (*repo, ocispec.Descriptor) {
	t.Helper()
	r := newRepo()
	d := r.image(t, "x")
	artifacts, err := Attach(t.Context(), k, r, d, names, verdict, epoch)
	if err != nil {
		t.Fatal(err)
	}
	r.add(artifacts)
	return r, d
}

func TestKeyPairSignsAndVerifiesWithAndWithoutPassphrase(t *testing.T) {
	for _, pass := range [][]byte{nil, []byte("correct horse")} {
		private, public, err := GenerateKey(pass)
		if err != nil {
			t.Fatal(err)
		}
		if sealed := bytes.Contains(private, []byte("ENCRYPTED SIGSTORE PRIVATE KEY")); sealed != (pass != nil) {
			t.Errorf("with passphrase %q the file is %s", pass, private)
		}
		k, err := LoadPrivate(private, pass)
		if err != nil {
			t.Fatal(err)
		}
		pub, err := LoadPublic(public)
		if err != nil {
			t.Fatal(err)
		}
		if text, err := k.PublicPEM(); err != nil || !bytes.Equal(text, public) {
			t.Errorf("public key is %s %v, want %s", text, err, public)
		}
		one, err := k.Sign(t.Context(), []byte("m"))
		if err != nil {
			t.Fatal(err)
		}
		if verifySignature(pub, []byte("m"), one) != nil || verifySignature(pub, []byte("n"), one) == nil {
			t.Error("a signature verifies for another message, or not for its own")
		}
		if two, err := k.Sign(t.Context(), []byte("m")); err != nil || !bytes.Equal(one, two) {
			t.Errorf("signatures differ from run to run: %x %x %v", one, two, err)
		}
		for _, format := range []string{"%v", "%+v", "%#v", "%s"} {
			if s := fmt.Sprintf(format, k); s != "private key" {
				t.Errorf("%s prints %s", format, s)
			}
		}
	}
}

func TestEncryptedKeyNeedsItsPassphrase(t *testing.T) {
	private, _, err := GenerateKey([]byte("right"))
	if err != nil {
		t.Fatal(err)
	}
	for _, pass := range []string{"", "wrong"} {
		if _, err := LoadPrivate(private, []byte(pass)); !errors.Is(err, ErrPassphrase) {
			t.Errorf("passphrase %q: %v", pass, err)
		}
	}
}

func TestKeysOfOtherKindsAreRefusedWithTheReason(t *testing.T) {
	edPublic, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	private, public, err := GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	block := func(kind string, der []byte, err error) []byte {
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	}
	pkcs8 := func(k any) []byte { der, err := x509.MarshalPKCS8PrivateKey(k); return block(pemPKCS8, der, err) }
	spki := func(k any) []byte { der, err := x509.MarshalPKIXPublicKey(k); return block(pemPublic, der, err) }
	for want, text := range map[string][]byte{
		"an Ed25519 key": pkcs8(ed), "an RSA key": pkcs8(rsaKey), "P-384": pkcs8(p384), "this is a public key": public,
		"not PEM": []byte("hello"), "encrypted as PKCS8": block("ENCRYPTED PRIVATE KEY", nil, nil), "larger than": make([]byte, maxPEM+1),
		"asn1": block(pemPKCS8, []byte{1, 2, 3}, nil), `PEM block "CERTIFICATE"`: block("CERTIFICATE", nil, nil),
	} {
		if _, err := LoadPrivate(text, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("private: got %v, want %s", err, want)
		}
	}
	for want, text := range map[string][]byte{
		"an Ed25519 key": spki(edPublic), "an RSA key": spki(&rsaKey.PublicKey), "P-384": spki(&p384.PublicKey), "is no public key": private, "not PEM": nil,
	} {
		_, err := LoadPublic(text)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("public: got %v, want %s", err, want)
		}
		var h interface{ Hint() string }
		if !errors.As(err, &h) || h.Hint() == "" {
			t.Errorf("no next step after %v", err)
		}
	}
	sec1 := newKey(t)
	der, err := x509.MarshalECPrivateKey(sec1.private)
	if k, err := LoadPrivate(block(pemSEC1, der, err), nil); err != nil || !k.Public().Equal(sec1.Public()) {
		t.Errorf("openssl's EC key: %v", err)
	}
}

func TestAttachIsReproducible(t *testing.T) {
	k := newKey(t)
	a, _ := signed(t, k)
	b, _ := signed(t, k)
	if d := cmp.Diff(slices.Sorted(maps.Keys(a.blobs)), slices.Sorted(maps.Keys(b.blobs))); d != "" {
		t.Errorf("two signings of one image differ:\n%s", d)
	}
}

func TestSimpleSignatureHasTheShapeThatOthersRead(t *testing.T) {
	r, image := signed(t, newKey(t))
	tag := "sha256-" + image.Digest.Encoded() + ".sig"
	var m ocispec.Manifest
	if err := json.Unmarshal(r.blobs[r.tags[tag].Digest], &m); err != nil {
		t.Fatalf("tag %s: %v", tag, err)
	}
	if m.MediaType != "application/vnd.oci.image.manifest.v1+json" || m.Config.MediaType != "application/vnd.oci.image.config.v1+json" || len(m.Layers) != 2 {
		t.Errorf("containers/image does not read %+v", m)
	}
	var config ocispec.Image
	if err := json.Unmarshal(r.blobs[m.Config.Digest], &config); err != nil || len(config.RootFS.DiffIDs) != len(m.Layers) {
		t.Errorf("config %+v %v", config, err)
	}
	for i, l := range m.Layers {
		want := fmt.Sprintf(`{"critical":{"identity":{"docker-reference":"reg.example/a/b:%d"},"image":{"docker-manifest-digest":"%s"},`+
			`"type":"cosign container image signature"},"optional":{"creator":"cooper"}}`, i+1, image.Digest)
		if got := string(r.blobs[l.Digest]); got != want || l.MediaType != "application/vnd.dev.cosign.simplesigning.v1+json" {
			t.Errorf("got  %s %s\nwant %s", l.MediaType, got, want)
		}
		if l.Annotations["dev.cosignproject.cosign/signature"] == "" {
			t.Errorf("no signature in %v", l.Annotations)
		}
	}
}

// The statements are made by hand; the project that owns the formats must agree that they are valid.
func TestStatementsAreValidInToto(t *testing.T) {
	r, image := signed(t, newKey(t))
	var types []string
	for _, d := range r.refs {
		var m ocispec.Manifest
		if err := json.Unmarshal(r.blobs[d.Digest], &m); err != nil {
			t.Fatal(err)
		}
		var b bundle
		if err := json.Unmarshal(r.blobs[m.Layers[0].Digest], &b); err != nil {
			t.Fatal(err)
		}
		body, err := base64.StdEncoding.DecodeString(b.DSSEEnvelope.Payload)
		if err != nil {
			t.Fatal(err)
		}
		var st intoto.Statement
		if err := protojson.Unmarshal(body, &st); err != nil {
			t.Fatalf("%s: %v", body, err)
		}
		if err := st.Validate(); err != nil || st.GetSubject()[0].GetDigest()["sha256"] != image.Digest.Encoded() {
			t.Errorf("%s: %v", body, err)
		}
		types = append(types, st.GetPredicateType())
		if m.Annotations["dev.sigstore.bundle.predicateType"] != st.GetPredicateType() || m.Annotations["dev.sigstore.bundle.content"] != "dsse-envelope" ||
			m.Annotations["org.opencontainers.image.created"] != "2023-11-14T22:13:20Z" || d.ArtifactType != "application/vnd.dev.sigstore.bundle.v0.3+json" {
			t.Errorf("cosign does not find %+v", m)
		}
		if st.GetPredicateType() != predicateVerdict {
			continue
		}
		predicate, err := protojson.Marshal(st.GetPredicate())
		if err != nil {
			t.Fatal(err)
		}
		var summary vsa.VerificationSummary
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(predicate, &summary); err != nil {
			t.Fatalf("%s: %v", predicate, err)
		}
		if summary.GetVerificationResult() != "PASSED" || !strings.Contains(string(predicate), "runs as root") {
			t.Errorf("%s", predicate)
		}
	}
	if d := cmp.Diff([]string{"https://sigstore.dev/cosign/sign/v1", "https://slsa.dev/verification_summary/v1"}, types); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestImageThatPolicyDidNotPassIsNotSigned(t *testing.T) {
	r := newRepo()
	image := r.image(t, "x")
	before := len(r.blobs)
	for name, change := range map[string]func(*Verdict, *ocispec.Descriptor){
		"denied":        func(v *Verdict, _ *ocispec.Descriptor) { v.Passed = false },
		"unknown rules": func(v *Verdict, _ *ocispec.Descriptor) { v.PolicyDigest = "" },
		"no digest":     func(_ *Verdict, d *ocispec.Descriptor) { d.Digest = "" },
		"sha512":        func(_ *Verdict, d *ocispec.Descriptor) { d.Digest = digest.SHA512.FromString("x") },
		"no size":       func(_ *Verdict, d *ocispec.Descriptor) { d.Size = 0 },
	} {
		v, d := verdict, image
		change(&v, &d)
		if a, err := Attach(t.Context(), newKey(t), r, d, names, v, epoch); err == nil || len(a) > 0 || len(r.blobs) != before {
			t.Errorf("%s: a signature was made: %v %v", name, a, err)
		}
	}
}

func TestVerifySaysWhichArtifactSatisfiedWhat(t *testing.T) {
	k := newKey(t)
	r, image := signed(t, k)
	got, err := Verify(t.Context(), k.Public(), image, r)
	if err != nil {
		t.Fatal(err)
	}
	sig := r.tags[SignatureTag(image.Digest)].Digest
	want := Report{
		Image: image,
		Signatures: []Evidence{
			{"simple signature", sig, "reg.example/a/b:1"}, {"simple signature", sig, "reg.example/a/b:2"}, {"signature bundle", r.refs[0].Digest, ""},
		},
		Verdicts: []Evidence{{"verdict bundle", r.refs[1].Digest, ""}},
		Verdict:  verdict, Blobs: 4, Bytes: got.Bytes,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestImageWithoutNameIsSignedToo(t *testing.T) {
	k, r := newKey(t), newRepo()
	image := r.image(t, "x")
	artifacts, err := Attach(t.Context(), k, r, image, nil, verdict, epoch)
	if err != nil {
		t.Fatal(err)
	}
	r.add(artifacts)
	if _, err := Verify(t.Context(), k.Public(), image, r); err != nil {
		t.Error(err)
	}
}

func TestOneKindOfSignatureIsEnoughButAVerdictIsNone(t *testing.T) {
	k := newKey(t)
	for name, c := range map[string]struct {
		cut  func(*repo)
		want string
	}{
		"only the simple signature": {func(r *repo) { r.refs = r.refs[1:] }, ""},
		"only the bundle":           {func(r *repo) { r.tags = nil }, ""},
		"only the verdict":          {func(r *repo) { r.tags, r.refs = nil, r.refs[1:] }, "no signature by this key"},
		"no verdict":                {func(r *repo) { r.refs = r.refs[:1] }, "no verdict of a policy"},
		"nothing":                   {func(r *repo) { r.tags, r.refs = nil, nil }, "no signature by this key"},
	} {
		r, image := signed(t, k)
		c.cut(r)
		_, err := Verify(t.Context(), k.Public(), image, r)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
}

func TestWrongKeyFails(t *testing.T) {
	r, image := signed(t, newKey(t))
	report, err := Verify(t.Context(), newKey(t).Public(), image, r)
	if err == nil || len(report.Signatures)+len(report.Verdicts) != 0 || !strings.Contains(err.Error(), "not signed by this key") {
		t.Errorf("anybody's signature passes: %+v %v", report, err)
	}
	if len(report.Rejected) != 4 {
		t.Errorf("%d rejections, want one for each of four artifacts: %+v", len(report.Rejected), report.Rejected)
	}
}

func TestSignaturesOfAnotherImageFail(t *testing.T) {
	k := newKey(t)
	r, good := signed(t, k)
	evil := r.image(t, "evil")
	r.tags[SignatureTag(evil.Digest)] = r.tags[SignatureTag(good.Digest)]
	report, err := Verify(t.Context(), k.Public(), evil, r)
	if err == nil || len(report.Signatures)+len(report.Verdicts) != 0 {
		t.Errorf("an attacker's image passes with the signatures of a good one: %+v %v", report, err)
	}
	// The attacker can also write new manifests around the signed bundles.
	for i, d := range r.refs {
		var m ocispec.Manifest
		if err := json.Unmarshal(r.blobs[d.Digest], &m); err != nil {
			t.Fatal(err)
		}
		m.Subject = &evil
		r.refs[i] = r.write(t, ocispec.MediaTypeImageManifest, m)
	}
	report, err = Verify(t.Context(), k.Public(), evil, r)
	if err == nil || len(report.Signatures)+len(report.Verdicts) != 0 || !strings.Contains(fmt.Sprint(report.Rejected), "signed for another image") {
		t.Errorf("replayed bundles pass: %+v %v", report, err)
	}
}

// statementFor signs any statement as a referrer, as the holder of the key could.
func (r *repo) statementFor(t testing.TB, k *Key, image ocispec.Descriptor, predicateType string, predicate any) {
	t.Helper()
	a := attacher{signer: k, blobs: r, image: image, created: epoch}
	made, err := a.bundle(t.Context(), predicateType, predicate)
	if err != nil {
		t.Fatal(err)
	}
	r.add([]Artifact{made})
}

func TestProvenanceIsNoSignatureAndNoVerdict(t *testing.T) {
	k, r := newKey(t), newRepo()
	image := r.image(t, "x")
	r.statementFor(t, k, image, "https://slsa.dev/provenance/v1", struct{}{})
	other := newSummary(image.Digest, nil, verdict, epoch)
	other.Verifier.ID = "https://example.org/other"
	r.statementFor(t, k, image, predicateVerdict, other)
	report, err := Verify(t.Context(), k.Public(), image, r)
	if err == nil || len(report.Signatures)+len(report.Verdicts) != 0 {
		t.Errorf("attested passes for signed and approved: %+v %v", report, err)
	}
	for _, want := range []string{"neither a signature nor a verdict", "a verdict of another verifier"} {
		if !strings.Contains(fmt.Sprint(report.Rejected), want) {
			t.Errorf("%+v does not say %q", report.Rejected, want)
		}
	}
}

func TestSignedFailureOfPolicyFailsWhateverElseIsThere(t *testing.T) {
	k := newKey(t)
	r, image := signed(t, k)
	failed := newSummary(image.Digest, nil, verdict, epoch)
	failed.VerificationResult = "FAILED"
	r.statementFor(t, k, image, predicateVerdict, failed)
	if _, err := Verify(t.Context(), k.Public(), image, r); err == nil || !strings.Contains(err.Error(), "policy did not pass it") {
		t.Errorf("got %v", err)
	}
}

// What the key signed for another purpose is no signature of an image, even when all else fits.
func TestSignedDocumentsOfOtherTypesDoNotCount(t *testing.T) {
	k := newKey(t)
	r, image := signed(t, k)

	empty := r.write(t, ocispec.MediaTypeEmptyJSON, []byte("{}"))
	tag := SignatureTag(image.Digest)
	text := []byte(`{"critical":{"identity":{"docker-reference":""},"image":{"docker-manifest-digest":"` + image.Digest.String() + `"},"type":"atomic"},"optional":{}}`)
	signature, err := k.Sign(t.Context(), text)
	if err != nil {
		t.Fatal(err)
	}
	layer := r.write(t, mediaTypeSimpleSigning, text)
	layer.Annotations = map[string]string{annotationSignature: base64.StdEncoding.EncodeToString(signature)}
	r.tags[tag] = r.write(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{Config: empty, Layers: []ocispec.Descriptor{layer}})

	body, err := newStatement(image.Digest, predicateSign, struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	envelopes, err := dsse.NewEnvelopeSigner(dsseKey{k})
	if err != nil {
		t.Fatal(err)
	}
	envelope, err := envelopes.SignPayload(t.Context(), "application/x-chat", body)
	if err != nil {
		t.Fatal(err)
	}
	m := ocispec.Manifest{ArtifactType: mediaTypeBundle, Config: empty, Subject: &image}
	m.Layers = []ocispec.Descriptor{r.write(t, mediaTypeBundle, bundle{MediaType: mediaTypeBundle, DSSEEnvelope: envelope})}
	good := r.refs[0]
	r.refs = []ocispec.Descriptor{r.write(t, ocispec.MediaTypeImageManifest, m)}

	// A good bundle that was hung onto another image.
	if err := json.Unmarshal(r.blobs[good.Digest], &m); err != nil {
		t.Fatal(err)
	}
	other := r.image(t, "other")
	m.Subject = &other
	r.refs = append(r.refs, r.write(t, ocispec.MediaTypeImageManifest, m))

	report, err := Verify(t.Context(), k.Public(), image, r)
	if err == nil || len(report.Signatures) != 0 {
		t.Errorf("passes as a signature: %+v", report.Signatures)
	}
	for _, want := range []string{`type "atomic" is no image signature`, `payload type "application/x-chat"`, "its subject is another image"} {
		if !strings.Contains(fmt.Sprint(report.Rejected), want) {
			t.Errorf("%+v does not say %s", report.Rejected, want)
		}
	}
}

// Every byte of the image and of what we attached to it counts, also where another artifact would do.
func TestChangedByteAnywhereFails(t *testing.T) {
	k := newKey(t)
	r, image := signed(t, k)
	for d, good := range maps.Clone(r.blobs) {
		for name, bad := range map[string][]byte{
			"changed": append(bytes.Clone(good[:len(good)-1]), good[len(good)-1]^1), "truncated": good[:len(good)/2], "longer": append(bytes.Clone(good), ' '), "gone": nil,
		} {
			r.blobs[d] = bad
			if name == "gone" {
				delete(r.blobs, d)
			}
			if _, err := Verify(t.Context(), k.Public(), image, r); err == nil || !strings.Contains(err.Error(), d.String()) {
				t.Errorf("blob %s of %s is %s: got %v, want an error that names it", d, good, name, err)
			}
		}
		r.blobs[d] = good
	}
	if _, err := Verify(t.Context(), k.Public(), image, r); err != nil {
		t.Errorf("restored, it must pass again: %v", err)
	}
}

// What somebody else attached is good for nothing, and must not be able to take our image down.
func TestArtifactsOfOthersDoNoHarm(t *testing.T) {
	k := newKey(t)
	r, image := signed(t, k)
	r.statementFor(t, newKey(t), image, predicateSign, struct{}{})
	r.refs = append(r.refs, r.write(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		ArtifactType: "application/x-sbom", Subject: &image, Layers: []ocispec.Descriptor{{MediaType: "x", Digest: digest.FromString("gone"), Size: 1 << 40}},
	}))
	r.refs = append(r.refs, r.write(t, ocispec.MediaTypeImageManifest, []byte("not json")), r.write(t, "text/plain", []byte("x")))
	report, err := Verify(t.Context(), k.Public(), image, r)
	if err != nil || len(report.Rejected) != 4 {
		t.Errorf("%d rejections, want 4: %+v %v", len(report.Rejected), report.Rejected, err)
	}
}

// A new manifest with a right digest around a bundle that was tampered with must fail by signature.
func TestTamperedBundleFails(t *testing.T) {
	k := newKey(t)
	for name, tamper := range map[string]func(*bundle){
		"media type":   func(b *bundle) { b.MediaType = "application/vnd.dev.sigstore.bundle.v0.1+json" },
		"no envelope":  func(b *bundle) { b.DSSEEnvelope = nil },
		"no signature": func(b *bundle) { b.DSSEEnvelope.Signatures = nil },
		"two signatures": func(b *bundle) {
			b.DSSEEnvelope.Signatures = append(b.DSSEEnvelope.Signatures, b.DSSEEnvelope.Signatures[0])
		},
		"payload type": func(b *bundle) { b.DSSEEnvelope.PayloadType = "text/plain" },
		"payload":      func(b *bundle) { b.DSSEEnvelope.Payload = b.DSSEEnvelope.Payload[:40] },
		"signature":    func(b *bundle) { b.DSSEEnvelope.Signatures[0].Sig = "AAAA" },
	} {
		r, image := signed(t, k)
		var m ocispec.Manifest
		if err := json.Unmarshal(r.blobs[r.refs[1].Digest], &m); err != nil {
			t.Fatal(err)
		}
		var b bundle
		if err := json.Unmarshal(r.blobs[m.Layers[0].Digest], &b); err != nil {
			t.Fatal(err)
		}
		tamper(&b)
		m.Layers[0] = r.write(t, mediaTypeBundle, b)
		r.refs[1] = r.write(t, ocispec.MediaTypeImageManifest, m)
		report, err := Verify(t.Context(), k.Public(), image, r)
		if err == nil || len(report.Verdicts) != 0 {
			t.Errorf("%s: a changed verdict passes: %+v", name, report)
		}
	}
}

func TestFloodOfSignaturesEnds(t *testing.T) {
	k := newKey(t)
	r, image := signed(t, k)
	tag := SignatureTag(image.Digest)
	var m ocispec.Manifest
	if err := json.Unmarshal(r.blobs[r.tags[tag].Digest], &m); err != nil {
		t.Fatal(err)
	}
	for len(m.Layers) < 1000 {
		m.Layers = append(m.Layers, r.write(t, mediaTypeSimpleSigning, []byte("junk")))
	}
	r.tags[tag] = r.write(t, ocispec.MediaTypeImageManifest, m)
	for len(r.refs) < 1000 {
		r.refs = append(r.refs, r.refs[0])
	}
	report, err := Verify(t.Context(), k.Public(), image, r)
	if err != nil || len(report.Rejected) != maxCandidates-2+2 {
		t.Errorf("%d rejections %v", len(report.Rejected), err)
	}
	big := m.Layers[0]
	big.Size = maxDocument + 1
	m.Layers = []ocispec.Descriptor{big}
	r.tags[tag] = r.write(t, ocispec.MediaTypeImageManifest, m)
	report, err = Verify(t.Context(), k.Public(), image, r)
	if err != nil || strings.Count(fmt.Sprint(report.Rejected), "more than 8388608") != 1 {
		t.Errorf("%+v %v", report.Rejected, err)
	}
}

func TestEndlessManifestIsNotRead(t *testing.T) {
	k := newKey(t)
	r, image := signed(t, k)
	r.tags[SignatureTag(image.Digest)] = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: image.Digest, Size: maxManifest + 1}
	image.Size = maxManifest + 1
	report, err := Verify(t.Context(), k.Public(), image, r)
	if err == nil || strings.Count(err.Error(), "more than 8388608") == 0 || strings.Count(fmt.Sprint(report.Rejected), "more than 8388608") == 0 {
		t.Errorf("a registry can fill our memory: %+v %v", report.Rejected, err)
	}
}

// A source that believes everything must not make a wrong size pass, with the right bytes or without an end.
func TestWrongSizeFails(t *testing.T) {
	v := verifier{src: newRepo()}
	d, err := v.src.(*repo).WriteBlob("x", []byte("abc"))
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{2, 4} {
		bad := d
		bad.Size = size
		if err := v.read(t.Context(), bad, io.Discard); err == nil {
			t.Errorf("three bytes pass for %d", size)
		}
	}
	if err := v.read(t.Context(), d, io.Discard); err != nil {
		t.Error(err)
	}
}

func TestIndexIsVerifiedThroughAllItsManifests(t *testing.T) {
	k, r := newKey(t), newRepo()
	one, two := r.image(t, "one"), r.image(t, "two")
	index := r.write(t, ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{one, two},
	})
	artifacts, err := Attach(t.Context(), k, r, index, names, verdict, epoch)
	if err != nil {
		t.Fatal(err)
	}
	r.add(artifacts)
	report, err := Verify(t.Context(), k.Public(), index, r)
	if err != nil || report.Blobs != 9 {
		t.Errorf("%d blobs, want 9: %v", report.Blobs, err)
	}
	layer := digest.FromString("two two")
	r.blobs[layer] = []byte("two tw0")
	if _, err := Verify(t.Context(), k.Public(), index, r); err == nil {
		t.Error("a changed layer of the second platform passes")
	}
}

func TestManifestThatIsAlsoAnIndexFails(t *testing.T) {
	k, r := newKey(t), newRepo()
	for name, text := range map[string]string{
		"both":       `{"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[],"manifests":[]}`,
		"other type": `{"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`,
	} {
		image := r.write(t, ocispec.MediaTypeImageManifest, []byte(text))
		artifacts, err := Attach(t.Context(), k, r, image, names, verdict, epoch)
		if err != nil {
			t.Fatal(err)
		}
		r.refs = nil
		r.add(artifacts)
		if _, err := Verify(t.Context(), k.Public(), image, r); err == nil || !strings.Contains(err.Error(), "ambiguous") {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func FuzzVerifyNeverPanics(f *testing.F) {
	k := newKey(f)
	r, image := signed(f, k)
	for _, b := range r.blobs {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		v := verifier{key: k.Public(), src: r, report: Report{Image: image}, seen: make(map[blob]bool)}
		if _, err := v.openBundle(t.Context(), b); err == nil && v.key == nil {
			t.Error("no key, no signature")
		}
		_, _ = LoadPublic(b)
		_, _ = LoadPrivate(b, nil)
		d := r.write(t, ocispec.MediaTypeImageManifest, b)
		_, _ = Verify(t.Context(), k.Public(), d, r)
	})
}
