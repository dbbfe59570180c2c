package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A floor is what part of a case costs with the plainest program that does it.
type floor struct {
	name   string
	script string // of sh; in, a directory with tree/, large and layer; out, an empty one
}

func floors() []floor {
	return []floor{
		{"clone and exec in new user, mount and pid namespaces: `unshare`", "exec unshare --map-root-user --mount --pid --fork true"},
		{"stat 50,000 files: `find -printf`", `exec find "$in/tree" -printf '%s %T@ %i\n' >/dev/null`},
		{"read and hash 50,000 files: `sha256sum`", `find "$in/tree" -type f -print0 | xargs -0 sha256sum >/dev/null`},
		{"copy 50,000 files: `cp -r`", `exec cp -r "$in/tree" "$out"`},
		{"tar 50,000 files: `tar -c`", `tar -cf - -C "$in" tree | cat >/dev/null`},
		{"copy 500 MB: `cp`", `exec cp "$in/large" "$out"`},
		{"hash 500 MB: `sha256sum`", `exec sha256sum "$in/large"`},
		{"hash the base's largest layer, compressed: `sha256sum`", `exec sha256sum "$in/layer"`},
		{"decompress it: `gzip -dc`", `exec gzip -dc "$in/layer" >/dev/null`},
		{"unpack it: `tar -xz`", `exec tar -xzf "$in/layer" -C "$out"`},
		{"tar and compress the export, one processor: `tar -c` to `gzip -6`", `tar -cf - -C "$in" tree large | gzip -6 >"$out/tar.gz"`},
		{"the same: `tar -c` to `zstd -3`", `tar -cf - -C "$in" tree large | zstd -q -3 >"$out/tar.zst"`},
	}
}

const floorRuns = 3

// floors measures all of them.
func (b *bench) floors(ctx context.Context, base string) ([]result, error) {
	in := filepath.Join(b.work, "floors")
	if err := os.Mkdir(in, 0o755); err != nil {
		return nil, err
	}
	defer os.RemoveAll(in)
	if err := b.writeContext(in, true, true); err != nil {
		return nil, err
	}
	layer, err := largestLayer(base)
	if err != nil {
		return nil, err
	}
	if err := os.Symlink(layer, filepath.Join(in, "layer")); err != nil {
		return nil, err
	}
	var all []result
	for _, f := range floors() {
		r := result{Builder: f.name}
		for range floorRuns {
			out := filepath.Join(b.work, "out")
			if err := os.Mkdir(out, 0o755); err != nil {
				return nil, err
			}
			syscall.Sync()
			env := environment(b.work, "in="+in, "out="+out)
			figure, err := measure(ctx, command{args: []string{"sh", "-c", f.script}, env: env}, b.log())
			if err := errors.Join(ctx.Err(), remove(out)); err != nil {
				return nil, err
			}
			if err != nil {
				r = result{Builder: f.name, Failure: err.Error()}
				break
			}
			r.Figures = append(r.Figures, figure)
		}
		b.say("%s: %s", strings.ReplaceAll(f.name, "`", ""), r.summary())
		all = append(all, r)
	}
	return all, nil
}

func largestLayer(layout string) (string, error) {
	var index ocispec.Index
	if err := readJSON(filepath.Join(layout, "index.json"), &index); err != nil {
		return "", err
	}
	var manifest ocispec.Manifest
	if err := readBlob(layout, index.Manifests[0], &manifest); err != nil {
		return "", err
	}
	largest := manifest.Layers[0]
	for _, l := range manifest.Layers {
		if l.Size > largest.Size {
			largest = l
		}
	}
	return blobPath(layout, largest.Digest), nil
}
