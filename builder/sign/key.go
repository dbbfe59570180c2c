// Package sign makes and checks signatures and attestations over the digest of an image.
//
// It knows keys, the documents that cosign and containers/image read, and where in an OCI image they lie. It
// refuses to know networks, registries and clocks: [Attach] writes blobs through one method and is told the time,
// [Verify] reads through the interface [Source]. Equal input and key give equal bytes, because signatures follow
// RFC 6979, so a reproducible image has reproducible signatures.
package sign

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/secure-systems-lab/go-securesystemslib/encrypted"
)

const (
	pemPKCS8   = "PRIVATE KEY"
	pemSEC1    = "EC PRIVATE KEY"
	pemPublic  = "PUBLIC KEY"
	pemSealed  = "ENCRYPTED SIGSTORE PRIVATE KEY" // what cosign writes and reads
	pemSealed1 = "ENCRYPTED COSIGN PRIVATE KEY"   // what cosign 1 wrote

	// maxPEM is far more than any key.
	maxPEM = 64 << 10
)

// ErrPassphrase is returned for an encrypted private key that was loaded without its passphrase or with another.
var ErrPassphrase = errors.New("the private key is encrypted and this is not its passphrase")

// A Signer signs for one key, which may be a file or a device.
type Signer interface {
	// Sign returns the ASN.1 ECDSA signature over the SHA-256 of the message.
	Sign(ctx context.Context, message []byte) ([]byte, error)
	// Public is the key that verifies it.
	Public() *ecdsa.PublicKey
}

// Key is an ECDSA P-256 private key in memory. It is a [Signer].
type Key struct {
	private *ecdsa.PrivateKey
}

// GenerateKey makes a key pair as PEM. The private key is PKCS8, or, with a passphrase, encrypted in the format of
// cosign, which can use it. The public key is SPKI, which everything reads.
func GenerateKey(passphrase []byte) (private, public []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("generate key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("generate key: %w", err)
	}
	kind := pemPKCS8
	if len(passphrase) > 0 {
		kind = pemSealed
		if der, err = encrypted.Encrypt(der, passphrase); err != nil {
			return nil, nil, fmt.Errorf("encrypt key: %w", err)
		}
	}
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return nil, nil, fmt.Errorf("generate key: %w", err)
	}
	private = pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	public = pem.EncodeToMemory(&pem.Block{Type: pemPublic, Bytes: spki})
	return private, public, nil
}

// LoadPrivate reads a private key that [GenerateKey], cosign or openssl made. The error is [ErrPassphrase] when the
// key is encrypted and the passphrase is missing or wrong.
func LoadPrivate(text, passphrase []byte) (*Key, error) {
	block, err := decodePEM(text)
	if err != nil {
		return nil, fmt.Errorf("private key: %w", err)
	}
	parsed, err := parsePrivate(block, passphrase)
	if err != nil {
		return nil, fmt.Errorf("private key: %w", err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("private key: %w", refused(parsed))
	}
	return &Key{key}, nil
}

func parsePrivate(block *pem.Block, passphrase []byte) (any, error) {
	switch block.Type {
	case pemSealed, pemSealed1:
		der, err := encrypted.Decrypt(block.Bytes, passphrase)
		if err != nil {
			return nil, ErrPassphrase
		}
		return x509.ParsePKCS8PrivateKey(der)
	case pemPKCS8:
		return x509.ParsePKCS8PrivateKey(block.Bytes)
	case pemSEC1:
		if block.Headers["Proc-Type"] != "" {
			return nil, hinted{errors.New("encrypted in OpenSSL's old format"), "convert it: openssl pkcs8 -topk8 -nocrypt -in OLD -out NEW"}
		}
		return x509.ParseECPrivateKey(block.Bytes)
	case "ENCRYPTED PRIVATE KEY":
		return nil, hinted{errors.New("encrypted as PKCS8"), "decrypt it: openssl pkcs8 -in OLD -out NEW, or import it: cosign import-key-pair --key OLD"}
	case pemPublic:
		return nil, hinted{errors.New("this is a public key"), "signing needs the private key of the pair"}
	case "RSA PRIVATE KEY":
		return nil, refused(&rsa.PrivateKey{})
	}
	return nil, fmt.Errorf("PEM block %q is no private key", block.Type)
}

// LoadPublic reads the public key that verifies: PEM, SPKI, ECDSA P-256.
func LoadPublic(text []byte) (*ecdsa.PublicKey, error) {
	block, err := decodePEM(text)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	if block.Type != pemPublic {
		return nil, hinted{fmt.Errorf("public key: PEM block %q is no public key", block.Type), "verification needs the .pub file of the pair"}
	}
	parsed, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	key, ok := parsed.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("public key: %w", refused(parsed))
	}
	return key, nil
}

func decodePEM(text []byte) (*pem.Block, error) {
	if len(text) > maxPEM {
		return nil, fmt.Errorf("larger than %d bytes", maxPEM)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, hinted{errors.New("not PEM"), "cooper keygen makes a key pair"}
	}
	return block, nil
}

// refused explains why a good key of another kind is not used.
func refused(key any) error {
	const hint = "make an ECDSA P-256 key with cooper keygen"
	switch k := key.(type) {
	case ed25519.PrivateKey, ed25519.PublicKey:
		return hinted{errors.New("an Ed25519 key: its signatures over images do not verify in cosign and containers/image, which hash first"), hint}
	case *rsa.PrivateKey, *rsa.PublicKey:
		return hinted{errors.New("an RSA key: only ECDSA P-256 verifies in all of cosign, containers/image and notation with one key"), hint}
	case *ecdsa.PrivateKey:
		return hinted{fmt.Errorf("an ECDSA key on %s: containers/image and cosign fix SHA-256, so the curve is P-256", k.Curve.Params().Name), hint}
	case *ecdsa.PublicKey:
		return hinted{fmt.Errorf("an ECDSA key on %s: containers/image and cosign fix SHA-256, so the curve is P-256", k.Curve.Params().Name), hint}
	}
	return hinted{fmt.Errorf("a key of type %T", key), hint}
}

// Public implements [Signer].
func (k *Key) Public() *ecdsa.PublicKey { return &k.private.PublicKey }

// PublicPEM is the public key as [GenerateKey] writes it.
func (k *Key) PublicPEM() ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemPublic, Bytes: spki}), nil
}

// Sign implements [Signer]. The signature is deterministic: without a source of randomness ECDSA follows RFC 6979.
func (k *Key) Sign(_ context.Context, message []byte) ([]byte, error) {
	sum := sha256.Sum256(message)
	return k.private.Sign(nil, sum[:], crypto.SHA256)
}

// String keeps the key out of logs.
func (k *Key) String() string { return "private key" }

// GoString keeps the key out of %#v.
func (k *Key) GoString() string { return k.String() }

// keyHint is how sigstore names a public key in a bundle.
func keyHint(key *ecdsa.PublicKey) (string, error) {
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", fmt.Errorf("public key: %w", err)
	}
	sum := sha256.Sum256(spki)
	return base64.StdEncoding.EncodeToString(sum[:]), nil
}

// hinted is an error with one next step.
type hinted struct {
	err  error
	hint string
}

func (h hinted) Error() string { return h.err.Error() }
func (h hinted) Unwrap() error { return h.err }

// Hint is the next step.
func (h hinted) Hint() string { return h.hint }
