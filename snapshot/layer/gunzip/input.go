package gunzip

import (
	"encoding/binary"
	"hash/crc32"
	"io"
)

const (
	inputSize = 64 << 10
	padding   = 16 // zeros behind what there is, so that eight bytes can be read at any place in it
)

// An input is read by bits, and by bytes where it is aligned. What is taken beyond its end is zero.
type input struct {
	src io.Reader
	err error // of src, when there is no more to come

	buf      [inputSize + padding]byte
	pos, end int    // of what has not been taken out of buf
	bits     uint64 // taken out of buf, the next one lowest
	nbits    uint   // how many of bits count; those above are what follows, or zero

	crc uint32 // of the bytes that byte and skip gave
}

// fill sees to it that there are eight bytes at pos.
func (in *input) fill() {
	if in.end-in.pos >= 8 || in.err != nil {
		return
	}
	from := in.pos - int(in.nbits/8) // align may want those bytes back
	in.end = copy(in.buf[:], in.buf[from:in.end])
	in.pos -= from
	for in.end-in.pos < 8 && in.err == nil {
		var n int
		n, in.err = in.src.Read(in.buf[in.end:inputSize])
		in.end += n
	}
	clear(in.buf[in.end : in.end+padding])
}

// enough fills and returns up to where pos may go before there are not eight bytes behind it.
func (in *input) enough() int {
	in.fill()
	if in.err != nil {
		return in.end + padding - 7
	}
	return in.end - 7
}

// overrun reports whether more was taken than there was.
func (in *input) overrun() bool { return in.pos-int(in.nbits/8) > in.end }

// cut is the error of a stream that ends too early.
func (in *input) cut() error {
	if in.err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return in.err
}

// more is nil if something follows, which begins with a byte.
func (in *input) more() error {
	in.fill()
	if in.pos < in.end {
		return nil
	}
	return in.err
}

// peek is the next bits, 56 at least.
func (in *input) peek() uint64 {
	if in.fill(); in.pos <= in.end+padding-8 {
		in.bits |= binary.LittleEndian.Uint64(in.buf[in.pos:]) << in.nbits
	}
	in.pos += int(63-in.nbits) >> 3
	in.nbits |= 56
	return in.bits
}

func (in *input) drop(n uint) {
	in.bits >>= n
	in.nbits -= n
}

func (in *input) take(n uint) uint64 {
	b := in.peek() & (1<<n - 1)
	in.drop(n)
	return b
}

// align goes on at the next whole byte.
func (in *input) align() {
	in.pos -= int(in.nbits / 8)
	in.bits, in.nbits = 0, 0
}

// byte is the next byte of an aligned input.
func (in *input) byte() byte {
	var b [1]byte
	in.copy(b[:])
	in.crc = crc32.Update(in.crc, crc32.IEEETable, b[:])
	return b[0]
}

func (in *input) skip(n int) {
	for range n {
		in.byte()
	}
}

// copy is as much of an aligned input as there is at hand and room for, at least one byte.
func (in *input) copy(to []byte) int {
	in.fill()
	if in.pos >= in.end && len(to) > 0 {
		in.pos = in.end + 1 // overrun
		return 0
	}
	n := copy(to, in.buf[in.pos:in.end])
	in.pos += n
	return n
}
