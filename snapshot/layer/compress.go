package layer

import (
	"bufio"
	"bytes"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// maxWindow is what a zstd stream may ask us to keep in memory: the most that a standard decoder
// accepts without being asked.
const maxWindow = 128 << 20

// Decompress finds out how r is compressed (gzip, zstd or not at all) and returns the plain stream.
// Memory stays bounded whatever the stream asks for; how much comes out does not, so the reader of
// the result counts. Close frees what is held and leaves r open.
func Decompress(r io.Reader) (io.ReadCloser, error) {
	buffered := bufio.NewReaderSize(r, 256<<10)
	magic, err := buffered.Peek(4)
	if err != nil && err != io.EOF {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(buffered)
		if err != nil {
			return nil, fmt.Errorf("decompress gzip: %w", err)
		}
		return z, nil
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}), isSkippable(magic):
		z, err := zstd.NewReader(buffered, zstd.WithDecoderMaxWindow(maxWindow),
			zstd.WithDecoderMaxMemory(2*maxWindow), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, fmt.Errorf("decompress zstd: %w", err)
		}
		return z.IOReadCloser(), nil
	case bytes.HasPrefix(magic, []byte("BZh")), bytes.HasPrefix(magic, []byte{0xfd, '7', 'z', 'X'}):
		return nil, fmt.Errorf("decompress: bzip2 and xz are no compressions of a layer")
	default:
		return io.NopCloser(buffered), nil
	}
}

// isSkippable reports a zstd frame without content, which may come first.
func isSkippable(magic []byte) bool {
	return len(magic) == 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:], []byte{0x2a, 0x4d, 0x18})
}

// Compression names a way to compress a layer.
type Compression string

// The compressions that OCI has media types for.
const (
	None Compression = "none"
	Gzip Compression = "gzip"
	Zstd Compression = "zstd"
)

// Compress returns a writer that compresses into w. The level, and so the bytes, are fixed for one
// version of this program. The result is complete when Close returned nil; w stays open.
func Compress(w io.Writer, c Compression) (io.WriteCloser, error) {
	switch c {
	case None:
		return nopCloser{w}, nil
	case Gzip:
		return gzip.NewWriterLevel(w, gzip.DefaultCompression)
	case Zstd:
		return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderConcurrency(1))
	default:
		return nil, fmt.Errorf("compress: %q is none of gzip, zstd, none", string(c))
	}
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }
