package image

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ErrNotFound is returned when a tag, manifest or blob is not there. Anything else that keeps it from being
// read is another error.
var ErrNotFound = errors.New("not found")

// A ContentError says that bytes are not what their descriptor promises.
type ContentError struct {
	Digest digest.Digest // promised
	Reason string
}

func (e *ContentError) Error() string { return fmt.Sprintf("%s: %s", e.Digest, e.Reason) }

// hexOf returns the hex part of a digest that is fit to be a file name or a part of a URL. Everything but
// sha256 with exactly 64 lower-case digits is refused: "sha256:../../x" must never reach a path.
func hexOf(d digest.Digest) (string, error) {
	const prefix = "sha256:"
	s := string(d)
	if len(s) != len(prefix)+2*sha256.Size || s[:len(prefix)] != prefix {
		return "", fmt.Errorf("digest %.100q is not sha256 with 64 hex digits", s)
	}
	hx := s[len(prefix):]
	for i := range len(hx) {
		if c := hx[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return "", fmt.Errorf("digest %.100q is not sha256 with 64 hex digits", s)
		}
	}
	return hx, nil
}

func checkDescriptor(d ocispec.Descriptor) error {
	if _, err := hexOf(d.Digest); err != nil {
		return err
	}
	if d.Size < 0 {
		return fmt.Errorf("%s: negative size %d", d.Digest, d.Size)
	}
	return nil
}

// verifier reads exactly what a descriptor promises. The check is made with the last byte, not at EOF, so a
// caller that stops after the promised size has verified bytes too.
type verifier struct {
	r    io.Reader
	want ocispec.Descriptor
	sum  hash.Hash
	n    int64
	err  error
}

func verify(r io.Reader, d ocispec.Descriptor) *verifier {
	return &verifier{r: r, want: d, sum: sha256.New()}
}

func (v *verifier) Read(p []byte) (int, error) {
	if v.err != nil {
		return 0, v.err
	}
	n, err := v.r.Read(p)
	v.n += int64(n)
	if v.n > v.want.Size {
		v.err = &ContentError{v.want.Digest, fmt.Sprintf("more than the promised %d bytes", v.want.Size)}
		return 0, v.err
	}
	v.sum.Write(p[:n])
	if v.n == v.want.Size && (n > 0 || err == io.EOF) {
		if got := "sha256:" + hex.EncodeToString(v.sum.Sum(nil)); got != string(v.want.Digest) {
			v.err = &ContentError{v.want.Digest, "the bytes have digest " + got}
			return 0, v.err
		}
	}
	if err == io.EOF && v.n < v.want.Size {
		err = &ContentError{v.want.Digest, fmt.Sprintf("ends after %d of %d bytes", v.n, v.want.Size)}
	}
	v.err = err
	return n, err
}

// readCloser joins a reader with the thing below it that must be closed.
type readCloser struct {
	io.Reader
	io.Closer
}

// readAll reads a whole document that may have at most max bytes and verifies it.
func readAll(r io.Reader, d ocispec.Descriptor, max int64) ([]byte, error) {
	if d.Size > max {
		return nil, &ContentError{d.Digest, fmt.Sprintf("%d bytes are more than the %d allowed here", d.Size, max)}
	}
	return io.ReadAll(verify(r, d))
}
