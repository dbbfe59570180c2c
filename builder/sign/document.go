package sign

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"
)

// The media types, predicate types and annotations that cosign 3 and containers/image look for.
const (
	mediaTypeSimpleSigning = "application/vnd.dev.cosign.simplesigning.v1+json"
	mediaTypeBundle        = "application/vnd.dev.sigstore.bundle.v0.3+json"
	payloadTypeInToto      = "application/vnd.in-toto+json"

	statementType    = "https://in-toto.io/Statement/v1"
	predicateSign    = "https://sigstore.dev/cosign/sign/v1"
	predicateVerdict = "https://slsa.dev/verification_summary/v1"

	annotationSignature     = "dev.cosignproject.cosign/signature"
	annotationContent       = "dev.sigstore.bundle.content"
	annotationPredicateType = "dev.sigstore.bundle.predicateType"

	simpleSigningType = "cosign container image signature"

	// verifierID names us in verdicts; a verdict of another verifier is not ours.
	verifierID = "https://github.com/cooper-build/cooper"
	creator    = "cooper"
	passed     = "PASSED"
)

// payload is what a simple signature signs. containers/image refuses any other field.
type payload struct {
	Critical struct {
		Identity struct {
			DockerReference string `json:"docker-reference"`
		} `json:"identity"`
		Image struct {
			DockerManifestDigest digest.Digest `json:"docker-manifest-digest"`
		} `json:"image"`
		Type string `json:"type"`
	} `json:"critical"`
	Optional struct {
		Creator string `json:"creator"`
	} `json:"optional"`
}

// bundle is sigstore's bundle v0.3 as far as a plain key needs it.
type bundle struct {
	MediaType            string `json:"mediaType"`
	VerificationMaterial struct {
		PublicKey struct {
			Hint string `json:"hint"`
		} `json:"publicKey"`
	} `json:"verificationMaterial"`
	DSSEEnvelope *dsse.Envelope `json:"dsseEnvelope"`
}

// statement is an in-toto statement. It is plain encoding/json, not in-toto/attestation's type, because protojson
// puts random spaces into its output on purpose, and ours is part of a digest.
type statement struct {
	Type          string          `json:"_type"`
	Subject       []subject       `json:"subject"`
	PredicateType string          `json:"predicateType"`
	Predicate     json.RawMessage `json:"predicate"`
}

type subject struct {
	Name   string            `json:"name,omitempty"`
	Digest map[string]string `json:"digest"`
}

// summary is the predicate of a SLSA verification summary. The specification lets others add fields with a URI
// for their name.
type summary struct {
	Verifier struct {
		ID string `json:"id"`
	} `json:"verifier"`
	TimeVerified string `json:"timeVerified"`
	ResourceURI  string `json:"resourceUri"`
	Policy       struct {
		URI    string            `json:"uri"`
		Digest map[string]string `json:"digest"`
	} `json:"policy"`
	VerificationResult string   `json:"verificationResult"`
	VerifiedLevels     []string `json:"verifiedLevels"`
	SLSAVersion        string   `json:"slsaVersion"`
	Findings           []string `json:"https://github.com/cooper-build/cooper/findings/v1"`
	Sandbox            string   `json:"https://github.com/cooper-build/cooper/sandbox/v1,omitempty"`
}

// A Verdict is what policy said about an image.
type Verdict struct {
	Policy       string        `json:"policy"`       // its name
	PolicyDigest digest.Digest `json:"policyDigest"` // of its text
	Passed       bool          `json:"passed"`
	Findings     []string      `json:"findings"`          // what it remarked on without denying, one line each
	Sandbox      string        `json:"sandbox,omitempty"` // what the commands of the build were kept in
}

func newPayload(d digest.Digest, name string) ([]byte, error) {
	var p payload
	p.Critical.Identity.DockerReference = name
	p.Critical.Image.DockerManifestDigest = d
	p.Critical.Type = simpleSigningType
	p.Optional.Creator = creator
	return json.Marshal(p)
}

func newStatement(d digest.Digest, predicateType string, predicate any) ([]byte, error) {
	raw, err := json.Marshal(predicate)
	if err != nil {
		return nil, err
	}
	return json.Marshal(statement{
		Type:          statementType,
		Subject:       []subject{{Digest: map[string]string{d.Algorithm().String(): d.Encoded()}}},
		PredicateType: predicateType,
		Predicate:     raw,
	})
}

func newSummary(d digest.Digest, names []string, v Verdict, epoch time.Time) summary {
	var s summary
	s.Verifier.ID = verifierID
	s.TimeVerified = epoch.UTC().Format(time.RFC3339)
	s.ResourceURI = "oci:" + d.String()
	if len(names) > 0 {
		s.ResourceURI = "oci://" + names[0] + "@" + d.String()
	}
	s.Policy.URI = v.Policy
	s.Policy.Digest = map[string]string{v.PolicyDigest.Algorithm().String(): v.PolicyDigest.Encoded()}
	s.VerificationResult = passed
	// The field is required; we judge content and say nothing about how the sources were built.
	s.VerifiedLevels = []string{"SLSA_BUILD_LEVEL_UNEVALUATED"}
	s.SLSAVersion = "1.0"
	s.Sandbox = v.Sandbox
	s.Findings = v.Findings
	if s.Findings == nil {
		s.Findings = []string{}
	}
	return s
}

// verdict reads a summary back.
func (s summary) verdict() (Verdict, error) {
	v := Verdict{Policy: s.Policy.URI, Passed: s.VerificationResult == passed, Findings: s.Findings, Sandbox: s.Sandbox}
	if hex := s.Policy.Digest["sha256"]; hex != "" {
		v.PolicyDigest = digest.NewDigestFromEncoded(digest.SHA256, hex)
		if err := v.PolicyDigest.Validate(); err != nil {
			return v, fmt.Errorf("policy digest: %w", err)
		}
	}
	return v, nil
}
