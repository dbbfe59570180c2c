package snapshot

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/snapshot/layer"
	"github.com/cooper-build/cooper/snapshot/lease"
)

// Damage is something in the store that is not as docs/store.md says.
type Damage struct {
	Where  string // the file or directory, relative to the store
	What   string
	Repair string // what was done about it; empty: nothing, or nothing yet
}

// digestRecord says what a change set was when it was exported.
type digestRecord struct {
	Made   string        `json:"made,omitempty"` // of the snapshot
	Writer string        `json:"writer"`         // of the layer: another one may give other bytes
	Epoch  *time.Time    `json:"epoch,omitempty"`
	DiffID digest.Digest `json:"diffID"`
}

// SetDigest notes the DiffID of a snapshot's own change set as writer exported it, so that Verify can compare.
func (s *Store) SetDigest(id ID, writer string, epoch *time.Time, diffID digest.Digest) error {
	m, err := s.use(id)
	if err == nil {
		err = s.writeRecord(filepath.Join(s.dir(id), "digest"), "digest/"+string(id), digestRecord{m.Made, writer, epoch, diffID})
	}
	if err != nil {
		return fmt.Errorf("remember digest: %w", err)
	}
	return nil
}

// Proof says how to tell that a snapshot is what it was.
type Proof struct {
	// Writer is the present form of exported layers. Digests of another one cannot be compared.
	Writer string
	// Layer returns the uncompressed layer that an imported snapshot was made from, nil when it is not at hand. The
	// reader fails when the bytes are not those.
	Layer func(ctx context.Context, id ID) (io.ReadCloser, error)
}

// Verify reads everything that the store holds of this id map and the records of the others, and returns what is
// wrong. It must run inside the user namespace. With repair, what is broken is moved to quarantine, with all that
// stands on it; what running processes use is left.
func (s *Store) Verify(ctx context.Context, proof Proof, repair bool) ([]Damage, error) {
	v := &verification{store: s, proof: proof, broken: map[string]string{}}
	for _, check := range []func(context.Context) error{v.directories, v.snapshots, v.trees, v.records, v.caches, v.leftovers} {
		if err := check(ctx); err != nil {
			return v.found, fmt.Errorf("verify store: %w", err)
		}
	}
	if !repair {
		return v.found, nil
	}
	// What was looked at is not in use for that.
	if err := s.Close(); err != nil {
		return v.found, err
	}
	for i := range v.found {
		if v.repairs[i] == nil {
			continue
		}
		done, err := v.repairs[i]()
		if err != nil {
			return v.found, fmt.Errorf("repair %s: %w", v.found[i].Where, err)
		}
		v.found[i].Repair = done
	}
	return v.found, s.DropKeys()
}

type verification struct {
	store   *Store
	proof   Proof
	found   []Damage
	repairs []func() (string, error)
	broken  map[string]string // snapshots that are or stand on something broken, by map and id
	used    inUse
}

func (v *verification) tell(path, what string, repair func() (string, error)) {
	where, err := filepath.Rel(v.store.root, path)
	if err != nil {
		where = path
	}
	v.found = append(v.found, Damage{Where: where, What: what})
	v.repairs = append(v.repairs, repair)
}

// aside is the repair that moves a file to quarantine.
func (v *verification) aside(path string) func() (string, error) {
	return func() (string, error) { return v.store.setAside(path) }
}

// setAside moves something to quarantine. A lock on it would have said that it is in use.
func (s *Store) setAside(path string) (string, error) {
	if err := os.MkdirAll(s.path("quarantine"), 0o700); err != nil {
		return "", err
	}
	name := filepath.Base(path) + "-" + rand.Text()
	err := os.Rename(path, s.path("quarantine", name))
	if errors.Is(err, fs.ErrNotExist) {
		return "gone meanwhile", nil
	}
	return "moved to quarantine/" + name, err
}

func (v *verification) directories(context.Context) error {
	s := v.store
	known := []string{"snapshots", "trees", "keys", "facts", "cache", "leases", "tmp", "quarantine", "empty", "content"}
	for _, name := range append([]string{"."}, known...) {
		path := s.path(name)
		info, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // Open has made what is needed
		}
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		switch {
		case leadsToDirectory(path, info):
			v.tell(path, "it is a link: what it leads to may lie on another file system", nil)
		case !info.IsDir(): // never the store itself: Open went to where that really is
			v.tell(path, "it is no directory", v.aside(path))
		case int(st.Uid) != os.Geteuid():
			v.tell(path, fmt.Sprintf("it belongs to user %d, not to you", st.Uid), nil)
		case name != "content" && info.Mode().Perm() != 0o700, info.Mode().Perm()&0o022 != 0:
			v.tell(path, fmt.Sprintf("its mode is %v: others could reach what is in it", info.Mode().Perm()), func() (string, error) {
				return "mode restored", os.Chmod(path, 0o700)
			})
		}
	}
	entries, err := os.ReadDir(s.root)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if n := e.Name(); n != "format" && n != "usage" && n != lostAndFound && !slices.Contains(known, n) {
			v.tell(s.path(n), "it is not part of a store", v.aside(s.path(n)))
		}
	}
	var u usage
	if _, err := peekRecord(s.path("usage"), "usage", &u); absent(err) && !errors.Is(err, fs.ErrNotExist) {
		v.tell(s.path("usage"), err.Error(), v.aside(s.path("usage")))
	}
	shown, err := os.ReadDir(s.path("empty"))
	for _, e := range shown {
		v.tell(s.path("empty", e.Name()), "every step of every build would see it", v.aside(s.path("empty", e.Name())))
	}
	return err
}

// leadsToDirectory reports a link by which a store works as long as nobody moves it.
func leadsToDirectory(path string, info fs.FileInfo) bool {
	if info.Mode()&fs.ModeSymlink == 0 {
		return false
	}
	to, err := os.Stat(path)
	return err == nil && to.IsDir()
}

func (v *verification) snapshots(ctx context.Context) error {
	for _, idMap := range v.store.idMaps() {
		at := v.store.of(idMap)
		dirs, err := os.ReadDir(at.snapshots)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		metas := map[ID]meta{}
		for _, d := range dirs {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			id := ID(d.Name())
			m, what, err := v.form(at, id)
			if err != nil {
				return err
			}
			if what != "" {
				v.lose(at, id, what)
			} else {
				metas[id] = m
			}
		}
		v.spread(at, metas)
		if idMap != v.store.idMap {
			continue // its files may be hidden from us
		}
		for id, m := range metas {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if v.broken[leaseName(idMap, id)] != "" {
				continue
			}
			if _, err := v.store.use(id); err != nil {
				continue // not to be trusted, and not trusted: it was not synced, or stands on something that was made again
			}
			what, err := v.content(ctx, id, m)
			if err != nil {
				return fmt.Errorf("%s: %w", id, err)
			}
			if what != "" {
				v.lose(at, id, what)
			}
		}
		v.spread(at, metas)
	}
	return nil
}

// form checks what a snapshot is without reading its files.
func (v *verification) form(at *Store, id ID) (m meta, what string, err error) {
	if checkName(string(id)) != nil {
		return m, "its name is none of a snapshot", nil
	}
	_, err = peekRecord(filepath.Join(at.dir(id), "meta"), metaName(id), &m)
	if absent(err) {
		return m, "meta: " + err.Error(), nil
	}
	if err != nil {
		return m, "", err
	}
	info, err := os.Lstat(filepath.Join(at.dir(id), "fs"))
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
		return m, "its files are gone", nil
	}
	return m, "", err
}

// spread marks what stands on something that is broken or not there.
func (v *verification) spread(at *Store, metas map[ID]meta) {
	for again := true; again; {
		again = false
		for id, m := range metas {
			if v.broken[leaseName(at.idMap, id)] != "" {
				continue
			}
			for _, n := range m.needs() {
				_, there := metas[n.id]
				if why := v.broken[leaseName(at.idMap, n.id)]; why != "" || !there {
					v.lose(at, id, fmt.Sprintf("it stands on %s, which is broken or gone", n.id))
					again = true
					break
				}
			}
		}
	}
}

func (v *verification) lose(at *Store, id ID, what string) {
	v.broken[leaseName(at.idMap, id)] = what
	v.tell(at.dir(id), what, func() (done string, err error) {
		if v.used.store == nil {
			v.used.store = v.store
		}
		err = lease.Exclude(v.store.path("leases"), func(names map[string]bool) (err error) {
			if v.used.add(names); v.used.has(at.idMap, id) {
				return nil
			}
			done, err = v.store.setAside(at.dir(id))
			return err
		})
		return done, err
	})
}

// content compares the files of a snapshot with what is known of them.
func (v *verification) content(ctx context.Context, id ID, m meta) (what string, err error) {
	dir := filepath.Join(v.store.dir(id), "fs")
	if m.Disk != 0 {
		size, err := measure(dir)
		if err != nil {
			return "", err
		}
		if size.Bytes != m.Bytes {
			return fmt.Sprintf("its files have %d bytes, they had %d", size.Bytes, m.Bytes), nil
		}
	}
	var r digestRecord
	_, err = peekRecord(filepath.Join(v.store.dir(id), "digest"), "digest/"+string(id), &r)
	if err == nil && r.Made == m.Made && r.Writer == v.proof.Writer {
		h := sha256.New()
		if err := v.store.WriteLayer(ctx, id, h, layer.DiffOptions{Epoch: r.Epoch}); err != nil {
			return "", err
		}
		if got := asDigest(h); got != r.DiffID {
			return fmt.Sprintf("its layer is %s now, it was %s", got, r.DiffID), nil
		}
		return "", nil
	}
	if errors.Is(err, errNoRecord) {
		path := filepath.Join(v.store.dir(id), "digest")
		v.tell(path, err.Error(), v.aside(path))
	}
	if m.Made != "" || v.proof.Layer == nil {
		return "", nil
	}
	return v.again(ctx, id, m)
}

func asDigest(h hash.Hash) digest.Digest {
	return digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(h.Sum(nil)))
}

// again unpacks the layer of an imported snapshot once more and compares.
func (v *verification) again(ctx context.Context, id ID, m meta) (what string, err error) {
	stream, err := v.proof.Layer(ctx, id)
	if err != nil || stream == nil {
		return "", err
	}
	defer stream.Close()
	a, _, err := v.store.begin("")
	if err != nil {
		return "", err
	}
	defer a.Discard()
	u := &Unpacked{active: a}
	if u.implied, err = layer.Unpack(ctx, a.upper(), stream, layer.UnpackOptions{Single: v.store.single}); err != nil {
		return "", err
	}
	if err := u.land(m.Parent); err != nil {
		return "", err
	}
	if err := a.simplify(ctx); err != nil {
		return "", err
	}
	lower, err := v.store.layers(m.Parent)
	if err != nil {
		return "", err
	}
	var base string
	if len(lower) > 0 {
		base = lower[0]
	}
	var digests []digest.Digest
	for _, dir := range []string{a.upper(), filepath.Join(v.store.dir(id), "fs")} {
		h := sha256.New()
		if err := layer.Diff(ctx, dir, h, layer.DiffOptions{Single: v.store.single, Base: base}); err != nil {
			return "", err
		}
		digests = append(digests, asDigest(h))
	}
	if digests[0] != digests[1] {
		return "its files are not those of the layer that it was unpacked from", nil
	}
	return "", nil
}

// records checks keys and facts. What leads nowhere any more is no damage: prune may have been killed.
func (v *verification) records(context.Context) error {
	for _, idMap := range v.store.idMaps() {
		at := v.store.of(idMap)
		for _, kind := range []struct {
			dir, name string
			into      any
		}{{at.keys, "key/", &keyRecord{}}, {at.facts, "fact/", &factRecord[json.RawMessage]{}}} {
			err := eachEntry(kind.dir, func(file string, k Key) error {
				_, err := peekRecord(file, kind.name+string(k), kind.into)
				if errors.Is(err, fs.ErrNotExist) || !absent(err) {
					return err
				}
				if want, nameErr := entry(kind.dir, k); nameErr != nil || want != file {
					err = errors.New("its name is none of a key")
				}
				v.tell(file, err.Error(), v.aside(file))
				return nil
			})
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

func (v *verification) caches(context.Context) error {
	for _, idMap := range v.store.idMaps() {
		dirs, err := os.ReadDir(v.store.path("cache", idMap))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, d := range dirs {
			file := v.store.path("cache", idMap, d.Name(), "id")
			var label string
			_, err := peekRecord(file, "cache/"+d.Name(), &label)
			if err == nil && cacheHash(label) == d.Name() || errors.Is(err, fs.ErrNotExist) {
				continue
			}
			v.tell(file, "it does not say which cache mount this is", v.aside(file))
		}
	}
	return nil
}

// leftovers reports what lies in tmp although its maker is gone. Open could not remove it.
func (v *verification) leftovers(context.Context) error {
	guard, err := lockFile(v.store.path("tmp"), os.O_RDONLY, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer guard.Close()
	entries, err := os.ReadDir(v.store.path("tmp"))
	for _, e := range entries {
		path := v.store.path("tmp", e.Name())
		lock, lockErr := lockFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, unix.LOCK_EX|unix.LOCK_NB)
		if lockErr != nil {
			continue
		}
		lock.Close()
		what := "left by a process that is gone"
		if strings.HasPrefix(e.Name(), "p-") {
			what = "left by a prune that was killed"
		}
		v.tell(path, what, v.aside(path))
	}
	return err
}
