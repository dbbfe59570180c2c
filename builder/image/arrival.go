package image

import (
	"context"
	"errors"
	"fmt"
	"io"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// An Arrival is a layer that is used while it comes in: reading it also writes it into the layout. Exactly one of
// Commit and Discard counts, as for a [BlobWriter]. It belongs to one goroutine at a time.
type Arrival struct {
	from io.ReadCloser
	want ocispec.Descriptor
	blob *BlobWriter // nil: the layout has it already
	err  error       // why there is nothing more to read
}

// Receive begins to read layer i of an image, from the layout when that has it. The reader verifies what it reads.
func (l *Layout) Receive(ctx context.Context, s *Source, i int) (*Arrival, error) {
	a := &Arrival{want: s.Manifest.Layers[i]}
	var err error
	if l.Has(a.want) {
		a.from, err = l.Open(a.want)
		return a, err
	}
	if a.from, err = s.Layer(ctx, i); err != nil {
		return nil, err
	}
	if a.blob, err = l.NewBlob(); err != nil {
		a.from.Close()
		return nil, err
	}
	return a, nil
}

func (a *Arrival) Read(p []byte) (int, error) {
	if a.err != nil {
		return 0, a.err
	}
	n, err := a.from.Read(p)
	if n > 0 && a.blob != nil {
		if _, writeErr := a.blob.out.Write(p[:n]); writeErr != nil { // the source verifies what it gives
			n, err = 0, fmt.Errorf("OCI layout %s: blob %s: %w", a.blob.layout.dir, a.want.Digest, writeErr)
		}
	}
	a.err = err
	return n, err
}

// Cause is why a use of the layer failed with err. A stream whose bytes are wrong fails whoever reads it in many
// ways; that they are wrong is what has to be said, so the rest is read to find out.
func (a *Arrival) Cause(err error) error {
	for _, ours := range []error{unix.ENOSPC, unix.EDQUOT, unix.EIO, unix.EROFS} {
		if errors.Is(err, ours) {
			return err
		}
	}
	if a.err == nil {
		_, _ = io.Copy(io.Discard, withoutWriteTo{a})
	}
	if a.err != nil && a.err != io.EOF {
		return a.err
	}
	return err
}

type withoutWriteTo struct{ io.Reader }

// Commit makes the blob part of the layout. It must have been read to its end.
func (a *Arrival) Commit() error {
	defer a.Discard()
	if a.blob == nil {
		return nil
	}
	if n := a.blob.out.size; n != a.want.Size || a.err != nil && a.err != io.EOF { // with its last byte a source has verified all of them
		return fmt.Errorf("OCI layout %s: blob %s: %d of %d bytes were read", a.blob.layout.dir, a.want.Digest, n, a.want.Size)
	}
	return a.blob.place(a.want)
}

// Discard forgets what came in.
func (a *Arrival) Discard() {
	a.from.Close()
	if a.blob != nil {
		a.blob.Discard()
	}
}
