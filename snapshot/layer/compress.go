package layer

import (
	"bufio"
	"bytes"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cooper-build/cooper/snapshot/layer/gunzip"
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
		return io.NopCloser(gunzip.NewReader(buffered)), nil
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

// Codec names a way to compress a layer.
type Codec string

// The codecs that OCI has media types for.
const (
	None Codec = "uncompressed"
	Gzip Codec = "gzip"
	Zstd Codec = "zstd"
)

// A Compression is how a layer is compressed. The zero value is gzip at its default level.
type Compression struct {
	Codec Codec
	Level *int // nil: the codec's default
}

// A LevelError says that a codec has no such level.
type LevelError struct {
	Codec Codec
	Level int
	Most  int // the levels begin at 0; negative: the codec has none
}

func (e *LevelError) Error() string {
	if e.Most < 0 {
		return fmt.Sprintf("%s has no levels", e.Codec)
	}
	return fmt.Sprintf("%s has levels from 0 to %d, not %d", e.Codec, e.Most, e.Level)
}

// Check reports a codec or a level that does not exist.
func (c Compression) Check() error {
	most := -1
	switch c.codec() {
	case Gzip:
		most = 9
	case Zstd:
		most = 22
	case None:
	default:
		return fmt.Errorf("compression %q is none of gzip, zstd, uncompressed", string(c.Codec))
	}
	if c.Level != nil && (*c.Level < 0 || *c.Level > most) {
		return &LevelError{Codec: c.codec(), Level: *c.Level, Most: most}
	}
	return nil
}

func (c Compression) codec() Codec {
	if c.Codec == "" {
		return Gzip
	}
	return c.Codec
}

// String tells compressions apart that may give other bytes.
func (c Compression) String() string {
	if c.Level == nil {
		return string(c.codec())
	}
	return fmt.Sprintf("%s-%d", c.codec(), *c.Level)
}

// MediaType is OCI's name for a layer that is compressed so.
func (c Compression) MediaType() string {
	switch c.codec() {
	case Zstd:
		return ocispec.MediaTypeImageLayerZstd
	case None:
		return ocispec.MediaTypeImageLayer
	default:
		return ocispec.MediaTypeImageLayerGzip
	}
}

// The bytes of a layer depend on these, and on nothing that the machine has more or less of.
const (
	gzipBlock  = 512 << 10 // what is compressed by itself, with the end of the block before as its dictionary
	zstdWindow = 8 << 20
)

// blocksAtOnce bounds memory: a block takes about 2 MB while it is compressed.
const blocksAtOnce = 4

// Compress returns a writer that compresses into w, on several cores. The bytes are fixed for one version of this
// program. The result is complete when Close returned nil; w stays open. Close must be called in any case.
func Compress(w io.Writer, c Compression) (io.WriteCloser, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	switch c.codec() {
	case Gzip:
		level := pgzip.DefaultCompression
		if c.Level != nil {
			level = *c.Level
		}
		z, err := pgzip.NewWriterLevel(w, level)
		if err != nil {
			return nil, err
		}
		return z, z.SetConcurrency(gzipBlock, blocksAtOnce)
	case Zstd:
		level := zstd.SpeedDefault
		if c.Level != nil {
			level = zstd.EncoderLevelFromZstd(*c.Level) // as BuildKit
		}
		return zstd.NewWriter(w, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(2), zstd.WithWindowSize(zstdWindow), zstd.WithEncoderCRC(false))
	default:
		return nopCloser{w}, nil
	}
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }
