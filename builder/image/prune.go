package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cooper-build/cooper/snapshot/lease"
)

const quarantineDir = ".quarantine"

// A StoredBlob is a blob as a file.
type StoredBlob struct {
	Digest      digest.Digest
	Disk, Bytes int64
	Written     time.Time
	InUse       bool // by a running process; that may have changed when you read it
	Reachable   bool // from index.json
}

// Blobs lists the blobs of a store.
func (l *Layout) Blobs() ([]StoredBlob, error) {
	var all []StoredBlob
	err := lease.Exclude(l.leases(), func(used map[string]bool) error {
		_, reachable, err := l.reachable(nil, nil, map[digest.Digest][]ocispec.Descriptor{})
		if err != nil {
			return err
		}
		entries, err := fs.ReadDir(l.root.FS(), blobsDir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			d := digest.Digest("sha256:" + e.Name())
			if _, err := hexOf(d); err != nil {
				continue // verify tells
			}
			info, err := e.Info()
			if err != nil {
				continue
			}
			b := StoredBlob{Digest: d, Bytes: info.Size(), Written: info.ModTime(), InUse: used[e.Name()], Reachable: reachable[d]}
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				b.Disk = st.Blocks * 512
			}
			all = append(all, b)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list blobs: %w", err)
	}
	return all, nil
}

func (l *Layout) leases() string { return filepath.Join(l.dir, leasesDir) }

// reachable returns what index.json leads to. For an index that is as known, that is known.
func (l *Layout) reachable(known []byte, was map[digest.Digest]bool, read map[digest.Digest][]ocispec.Descriptor) ([]byte, map[digest.Digest]bool, error) {
	stored, err := l.readIndex()
	raw := stored.raw
	if errors.Is(err, fs.ErrNotExist) {
		return nil, map[digest.Digest]bool{}, nil
	}
	if err != nil {
		return nil, nil, err
	}
	if known != nil && bytes.Equal(raw, known) {
		return known, was, nil
	}
	idx, err := parseIndex(raw)
	if err != nil {
		// Nothing must be removed because the list of what is needed cannot be read.
		return nil, nil, fmt.Errorf("%s: %w", ocispec.ImageIndexFile, err)
	}
	led, err := l.follow(idx.Manifests, read)
	return raw, led, err
}

// follow returns what some descriptors lead to, themselves included. A blob that is missing or broken leads nowhere; what it
// once led to cannot be used. What a manifest says is kept in read, as it never changes: an index is followed again after
// every image that leaves it.
func (l *Layout) follow(todo []ocispec.Descriptor, read map[digest.Digest][]ocispec.Descriptor) (map[digest.Digest]bool, error) {
	seen := map[digest.Digest]bool{}
	for ; len(todo) > 0; todo = todo[1:] {
		d := todo[0]
		if seen[d.Digest] {
			continue
		}
		seen[d.Digest] = true
		if !isManifest(d.MediaType) && !isIndex(d.MediaType) {
			continue
		}
		below, ok := read[d.Digest]
		if !ok {
			doc, err := l.peek(d)
			var broken *ContentError
			if notFound(err) || errors.As(err, &broken) {
				continue
			}
			if err != nil {
				return nil, err
			}
			if below, err = children(doc, d.MediaType); err != nil {
				continue
			}
			read[d.Digest] = below
		}
		todo = append(todo, below...)
	}
	return seen, nil
}

// peek reads a manifest without using it.
func (l *Layout) peek(d ocispec.Descriptor) ([]byte, error) {
	f, err := l.openUnused(d)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAll(f, d, maxManifest)
}

// A Remover removes blobs.
type Remover struct {
	layout    *Layout
	index     []byte // what reachable was found in
	reachable map[digest.Digest]bool
	read      map[digest.Digest][]ocispec.Descriptor
}

// Remover returns a Remover.
func (l *Layout) Remover() *Remover {
	return &Remover{layout: l, read: map[digest.Digest][]ocispec.Descriptor{}}
}

// Remove removes a blob that nobody uses and index.json does not reach. It reports false when it left it.
func (r *Remover) Remove(d digest.Digest) (bool, error) {
	hx, err := hexOf(d)
	if err != nil {
		return false, err
	}
	l := r.layout
	var gone string
	// The leases were read before index.json is: whoever enters a blob there has a lease until that is done.
	err = lease.Exclude(l.leases(), func(used map[string]bool) (err error) {
		if r.index, r.reachable, err = l.reachable(r.index, r.reachable, r.read); err != nil || used[hx] || r.reachable[d] {
			return err
		}
		gone = tempPrefix + randomName() // which anybody may remove
		err = l.root.Rename(blobsDir+"/"+hx, gone)
		if err != nil {
			gone = ""
		}
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return err
	})
	if err != nil {
		return false, fmt.Errorf("remove blob %s: %w", d, err)
	}
	if gone == "" {
		return false, nil
	}
	_ = l.root.Remove(markersDir + "/" + hx) // a mark without its blob says nothing
	if err := l.root.Remove(gone); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("remove blob %s: %w", d, err)
	}
	return true, nil
}

// Without returns what index.json would still lead to if some images were forgotten.
func (l *Layout) Without(images map[digest.Digest]bool) (map[digest.Digest]bool, error) {
	idx, err := l.Index()
	if err != nil {
		return nil, err
	}
	l.takeOut(idx, images)
	return l.follow(idx.Manifests, map[digest.Digest][]ocispec.Descriptor{})
}

// Forget takes an image with what is said about it out of index.json, unless somebody uses it: then it reports false.
func (l *Layout) Forget(image digest.Digest) (bool, error) {
	return l.forgetIf(image, func(*ocispec.Index) bool { return true })
}

// ForgetUntagged is Forget for an image that had no tag: when it has got one meanwhile, it stays.
func (l *Layout) ForgetUntagged(image digest.Digest) (bool, error) {
	return l.forgetIf(image, func(idx *ocispec.Index) bool {
		return !slices.ContainsFunc(idx.Manifests, func(d ocispec.Descriptor) bool {
			return d.Digest == image && d.Annotations[ocispec.AnnotationRefName] != ""
		})
	})
}

func (l *Layout) forgetIf(image digest.Digest, may func(*ocispec.Index) bool) (bool, error) {
	hx, err := hexOf(image)
	if err != nil {
		return false, err
	}
	var done bool
	err = l.Update(func(idx *ocispec.Index) error {
		var inUse bool
		if err := lease.Exclude(l.leases(), func(used map[string]bool) error { inUse = used[hx]; return nil }); err != nil || inUse || !may(idx) {
			return err
		}
		l.takeOut(idx, map[digest.Digest]bool{image: true})
		done = true
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("forget image %s: %w", image, err)
	}
	return done, nil
}

// takeOut takes images and what is said about them out of an index. What is said about a manifest that another image lists, too,
// stays.
func (l *Layout) takeOut(idx *ocispec.Index, images map[digest.Digest]bool) {
	gone, kept := map[digest.Digest]bool{}, map[digest.Digest]bool{}
	for _, d := range idx.Manifests {
		subjects := kept
		switch {
		case images[d.Digest]:
			subjects = gone
		case !isImageEntry(d) || isArtifactTag(d.Annotations[ocispec.AnnotationRefName]):
			continue
		}
		for _, s := range l.subjects(d) {
			subjects[s] = true
		}
	}
	maps.DeleteFunc(gone, func(s digest.Digest, _ bool) bool { return kept[s] })
	l.dropAbout(idx, gone)
	idx.Manifests = slices.DeleteFunc(idx.Manifests, func(d ocispec.Descriptor) bool { return images[d.Digest] })
}

// trusting reads a blob, and moves it away when its bytes are wrong.
func (l *Layout) trusting(f *os.File, d ocispec.Descriptor) io.Reader {
	if !l.own {
		return verify(f, d)
	}
	return &doubter{verifier: verify(f, d), layout: l, file: f}
}

type doubter struct {
	*verifier
	layout *Layout
	file   *os.File
}

func (r *doubter) Read(p []byte) (int, error) {
	told := r.err != nil
	n, err := r.verifier.Read(p)
	var wrong *ContentError
	if !told && errors.As(err, &wrong) && r.n == r.want.Size {
		if fi, statErr := r.file.Stat(); statErr == nil && fi.Size() == r.want.Size { // else the descriptor is wrong, or it is being truncated
			r.layout.quarantine(r.want.Digest, fi)
		}
	}
	return n, err
}

// quarantine moves a blob with wrong bytes out of the way, so that it is missing and made again. Nothing is lost by
// that, and what cannot be moved is still not believed.
func (l *Layout) quarantine(d digest.Digest, was fs.FileInfo) {
	hx := d.Encoded()
	if err := l.mkdir(quarantineDir); err != nil {
		return
	}
	l.mu.Lock()
	delete(l.verified, d)
	l.mu.Unlock()
	_ = l.root.Remove(markersDir + "/" + hx)
	name, to := blobsDir+"/"+hx, quarantineDir+"/"+hx+"-"+randomName()
	if l.root.Rename(name, to) != nil {
		return
	}
	// Somebody may have put a good one there in the meantime.
	if moved, err := l.root.Lstat(to); err == nil && !os.SameFile(moved, was) {
		_ = l.root.Rename(to, name)
	}
}

// Quarantine lists the blobs that were found with wrong bytes and moved away.
func (l *Layout) Quarantine() ([]StoredBlob, error) {
	entries, err := fs.ReadDir(l.root.FS(), quarantineDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list quarantine: %w", err)
	}
	var all []StoredBlob
	for _, e := range entries {
		hx, _, _ := strings.Cut(e.Name(), "-")
		if info, err := e.Info(); err == nil {
			all = append(all, StoredBlob{Digest: digest.Digest("sha256:" + hx), Disk: info.Size(), Bytes: info.Size(), Written: info.ModTime()})
		}
	}
	return all, nil
}

// EmptyQuarantine removes them.
func (l *Layout) EmptyQuarantine() error {
	if err := l.root.RemoveAll(quarantineDir); err != nil {
		return fmt.Errorf("empty quarantine: %w", err)
	}
	return nil
}
