package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/snapshot/lease"
)

const (
	blobsDir    = "blobs/sha256"
	markersDir  = ".verified"
	leasesDir   = ".leases"
	maxManifest = 4 << 20
	maxConfig   = 8 << 20
	maxIndex    = 16 << 20 // index.json of a store with many tags
)

// A Layout is an OCI image layout: a directory of blobs named by digest and an index.json that names some of
// them. Any number of processes may use one at a time.
//
// A blob is written under a temporary name, synced and renamed, so a file below blobs/ is whole from the
// moment it exists. Before index.json leads to it its directory is synced, too. index.json is replaced the
// same way under a lock on the layout's directory. A killed process leaves at most temporary files in the layout's top directory, which nobody
// reads and the next CreateLayout removes.
//
// In the layout of a store, what was opened, found or written through a Layout stays until it is closed,
// whoever prunes meanwhile.
type Layout struct {
	folder
	dir string
	own bool // remember on disk which blobs were verified, and believe what is remembered

	blobs, markers *os.Root // of a store, held open because every step asks for some

	lease   *lease.Lease // on the blobs of a store; nil where nobody removes any
	written atomic.Int64

	mu       sync.Mutex
	verified map[digest.Digest]stamp
}

// OpenLayout opens a layout that must exist already. Nothing in it is believed: blobs are verified as they
// are read.
func OpenLayout(dir string) (*Layout, error) {
	l, err := open(dir)
	if err != nil {
		return nil, err
	}
	if err := l.checkVersion(); err != nil {
		l.Close()
		return nil, fmt.Errorf("OCI layout %s: %w", dir, err)
	}
	if _, err := l.Index(); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// CreateLayout opens the layout of a store, which belongs to the caller, and makes it when the directory is
// missing or empty. Blobs that were verified once are not hashed again until their file changes. A directory
// that holds anything but a layout is refused.
func CreateLayout(dir string) (*Layout, error) {
	l, err := create(dir, true)
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		err = &DamagedError{err}
	}
	if err != nil {
		return nil, err
	}
	at, err := filepath.Abs(dir)
	for _, sub := range []string{markersDir, leasesDir} {
		if err == nil {
			err = l.mkdir(sub)
		}
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	if l.blobs, err = l.root.OpenRoot(blobsDir); err == nil {
		l.markers, err = l.root.OpenRoot(markersDir)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("OCI layout: %w", err)
	}
	leases := filepath.Join(at, leasesDir)
	lease.Sweep(leases)
	l.lease = lease.New(leases)
	err = l.locked(func() error {
		idx, err := l.readIndex()
		if errors.Is(err, fs.ErrNotExist) {
			return l.writeIndex(emptyIndex())
		}
		if err == nil && (idx.damage != "" || idx.copyStale) {
			_, _ = l.mendIndex(idx) // where nothing can be written, the copy is read in its place all the same
		}
		return nil // whoever needs an index that cannot be read says so
	})
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("OCI layout %s: %w", dir, err)
	}
	return l, nil
}

// Close gives the directory back; blobs that are being read stay readable.
func (l *Layout) Close() error {
	err := l.root.Close()
	for _, dir := range []*os.Root{l.blobs, l.markers} {
		if dir != nil {
			err = errors.Join(err, dir.Close())
		}
	}
	if l.lease != nil {
		err = errors.Join(err, l.lease.Close())
	}
	return err
}

// Release ends every use of blobs through l so far: who lists them does not need them.
func (l *Layout) Release() error {
	if l.lease == nil {
		return nil
	}
	return l.lease.Close()
}

// Written returns how many bytes of blobs were added through l.
func (l *Layout) Written() int64 { return l.written.Load() }

// use says that this process needs a blob, until Close.
func (l *Layout) use(hx string) error {
	if l.lease == nil {
		return nil
	}
	return l.lease.Use(hx)
}

func open(dir string) (*Layout, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("OCI layout: %w", err)
	}
	return &Layout{folder: folder{root}, dir: dir, verified: map[digest.Digest]stamp{}}, nil
}

// create makes everything of a layout but its index.json: what has none yet shows no image to anybody.
// own says that it is that of a store.
func create(dir string, own bool) (*Layout, error) {
	if err := makeDirs(dir); err != nil {
		return nil, fmt.Errorf("OCI layout: %w", err)
	}
	l, err := open(dir)
	if err != nil {
		return nil, err
	}
	l.own = own
	// Under the lock, because another process may be making the same layout.
	if err := l.locked(l.prepare); err != nil {
		l.Close()
		return nil, fmt.Errorf("OCI layout %s: %w", dir, err)
	}
	return l, nil
}

func (l *Layout) prepare() error {
	err := l.checkVersion()
	switch {
	case err != nil && l.own && l.isStores():
		// It never says anything else there: what it says wrong is damage, and no reason to stop.
		err = l.writeVersion()
	case errors.Is(err, fs.ErrNotExist):
		if err = l.checkEmpty(); err == nil {
			err = l.writeVersion()
		}
	}
	if err != nil {
		return err
	}
	l.sweep()
	for _, dir := range []string{"blobs", blobsDir} {
		if err := l.mkdir(dir); err != nil {
			return err
		}
	}
	return nil
}

// isStores reports whether the directory has what only the layout of a store has.
func (l *Layout) isStores() bool {
	fi, err := l.root.Lstat(markersDir)
	return err == nil && fi.IsDir()
}

func (l *Layout) writeVersion() error {
	version, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	return l.replace(ocispec.ImageLayoutFile, version)
}

func (l *Layout) checkVersion() error {
	b, err := l.readSmall(ocispec.ImageLayoutFile, 64<<10)
	if err != nil {
		return err
	}
	var v ocispec.ImageLayout
	if err := json.Unmarshal(b, &v); err != nil {
		return fmt.Errorf("%s: %w", ocispec.ImageLayoutFile, err)
	}
	if v.Version != ocispec.ImageLayoutVersion {
		return fmt.Errorf("%s: version %q is not %s", ocispec.ImageLayoutFile, v.Version, ocispec.ImageLayoutVersion)
	}
	return nil
}

// A NotLayoutError refuses to write an OCI layout among files of another kind.
type NotLayoutError struct{ Entry string }

func (e *NotLayoutError) Error() string {
	return fmt.Sprintf("not an OCI layout: the directory holds %q", e.Entry)
}

// Hint names the next step.
func (e *NotLayoutError) Hint() string { return "name a new or an empty directory" }

// checkEmpty accepts what a process killed while it made the layout may leave.
func (l *Layout) checkEmpty() error {
	entries, err := fs.ReadDir(l.root.FS(), ".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tempPrefix) {
			return &NotLayoutError{e.Name()}
		}
	}
	return nil
}

func emptyIndex() *ocispec.Index {
	return &ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{},
	}
}

// Index returns what index.json says now.
func (l *Layout) Index() (*ocispec.Index, error) {
	stored, err := l.readIndex()
	if err != nil {
		return nil, fmt.Errorf("OCI layout %s: %w", l.dir, err)
	}
	idx, err := parseIndex(stored.raw)
	if err != nil {
		err = fmt.Errorf("OCI layout %s: %s: %w", l.dir, ocispec.ImageIndexFile, err)
		if l.own {
			err = &DamagedError{err}
		}
		return nil, err
	}
	return idx, nil
}

// A DamagedError says that a file of the store's own layout cannot be read.
type DamagedError struct{ error }

func (e *DamagedError) Unwrap() error { return e.error }

// Hint names the next step.
func (e *DamagedError) Hint() string {
	return "'cooper store verify --repair' moves it away and begins anew; images lose their names by that"
}

// Update changes index.json: f gets the present index, and what it leaves there becomes index.json in one
// step unless it returns an error. Other processes wait meanwhile, so f must be quick.
func (l *Layout) Update(f func(*ocispec.Index) error) error {
	return l.locked(func() error {
		idx, err := l.Index()
		if errors.Is(err, fs.ErrNotExist) {
			idx, err = emptyIndex(), nil
		}
		if err != nil {
			return err
		}
		if err := f(idx); err != nil {
			return err
		}
		return l.writeIndex(idx)
	})
}

func (l *Layout) writeIndex(idx *ocispec.Index) error {
	b, err := json.Marshal(idx)
	if err != nil {
		return err
	}
	if len(b) > maxIndex {
		return fmt.Errorf("%s would grow beyond %d bytes", ocispec.ImageIndexFile, maxIndex)
	}
	old, err := l.readSmall(ocispec.ImageIndexFile, maxIndex)
	same := err == nil && bytes.Equal(old, b)
	if same && l.own {
		return nil // a blob that a loss of power took from a store is made again
	}
	// The names that it leads to come first, whoever placed them: blobs are named without waiting for the disk.
	if err := l.syncDir(blobsDir); err != nil {
		return err
	}
	if same {
		return nil
	}
	if err := l.replace(ocispec.ImageIndexFile, b); err != nil {
		return fmt.Errorf("write %s: %w", ocispec.ImageIndexFile, err)
	}
	if l.own {
		return l.copyIndex()
	}
	return nil
}

// locked runs f while no other process is in it. The lock is on the directory itself, so it leaves no file
// in a layout that is handed on, and it dies with its holder.
func (l *Layout) locked(f func() error) error {
	d, err := l.root.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	if err := flock(d, unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", l.dir, err)
	}
	return f()
}

// Tag lets name mean d, and nothing else any more.
func (l *Layout) Tag(name string, d ocispec.Descriptor) error {
	if err := checkDescriptor(d); err != nil {
		return err
	}
	return l.Update(func(idx *ocispec.Index) error {
		setTag(idx, name, d)
		return nil
	})
}

// setTag puts a named descriptor in the place of the one that had the name, or at the end. An entry without
// a name for the same image has then served its purpose.
func setTag(idx *ocispec.Index, name string, d ocispec.Descriptor) {
	d.Annotations = withAnnotation(d.Annotations, ocispec.AnnotationRefName, name)
	at := slices.IndexFunc(idx.Manifests, func(m ocispec.Descriptor) bool { return m.Annotations[ocispec.AnnotationRefName] == name })
	if at >= 0 {
		idx.Manifests[at] = d
	} else {
		idx.Manifests = append(idx.Manifests, d)
		at = len(idx.Manifests) - 1
	}
	kept := idx.Manifests[:0]
	for i, m := range idx.Manifests {
		ref := m.Annotations[ocispec.AnnotationRefName]
		if i == at || ref != name && (ref != "" || m.Digest != d.Digest) {
			kept = append(kept, m)
		}
	}
	idx.Manifests = kept
}

func withAnnotation(a map[string]string, key, value string) map[string]string {
	b := make(map[string]string, len(a)+1)
	for k, v := range a {
		b[k] = v
	}
	b[key] = value
	return b
}

// Resolve returns the descriptor that index.json has for a name or a digest, and ErrNotFound when it has
// none. A digest may also be that of a manifest that an index in the layout leads to.
func (l *Layout) Resolve(tagOrDigest string) (ocispec.Descriptor, error) {
	idx, err := l.Index()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	for _, d := range idx.Manifests {
		if d.Annotations[ocispec.AnnotationRefName] == tagOrDigest && tagOrDigest != "" || d.Digest.String() == tagOrDigest {
			return d, checkDescriptor(d)
		}
	}
	if _, err := hexOf(digest.Digest(tagOrDigest)); err == nil {
		return l.resolveInside(digest.Digest(tagOrDigest))
	}
	return ocispec.Descriptor{}, fmt.Errorf("OCI layout %s: %q: %w", l.dir, tagOrDigest, ErrNotFound)
}

// resolveInside finds a manifest that only an index blob names.
func (l *Layout) resolveInside(want digest.Digest) (ocispec.Descriptor, error) {
	missing := fmt.Errorf("OCI layout %s: %s: %w", l.dir, want, ErrNotFound)
	hx, err := hexOf(want)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	fi, err := l.root.Lstat(blobsDir + "/" + hx)
	if err != nil || fi.Size() > maxManifest {
		return ocispec.Descriptor{}, missing
	}
	d := ocispec.Descriptor{Digest: want, Size: fi.Size()}
	b, err := l.ReadAll(d, maxManifest)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if d.MediaType, err = classify(b); err != nil {
		return ocispec.Descriptor{}, missing // a blob, but no manifest
	}
	return d, nil
}
