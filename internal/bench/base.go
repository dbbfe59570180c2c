package main

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The large base is busybox and, like an image for developers, one layer with nearly everything and three small ones.
const (
	baseRecipe = 1 // raised when the contents change
	baseFiles  = 57_000
	baseBytes  = 1_460_000_000
)

// epoch is the time of all files in the base: its bytes must not depend on when it was made.
func epoch() time.Time { return time.Unix(1_700_000_000, 0).UTC() }

// ensureBase returns the OCI layout of the large base, which it makes on top of that of busybox when the cache has none.
func ensureBase(cache, busybox string, w workload) (string, error) {
	dir := filepath.Join(cache, w.baseName())
	if _, err := os.Stat(filepath.Join(dir, "index.json")); err == nil {
		return dir, nil
	}
	making, err := os.MkdirTemp(cache, "making-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(making)
	if err := os.MkdirAll(filepath.Join(making, "blobs/sha256"), 0o755); err != nil {
		return "", err
	}
	if err := makeBase(making, busybox, w); err != nil {
		return "", fmt.Errorf("make the large base: %w", err)
	}
	return dir, os.Rename(making, dir)
}

// baseName is the repository and the directory of the large base.
func (w workload) baseName() string { return fmt.Sprintf("large-%d-%g", baseRecipe, w.scale) }

func makeBase(dir, busybox string, w workload) error {
	var index ocispec.Index
	if err := readJSON(filepath.Join(busybox, "index.json"), &index); err != nil {
		return err
	}
	var manifest ocispec.Manifest
	if err := readBlob(busybox, index.Manifests[0], &manifest); err != nil {
		return err
	}
	var config ocispec.Image
	if err := readBlob(busybox, manifest.Config, &config); err != nil {
		return err
	}
	for _, l := range manifest.Layers {
		if err := copyBlob(dir, busybox, l); err != nil {
			return err
		}
	}
	shares := []float64{0.94, 0.03, 0.02, 0.01}
	layers, diffIDs, errs := make([]ocispec.Descriptor, len(shares)), make([]digest.Digest, len(shares)), make([]error, len(shares))
	var wg sync.WaitGroup
	for i, share := range shares {
		wg.Go(func() {
			files, bytes := float64(w.count(baseFiles))*share, float64(baseBytes)*w.scale*share
			layers[i], diffIDs[i], errs[i] = writeLayer(dir, i, int(files), int64(bytes))
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	manifest.Layers = append(manifest.Layers, layers...)
	config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, diffIDs...)
	created := epoch()
	for range shares {
		config.History = append(config.History, ocispec.History{Created: &created, CreatedBy: "cooper bench"})
	}
	return writeLayout(dir, manifest, config)
}

// writeLayer writes one layer: directories of a hundred entries, of which in a hundred four are symbolic links and one is a hard link; some
// of the files belong to other users.
func writeLayer(dir string, number, files int, bytes int64) (ocispec.Descriptor, digest.Digest, error) {
	temp := filepath.Join(dir, "layer-"+strconv.Itoa(number))
	f, err := os.Create(temp)
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	defer f.Close()
	packed, plain := &counting{w: f, hash: sha256.New()}, sha256.New()
	z := gzip.NewWriter(packed)
	buffered := bufio.NewWriterSize(io.MultiWriter(z, plain), 1<<20)
	t := tar.NewWriter(buffered)
	err = writeEntries(t, number, files, bytes)
	err = errors.Join(err, t.Close(), buffered.Flush(), z.Close(), f.Close())
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.NewDigest(digest.SHA256, packed.hash), Size: packed.n}
	return d, digest.NewDigest(digest.SHA256, plain), os.Rename(temp, blobPath(dir, d.Digest))
}

func writeEntries(t *tar.Writer, number, files int, bytes int64) error {
	s := newSource(10 + uint64(number))
	owners := []int{0, 0, 0, 0, 0, 0, 0, 0, 33, 1000}
	base := fmt.Sprintf("opt/layer%d/", number)
	if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: base, Mode: 0o755, ModTime: epoch()}); err != nil {
		return err
	}
	var in, first string
	for i, size := range s.sizes(files, bytes) {
		if i%filesInDirectory == 0 {
			in = base + hex.EncodeToString([]byte{byte(i / filesInDirectory >> 8), byte(i / filesInDirectory)}) + "/"
			if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: in, Mode: 0o755, ModTime: epoch()}); err != nil {
				return err
			}
		}
		h := tar.Header{Typeflag: tar.TypeReg, Name: in + strconv.Itoa(i), Mode: 0o644, Size: size, ModTime: epoch()}
		switch i % filesInDirectory {
		case 0:
			first = h.Name
		case 20, 40, 60, 80:
			h.Typeflag, h.Linkname, h.Size, h.Mode = tar.TypeSymlink, filepath.Base(first), 0, 0o777
		case 99:
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		default:
			h.Uid = owners[s.rng.IntN(len(owners))]
			h.Gid = h.Uid
		}
		if err := t.WriteHeader(&h); err != nil {
			return err
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := io.Copy(t, s.content(size)); err != nil {
				return err
			}
		}
	}
	return nil
}

// counting hashes and counts what it passes on.
type counting struct {
	w    io.Writer
	hash hash.Hash
	n    int64
}

func (c *counting) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.hash.Write(p[:n])
	c.n += int64(n)
	return n, err
}

func writeLayout(dir string, manifest ocispec.Manifest, config ocispec.Image) error {
	var err error
	if manifest.Config, err = writeBlob(dir, ocispec.MediaTypeImageConfig, config); err != nil {
		return err
	}
	d, err := writeBlob(dir, ocispec.MediaTypeImageManifest, manifest)
	if err != nil {
		return err
	}
	d.Annotations = map[string]string{ocispec.AnnotationRefName: "latest"}
	if err := writeJSON(filepath.Join(dir, "oci-layout"), ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}); err != nil {
		return err
	}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{d}}
	return writeJSON(filepath.Join(dir, "index.json"), index)
}

func blobPath(dir string, d digest.Digest) string {
	return filepath.Join(dir, "blobs/sha256", d.Encoded())
}

func writeBlob(dir, mediaType string, v any) (ocispec.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	return d, os.WriteFile(blobPath(dir, d.Digest), b, 0o644)
}

func copyBlob(to, from string, d ocispec.Descriptor) error {
	b, err := os.ReadFile(blobPath(from, d.Digest))
	if err != nil {
		return err
	}
	return os.WriteFile(blobPath(to, d.Digest), b, 0o644)
}

func readBlob(dir string, d ocispec.Descriptor, into any) error {
	return readJSON(blobPath(dir, d.Digest), into)
}

func readJSON(file string, into any) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, into)
}

func writeJSON(file string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return replace(file, append(b, '\n'))
}

// replace leaves the old file where the new one cannot be written whole: it may have taken half an hour to measure.
func replace(file string, content []byte) error {
	making := filepath.Join(filepath.Dir(file), "."+filepath.Base(file))
	if err := os.WriteFile(making, content, 0o644); err != nil {
		return err
	}
	return os.Rename(making, file)
}
