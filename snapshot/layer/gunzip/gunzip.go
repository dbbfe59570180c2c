// Package gunzip reads gzip streams (RFC 1952) in half the time that the libraries take: inflating is two fifths of the work of a
// pull, and no stream can be begun in the middle, so that it is one processor's. docs/decisions/layer-pipeline.md has figures.
//
// Unlike compress/gzip it reads ahead of what it gives, takes several members for one stream, and reads nothing of a header.
package gunzip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// ErrCorrupt says that a stream is no gzip stream or was changed on its way. One that ends too early is io.ErrUnexpectedEOF.
var ErrCorrupt = errors.New("the gzip stream is damaged")

func corrupt(what string) error { return fmt.Errorf("%w: %s", ErrCorrupt, what) }

const (
	window = 32 << 10 // how far back a match can lead
	chunk  = 256 << 10
	slack  = 512 // a match, and what copying eight bytes at a time writes behind it
)

// A Reader reads what a gzip stream holds.
type Reader struct {
	input input
	next  func(*Reader) error // goes on until out is full, input is wanted, or something else comes next
	err   error               // io.EOF at the end

	out    [window + chunk + slack]byte
	op     int // where the next byte goes
	given  int // up to where the caller has it
	member int // where the member begins that is read; 0 also if that is no longer in out
	summed int // up to where crc goes
	crc    uint32
	size   uint32 // of the member, modulo 2^32

	litlen, dist decodeTable
	fixed        bool // they are those of blocks that bring no codes
	last         bool // this block is the last of its member
	stored       int  // bytes that are left of a stored block
}

// NewReader returns a reader of the gzip stream that src is up to its end.
func NewReader(src io.Reader) *Reader {
	return &Reader{input: input{src: src}, next: (*Reader).header}
}

// Read gives what comes next. Everything before an error is right; io.EOF comes only when the checksums were, too.
func (r *Reader) Read(p []byte) (int, error) {
	for r.given == r.op {
		if r.err != nil {
			return 0, r.err
		}
		r.fill()
	}
	n := copy(p, r.out[r.given:r.op])
	r.given += n
	return n, nil
}

// fill makes the next chunk. Of one in which an error is found nothing is given.
func (r *Reader) fill() {
	if past := r.op - window; past > 0 {
		copy(r.out[:], r.out[past:r.op])
		r.op, r.given, r.summed = window, window, window
		r.member = max(0, r.member-past)
	}
	for r.err == nil && r.op < window+chunk {
		r.err = r.next(r)
		if r.input.overrun() {
			r.err = r.input.cut()
		}
	}
	if r.err != nil && r.err != io.EOF {
		r.op = r.given
		return
	}
	r.sum()
}

// sum brings crc and size up to op.
func (r *Reader) sum() {
	fresh := r.out[r.summed:r.op]
	r.crc = crc32.Update(r.crc, crc32.IEEETable, fresh)
	r.size += uint32(len(fresh))
	r.summed = r.op
}

// header reads that of a member (RFC 1952, section 2.3).
func (r *Reader) header() error {
	const hasCRC, hasExtra, hasName, hasComment = 1 << 1, 1 << 2, 1 << 3, 1 << 4
	in := &r.input
	in.crc = 0
	if in.byte() != 0x1f || in.byte() != 0x8b || in.byte() != 8 {
		return corrupt("it has no header")
	}
	flags := in.byte()
	in.skip(6) // time, extra flags, operating system
	if flags&hasExtra != 0 {
		in.skip(int(in.byte()) | int(in.byte())<<8)
	}
	for _, flag := range []byte{hasName, hasComment} {
		for flags&flag != 0 && in.byte() != 0 {
		}
	}
	if sum := uint16(in.crc); flags&hasCRC != 0 && sum != uint16(in.byte())|uint16(in.byte())<<8 {
		return corrupt("the checksum of its header is another one")
	}
	r.member, r.crc, r.size = r.op, 0, 0
	r.next = (*Reader).block
	return nil
}

// trailer reads what follows the last block of a member.
func (r *Reader) trailer() error {
	r.sum()
	r.input.align()
	var sums [8]byte
	for i := range sums {
		sums[i] = r.input.byte()
	}
	if binary.LittleEndian.Uint32(sums[:]) != r.crc || binary.LittleEndian.Uint32(sums[4:]) != r.size {
		return corrupt("the checksum of what it holds is another one")
	}
	r.next = (*Reader).header
	return r.input.more()
}

// block reads the header of one (RFC 1951, section 3.2.3).
func (r *Reader) block() error {
	if r.last {
		r.last = false
		return r.trailer()
	}
	r.last = r.input.take(1) == 1
	switch r.input.take(2) {
	case 0:
		return r.storedBlock()
	case 1:
		if r.fixed { // such a block may be ten bits long, and a stream be made of nothing else
			r.next = (*Reader).inflate
			return nil
		}
		r.fixed = true
		return r.codes(fixedLitlen[:], fixedDist[:])
	case 2:
		return r.dynamicBlock()
	default:
		return corrupt("it has a block of no type")
	}
}

func (r *Reader) storedBlock() error {
	in := &r.input
	in.align()
	n := uint16(in.byte()) | uint16(in.byte())<<8
	if n != ^(uint16(in.byte()) | uint16(in.byte())<<8) {
		return corrupt("the length of a block is no length")
	}
	r.stored = int(n)
	r.next = (*Reader).copyStored
	return nil
}

func (r *Reader) copyStored() error {
	n := r.input.copy(r.out[r.op:min(r.op+r.stored, window+chunk)])
	r.op += n
	r.stored -= n
	if r.stored == 0 {
		r.next = (*Reader).block
	}
	return nil
}

// dynamicBlock reads the codes of a block (RFC 1951, section 3.2.7).
func (r *Reader) dynamicBlock() error {
	in := &r.input
	r.fixed = false
	litlen, dist, codes := int(in.take(5))+257, int(in.take(5))+1, int(in.take(4))+4
	if litlen > litlenCodes-2 || dist > distCodes-2 {
		return corrupt("it has a block of too many codes")
	}
	var ofLengths [19]uint8
	for _, symbol := range []int{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}[:codes] {
		ofLengths[symbol] = uint8(in.take(3))
	}
	table := &r.dist // which is free until the lengths are there
	if !table.build(ofLengths[:], lengthSymbols[:], distBits) {
		return corrupt("it has a block with lengths that are no code")
	}
	var lengths [litlenCodes + distCodes]uint8
	for i := 0; i < litlen+dist; {
		e := table[in.peek()&(1<<distBits-1)]
		if e.kind() == invalid {
			return corrupt("it has a block with a code that does not exist")
		}
		in.drop(e.bits())
		length, times := uint8(e.value()), 1
		switch length {
		case 16:
			if i == 0 {
				return corrupt("it has a block that repeats a length before the first")
			}
			length, times = lengths[i-1], 3+int(in.take(2))
		case 17:
			length, times = 0, 3+int(in.take(3))
		case 18:
			length, times = 0, 11+int(in.take(7))
		}
		if i+times > litlen+dist {
			return corrupt("it has a block of too many lengths")
		}
		for range times {
			lengths[i] = length
			i++
		}
	}
	return r.codes(lengths[:litlen], lengths[litlen:litlen+dist])
}

// codes begins the content of a block with the codes of these lengths.
func (r *Reader) codes(litlen, dist []uint8) error {
	if !r.litlen.build(litlen, litlenSymbols[:], litlenBits) || !r.dist.build(dist, distSymbols[:], distBits) {
		return corrupt("it has a block with lengths that are no code")
	}
	r.litlen.pairs()
	r.next = (*Reader).inflate
	return nil
}

// inflate decodes a block until its end, or until there may be no room for a match, or no input. No other goroutine knows
// what it works on, and the race detector would make it take most of the time of tests that unpack.
//
//go:norace
func (r *Reader) inflate() error {
	in, out, litlen, dist := &r.input, &r.out, &r.litlen, &r.dist
	enough := in.enough()
	op, pos, bits, nbits := r.op, in.pos, in.bits, in.nbits
	var err error
	for op < window+chunk && pos < enough {
		// After this there are 56 bits at least: two literals, or one of each of the longest codes with all extra bits.
		bits |= binary.LittleEndian.Uint64(in.buf[pos:]) << (nbits & 63)
		pos += int((63 - nbits) >> 3)
		nbits |= 56

		e := litlen[bits&(1<<litlenBits-1)]
		if e&literal != 0 {
			out[op], out[op+1] = byte(e>>16), byte(e>>24)
			op += 1 + int(e>>secondBit&1)
			bits >>= e.bits()
			nbits -= e.bits()
			e = litlen[bits&(1<<litlenBits-1)]
			if e&literal != 0 {
				out[op], out[op+1] = byte(e>>16), byte(e>>24)
				op += 1 + int(e>>secondBit&1)
				bits >>= e.bits()
				nbits -= e.bits()
				continue
			}
			if nbits < 48 {
				continue
			}
		}
		if e.kind() == subtable {
			bits >>= e.bits()
			nbits -= e.bits()
			e = litlen[(e.value()+uint(bits&(1<<(e>>8&15)-1)))%tableSize]
		}
		start := bits
		bits >>= e.bits()
		nbits -= e.bits()
		if e&kinds != 0 {
			if e&literal != 0 {
				out[op] = byte(e >> 16)
				op++
				continue
			}
			r.next = (*Reader).block
			if e.kind() == invalid {
				err = corrupt("it has a code that does not exist")
			}
			break
		}
		length := e.plus(start)

		e = dist[bits&(1<<distBits-1)]
		if e.kind() == subtable {
			bits >>= e.bits()
			nbits -= e.bits()
			e = dist[(e.value()+uint(bits&(1<<(e>>8&15)-1)))%tableSize]
		}
		start = bits
		bits >>= e.bits()
		nbits -= e.bits()
		if e.kind() == invalid {
			err = corrupt("it has a code that does not exist")
			break
		}
		back := e.plus(start)
		if back > op-r.member {
			err = corrupt("it repeats what was before its beginning")
			break
		}
		from, end := op-back, op+length
		switch {
		case back >= 8:
			// Most are short: nobody guesses for the processor how often to go round.
			to, what := out[op:op+24], out[from:from+24]
			binary.LittleEndian.PutUint64(to, binary.LittleEndian.Uint64(what))
			binary.LittleEndian.PutUint64(to[8:], binary.LittleEndian.Uint64(what[8:]))
			binary.LittleEndian.PutUint64(to[16:], binary.LittleEndian.Uint64(what[16:]))
			for op, from = op+24, from+24; op < end; op, from = op+8, from+8 {
				binary.LittleEndian.PutUint64(out[op:], binary.LittleEndian.Uint64(out[from:]))
			}
		case back == 1:
			for b := out[from]; op < end; op++ {
				out[op] = b
			}
		default:
			for ; op < end; op, from = op+1, from+1 {
				out[op] = out[from]
			}
		}
		op = end
	}
	r.op, in.pos, in.bits, in.nbits = op, pos, bits, nbits
	return err
}
