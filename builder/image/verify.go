package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Damage is something in the layout of a store that is not as it should be.
type Damage struct {
	Where  string // relative to the layout
	What   string
	Repair string // what was done about it; empty: nothing
}

// RepairFrame finds a layout's own files, oci-layout and index.json, that cannot be read, without which it cannot be
// opened, or say something else than was written. With repair they are moved away and written again. Images lose their
// names only when the copy of index.json is damaged, too.
func RepairFrame(dir string, repair bool) ([]Damage, error) {
	l, err := open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer l.Close()
	l.own = true
	var found []Damage
	tell := func(name, what string, mend func() (string, error)) error {
		d := Damage{Where: name, What: what}
		var err error
		if repair {
			d.Repair, err = mend()
		}
		found = append(found, d)
		return err
	}
	err = l.locked(func() error {
		if err := l.checkVersion(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			err = tell(ocispec.ImageLayoutFile, err.Error(), func() (string, error) {
				done, err := l.setAside(ocispec.ImageLayoutFile)
				return done, errors.Join(err, l.writeVersion())
			})
			if err != nil {
				return err
			}
		}
		stored, err := l.readIndex()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && stored.damage != "" {
			return tell(ocispec.ImageIndexFile, stored.damage, func() (string, error) { return l.mendIndex(stored) })
		}
		if _, err := l.Index(); err != nil {
			return tell(ocispec.ImageIndexFile, err.Error(), l.beginIndex)
		}
		if stored.copyDamage != "" {
			return tell(indexCopyFile, stored.copyDamage, func() (string, error) { return "written again", l.copyIndex() })
		}
		return nil
	})
	if err != nil {
		return found, fmt.Errorf("OCI layout %s: %w", dir, err)
	}
	return found, nil
}

// beginIndex puts an index without images in the place of one that cannot be read.
func (l *Layout) beginIndex() (string, error) {
	done, err := l.setAside(ocispec.ImageIndexFile)
	return done, errors.Join(err, l.writeIndex(emptyIndex()))
}

func (l *Layout) setAside(name string) (string, error) {
	if err := l.mkdir(quarantineDir); err != nil {
		return "", err
	}
	to := quarantineDir + "/" + filepath.Base(name) + "-" + randomName()
	return "moved to content/" + to, l.root.Rename(name, to)
}

// Verify hashes every blob and follows index.json. With repair, broken blobs are moved away, and images that lack
// something leave index.json.
func (l *Layout) Verify(ctx context.Context, repair bool) ([]Damage, error) {
	found, broken, err := l.verifyBlobs(ctx, repair)
	if err != nil {
		return found, fmt.Errorf("verify blobs: %w", err)
	}
	idx, err := l.Index()
	if err != nil {
		return found, err
	}
	for _, d := range idx.Manifests {
		what := l.lacks(d, broken, 0)
		if what == "" {
			continue
		}
		name := d.Annotations[ocispec.AnnotationRefName]
		if name == "" {
			name = d.Digest.String()
		}
		damage := Damage{Where: ocispec.ImageIndexFile, What: fmt.Sprintf("%s needs what is missing or broken: %s", name, what)}
		if repair {
			if err := l.drop(d.Digest); err != nil {
				return found, err
			}
			damage.Repair = "taken out of index.json"
		}
		found = append(found, damage)
	}
	return found, nil
}

func (l *Layout) verifyBlobs(ctx context.Context, repair bool) (found []Damage, broken map[digest.Digest]string, err error) {
	entries, err := fs.ReadDir(l.root.FS(), blobsDir)
	if err != nil {
		return nil, nil, err
	}
	broken = map[digest.Digest]string{}
	for _, e := range entries {
		if ctx.Err() != nil {
			return found, broken, context.Cause(ctx)
		}
		name := blobsDir + "/" + e.Name()
		what, err := l.checkFile(digest.Digest("sha256:"+e.Name()), name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return found, broken, err
		}
		if what == "" {
			continue
		}
		d := Damage{Where: name, What: what}
		broken[digest.Digest("sha256:"+e.Name())] = what
		if repair {
			_ = l.root.Remove(markersDir + "/" + e.Name())
			if d.Repair, err = l.setAside(name); err != nil {
				return found, broken, err
			}
		}
		found = append(found, d)
	}
	return found, broken, nil
}

// checkFile hashes a file below blobs, whatever is remembered about it.
func (l *Layout) checkFile(d digest.Digest, name string) (what string, err error) {
	if _, err := hexOf(d); err != nil {
		return "its name is no digest", nil
	}
	at, err := l.root.Lstat(name)
	if err != nil {
		return "", err
	}
	if !at.Mode().IsRegular() {
		return "it is not a regular file", nil
	}
	f, fi, err := l.openFile(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	_, err = io.Copy(io.Discard, verify(f, ocispec.Descriptor{Digest: d, Size: fi.Size()}))
	var wrong *ContentError
	if errors.As(err, &wrong) {
		return wrong.Error(), nil
	}
	return "", err
}

// lacks returns what an image cannot do without and is not there, or "".
func (l *Layout) lacks(d ocispec.Descriptor, broken map[digest.Digest]string, depth int) string {
	if what := broken[d.Digest]; what != "" {
		return what
	}
	if depth > maxDepth {
		return "nested too deeply"
	}
	if !isManifest(d.MediaType) && !isIndex(d.MediaType) {
		f, err := l.openUnused(d)
		if err != nil {
			return err.Error()
		}
		f.Close()
		return ""
	}
	raw, err := l.peek(d)
	if err != nil {
		return err.Error()
	}
	below, err := children(raw, d.MediaType)
	if err != nil {
		return err.Error()
	}
	for _, c := range below {
		if what := l.lacks(c, broken, depth+1); what != "" {
			return what
		}
	}
	return ""
}

// drop takes the entries of a manifest out of index.json, whoever uses it: it cannot be used.
func (l *Layout) drop(d digest.Digest) error {
	return l.Update(func(idx *ocispec.Index) error {
		kept := idx.Manifests[:0]
		for _, m := range idx.Manifests {
			if m.Digest != d {
				kept = append(kept, m)
			}
		}
		idx.Manifests = kept
		return nil
	})
}
