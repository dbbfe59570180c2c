package image

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// An Artifact is a manifest that says something about an image: a signature or an attestation.
type Artifact struct {
	Subject    digest.Digest      // the image, or a manifest that the image, an index, lists; empty is the image
	Descriptor ocispec.Descriptor // of its manifest, which lies in the same layout as the image
	Tag        string             // "sha256-<hex>.sig", or ""
	Referrer   bool               // its manifest names the image as its subject
}

// A Publication is an image with everything that goes where it goes.
type Publication struct {
	Image     ocispec.Descriptor // of a manifest or an index
	Names     []string           // docker references with a tag; none: the image is known by its digest only
	Artifacts []Artifact
}

// subject is what an artifact is about.
func (p Publication) subject(a Artifact) digest.Digest { return cmp.Or(a.Subject, p.Image.Digest) }

// A Sink takes publications to one kind of place.
type Sink interface {
	// Publish copies an image and its artifacts out of a layout. Names and tags appear last, when all
	// that they lead to is there; a nil error means that they did.
	Publish(ctx context.Context, from *Layout, p Publication) error
}

const (
	annotationImageName = "io.containerd.image.name" // the whole name, where ref.name has the tag only
	annotationKind      = "kind"                     // by which cosign finds its way in a layout
	kindImage           = "dev.cosignproject.cosign/image"
	kindIndex           = "dev.cosignproject.cosign/imageIndex"
	kindSignatures      = "dev.cosignproject.cosign/sigs"
)

// A node is one blob of a publication.
type node struct {
	ocispec.Descriptor
	manifest []byte // nil for what is not a manifest
}

const (
	maxNodes = 100_000
	maxDepth = 4
)

// closure lists everything that some descriptors lead to, children before parents, each once. All of it is
// in the layout and good, or closure fails.
func (l *Layout) closure(roots ...ocispec.Descriptor) ([]node, error) {
	var nodes []node
	seen := map[digest.Digest]bool{}
	var visit func(d ocispec.Descriptor, depth int) error
	visit = func(d ocispec.Descriptor, depth int) error {
		if seen[d.Digest] {
			return nil
		}
		if depth > maxDepth || len(nodes) > maxNodes {
			return fmt.Errorf("%s: nested too deeply or too large", d.Digest)
		}
		seen[d.Digest] = true
		n := node{Descriptor: d}
		if isManifest(d.MediaType) || isIndex(d.MediaType) {
			raw, err := l.ReadAll(d, maxManifest)
			if err != nil {
				return err
			}
			below, err := children(raw, d.MediaType)
			if err != nil {
				return fmt.Errorf("%s: %w", d.Digest, err)
			}
			for _, c := range below {
				if err := visit(c, depth+1); err != nil {
					return err
				}
			}
			n.manifest = raw
		} else if !l.Has(d) {
			return fmt.Errorf("blob %s is missing or corrupt", d.Digest)
		}
		nodes = append(nodes, n)
		return nil
	}
	for _, d := range roots {
		if err := visit(d, 0); err != nil {
			return nil, fmt.Errorf("source OCI layout %s: %w", l.dir, err)
		}
	}
	return nodes, nil
}

func children(raw []byte, mediaType string) ([]ocispec.Descriptor, error) {
	if isIndex(mediaType) {
		idx, err := parseIndex(raw, mediaType)
		if err != nil {
			return nil, err
		}
		return idx.Manifests, nil
	}
	m, err := parseManifest(raw, mediaType)
	if err != nil {
		return nil, err
	}
	return append([]ocispec.Descriptor{m.Config}, m.Layers...), nil
}

func (p Publication) roots() []ocispec.Descriptor {
	roots := []ocispec.Descriptor{p.Image}
	for _, a := range p.Artifacts {
		roots = append(roots, a.Descriptor)
	}
	return roots
}

// An entryName is how index.json knows an image.
type entryName struct{ ref, full string }

// tagNames are the entries of a layout that is handed on: tools look for the tag there.
func tagNames(names []string) ([]entryName, error) {
	var out []entryName
	for _, n := range names {
		r, err := name.NewTag(n)
		if err != nil {
			return nil, err
		}
		full, err := Normalize(n)
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(out, func(e entryName) bool { return e.ref == r.TagStr() }) {
			out = append(out, entryName{r.TagStr(), full})
		}
	}
	return out, nil
}

// fullNames are the entries of the store, which holds images of many repositories.
func fullNames(names []string) ([]entryName, error) {
	var out []entryName
	for _, n := range names {
		full, err := Normalize(n)
		if err != nil {
			return nil, err
		}
		out = append(out, entryName{full, full})
	}
	return out, nil
}

// record enters a publication in the index of l, where its blobs are already: the image first, then what
// refers to it, then its signatures by tag.
func (l *Layout) record(idx *ocispec.Index, p Publication, names []entryName) error {
	l.recordImage(idx, p, names)
	for _, a := range p.Artifacts {
		if !a.Referrer {
			continue
		}
		d, err := l.referrer(a.Descriptor, p.subject(a))
		if err != nil {
			return err
		}
		if d == nil {
			return fmt.Errorf("artifact %s does not refer to %s", a.Descriptor.Digest, p.subject(a))
		}
		if !slices.ContainsFunc(idx.Manifests, func(m ocispec.Descriptor) bool { return m.Digest == d.Digest }) {
			idx.Manifests = append(idx.Manifests, *d)
		}
	}
	for _, a := range p.Artifacts {
		if a.Tag == "" {
			continue
		}
		d, err := l.mergeTagged(idx, a)
		if err != nil {
			return err
		}
		d.Annotations = map[string]string{annotationKind: kindSignatures}
		setTag(idx, a.Tag, d)
	}
	return nil
}

func (l *Layout) recordImage(idx *ocispec.Index, p Publication, names []entryName) {
	d := p.Image
	d.Annotations = maps.Clone(d.Annotations)
	delete(d.Annotations, ocispec.AnnotationRefName)
	delete(d.Annotations, annotationImageName)
	if len(p.Artifacts) > 0 {
		kind := kindImage
		if isIndex(d.MediaType) {
			kind = kindIndex
		}
		d.Annotations = withAnnotation(d.Annotations, annotationKind, kind)
		for i := range idx.Manifests {
			if m := &idx.Manifests[i]; m.Digest == d.Digest {
				m.Annotations = withAnnotation(m.Annotations, annotationKind, kind)
			}
		}
	}
	for _, n := range names {
		l.forget(idx, n.ref, d.Digest)
		named := d
		named.Annotations = withAnnotation(d.Annotations, annotationImageName, n.full)
		setTag(idx, n.ref, named)
	}
	if len(names) == 0 && !slices.ContainsFunc(idx.Manifests, func(m ocispec.Descriptor) bool { return m.Digest == d.Digest }) {
		idx.Manifests = append(idx.Manifests, d)
	}
}

// forget removes what was said about the image that loses the name ref, if it has no other entry: signatures
// of images that nobody can name any more would pile up with every build.
func (l *Layout) forget(idx *ocispec.Index, ref string, successor digest.Digest) {
	at := slices.IndexFunc(idx.Manifests, func(m ocispec.Descriptor) bool { return m.Annotations[ocispec.AnnotationRefName] == ref })
	if at < 0 || idx.Manifests[at].Digest == successor {
		return
	}
	old := idx.Manifests[at]
	if !slices.ContainsFunc(idx.Manifests, func(m ocispec.Descriptor) bool {
		return m.Digest == old.Digest && m.Annotations[ocispec.AnnotationRefName] != ref
	}) {
		l.dropArtifacts(idx, old)
	}
}

// dropArtifacts removes from an index what is said about an image.
func (l *Layout) dropArtifacts(idx *ocispec.Index, image ocispec.Descriptor) {
	subjects := map[digest.Digest]bool{}
	for _, s := range l.subjects(image) {
		subjects[s] = true
	}
	l.dropAbout(idx, subjects)
}

// dropAbout removes from an index what is said about some manifests, reading each artifact once.
func (l *Layout) dropAbout(idx *ocispec.Index, subjects map[digest.Digest]bool) {
	idx.Manifests = slices.DeleteFunc(idx.Manifests, func(d ocispec.Descriptor) bool {
		if subjects[taggedSubject(d.Annotations[ocispec.AnnotationRefName])] {
			return true
		}
		if d.ArtifactType == "" || !isManifest(d.MediaType) {
			return false
		}
		raw, err := l.ReadAll(d, maxManifest)
		if err != nil {
			return false
		}
		m, err := parseManifest(raw, d.MediaType)
		return err == nil && m.Subject != nil && subjects[m.Subject.Digest]
	})
}

// subjects are the manifests that an image consists of: itself, and those that an index lists.
func (l *Layout) subjects(image ocispec.Descriptor) []digest.Digest {
	all := []digest.Digest{image.Digest}
	if !isIndex(image.MediaType) {
		return all
	}
	raw, err := l.ReadAll(image, maxManifest)
	if err != nil {
		return all // it says nothing any more
	}
	idx, err := parseIndex(raw, image.MediaType)
	if err != nil {
		return all
	}
	for _, m := range idx.Manifests {
		all = append(all, m.Digest)
	}
	return all
}

// mergeTagged returns what the tag of an artifact shall mean: the artifact alone, or merged with what has
// the tag already, because other keys and other tags may have signed the same image before.
func (l *Layout) mergeTagged(idx *ocispec.Index, a Artifact) (ocispec.Descriptor, error) {
	at := slices.IndexFunc(idx.Manifests, func(m ocispec.Descriptor) bool { return m.Annotations[ocispec.AnnotationRefName] == a.Tag })
	if at < 0 || idx.Manifests[at].Digest == a.Descriptor.Digest {
		return a.Descriptor, nil
	}
	old, err := l.ReadAll(idx.Manifests[at], maxManifest)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	ours, err := l.ReadAll(a.Descriptor, maxManifest)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	manifest, config, err := mergeSignatures(old, ours)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("tag %s: %w", a.Tag, err)
	}
	if config != nil {
		if _, err := l.WriteBlob(ocispec.MediaTypeImageConfig, config); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	return l.WriteBlob(ocispec.MediaTypeImageManifest, manifest)
}

const maxSignatures = 1000

// mergeSignatures adds the layers of one signature manifest to another. Without anything to add, config is
// nil and manifest one of the two.
func mergeSignatures(old, ours []byte) (manifest, config []byte, err error) {
	a, err := parseManifest(old)
	if err != nil {
		return nil, nil, err
	}
	b, err := parseManifest(ours)
	if err != nil {
		return nil, nil, err
	}
	same := func(x, y ocispec.Descriptor) bool {
		return x.Digest == y.Digest && maps.Equal(x.Annotations, y.Annotations)
	}
	within := func(m *ocispec.Manifest) func(ocispec.Descriptor) bool {
		return func(l ocispec.Descriptor) bool {
			return slices.ContainsFunc(m.Layers, func(o ocispec.Descriptor) bool { return same(o, l) })
		}
	}
	if !slices.ContainsFunc(b.Layers, func(l ocispec.Descriptor) bool { return !within(a)(l) }) {
		return old, nil, nil
	}
	if !slices.ContainsFunc(a.Layers, func(l ocispec.Descriptor) bool { return !within(b)(l) }) {
		return ours, nil, nil
	}
	merged := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Layers: slices.Clone(a.Layers),
	}
	for _, l := range b.Layers {
		if !within(a)(l) {
			merged.Layers = append(merged.Layers, l)
		}
	}
	if len(merged.Layers) > maxSignatures {
		return nil, nil, fmt.Errorf("more than %d signatures", maxSignatures)
	}
	var img ocispec.Image
	img.RootFS.Type = "layers"
	for _, l := range merged.Layers {
		img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, l.Digest) // payloads are stored as they are
	}
	if config, err = json.Marshal(img); err != nil {
		return nil, nil, err
	}
	merged.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}
	manifest, err = json.Marshal(merged)
	return manifest, config, err
}

// Artifacts returns what a layout's index.json records about an image.
func (l *Layout) Artifacts(image digest.Digest) ([]Artifact, error) {
	found, err := l.referrers(image)
	if err != nil {
		return nil, err
	}
	var out []Artifact
	for _, d := range found {
		out = append(out, Artifact{Subject: image, Descriptor: d, Referrer: true})
	}
	tag := fallbackTag(image) + ".sig"
	d, err := l.Resolve(tag)
	if notFound(err) {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	d.Annotations = nil
	return append(out, Artifact{Subject: image, Descriptor: d, Tag: tag}), nil
}

// Publication returns the image that the layout of a store has under a name, with its artifacts, ready to be
// published under the same name.
func (l *Layout) Publication(name string) (Publication, error) {
	full, err := Normalize(name)
	if err != nil {
		return Publication{}, err
	}
	d, err := l.Resolve(full)
	if err != nil {
		return Publication{}, err
	}
	var artifacts []Artifact
	for _, subject := range l.subjects(d) {
		about, err := l.Artifacts(subject)
		if err != nil {
			return Publication{}, err
		}
		artifacts = append(artifacts, about...)
	}
	for _, key := range []string{ocispec.AnnotationRefName, annotationImageName, annotationKind} {
		delete(d.Annotations, key)
	}
	if len(d.Annotations) == 0 {
		d.Annotations = nil
	}
	return Publication{Image: d, Names: []string{full}, Artifacts: artifacts}, nil
}

// An Entry is an image in a layout.
type Entry struct {
	Name    string // "" when it has none
	Digest  digest.Digest
	Parts   []digest.Digest // it and, of an index, the manifests that it lists
	Size    int64           // of all its blobs
	Created *time.Time      // nil when its config does not say
	Err     error           // why the rest is not known
}

// List returns the images of a layout, sorted by name, without signatures and other artifacts.
func (l *Layout) List() ([]Entry, error) {
	idx, err := l.Index()
	if err != nil {
		return nil, err
	}
	var out []Entry
	for _, d := range idx.Manifests {
		ref := d.Annotations[ocispec.AnnotationRefName]
		if !isImageEntry(d) || isArtifactTag(ref) {
			continue
		}
		e := Entry{Name: ref, Digest: d.Digest, Parts: l.subjects(d)}
		e.Size, e.Created, e.Err = l.measure(d, 0)
		out = append(out, e)
	}
	slices.SortStableFunc(out, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// measure sums the sizes of an image's blobs and finds the youngest config.
func (l *Layout) measure(d ocispec.Descriptor, depth int) (size int64, created *time.Time, err error) {
	raw, err := l.ReadAll(d, maxManifest)
	if err != nil {
		return 0, nil, err
	}
	if depth > maxDepth {
		return 0, nil, errors.New("nested too deeply")
	}
	size = d.Size
	if isIndex(d.MediaType) {
		idx, err := parseIndex(raw, d.MediaType)
		if err != nil {
			return 0, nil, err
		}
		for _, m := range idx.Manifests {
			s, c, err := l.measure(m, depth+1)
			if err != nil {
				return 0, nil, err
			}
			size += s
			if c != nil && (created == nil || c.After(*created)) {
				created = c
			}
		}
		return size, created, nil
	}
	m, err := parseManifest(raw, d.MediaType)
	if err != nil {
		return 0, nil, err
	}
	size += m.Config.Size
	for _, layer := range m.Layers {
		size += layer.Size
	}
	config, err := l.ReadAll(m.Config, maxConfig)
	if err != nil {
		return 0, nil, err
	}
	var img ocispec.Image
	if err := json.Unmarshal(config, &img); err != nil {
		return 0, nil, err
	}
	return size, img.Created, nil
}
