package files

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/owner"
)

// HashCache remembers what files contain, so that an unchanged context is looked at and not read. A file is known by
// its device, inode, size and both times of change: nothing but a wrong clock brings another content with the same.
// It may be used by several goroutines, and a nil *HashCache works and remembers nothing.
type HashCache struct {
	now func() time.Time

	mu      sync.Mutex
	known   map[inode]known
	changed bool
}

// known is what is remembered of one file.
type known struct {
	size         int64
	ctime, mtime unix.Timespec
	sum          [sha256.Size]byte
	// plain says that it has no extended attribute that a copy would carry. Setting one changes ctime.
	plain bool
	// idle is for how many saves nobody asked for it.
	idle uint8
}

const (
	// settled is how long ago a file must have changed (ctime, which nobody can set) to be remembered: one that changes
	// twice within the grain of its times looks the same. ext4 has 4 ms, FAT and old NFS servers 2 s.
	settled = 2 * time.Second
	// maxIdle is after how many saves a file that nobody asks for is forgotten.
	maxIdle = 20

	cacheMagic = "cooper hashes 2\n"
	recordSize = 8*7 + sha256.Size + 2
)

// NewHashCache returns an empty cache.
func NewHashCache() *HashCache {
	return &HashCache{now: time.Now, known: map[inode]known{}}
}

// LoadHashCache returns the cache that Save wrote. Anything else, such as the file of another version or a damaged
// one, gives an empty cache: remembering is only a saving.
func LoadHashCache(saved []byte) *HashCache {
	c := NewHashCache()
	body, ok := bytes.CutPrefix(saved, []byte(cacheMagic))
	if !ok || len(body) < sha256.Size {
		return c
	}
	body, seal := body[:len(body)-sha256.Size], body[len(body)-sha256.Size:]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], seal) || len(body)%recordSize != 0 {
		return c
	}
	c.known = make(map[inode]known, len(body)/recordSize)
	for record := range slices.Chunk(body, recordSize) {
		id, k := decodeRecord(record)
		k.idle = min(k.idle, maxIdle) + 1
		c.known[id] = k
	}
	return c
}

// Save gives the bytes for LoadHashCache, unless nothing was learnt that is worth writing.
func (c *HashCache) Save() (saved []byte, changed bool) {
	if c == nil {
		return nil, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.changed {
		return nil, false
	}
	ids := slices.SortedFunc(maps.Keys(c.known), func(a, b inode) int {
		return cmp.Or(cmp.Compare(a.dev, b.dev), cmp.Compare(a.ino, b.ino))
	})
	out := append(make([]byte, 0, len(cacheMagic)+len(ids)*recordSize+sha256.Size), cacheMagic...)
	for _, id := range ids {
		if k := c.known[id]; k.idle <= maxIdle {
			out = appendRecord(out, id, k)
		}
	}
	seal := sha256.Sum256(out[len(cacheMagic):])
	return append(out, seal[:]...), true
}

func appendRecord(b []byte, id inode, k known) []byte {
	for _, n := range []uint64{
		id.dev, id.ino, uint64(k.size), uint64(k.ctime.Sec), uint64(k.ctime.Nsec), uint64(k.mtime.Sec), uint64(k.mtime.Nsec),
	} {
		b = binary.BigEndian.AppendUint64(b, n)
	}
	plain := byte(0)
	if k.plain {
		plain = 1
	}
	return append(append(b, k.sum[:]...), plain, k.idle)
}

func decodeRecord(b []byte) (inode, known) {
	var n [7]uint64
	for i := range n {
		n[i] = binary.BigEndian.Uint64(b[i*8:])
	}
	rest := b[len(n)*8:]
	return inode{n[0], n[1]}, known{
		size:  int64(n[2]),
		ctime: unix.Timespec{Sec: int64(n[3]), Nsec: int64(n[4])},
		mtime: unix.Timespec{Sec: int64(n[5]), Nsec: int64(n[6])},
		sum:   [sha256.Size]byte(rest),
		plain: rest[sha256.Size] == 1,
		idle:  rest[sha256.Size+1],
	}
}

// xattrs is that of e, which is not asked if it is known to be plain.
func (c *HashCache) xattrs(e *entry) ([]xattr, owner.IDs, error) {
	if k, ok := c.lookup(&e.st); ok && k.plain {
		return nil, owner.IDs{}, nil
	}
	return e.xattrs()
}

// hash is the SHA-256 of the regular file e. plain says what its attributes were since the walk met it.
func (c *HashCache) hash(e *entry, plain bool) ([sha256.Size]byte, error) {
	if k, ok := c.lookup(&e.st); ok {
		return k.sum, nil
	}
	f, err := e.open()
	if err != nil {
		return [sha256.Size]byte{}, err
	}
	defer f.Close()
	var before, after unix.Stat_t
	start := c.time()
	if err := unix.Fstat(int(f.Fd()), &before); err != nil {
		return [sha256.Size]byte{}, failed("read", e.path, err)
	}
	sum, err := hashFile(f, before.Size)
	if err != nil {
		return sum, failed("read", e.path, err)
	}
	if err := unix.Fstat(int(f.Fd()), &after); err != nil {
		return sum, failed("read", e.path, err)
	}
	if same(&before, &after) && start.Sub(time.Unix(after.Ctim.Unix())) >= settled {
		c.remember(&after, sum, plain && same(&e.st, &after))
	}
	return sum, nil
}

func same(a, b *unix.Stat_t) bool {
	return a.Dev == b.Dev && a.Ino == b.Ino && a.Size == b.Size && a.Ctim == b.Ctim && a.Mtim == b.Mtim
}

func (c *HashCache) time() time.Time {
	if c == nil {
		return time.Time{}
	}
	return c.now()
}

func (c *HashCache) lookup(st *unix.Stat_t) (known, bool) {
	if c == nil {
		return known{}, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	id := inode{st.Dev, st.Ino}
	k, ok := c.known[id]
	if !ok || k.size != st.Size || k.ctime != st.Ctim || k.mtime != st.Mtim {
		return known{}, false
	}
	if k.idle > 0 {
		k.idle = 0
		c.known[id] = k
	}
	return k, true
}

func (c *HashCache) remember(st *unix.Stat_t, sum [sha256.Size]byte, plain bool) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changed = true
	c.known[inode{st.Dev, st.Ino}] = known{size: st.Size, ctime: st.Ctim, mtime: st.Mtim, sum: sum, plain: plain}
}
