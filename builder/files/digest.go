package files

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"io"
	"os"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/owner"
)

// Digest is the content of what c copies from t: the paths as they will be below the destination, types, modes,
// owners, link targets, bytes and attributes as the copy will have them, and no times. Where c sets owners or modes
// itself, those of the source do not count, and neither does the look of a directory of which only the contents are
// copied.
//
// Equal digests mean that the copies are equal over any destination. c itself is no part of the digest. fc remembers
// the content of files between calls; nil remembers nothing.
func Digest(ctx context.Context, t Tree, c plan.Copy, fc *HashCache) (digest.Digest, error) {
	return digestTree(ctx, t, c, fc, nil)
}

func digestTree(ctx context.Context, t Tree, c plan.Copy, fc *HashCache, list *lister) (digest.Digest, error) {
	src, err := openSource(t)
	if err != nil {
		return "", err
	}
	defer src.close()
	sel, err := newSelection(src, c)
	if err != nil {
		return "", err
	}
	h := newHasher(c, fc, list)
	err = sel.starts(func(s start) error {
		h.begin(s)
		return sel.walk(ctx, s, h)
	})
	if err != nil {
		return "", err
	}
	return digest.NewDigest(digest.SHA256, h.sum), nil
}

// hasher is the visitor that digests what the copier would make.
type hasher struct {
	copy  plan.Copy
	cache *HashCache
	sum   hash.Hash
	list  *lister // hears the same
}

// digestVersion changes when the same selection gets another digest.
const digestVersion = "files 1"

func newHasher(c plan.Copy, fc *HashCache, list *lister) *hasher {
	h := &hasher{copy: c, cache: fc, sum: sha256.New(), list: list}
	h.str(digestVersion)
	return h
}

// str adds a string with its length, so that no two lists of strings look the same.
func (h *hasher) str(s string) {
	h.num(uint64(len(s)))
	io.WriteString(h.sum, s)
	h.list.write(s)
}

func (h *hasher) num(n uint64) {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], n)
	h.sum.Write(b[:])
	h.list.write(string(b[:]))
}

func (h *hasher) begin(s start) {
	h.list.begin(s)
	h.str("start")
	if h.copy.ContentsOnly && s.isDir() {
		h.str("contents")
		return
	}
	h.str(s.base())
}

func (h *hasher) enter(e *entry) error {
	h.str("entry")
	h.str(e.rel)
	if e.rel == "" && e.isDir() && h.copy.ContentsOnly {
		h.num(uint64(e.kind()))
		return nil
	}
	h.list.enter(e.rel)
	defer h.list.left()
	h.num(uint64(e.kind()))
	xattrs, recorded, err := h.cache.xattrs(e)
	if err != nil {
		return err
	}
	h.mode(e)
	if h.copy.Owner == nil {
		h.num(uint64(e.st.Uid))
		h.num(uint64(e.st.Gid))
		h.num(uint64(recorded.UID))
		h.num(uint64(recorded.GID))
	}
	h.num(uint64(len(xattrs)))
	for _, x := range xattrs {
		h.str(x.name)
		h.str(x.value)
	}
	h.list.looked()
	return h.content(e, len(xattrs) == 0 && recorded == (owner.IDs{}))
}

func (h *hasher) mode(e *entry) {
	if e.kind() == unix.S_IFLNK {
		return
	}
	h.num(uint64(modeBits(e.mode)))
	if e.implied {
		// Over an existing directory it is the source's own mode that counts.
		h.str("implied")
		h.num(uint64(modeBits(statMode(&e.st))))
	}
}

func (h *hasher) content(e *entry, plain bool) error {
	switch e.kind() {
	case unix.S_IFREG:
		if e.twin != "" {
			h.str("link")
			h.str(e.twin)
			return nil
		}
		sum, err := h.cache.hash(e, plain)
		h.str(string(sum[:]))
		return err
	case unix.S_IFLNK:
		to, err := e.link()
		h.str(to)
		return err
	case unix.S_IFCHR, unix.S_IFBLK:
		h.num(e.st.Rdev)
	}
	return nil
}

func (h *hasher) leave(*entry) error { return nil }

// hashFile is the SHA-256 of a file of about that size.
func hashFile(f *os.File, size int64) (sum [sha256.Size]byte, err error) {
	const small, large = 1 << 10, 128 << 10
	h := sha256.New()
	if _, err := io.CopyBuffer(h, onlyReader{f}, make([]byte, max(small, min(size+1, large)))); err != nil {
		return sum, bare(err)
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}

// onlyReader keeps io.CopyBuffer from using a file's own WriteTo, which would not use our buffer.
type onlyReader struct{ io.Reader }
