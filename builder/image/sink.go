package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/ahead"
)

// NewLayoutSink returns a sink that writes an OCI layout directory, which is made when it is missing. Images
// are added to a layout that is there; a directory with anything else in it is refused. index.json is
// written last.
func NewLayoutSink(dir string) Sink { return layoutSink{dir} }

type layoutSink struct{ dir string }

func (s layoutSink) Publish(ctx context.Context, from *Layout, p Publication) error {
	names, err := tagNames(p.Names)
	if err != nil {
		return err
	}
	nodes, err := from.closure(p.roots()...)
	if err != nil {
		return err
	}
	to, err := create(s.dir, false)
	if err != nil {
		return fmt.Errorf("destination %w", err)
	}
	defer to.Close()
	return publishTo(ctx, to, from, nodes, func(idx *ocispec.Index) error { return to.record(idx, p, names) })
}

// NewStoreSink returns a sink that keeps images in the layout of a store, under their full names. An image that
// comes with artifacts loses those it had: the store keeps what the last build said, not what all of them did.
func NewStoreSink(to *Layout) Sink { return storeSink{to} }

type storeSink struct{ to *Layout }

func (s storeSink) Publish(ctx context.Context, from *Layout, p Publication) error {
	names, err := fullNames(p.Names)
	if err != nil {
		return err
	}
	nodes, err := from.closure(p.roots()...)
	if err != nil {
		return err
	}
	return publishTo(ctx, s.to, from, nodes, func(idx *ocispec.Index) error {
		if len(p.Artifacts) > 0 {
			s.to.dropArtifacts(idx, p.Image)
		}
		return s.to.record(idx, p, names)
	})
}

// publishTo copies blobs, a few at a time, and then lets record enter them in the index.
func publishTo(ctx context.Context, to, from *Layout, nodes []node, record func(*ocispec.Index) error) error {
	group, copying := errgroup.WithContext(ctx)
	group.SetLimit(4)
	for _, n := range nodes {
		group.Go(func() error { return to.copyBlob(copying, from, n.Descriptor) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if err := to.Update(record); err != nil {
		return fmt.Errorf("destination %w", err)
	}
	return nil
}

func (l *Layout) copyBlob(ctx context.Context, from *Layout, d ocispec.Descriptor) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if l == from || l.Has(d) {
		return nil
	}
	f, err := from.openBlob(d)
	if err != nil {
		return fmt.Errorf("source %w", err)
	}
	defer f.Close()
	err = l.ingestFile(ctx, d, f)
	var content *ContentError
	if errors.As(err, &content) {
		return fmt.Errorf("source OCI layout %s: %w", from.dir, err)
	}
	if err != nil {
		return fmt.Errorf("destination %w", err)
	}
	return nil
}

// ingestFile is Ingest of a blob that l does not have from a file. Where the file system can share its bytes they are not
// copied, only verified.
func (l *Layout) ingestFile(ctx context.Context, d ocispec.Descriptor, f *os.File) error {
	w, err := l.NewBlob()
	if err != nil {
		return err
	}
	defer w.Discard()
	if unix.IoctlFileClone(int(w.out.file.Fd()), int(f.Fd())) == nil {
		_, err = io.Copy(io.Discard, verify(withContext{ctx, w.out.file}, d))
	} else {
		_, err = io.CopyBuffer(verified{w}, verify(withContext{ctx, f}, d), make([]byte, 256<<10))
	}
	if err != nil {
		return err
	}
	return w.place(d)
}

// withContext makes a long copy end when its context does.
type withContext struct {
	ctx context.Context
	r   io.Reader
}

func (w withContext) Read(p []byte) (int, error) {
	if w.ctx.Err() != nil {
		return 0, context.Cause(w.ctx)
	}
	return w.r.Read(p)
}

// NewArchiveSink returns a sink that writes an OCI layout as one tar file. The same publication gives the
// same bytes. The file gets its name when it is whole and on disk.
func NewArchiveSink(file string) Sink { return archiveSink{file: file} }

// NewDockerSink is NewArchiveSink for docker load: an OCI layout that also has docker's manifest.json. It takes single
// images only, as docker load does.
func NewDockerSink(file string) Sink { return archiveSink{file: file, docker: true} }

type archiveSink struct {
	file   string
	docker bool
}

func (s archiveSink) Publish(ctx context.Context, from *Layout, p Publication) error {
	root, err := os.OpenRoot(filepath.Dir(s.file))
	if err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	defer root.Close()
	dir := folder{root}
	dir.sweep()
	f, tmp, err := dir.temp()
	if err != nil {
		return fmt.Errorf("destination %s: %w", s.file, err)
	}
	defer f.Close()
	err = archiveStream{&outgoing{file: f}, s.docker}.Publish(ctx, from, p)
	if err == nil {
		if err = dir.settleForGood(f, tmp, filepath.Base(s.file)); err != nil {
			err = fmt.Errorf("destination %s: %w", s.file, err)
		}
	}
	if err != nil {
		root.Remove(tmp)
	}
	return err
}

// NewArchiveStream is NewArchiveSink for a pipe.
func NewArchiveStream(w io.Writer) Sink { return archiveStream{w: w} }

// NewDockerStream is NewDockerSink for a pipe.
func NewDockerStream(w io.Writer) Sink { return archiveStream{w: w, docker: true} }

type archiveStream struct {
	w      io.Writer
	docker bool
}

func (s archiveStream) Publish(ctx context.Context, from *Layout, p Publication) error {
	names, err := tagNames(p.Names)
	if err != nil {
		return err
	}
	nodes, err := from.closure(p.roots()...)
	if err != nil {
		return err
	}
	idx := emptyIndex()
	if err := from.record(idx, p, names); err != nil {
		return err
	}
	small := map[string][]byte{}
	if small[ocispec.ImageIndexFile], err = json.Marshal(idx); err != nil {
		return err
	}
	if small[ocispec.ImageLayoutFile], err = json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}); err != nil {
		return err
	}
	if s.docker {
		if small["manifest.json"], err = loadManifest(from, p); err != nil {
			return err
		}
	}
	return writeArchive(ctx, tar.NewWriter(s.w), from, nodes, small)
}

// loadManifest is manifest.json of docker save (moby image spec v1.2) with paths in an OCI layout.
func loadManifest(from *Layout, p Publication) ([]byte, error) {
	if isIndex(p.Image.MediaType) {
		return nil, errors.New("docker load takes one image and this is an index: choose one platform, or write an OCI archive")
	}
	raw, err := from.ReadAll(p.Image, maxManifest)
	if err != nil {
		return nil, fmt.Errorf("source %w", err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("source manifest %s: %w", p.Image.Digest, err)
	}
	path := func(d ocispec.Descriptor) string { return blobsDir + "/" + d.Digest.Encoded() }
	entry := struct {
		Config   string
		RepoTags []string
		Layers   []string
	}{Config: path(m.Config), RepoTags: p.Names, Layers: []string{}}
	for _, l := range m.Layers {
		entry.Layers = append(entry.Layers, path(l))
	}
	return json.Marshal([]any{entry})
}

func writeArchive(ctx context.Context, tw *tar.Writer, from *Layout, nodes []node, small map[string][]byte) error {
	blobs := map[string]ocispec.Descriptor{}
	paths := []string{"blobs/", blobsDir + "/"}
	for _, n := range nodes {
		path := blobsDir + "/" + n.Digest.Encoded()
		blobs[path] = n.Descriptor
		paths = append(paths, path)
	}
	for path := range small {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	for _, path := range paths {
		d, isBlob := blobs[path]
		var err error
		switch {
		case isBlob:
			err = archiveBlob(ctx, tw, path, from, d)
		case strings.HasSuffix(path, "/"):
			err = tw.WriteHeader(archiveHeader(path, tar.TypeDir, 0o755, 0))
		default:
			if err = tw.WriteHeader(archiveHeader(path, tar.TypeReg, 0o444, int64(len(small[path])))); err == nil {
				_, err = tw.Write(small[path])
			}
		}
		if err != nil {
			return fmt.Errorf("archive %s: %w", path, err)
		}
	}
	if err := tw.Close(); err != nil {
		return fmt.Errorf("archive: %w", err)
	}
	return nil
}

func archiveHeader(path string, kind byte, mode, size int64) *tar.Header {
	return &tar.Header{Typeflag: kind, Name: path, Mode: mode, Size: size, ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR}
}

func archiveBlob(ctx context.Context, tw *tar.Writer, path string, from *Layout, d ocispec.Descriptor) error {
	r, err := from.Open(d)
	if err != nil {
		return fmt.Errorf("source %w", err)
	}
	defer r.Close()
	h := archiveHeader(path, tar.TypeReg, 0o444, d.Size)
	h.Format = tar.FormatUnknown // USTAR ends at 8 GiB; which format follows depends on the size alone
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	checked := ahead.New(withContext{ctx, r}) // the digest of the next bytes is made while these are written
	defer checked.Close()
	_, err = io.Copy(tw, checked)
	return err
}
