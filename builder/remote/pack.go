package remote

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/zlib"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"os"
	"slices"
)

// pack is a file of objects, as a server sends it, with the index that git would make of it. Every object in it has been hashed, so what is
// found under a name is what the name promises.
type pack struct {
	f      *os.File
	size   int // of an oid
	sum    oid // of the whole file
	limit  Limits
	packed []packed // by offset
	byID   map[oid]int
	cache  map[int][]byte // contents that deltas build upon
	cached []int          // in the order they came
	weight int64
}

// packed is one object in the file.
type packed struct {
	at     int64 // where its header begins
	body   int64 // where its compressed data begin
	length int64 // of the data; of the delta, where it is one
	id     oid
	baseID oid // refDelta
	base   int // ofsDelta, and refDelta once it is found
	crc    uint32
	typ    objectType // of the object, once a delta is resolved
	delta  bool
}

const cacheWeight = 128 << 20

var errPack = errors.New("the pack is damaged")

// receive stores a pack in f and indexes it. A nil error means that it is complete and every object is what it is called.
func receive(ctx context.Context, from io.Reader, f *os.File, size int, limit Limits) (*pack, error) {
	p := &pack{f: f, size: size, limit: limit, byID: map[oid]int{}, cache: map[int][]byte{}}
	out := bufio.NewWriterSize(f, 1<<20)
	s := &packStream{from: from, to: out, sum: newChecksum(size), crc: crc32.NewIEEE(), limit: limit.Bytes, buf: make([]byte, 64<<10)}
	if err := p.readAll(ctx, s); err != nil {
		return nil, err
	}
	if err := out.Flush(); err != nil {
		return nil, err
	}
	return p, p.resolve(ctx)
}

func (p *pack) readAll(ctx context.Context, s *packStream) error {
	var head [12]byte
	if _, err := io.ReadFull(s, head[:]); err != nil {
		return fmt.Errorf("pack: %w", noEOF(err))
	}
	version, count := binary.BigEndian.Uint32(head[4:]), binary.BigEndian.Uint32(head[8:])
	if string(head[:4]) != "PACK" || (version != 2 && version != 3) {
		return errPack
	}
	if int64(count) > int64(p.limit.Objects) {
		return fmt.Errorf("the pack has %d objects, more than %d", count, p.limit.Objects)
	}
	inflate := &inflater{}
	for range count {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		o, err := p.readObject(s, inflate)
		if err != nil {
			return err
		}
		if !o.delta {
			p.byID[o.id] = len(p.packed)
		}
		p.packed = append(p.packed, o)
	}
	s.settle()
	want, err := s.sum.oid()
	if err != nil {
		return err
	}
	s.sum = checksum{discard{s.sum}}
	got := make([]byte, p.size)
	if _, err := io.ReadFull(s, got); err != nil {
		return fmt.Errorf("pack: %w", noEOF(err))
	}
	if oid(got) != want {
		return errPack
	}
	p.sum = want
	s.settle()
	if s.pos < s.end {
		return errPack // something follows
	}
	return nil
}

// readObject reads one object through, and hashes it unless it is a delta.
func (p *pack) readObject(s *packStream, inflate *inflater) (packed, error) {
	o := packed{at: s.offset()}
	s.startCRC()
	typ, length, err := readObjectHeader(s)
	if err != nil {
		return o, err
	}
	o.typ, o.length, o.base = typ, length, -1
	switch typ {
	case commitObject, treeObject, blobObject, tagObject:
	case ofsDelta:
		back, err := readOffset(s)
		if err != nil {
			return o, err
		}
		i, ok := slices.BinarySearchFunc(p.packed, o.at-back, func(e packed, at int64) int { return cmp.Compare(e.at, at) })
		if !ok {
			return o, errPack
		}
		o.base, o.delta = i, true
	case refDelta:
		id := make([]byte, p.size)
		if _, err := io.ReadFull(s, id); err != nil {
			return o, noEOF(err)
		}
		o.baseID, o.delta = oid(id), true
	default:
		return o, errPack
	}
	if (o.delta || typ != blobObject) && length > p.limit.Object {
		return o, fmt.Errorf("a %v of %d bytes, more than %d", typ, length, p.limit.Object)
	}
	if length > p.limit.Bytes {
		return o, fmt.Errorf("a %v of %d bytes, more than %d", typ, length, p.limit.Bytes)
	}
	o.body = s.offset()
	sum := newChecksum(p.size)
	var to io.Writer = io.Discard
	if !o.delta {
		fmt.Fprintf(sum, "%v %d\x00", typ, length)
		to = sum
	}
	if err := inflate.copy(to, s, length); err != nil {
		return o, err
	}
	o.crc = s.endCRC()
	if !o.delta {
		o.id, err = sum.oid()
	}
	return o, err
}

func readObjectHeader(r io.ByteReader) (objectType, int64, error) {
	b, err := r.ReadByte()
	if err != nil {
		return 0, 0, noEOF(err)
	}
	typ, length := objectType(b>>4&7), int64(b&15)
	for shift := 4; b&0x80 != 0; shift += 7 {
		if b, err = r.ReadByte(); err != nil {
			return 0, 0, noEOF(err)
		}
		if shift > 53 {
			return 0, 0, errPack
		}
		length |= int64(b&0x7f) << shift
	}
	return typ, length, nil
}

func readOffset(r io.ByteReader) (int64, error) {
	b, err := r.ReadByte()
	if err != nil {
		return 0, noEOF(err)
	}
	n := int64(b & 0x7f)
	for b&0x80 != 0 {
		if b, err = r.ReadByte(); err != nil {
			return 0, noEOF(err)
		}
		if n > 1<<50 {
			return 0, errPack
		}
		n = (n+1)<<7 | int64(b&0x7f)
	}
	return n, nil
}

// resolve finds out what the deltas make, base before delta, depth first, so that a base is mostly still in the cache.
func (p *pack) resolve(ctx context.Context) error {
	onto := map[int][]int{}    // deltas by their base
	waiting := map[oid][]int{} // by the name of a base that is not known yet
	var next []int
	for i := len(p.packed) - 1; i >= 0; i-- {
		switch o := &p.packed[i]; {
		case !o.delta:
			next = append(next, i)
		case o.base >= 0:
			onto[o.base] = append(onto[o.base], i)
		default:
			waiting[o.baseID] = append(waiting[o.baseID], i)
		}
	}
	for len(next) > 0 {
		i := next[len(next)-1]
		next = next[:len(next)-1]
		o := &p.packed[i]
		if o.delta {
			if err := ctx.Err(); err != nil {
				return context.Cause(ctx)
			}
			o.typ = p.packed[o.base].typ
			content, err := p.content(i)
			if err != nil {
				return err
			}
			sum := newChecksum(p.size)
			fmt.Fprintf(sum, "%v %d\x00", o.typ, len(content))
			sum.Write(content)
			if o.id, err = sum.oid(); err != nil {
				return err
			}
			p.byID[o.id] = i
		}
		for _, child := range waiting[o.id] {
			p.packed[child].base = i
		}
		next = append(append(next, onto[i]...), waiting[o.id]...)
		delete(waiting, o.id)
	}
	for _, o := range p.packed {
		if o.id == "" {
			return errPack // a delta onto something that is not here
		}
	}
	return nil
}

// content is the data of an object that has to be in memory. The caller must not change it.
func (p *pack) content(i int) ([]byte, error) {
	var deltas []int
	for p.packed[i].delta && p.cache[i] == nil {
		deltas = append(deltas, i)
		i = p.packed[i].base
	}
	content := p.cache[i]
	if content == nil {
		var err error
		if content, err = p.inflate(i); err != nil {
			return nil, err
		}
		p.keep(i, content)
	}
	for _, d := range slices.Backward(deltas) {
		delta, err := p.inflate(d)
		if err != nil {
			return nil, err
		}
		if content, err = applyDelta(content, delta, p.limit.Object); err != nil {
			return nil, err
		}
		p.keep(d, content)
	}
	return content, nil
}

func (p *pack) keep(i int, content []byte) {
	if int64(len(content)) > cacheWeight/4 || p.cache[i] != nil || len(content) == 0 {
		return
	}
	p.cache[i] = content
	p.cached = append(p.cached, i)
	p.weight += int64(len(content))
	for p.weight > cacheWeight {
		p.weight -= int64(len(p.cache[p.cached[0]]))
		delete(p.cache, p.cached[0])
		p.cached = p.cached[1:]
	}
}

func (p *pack) inflate(i int) ([]byte, error) {
	o := p.packed[i]
	if o.length > p.limit.Object {
		return nil, fmt.Errorf("a %v of %d bytes is too large to be the base of a delta", o.typ, o.length)
	}
	var b bytes.Buffer
	b.Grow(int(o.length))
	if err := p.copyTo(&b, o); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

func (p *pack) copyTo(w io.Writer, o packed) error {
	r := bufio.NewReaderSize(io.NewSectionReader(p.f, o.body, 1<<62-o.body), 32<<10)
	return (&inflater{}).copy(w, r, o.length)
}

// read is an object as a whole, of the type that is expected.
func (p *pack) read(id oid, want objectType) ([]byte, error) {
	i, ok := p.byID[id]
	if !ok {
		return nil, fmt.Errorf("the server did not send %v %v", want, id)
	}
	if got := p.packed[i].typ; got != want {
		return nil, fmt.Errorf("%v is a %v, not a %v", id, got, want)
	}
	return p.content(i)
}

// write streams a blob.
func (p *pack) write(w io.Writer, id oid) (int64, error) {
	i, ok := p.byID[id]
	if !ok || p.packed[i].typ != blobObject {
		return 0, fmt.Errorf("the server did not send blob %v", id)
	}
	if o := p.packed[i]; !o.delta {
		return o.length, p.copyTo(w, o)
	}
	content, err := p.content(i)
	if err != nil {
		return 0, err
	}
	_, err = w.Write(content)
	return int64(len(content)), err
}

// applyDelta makes the object that a delta describes: parts of the base, and bytes of its own.
func applyDelta(base, delta []byte, limit int64) ([]byte, error) {
	from, n := binary.Uvarint(delta)
	if n <= 0 || from != uint64(len(base)) {
		return nil, errPack
	}
	delta = delta[n:]
	length, n := binary.Uvarint(delta)
	if n <= 0 {
		return nil, errPack
	}
	if length > uint64(limit) {
		return nil, fmt.Errorf("an object of %d bytes, more than %d", length, limit)
	}
	delta = delta[n:]
	out := make([]byte, 0, length)
	for len(delta) > 0 {
		op := delta[0]
		delta = delta[1:]
		if op == 0 {
			return nil, errPack
		}
		if op&0x80 == 0 {
			if len(delta) < int(op) || uint64(len(out))+uint64(op) > length {
				return nil, errPack
			}
			out = append(out, delta[:op]...)
			delta = delta[op:]
			continue
		}
		var arg [7]uint64
		for i := range arg {
			if op&(1<<i) != 0 {
				if len(delta) == 0 {
					return nil, errPack
				}
				arg[i], delta = uint64(delta[0]), delta[1:]
			}
		}
		at := arg[0] | arg[1]<<8 | arg[2]<<16 | arg[3]<<24
		size := arg[4] | arg[5]<<8 | arg[6]<<16
		if size == 0 {
			size = 0x10000
		}
		if at+size > uint64(len(base)) || uint64(len(out))+size > length {
			return nil, errPack
		}
		out = append(out, base[at:at+size]...)
	}
	if uint64(len(out)) != length {
		return nil, errPack
	}
	return out, nil
}

// inflater keeps zlib's tables from object to object.
type inflater struct{ z io.ReadCloser }

// copy writes exactly length bytes of the compressed data at from, and reads no byte beyond them.
func (i *inflater) copy(w io.Writer, from interface {
	io.Reader
	io.ByteReader
}, length int64) error {
	var err error
	if i.z == nil {
		i.z, err = zlib.NewReader(from)
	} else {
		err = i.z.(zlib.Resetter).Reset(from, nil)
	}
	if err != nil {
		return fmt.Errorf("pack: %w", noEOF(err))
	}
	n, err := io.Copy(w, io.LimitReader(i.z, length+1)) // one more, so that the checksum is read
	if err != nil {
		return fmt.Errorf("pack: %w", noEOF(err))
	}
	if n != length {
		return errPack
	}
	return nil
}

// packStream copies what is read of it to a file, and keeps two checksums of it: of everything, and of one object.
type packStream struct {
	from     io.Reader
	to       io.Writer
	sum      checksum
	crc      hash.Hash32
	limit    int64
	buf      []byte
	pos, end int
	summed   int   // up to where in buf the checksums are
	base     int64 // offset of buf[0] in the stream
}

func (s *packStream) offset() int64 { return s.base + int64(s.pos) }

func (s *packStream) settle() {
	s.sum.Write(s.buf[s.summed:s.pos])
	s.crc.Write(s.buf[s.summed:s.pos])
	s.summed = s.pos
}

func (s *packStream) startCRC()      { s.settle(); s.crc.Reset() }
func (s *packStream) endCRC() uint32 { s.settle(); return s.crc.Sum32() }

func (s *packStream) fill() error {
	s.settle()
	s.base += int64(s.end)
	s.pos, s.end, s.summed = 0, 0, 0
	if s.base > s.limit {
		return fmt.Errorf("the pack is larger than %d bytes", s.limit)
	}
	for s.end == 0 {
		n, err := s.from.Read(s.buf)
		if n == 0 && err != nil {
			return err
		}
		s.end = n
	}
	if _, err := s.to.Write(s.buf[:s.end]); err != nil {
		return err
	}
	return nil
}

func (s *packStream) ReadByte() (byte, error) {
	if s.pos == s.end {
		if err := s.fill(); err != nil {
			return 0, err
		}
	}
	s.pos++
	return s.buf[s.pos-1], nil
}

func (s *packStream) Read(b []byte) (int, error) {
	if s.pos == s.end {
		if err := s.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(b, s.buf[s.pos:s.end])
	s.pos += n
	return n, nil
}

type discard struct{ hash.Hash }

func (discard) Write(b []byte) (int, error) { return len(b), nil }

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// index is the .idx file that lets git find objects in the pack.
func (p *pack) index() ([]byte, error) {
	order := make([]int, len(p.packed))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Compare(p.packed[a].id, p.packed[b].id) })
	var fan [256]uint32
	for _, o := range p.packed {
		fan[o.id[0]]++
	}
	b := append([]byte("\377tOc"), 0, 0, 0, 2)
	var total uint32
	for _, n := range fan {
		total += n
		b = binary.BigEndian.AppendUint32(b, total)
	}
	for _, i := range order {
		b = append(b, p.packed[i].id...)
	}
	for _, i := range order {
		b = binary.BigEndian.AppendUint32(b, p.packed[i].crc)
	}
	var far []byte
	for _, i := range order {
		at := uint64(p.packed[i].at)
		if at < 1<<31 {
			b = binary.BigEndian.AppendUint32(b, uint32(at))
			continue
		}
		b = binary.BigEndian.AppendUint32(b, 1<<31|uint32(len(far)/8))
		far = binary.BigEndian.AppendUint64(far, at)
	}
	b = append(append(b, far...), p.sum...)
	return appendChecksum(b, p.size)
}

func appendChecksum(b []byte, size int) ([]byte, error) {
	sum := newChecksum(size)
	sum.Write(b)
	id, err := sum.oid()
	return append(b, id...), err
}
