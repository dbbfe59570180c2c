package sign

import (
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// Fingerprint names a public key: the SHA-256 of its SPKI, as in the hint of a bundle.
func Fingerprint(key *ecdsa.PublicKey) (digest.Digest, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", fmt.Errorf("encode the public key: %w", err)
	}
	return digest.FromBytes(der), nil
}
