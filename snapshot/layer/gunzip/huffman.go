package gunzip

import (
	"math/bits"
	"slices"
)

// An entry of a decoding table says what the next bits of the input stand for:
//
//	bits 0-5    how many bits it takes, with the extra bits of a length or a distance
//	bits 8-11   how many bits the code itself takes
//	bits 12-15  what it is; none of them: a length or a distance
//	bits 16-31  its value: one or two literals, the least length or distance, or where a second table begins
type entry uint32

const (
	literal    entry = 1 << 12        // in the lower byte of the value
	second     entry = 1 << secondBit // with literal: another one follows, in the upper byte
	endOfBlock entry = 1 << 14
	invalid    entry = 1 << 15
	subtable         = invalid | endOfBlock // bits 8-11 say how many bits select in it
)

const (
	secondBit = 13
	kinds     = 15 << 12
)

func (e entry) bits() uint  { return uint(e & 63) }
func (e entry) value() uint { return uint(e >> 16) }
func (e entry) kind() entry { return e & kinds }

// plus is a length or a distance: the least one, and what its extra bits in the input add.
func (e entry) plus(in uint64) int {
	return int(e.value()) + int(in&(1<<e.bits()-1)>>(e>>8&15))
}

const (
	maxCode     = 15 // longest code, in bits
	litlenCodes = 288
	distCodes   = 32

	litlenBits = 11 // that select in the first table; longer codes need a second one
	distBits   = 8

	tableSize = 1 << 13 // holds the first table and a second one for each code
)

type decodeTable [tableSize]entry

// build makes the table of a canonical Huffman code (RFC 1951, section 3.2.2) from the lengths of its codes and the entries of
// its symbols. It reports whether the lengths are those of a code. No code at all is one, and a single code of one bit;
// the bits that are missing are invalid.
func (t *decodeTable) build(lengths []uint8, symbols []entry, first uint) bool {
	var count, next [maxCode + 1]int
	longest := uint(0)
	for _, l := range lengths {
		count[l]++
		longest = max(longest, uint(l))
	}
	code := 0
	for l := uint(1); l <= longest; l++ {
		code <<= 1
		next[l] = code
		code += count[l]
	}
	if code != 1<<longest && longest != 0 && (code != 1 || longest != 1) {
		return false
	}
	for i := range t[:1<<first] {
		t[i] = invalid
	}
	free := 1 << first
	for symbol, l := range lengths {
		if l == 0 {
			continue
		}
		length := uint(l)
		reversed := int(bits.Reverse16(uint16(next[l])) >> (16 - length))
		next[l]++
		if length <= first {
			e := symbols[symbol] + entry(length) + entry(length)<<8
			for i := reversed; i < 1<<first; i += 1 << length {
				t[i] = e
			}
			continue
		}
		from := &t[reversed&(1<<first-1)]
		if from.kind() != subtable {
			*from = subtable | entry(free)<<16 | entry(longest-first)<<8 | entry(first)
			free += 1 << (longest - first)
		}
		length -= first
		e := symbols[symbol] + entry(length) + entry(length)<<8
		for i := reversed >> first; i < 1<<(longest-first); i += 1 << length {
			t[int(from.value())+i] = e
		}
	}
	return true
}

// pairs lets entries of the first table of literals and lengths stand for two literals where the bits that select it suffice for both.
func (t *decodeTable) pairs() {
	for i := 1<<litlenBits - 1; i >= 0; i-- { // downwards, so that what is looked up is still single
		e := t[i]
		if e.kind() != literal {
			continue
		}
		next := t[i>>e.bits()]
		if next.kind() == literal && e.bits()+next.bits() <= litlenBits {
			t[i] = e + entry(next.bits()) | second | entry(next.value())<<24
		}
	}
}

// lengthSymbols are what the code of the lengths of codes stands for.
var lengthSymbols = func() (s [19]entry) {
	for i := range s {
		s[i] = literal | entry(i)<<16
	}
	return s
}()

// fixedLitlen and fixedDist are the lengths of the codes of blocks that bring none (RFC 1951, section 3.2.6).
var (
	fixedLitlen = func() (l [litlenCodes]uint8) {
		for i := range l {
			switch {
			case i < 144, i >= 280:
				l[i] = 8
			case i < 256:
				l[i] = 9
			default:
				l[i] = 7
			}
		}
		return l
	}()
	fixedDist = [distCodes]uint8(slices.Repeat([]uint8{5}, distCodes))
)

// litlenSymbols and distSymbols are what the codes of a block stand for (RFC 1951, section 3.2.5).
var (
	litlenSymbols = func() (s [litlenCodes]entry) {
		for i := range 256 {
			s[i] = literal | entry(i)<<16
		}
		s[256] = endOfBlock
		least, extra := 3, 0
		for i := 257; i < 285; i++ {
			s[i] = entry(least)<<16 | entry(extra)
			least += 1 << extra
			if i >= 264 && (i-264)%4 == 0 {
				extra++
			}
		}
		s[285] = 258 << 16
		s[286], s[287] = invalid, invalid
		return s
	}()
	distSymbols = func() (s [distCodes]entry) {
		least, extra := 1, 0
		for i := range 30 {
			s[i] = entry(least)<<16 | entry(extra)
			least += 1 << extra
			if i >= 3 && i%2 == 1 {
				extra++
			}
		}
		s[30], s[31] = invalid, invalid
		return s
	}()
)
