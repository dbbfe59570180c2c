package builder

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/cooper-build/cooper/snapshot/layer"
)

// exportTar writes the final trees as one tar. A file gets its name when it is whole.
func (b *build) exportTar(ctx context.Context, f *finished, o TreeTar) (err error) {
	if o.File == "" {
		return b.writeTrees(ctx, f, o.To)
	}
	tmp, err := os.CreateTemp(filepath.Dir(o.File), "."+filepath.Base(o.File)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(tmp.Name())
		}
	}()
	err = errors.Join(b.writeTrees(ctx, f, tmp), tmp.Chmod(0o644), tmp.Sync(), tmp.Close())
	if err != nil {
		return err
	}
	return os.Rename(tmp.Name(), o.File)
}

func (b *build) writeTrees(ctx context.Context, f *finished, to io.Writer) error {
	w := tar.NewWriter(to)
	for _, img := range f.Targets {
		prefix := ""
		if f.Index {
			prefix = platformDir(img) + "/"
		}
		if err := b.writeTree(ctx, img, prefix, w); err != nil {
			return err
		}
	}
	return w.Close()
}

// writeTree writes a tree, as one layer, under a prefix.
func (b *build) writeTree(ctx context.Context, img *assembled, prefix string, w *tar.Writer) error {
	view, err := b.store.View(ctx, img.Root)
	if err != nil {
		return err
	}
	defer view.Close()
	o := layer.DiffOptions{Epoch: b.epoch(), StripPrivilege: map[string]bool{}}
	for _, path := range img.Stripped {
		o.StripPrivilege[path] = true
	}
	write := func(w io.Writer) error { return view.WriteLayer(ctx, w, o) }
	return readWritten(write, func(r io.Reader) error {
		for from := tar.NewReader(r); ; {
			h, err := from.Next()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			h.Name = prefix + h.Name
			if h.Typeflag == tar.TypeLink {
				h.Linkname = prefix + h.Linkname
			}
			if err := w.WriteHeader(h); err != nil {
				return err
			}
			if _, err := io.Copy(w, from); err != nil {
				return err
			}
		}
	})
}
