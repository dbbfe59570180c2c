package files

import (
	"bytes"
	"cmp"
	"compress/flate"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/fnv"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/cooper-build/cooper/builder/plan"
)

// A Listing says of everything that a copy selects where it lies and, in short sums, what it is: enough to tell later which
// file of a selection changed, and too little to learn what was in it. It proves nothing: that is what the digest does.
type Listing []Listed

// Listed is one entry of a Listing.
type Listed struct {
	Path    string // in the source, without a slash in front
	Look    uint32 // sum of type, mode, owner and attributes
	Content uint32 // sum of the bytes or the link target
	Folded  bool   // Path and all below it, which were too many to list
}

// maxListed is how many entries a listing has at most. The deepest directories are folded into one entry each when there
// are more.
const maxListed = 1 << 16

// DigestAndList is Digest, and lists what was read.
func DigestAndList(ctx context.Context, t Tree, c plan.Copy, fc *HashCache) (digest.Digest, Listing, error) {
	l := &lister{part: fnv.New32a()}
	d, err := digestTree(ctx, t, c, fc, l)
	if err != nil {
		return "", nil, err
	}
	slices.SortFunc(l.list, func(a, b Listed) int { return cmp.Compare(a.Path, b.Path) })
	return d, l.list.fold(maxListed), nil
}

// lister lists what a hasher hashes. nil lists nothing.
type lister struct {
	list Listing
	part hash.Hash32
	src  string
}

func (l *lister) begin(s start) {
	if l != nil {
		l.src = strings.TrimPrefix(path.Clean(s.src), "/")
	}
}

func (l *lister) write(s string) {
	if l != nil {
		io.WriteString(l.part, s) // never fails
	}
}

func (l *lister) enter(rel string) {
	if l != nil {
		l.part.Reset()
		l.list = append(l.list, Listed{Path: path.Join(l.src, rel)})
	}
}

// looked ends what an entry looks like; what is hashed until left is its content.
func (l *lister) looked() {
	if l != nil {
		l.list[len(l.list)-1].Look = l.part.Sum32()
		l.part.Reset()
	}
}

func (l *lister) left() {
	if l != nil {
		l.list[len(l.list)-1].Content = l.part.Sum32()
	}
}

// fold makes one entry of everything in a directory, deepest first, until at most limit are left.
func (l Listing) fold(limit int) Listing {
	for len(l) > limit {
		deepest := 0
		for _, e := range l {
			deepest = max(deepest, strings.Count(e.Path, "/"))
		}
		var out Listing
		at := map[string]int{}
		for _, e := range l {
			if strings.Count(e.Path, "/") < deepest || deepest == 0 && e.Path == "." {
				at[e.Path] = len(out)
				out = append(out, e)
				continue
			}
			above := path.Dir(e.Path)
			i, ok := at[above]
			if !ok {
				i = len(out)
				at[above] = i
				out = append(out, Listed{Path: above})
			}
			out[i].Folded = true
			out[i].Content = together(out[i].Content, e)
		}
		slices.SortFunc(out, func(a, b Listed) int { return cmp.Compare(a.Path, b.Path) })
		l = out
		if deepest == 0 {
			break
		}
	}
	return l
}

func together(sum uint32, e Listed) uint32 {
	h := fnv.New32a()
	fmt.Fprintf(h, "%d %s %d %d", sum, e.Path, e.Look, e.Content) // never fails
	return h.Sum32()
}

// listingMagic begins the saved form; a change of what is summed up changes it.
const listingMagic = "cooper listing 1\n"

// Save gives the bytes for LoadListing.
func (l Listing) Save() ([]byte, error) {
	out := bytes.NewBufferString(listingMagic)
	zip, err := flate.NewWriter(out, flate.BestSpeed)
	if err != nil {
		return nil, err
	}
	// Names compress well and sums do not, so they lie apart. What begins like the name before is not written again.
	var names, sums []byte
	last := ""
	for _, e := range l {
		shared := sharedPrefix(last, e.Path)
		names = binary.AppendUvarint(names, uint64(shared))
		names = binary.AppendUvarint(names, uint64(len(e.Path)-shared))
		names = append(names, e.Path[shared:]...)
		sums = binary.BigEndian.AppendUint32(sums, e.Look)
		sums = binary.BigEndian.AppendUint32(sums, e.Content)
		sums = append(sums, flag(e.Folded))
		last = e.Path
	}
	head := binary.AppendUvarint(nil, uint64(len(l)))
	head = binary.AppendUvarint(head, uint64(len(names)))
	for _, b := range [][]byte{head, names, sums} {
		if _, err := zip.Write(b); err != nil {
			return nil, err
		}
	}
	if err := zip.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

func flag(b bool) byte {
	if b {
		return 1
	}
	return 0
}

func sharedPrefix(a, b string) int {
	n := 0
	for n < min(len(a), len(b)) && a[n] == b[n] {
		n++
	}
	return n
}

var errListing = errors.New("not a listing")

// LoadListing gives back what Save was given.
func LoadListing(saved []byte) (Listing, error) {
	zipped, ok := bytes.CutPrefix(saved, []byte(listingMagic))
	if !ok {
		return nil, errListing
	}
	const most = 64 << 20 // of maxListed names, none longer than the system allows in practice
	raw, err := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(zipped)), most))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errListing, err)
	}
	r := bytes.NewReader(raw)
	count, err := binary.ReadUvarint(r)
	if err != nil || count > maxListed {
		return nil, errListing
	}
	length, err := binary.ReadUvarint(r)
	rest := raw[len(raw)-r.Len():]
	if err != nil || length > uint64(len(rest)) || uint64(len(rest))-length != 9*count {
		return nil, errListing
	}
	return decodeListing(int(count), rest[:length], rest[length:])
}

func decodeListing(count int, names, sums []byte) (Listing, error) {
	l := make(Listing, 0, count)
	last := ""
	for i := range count {
		shared, n := binary.Uvarint(names)
		if n <= 0 || shared > uint64(len(last)) {
			return nil, errListing
		}
		names = names[n:]
		own, n := binary.Uvarint(names)
		if n <= 0 || own > uint64(len(names)-n) {
			return nil, errListing
		}
		last = last[:shared] + string(names[n:n+int(own)])
		names = names[n+int(own):]
		s := sums[9*i:]
		l = append(l, Listed{last, binary.BigEndian.Uint32(s), binary.BigEndian.Uint32(s[4:]), s[8] != 0})
	}
	return l, nil
}

// A Change is one difference between two listings.
type Change struct {
	Path   string
	What   ChangeKind
	Folded bool // it is something below Path
}

// ChangeKind says how an entry differs.
type ChangeKind string

// The kinds of changes, as they are told.
const (
	FileAdded   ChangeKind = "added"
	FileRemoved ChangeKind = "removed"
	FileChanged ChangeKind = "changed"
	LookChanged ChangeKind = "changed its mode, owner or attributes"
)

// Changes lists what happened between the listing before and this one, by path. It is empty when one of them was folded
// further than the other, so that entries cannot be compared.
func (l Listing) Changes(before Listing) []Change {
	if !slices.Equal(l.folded(), before.folded()) {
		return nil
	}
	var all []Change
	for len(l) > 0 || len(before) > 0 {
		switch {
		case len(before) == 0 || len(l) > 0 && l[0].Path < before[0].Path:
			all = append(all, Change{l[0].Path, FileAdded, l[0].Folded})
			l = l[1:]
		case len(l) == 0 || before[0].Path < l[0].Path:
			all = append(all, Change{before[0].Path, FileRemoved, before[0].Folded})
			before = before[1:]
		default:
			if l[0].Content != before[0].Content {
				all = append(all, Change{l[0].Path, FileChanged, l[0].Folded})
			} else if l[0].Look != before[0].Look {
				all = append(all, Change{l[0].Path, LookChanged, l[0].Folded})
			}
			l, before = l[1:], before[1:]
		}
	}
	return all
}

func (l Listing) folded() []string {
	var paths []string
	for _, e := range l {
		if e.Folded {
			paths = append(paths, e.Path)
		}
	}
	return paths
}
