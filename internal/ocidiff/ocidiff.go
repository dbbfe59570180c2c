// Package ocidiff compares what two images say and contain: configs, history, the files of each layer and the
// tree that they add up to, for each platform of an index. It reads OCI layouts, as a directory or as a tar archive, with nothing but the standard library,
// so that a mistake of cooper's own packages cannot hide itself. It is test support.
package ocidiff

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// An Entry is one file of a tree. Times are no part of it: builders differ in them on purpose.
type Entry struct {
	Type     string
	Mode     int64
	UID, GID int
	Size     int64
	Content  string // sha256
	Link     string
	Device   string
	Links    string // the paths that are hard links to one another, sorted
	Xattrs   map[string]string
}

// An Image is a manifest with everything it refers to.
type Image struct {
	// Platform is what the index says of the manifest, such as "linux/arm/v7"; empty if it says nothing.
	Platform string
	Manifest ocispec.Manifest
	Config   map[string]any
	Layers   []map[string]Entry // as the tar has them: whiteouts are entries
	Tree     map[string]Entry
}

// A Loader reads images and remembers layers, so that the layers of a base are unpacked once. The zero value is ready,
// and may be used by several goroutines.
type Loader struct {
	mu     sync.Mutex
	layers map[string][]item
}

// Load reads the first image of a layout.
func Load(layout string) (*Image, error) {
	images, err := new(Loader).LoadAll(layout)
	if err != nil {
		return nil, err
	}
	return images[0], nil
}

// LoadAll reads what the layout's first name stands for: one image, or those of an index in its order. Attestations
// are left out, as they are about an image and no image.
func (l *Loader) LoadAll(layout string) ([]*Image, error) {
	read, err := open(layout)
	if err != nil {
		return nil, err
	}
	var index ocispec.Index
	if err := unmarshal(read, "index.json", &index); err != nil {
		return nil, err
	}
	if len(index.Manifests) == 0 {
		return nil, errors.New("the layout has no image")
	}
	if d := index.Manifests[0]; d.MediaType == ocispec.MediaTypeImageIndex || strings.Contains(d.MediaType, "manifest.list") {
		if err := unmarshal(read, blob(d), &index); err != nil {
			return nil, err
		}
	} else {
		index.Manifests = index.Manifests[:1]
	}
	var images []*Image
	for _, d := range index.Manifests {
		if d.Annotations["vnd.docker.reference.type"] == "attestation-manifest" {
			continue
		}
		img, err := l.load(read, d)
		if err != nil {
			return nil, err
		}
		images = append(images, img)
	}
	if len(images) == 0 {
		return nil, errors.New("the index has no image")
	}
	return images, nil
}

func (l *Loader) load(read reader, d ocispec.Descriptor) (*Image, error) {
	img := &Image{Platform: platform(d.Platform), Tree: map[string]Entry{}}
	if err := unmarshal(read, blob(d), &img.Manifest); err != nil {
		return nil, err
	}
	if err := unmarshal(read, blob(img.Manifest.Config), &img.Config); err != nil {
		return nil, err
	}
	groups := newGroups()
	for _, d := range img.Manifest.Layers {
		items, err := l.layer(read, d)
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", d.Digest, err)
		}
		entries, err := img.apply(items, groups)
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", d.Digest, err)
		}
		img.Layers = append(img.Layers, entries)
	}
	groups.name(img.Tree)
	return img, nil
}

func platform(p *ocispec.Platform) string {
	if p == nil {
		return ""
	}
	return strings.TrimSuffix(p.OS+"/"+p.Architecture+"/"+p.Variant, "/")
}

type reader func(name string) ([]byte, error)

func open(layout string) (reader, error) {
	st, err := os.Stat(layout)
	if err != nil {
		return nil, err
	}
	if st.IsDir() {
		return func(name string) ([]byte, error) { return os.ReadFile(filepath.Join(layout, name)) }, nil
	}
	f, err := os.Open(layout)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	files := map[string][]byte{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		if files[path.Clean(h.Name)], err = io.ReadAll(r); err != nil {
			return nil, err
		}
	}
	return func(name string) ([]byte, error) {
		b, ok := files[name]
		if !ok {
			return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
		}
		return b, nil
	}, nil
}

func blob(d ocispec.Descriptor) string { return path.Join("blobs", "sha256", d.Digest.Encoded()) }

func unmarshal(read reader, name string, v any) error {
	text, err := read(name)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, v)
}

// groups remembers which paths are one file.
type groups struct {
	of   map[string]int
	next int
}

func newGroups() *groups { return &groups{of: map[string]int{}} }

func (g *groups) add(name, target string) {
	if _, ok := g.of[target]; !ok {
		g.of[target] = g.next
		g.next++
	}
	g.of[name] = g.of[target]
}

func (g *groups) name(tree map[string]Entry) {
	members := map[int][]string{}
	for name, n := range g.of {
		if _, ok := tree[name]; ok {
			members[n] = append(members[n], name)
		}
	}
	for _, names := range members {
		slices.Sort(names)
		for _, n := range names {
			if e := tree[n]; len(names) > 1 {
				e.Links = strings.Join(names, " ")
				tree[n] = e
			}
		}
	}
}

// An item is an entry where it stands in a layer.
type item struct {
	name  string
	entry Entry
}

// layer reads a layer, or remembers it.
func (l *Loader) layer(read reader, d ocispec.Descriptor) ([]item, error) {
	l.mu.Lock()
	items, ok := l.layers[d.Digest.String()]
	l.mu.Unlock()
	if ok {
		return items, nil
	}
	text, err := read(blob(d))
	if err != nil {
		return nil, err
	}
	if items, err = itemsOf(text); err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.layers == nil {
		l.layers = map[string][]item{}
	}
	l.layers[d.Digest.String()] = items
	return items, nil
}

func itemsOf(text []byte) ([]item, error) {
	body, err := uncompressed(text)
	if err != nil {
		return nil, err
	}
	var items []item
	for r := tar.NewReader(body); ; {
		h, err := r.Next()
		if err == io.EOF {
			return items, nil
		}
		if err != nil {
			return nil, err
		}
		e, err := entry(h, r)
		if err != nil {
			return nil, err
		}
		items = append(items, item{path.Clean("/" + h.Name), e})
	}
}

// apply adds a layer to the tree. It is strict, so that equal entries of layers mean equal trees: a name that comes
// twice or a link to what is not there yet is an error.
func (img *Image) apply(items []item, g *groups) (map[string]Entry, error) {
	entries := map[string]Entry{}
	for _, it := range items {
		name, e := it.name, it.entry
		if _, twice := entries[name]; twice {
			return nil, fmt.Errorf("%s is in it twice", name)
		}
		entries[name] = e
		dir, base := path.Split(name)
		if base == ".wh..wh..opq" {
			img.remove(path.Clean(dir), false, entries)
			continue
		}
		if hidden, ok := strings.CutPrefix(base, ".wh."); ok {
			img.remove(path.Join(dir, hidden), true, nil)
			delete(g.of, path.Join(dir, hidden))
			continue
		}
		if old, ok := img.Tree[name]; ok && old.Type == "dir" && e.Type != "dir" {
			img.remove(name, true, nil)
		}
		delete(g.of, name)
		if e.Type == "hardlink" {
			target := path.Clean("/" + e.Link)
			if _, ok := entries[target]; !ok {
				return nil, fmt.Errorf("%s is a hard link to %s, which does not come before it", name, target)
			}
			e = img.Tree[target]
			g.add(name, target)
		}
		img.Tree[name] = e
	}
	return entries, nil
}

// remove takes a path with all beneath it out of the tree; entries of the same layer stay.
func (img *Image) remove(name string, itself bool, keep map[string]Entry) {
	if itself {
		delete(img.Tree, name)
	}
	for p := range img.Tree {
		if _, kept := keep[p]; !kept && strings.HasPrefix(p, strings.TrimSuffix(name, "/")+"/") {
			delete(img.Tree, p)
		}
	}
}

func uncompressed(text []byte) (io.Reader, error) {
	r := bufio.NewReader(bytes.NewReader(text))
	if magic, err := r.Peek(2); err == nil && magic[0] == 0x1f && magic[1] == 0x8b {
		return gzip.NewReader(r)
	}
	return r, nil
}

func entry(h *tar.Header, r io.Reader) (Entry, error) {
	e := Entry{Mode: h.Mode & 0o7777, UID: h.Uid, GID: h.Gid, Link: h.Linkname}
	switch h.Typeflag {
	case tar.TypeReg:
		e.Type, e.Size = "file", h.Size
		sum := sha256.New()
		if _, err := io.Copy(sum, r); err != nil {
			return e, err
		}
		e.Content = hex.EncodeToString(sum.Sum(nil))
	case tar.TypeDir:
		e.Type = "dir"
	case tar.TypeFifo:
		e.Type = "fifo"
	case tar.TypeSymlink:
		e.Type, e.Mode = "symlink", 0 // Linux has no modes of symlinks
	case tar.TypeLink:
		e.Type = "hardlink"
	default:
		e.Type, e.Device = string(h.Typeflag), fmt.Sprintf("%d:%d", h.Devmajor, h.Devminor)
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
			if e.Xattrs == nil {
				e.Xattrs = map[string]string{}
			}
			e.Xattrs[name] = hex.EncodeToString([]byte(v))
		}
	}
	return e, nil
}

// WithoutTimes is a config without what two builds of the same Dockerfile may differ in: creation times, and
// the diff ids of layers, which contain times.
func WithoutTimes(config map[string]any) map[string]any {
	text, err := json.Marshal(config)
	if err != nil {
		return nil
	}
	var out map[string]any
	if err := json.Unmarshal(text, &out); err != nil {
		return nil
	}
	delete(out, "created")
	if rootfs, ok := out["rootfs"].(map[string]any); ok {
		ids, _ := rootfs["diff_ids"].([]any)
		rootfs["diff_ids"] = len(ids)
	}
	history, _ := out["history"].([]any)
	for _, h := range history {
		if e, ok := h.(map[string]any); ok {
			delete(e, "created")
		}
	}
	return out
}
