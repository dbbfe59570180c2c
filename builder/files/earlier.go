package files

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"maps"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/owner"
)

// Earlier is the result of the same copy at another time, frozen: a file that would be the same again becomes one more name
// of the one that is there. Nothing is ever written to either: overlay copies a file of a layer before it changes.
//
// A file is linked to the one that lies at its own path and nowhere else. So no tree ever shows one file at two paths that
// are not hard links in the image.
type Earlier struct {
	// Dir is the directory of what was made; empty if there is none.
	Dir string
	// Sums says what the files in Dir contain.
	Sums Sums
}

// Sums are the SHA-256 of files by path. Only files are in it that have one name, and nothing that stat does not show: no
// extended attributes, no recorded owner.
type Sums map[string][sha256.Size]byte

const sumsMagic = "cooper sums 1\n"

// Encode gives the bytes for DecodeSums.
func (s Sums) Encode() []byte {
	out := []byte(sumsMagic)
	for _, p := range slices.Sorted(maps.Keys(s)) {
		sum := s[p]
		out = append(append(append(out, p...), 0), sum[:]...)
	}
	return out
}

// DecodeSums returns what Encode was given, and nothing for anything else.
func DecodeSums(b []byte) Sums {
	b, ok := bytes.CutPrefix(b, []byte(sumsMagic))
	if !ok {
		return nil
	}
	s := Sums{}
	for len(b) > 0 {
		p, rest, ok := bytes.Cut(b, []byte{0})
		if !ok || len(rest) < sha256.Size {
			return nil
		}
		s[string(p)] = [sha256.Size]byte(rest)
		b = rest[sha256.Size:]
	}
	return s
}

// An again makes files again that an earlier copy has made, and notes what this one makes. A nil *again does nothing.
type again struct {
	root    int // of Earlier.Dir, or -1
	earlier Sums
	hashes  *HashCache

	mu      sync.Mutex
	made    Sums
	pending Pending
}

// Pending are files that were copied before it was known what they contain.
type Pending map[string]unix.Stat_t

// Resolve adds to sums what h knows of them by now.
func (p Pending) Resolve(h *HashCache, sums Sums) {
	for name, st := range p {
		if k, ok := h.lookup(&st); ok {
			sums[name] = k.sum
		}
	}
}

func openAgain(o Options) (*again, error) {
	if o.Made == nil {
		return nil, nil
	}
	a := &again{root: -1, earlier: o.Earlier.Sums, hashes: o.Hashes, made: o.Made, pending: o.Pending}
	if o.Earlier.Dir == "" {
		return a, nil
	}
	var err error
	a.root, err = unix.Open(o.Earlier.Dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	return a, err
}

func (a *again) close() {
	if a != nil && a.root >= 0 {
		unix.Close(a.root)
	}
}

// dir opens the earlier directory at a path, -1 if there is none.
func (a *again) dir(p string) int {
	if a == nil || a.root < 0 {
		return -1
	}
	fd, err := openBeneath(a.root, p, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return -1
	}
	return fd
}

// can reports whether an entry is one that can be made again.
func (a *again) can(e *entry, l look, single bool) bool {
	return a != nil && e.local && e.st.Nlink == 1 && len(l.xattrs) == 0 && l.mtime != nil && l.own != nil && (!single || *l.own == (ids{}))
}

// xattrs is that of e, which is not asked if that is known.
func (a *again) xattrs(e *entry) ([]xattr, owner.IDs, error) {
	if a == nil || !e.local {
		return e.xattrs()
	}
	return a.hashes.xattrs(e)
}

// link makes an entry a name of the earlier file at the same path, if that is what the copy would be. What it cannot do is
// to be copied.
func (c *copier) link(e *entry, l look, into *copiedDir) bool {
	from, name, to := into.earlier, c.name(e), c.to(e)
	was, ok := c.again.earlier[to]
	if from < 0 || !ok {
		return false
	}
	if k, known := c.again.hashes.lookup(&e.st); !known || k.sum != was {
		return false
	}
	st, err := lstatAt(from, name)
	if err != nil || st.Mode != unix.S_IFREG|modeBits(l.mode) || st.Size != e.st.Size || st.Mtim != *l.mtime ||
		int(st.Uid) != l.own.uid || int(st.Gid) != l.own.gid {
		return false
	}
	// It fails on a file with as many names as the file system allows (ext4: 65,000).
	if unix.Linkat(from, name, into.fd, name, 0) != nil {
		return false
	}
	c.again.mu.Lock()
	defer c.again.mu.Unlock()
	c.again.made[to] = was
	return true
}

// note remembers what an entry that was copied contains, if it is what the walk has seen, or, if that is not known yet, what to look for.
func (c *copier) note(e *entry, from int) error {
	var st unix.Stat_t
	if err := unix.Fstat(from, &st); err != nil {
		return errors.Join(errors.New("look at it again"), err)
	}
	if !same(&st, &e.st) {
		return nil
	}
	k, known := c.again.hashes.lookup(&st)
	c.again.mu.Lock()
	defer c.again.mu.Unlock()
	if known {
		c.again.made[c.to(e)] = k.sum
	} else if c.again.pending != nil {
		c.again.pending[c.to(e)] = st
	}
	return nil
}
