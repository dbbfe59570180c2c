package image

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"syscall"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Has reports whether a blob is here and good. A blob of the right size with the wrong bytes is not.
func (l *Layout) Has(d ocispec.Descriptor) bool {
	hx, err := hexOf(d.Digest)
	if err != nil {
		return false
	}
	if _, err := l.lstatBlob(hx); err != nil || l.use(hx) != nil {
		return false
	}
	if fi, err := l.lstatBlob(hx); err == nil && fi.Mode().IsRegular() && fi.Size() == d.Size && l.wasVerified(d.Digest, stampOf(fi)) {
		return true
	}
	f, fi, err := l.openFile(blobsDir + "/" + hx)
	if err != nil {
		return false
	}
	defer f.Close()
	if fi.Size() != d.Size {
		return false
	}
	before := stampOf(fi)
	if _, err := io.Copy(io.Discard, l.trusting(f, d)); err != nil {
		return false
	}
	if fi, err = f.Stat(); err != nil || stampOf(fi) != before {
		return false // changed under our eyes
	}
	l.setVerified(d.Digest, before)
	return true
}

func (l *Layout) lstatBlob(hx string) (fs.FileInfo, error) {
	if l.blobs == nil {
		return l.root.Lstat(blobsDir + "/" + hx)
	}
	return l.blobs.Lstat(hx)
}

// Open returns the bytes of a blob, or ErrNotFound. The reader verifies them: it ends with an error, and
// not with EOF, when they are not what the descriptor promises.
func (l *Layout) Open(d ocispec.Descriptor) (io.ReadCloser, error) {
	f, err := l.openBlob(d)
	if err != nil {
		return nil, err
	}
	return readCloser{l.trusting(f, d), f}, nil
}

// openBlob opens the file of a blob, which is not verified but for its size. The blob is in use from now on.
func (l *Layout) openBlob(d ocispec.Descriptor) (*os.File, error) {
	if err := checkDescriptor(d); err != nil {
		return nil, err
	}
	if err := l.use(d.Digest.Encoded()); err != nil {
		return nil, fmt.Errorf("OCI layout %s: %w", l.dir, err)
	}
	return l.openUnused(d)
}

func (l *Layout) openUnused(d ocispec.Descriptor) (*os.File, error) {
	if err := checkDescriptor(d); err != nil {
		return nil, err
	}
	f, fi, err := l.openFile(blobsDir + "/" + d.Digest.Encoded())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("OCI layout %s: blob %s: %w", l.dir, d.Digest, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("OCI layout %s: %w", l.dir, err)
	}
	if fi.Size() != d.Size {
		f.Close()
		return nil, fmt.Errorf("OCI layout %s: %w", l.dir, &ContentError{d.Digest, fmt.Sprintf("the file has %d bytes, its descriptor promises %d", fi.Size(), d.Size)})
	}
	return f, nil
}

// ReadAll returns a whole blob, which may have at most max bytes, verified.
func (l *Layout) ReadAll(d ocispec.Descriptor, max int64) ([]byte, error) {
	r, err := l.Open(d)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := readAll(r, d, max)
	if err != nil {
		return nil, fmt.Errorf("OCI layout %s: %w", l.dir, err)
	}
	return b, nil
}

// Ingest stores the blob d from r. It reads r to its end, also when it has the blob, so r may be the end of a
// pipe; only wrong bytes make it stop earlier. A nil error means that the bytes were as promised and are on
// disk; a good blob that was there already is kept, a corrupt one replaced.
func (l *Layout) Ingest(d ocispec.Descriptor, r io.Reader) error {
	if err := checkDescriptor(d); err != nil {
		return err
	}
	if l.Has(d) {
		_, err := io.Copy(io.Discard, verify(r, d))
		return err
	}
	w, err := l.NewBlob()
	if err != nil {
		return err
	}
	defer w.Discard()
	if _, err := io.Copy(verified{w}, verify(r, d)); err != nil {
		return err
	}
	return w.place(d)
}

// WriteBlob stores b as a blob.
func (l *Layout) WriteBlob(mediaType string, b []byte) (ocispec.Descriptor, error) {
	w, err := l.NewBlob()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer w.Discard()
	if _, err := w.Write(b); err != nil {
		return ocispec.Descriptor{}, err
	}
	return w.Commit(mediaType)
}

// A BlobWriter takes the bytes of a new blob whose digest is not known before its end. Then exactly one of
// Commit and Discard counts; Discard after Commit does nothing, so it can be deferred.
type BlobWriter struct {
	layout *Layout
	out    outgoing
	tmp    string
	sum    hash.Hash
	done   bool
}

// An outgoing file is written to the disk while the rest comes, so that the sync at the end has little left to wait for.
type outgoing struct {
	file   *os.File
	size   int64
	queued int64 // bytes that the kernel was asked to write out
}

func (f *outgoing) Write(p []byte) (int, error) {
	n, err := f.file.Write(p)
	f.size += int64(n)
	const step = 8 << 20
	if f.size-f.queued >= step {
		_ = unix.SyncFileRange(int(f.file.Fd()), f.queued, f.size-f.queued, unix.SYNC_FILE_RANGE_WRITE) // advice
		f.queued = f.size
	}
	return n, err
}

// NewBlob begins a blob.
func (l *Layout) NewBlob() (*BlobWriter, error) {
	f, tmp, err := l.temp()
	if err != nil {
		return nil, fmt.Errorf("OCI layout %s: new blob: %w", l.dir, err)
	}
	return &BlobWriter{layout: l, out: outgoing{file: f}, tmp: tmp, sum: sha256.New()}, nil
}

func (w *BlobWriter) Write(p []byte) (int, error) {
	n, err := w.out.Write(p)
	w.sum.Write(p[:n])
	return n, err
}

// verified takes bytes for w that were hashed on the way.
type verified struct{ w *BlobWriter }

func (v verified) Write(p []byte) (int, error) { return v.w.out.Write(p) }

// Commit makes the blob part of the layout. A nil error means that its bytes are on disk for good; so is its name from the
// moment that index.json leads to it.
func (w *BlobWriter) Commit(mediaType string) (ocispec.Descriptor, error) {
	if w.done {
		return ocispec.Descriptor{}, errors.New("commit of a blob that was committed or discarded")
	}
	hx := hex.EncodeToString(w.sum.Sum(nil))
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.Digest("sha256:" + hx), Size: w.out.size}
	if w.layout.Has(d) {
		w.Discard()
		return d, nil
	}
	return d, w.place(d)
}

// place gives the finished file the name of d, which its content is known to fit.
func (w *BlobWriter) place(d ocispec.Descriptor) error {
	defer w.Discard()
	if err := w.layout.use(d.Digest.Encoded()); err != nil { // before it is there, so that nobody removes it in between
		return fmt.Errorf("OCI layout %s: blob %s: %w", w.layout.dir, d.Digest, err)
	}
	if err := w.layout.settle(w.out.file, w.tmp, blobsDir+"/"+d.Digest.Encoded()); err != nil {
		return fmt.Errorf("OCI layout %s: blob %s: %w", w.layout.dir, d.Digest, err)
	}
	if fi, err := w.out.file.Stat(); err == nil {
		w.layout.setVerified(d.Digest, stampOf(fi))
	}
	w.layout.written.Add(d.Size)
	return nil
}

// Discard forgets what was written.
func (w *BlobWriter) Discard() {
	if w.done {
		return
	}
	w.done = true
	w.layout.root.Remove(w.tmp) // gone already after a rename
	w.out.file.Close()
}

// A stamp tells whether a file is still the one that was verified. A user cannot set ctime back, and the
// kernel changes it with every write.
type stamp struct {
	inode       uint64
	sec, nsec   int64
	size, links int64
}

func stampOf(fi fs.FileInfo) stamp {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return stamp{}
	}
	return stamp{inode: st.Ino, sec: int64(st.Ctim.Sec), nsec: int64(st.Ctim.Nsec), size: fi.Size(), links: int64(st.Nlink)}
}

func (s stamp) String() string {
	return fmt.Sprintf("v1 %d %d.%09d %d %d\n", s.inode, s.sec, s.nsec, s.size, s.links)
}

func linked(fi fs.FileInfo) bool { return stampOf(fi).links > 0 }

func (l *Layout) wasVerified(d digest.Digest, s stamp) bool {
	if s == (stamp{}) {
		return false
	}
	l.mu.Lock()
	known := l.verified[d] == s
	l.mu.Unlock()
	if known || !l.own {
		return known
	}
	hx, err := hexOf(d)
	if err != nil {
		return false
	}
	b, err := folder{l.markers}.readSmall(hx, 1<<10)
	if err != nil || string(b) != s.String() {
		return false
	}
	l.mu.Lock()
	l.verified[d] = s
	l.mu.Unlock()
	return true
}

// setVerified remembers a verified blob. On disk this is best effort and not synced: a marker that was lost
// or torn costs one more hashing.
func (l *Layout) setVerified(d digest.Digest, s stamp) {
	l.mu.Lock()
	l.verified[d] = s
	l.mu.Unlock()
	hx, err := hexOf(d)
	if err != nil || !l.own {
		return
	}
	f, tmp, err := l.temp()
	if err != nil {
		return
	}
	defer f.Close()
	if _, err := f.WriteString(s.String()); err != nil || l.root.Rename(tmp, markersDir+"/"+hx) != nil {
		l.root.Remove(tmp)
	}
}

func randomName() string {
	var b [12]byte
	rand.Read(b[:]) // never fails, says its documentation
	return hex.EncodeToString(b[:])
}
