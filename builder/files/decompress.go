package files

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"fmt"
	"io"

	"github.com/ulikunitz/xz"

	"github.com/cooper-build/cooper/snapshot/layer"
)

// decompress reads what tar, gzip, bzip2, xz or zstd made, which it knows by the first bytes.
func decompress(r io.ReadSeeker) (io.ReadCloser, error) {
	buffered := bufio.NewReaderSize(r, 64<<10)
	head, err := buffered.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte("BZh")):
		return io.NopCloser(bzip2.NewReader(buffered)), nil
	case bytes.HasPrefix(head, xzMagic):
		if err := checkXZ(r); err != nil {
			return nil, err
		}
		buffered.Reset(r)
		x, err := xz.NewReader(buffered)
		if err != nil {
			return nil, err
		}
		return io.NopCloser(x), nil
	}
	return layer.Decompress(buffered)
}

var xzMagic = []byte("\xfd7zXZ\x00")

// maxXZDictionary is twice what "xz -9" uses. The format allows 4 GiB, which the decoder would allocate.
const maxXZDictionary = 128 << 20

var errXZ = errors.New("the xz file is broken")

// memoryError says that a file needs more memory than we give it.
type memoryError struct{ size uint64 }

func (e *memoryError) Error() string {
	return fmt.Sprintf("decompressing it takes %d MiB of memory, and %d are allowed", e.size>>20, maxXZDictionary>>20)
}

// Hint says what takes less.
func (e *memoryError) Hint() string { return `compress it with "xz -9" or less, or with zstd` }

// checkXZ reads an xz file from its beginning to its end, without decompressing it, and refuses a block that needs
// more memory than maxXZDictionary. It leaves r at its beginning.
func checkXZ(r io.ReadSeeker) error {
	if _, err := r.Seek(0, io.SeekStart); err != nil {
		return err
	}
	x := &xzScanner{r: bufio.NewReaderSize(r, 64<<10)}
	if err := x.streams(); err != nil {
		return err
	}
	_, err := r.Seek(0, io.SeekStart)
	return err
}

// xzScanner walks over the structure of an xz file, https://tukaani.org/xz/xz-file-format.txt. It keeps its first
// error, which makes everything after it read as zero.
type xzScanner struct {
	r   *bufio.Reader
	n   int64 // bytes read
	err error
}

func (x *xzScanner) byte() byte {
	if x.err != nil {
		return 0
	}
	b, err := x.r.ReadByte()
	if err != nil {
		x.err = errXZ
		return 0
	}
	x.n++
	return b
}

func (x *xzScanner) skip(n int64) {
	for n > 0 && x.err == nil {
		k, err := x.r.Discard(int(min(n, 1<<30)))
		x.n += int64(k)
		n -= int64(k)
		if err != nil {
			x.err = errXZ
		}
	}
}

func (x *xzScanner) pad() { x.skip(-x.n & 3) }

// number reads a variable-length integer.
func (x *xzScanner) number() (n uint64) {
	for shift := 0; shift < 63; shift += 7 {
		b := x.byte()
		n |= uint64(b&0x7f) << shift
		if b&0x80 == 0 {
			return n
		}
	}
	x.err = errXZ
	return 0
}

// streams reads one stream after the other with zeros between them.
func (x *xzScanner) streams() error {
	for {
		x.stream()
		for x.err == nil {
			next, err := x.r.Peek(1)
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil || next[0] != 0 {
				break
			}
			x.byte()
		}
		if x.err != nil {
			return x.err
		}
	}
}

func (x *xzScanner) stream() {
	x.skip(7)
	check := int64(x.byte() & 15)
	x.skip(4)
	var checkSize int64
	if check > 0 {
		checkSize = 4 << ((check - 1) / 3)
	}
	for x.err == nil {
		size := x.byte()
		if size == 0 {
			break
		}
		x.blockHeader(size)
		x.chunks()
		x.pad()
		x.skip(checkSize)
	}
	for records := x.number(); records > 0 && x.err == nil; records-- {
		x.number()
		x.number()
	}
	x.pad()
	x.skip(4 + 12) // the sum of the index, and the footer
}

func (x *xzScanner) blockHeader(size byte) {
	end := x.n - 1 + (int64(size)+1)*4
	flags := x.byte()
	for _, present := range []byte{0x40, 0x80} {
		if flags&present != 0 {
			x.number()
		}
	}
	for range flags&3 + 1 {
		id, properties := x.number(), x.number()
		if id == lzma2 && properties == 1 {
			x.checkDictionary(x.byte())
		} else {
			x.skip(int64(min(properties, 1<<20)))
		}
	}
	if x.n > end {
		x.err = errXZ
	}
	x.skip(end - x.n)
}

const lzma2 = 0x21

func (x *xzScanner) checkDictionary(bits byte) {
	const largest = 40
	size := uint64(2|bits&1) << (bits/2 + 11)
	if bits > largest || size > maxXZDictionary {
		x.err = &memoryError{size}
	}
}

// chunks reads the compressed data of a block.
func (x *xzScanner) chunks() {
	for x.err == nil {
		control := x.byte()
		switch {
		case control == 0:
			return
		case control < 3:
			x.skip(x.short() + 1)
		case control < 0x80:
			x.err = errXZ
		default:
			x.short()
			size := x.short() + 1
			if control >= 0xc0 {
				size++ // properties
			}
			x.skip(size)
		}
	}
}

func (x *xzScanner) short() int64 {
	high := x.byte()
	return int64(high)<<8 | int64(x.byte())
}
