// Package testimage makes the base images that tests and the demo stand on, from this machine's own Debian packages, so that no
// binary lives in the repository and nothing is fetched from an image registry.
//
// An image is an OCI layout directory with one image tagged "latest". It is made once, under a lock, into a cache outside the
// repository, and only read from then on: its path and its bytes are the same for every test and every account of a machine. The
// package knows nothing of cooper; it is written with another library than the code it helps to test, which keeps both honest.
package testimage

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Tag is the one tag of every layout made here.
const Tag = "latest"

// epoch is the time of every file and config: the bytes must not depend on when they were made.
var epoch = time.Unix(1_700_000_000, 0).UTC()

// searchPath is the PATH of the images' config; Debian's, because RUN steps in tests expect to find sbin.
const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Base is one of the images this package can make.
type Base struct {
	name   string
	recipe int // raised when the contents change, so that an old cache is not taken for the new image
	arch   string
	cmd    string
	fill   func(ctx context.Context, w *tar.Writer, scratch string) error
	of     []string // instead of a tree of its own: the images of an index
}

// Bases lists the images by the name that mkbase and Serve know them by.
func Bases() map[string]Base {
	here := runtime.GOARCH
	bases := map[string]Base{
		"busybox": {name: "busybox", recipe: 1, arch: here, cmd: "sh", fill: fillBusybox},
		"debian":  {name: "debian", recipe: 1, arch: here, cmd: "bash", fill: debianWith()},
		"clients": {name: "clients", recipe: 1, arch: here, cmd: "bash", fill: debianWith("ca-certificates", "curl", "git", "nodejs", "npm", "python3-pip")},
		"multi":   {name: "multi", recipe: 1, of: []string{busyboxFor("amd64"), busyboxFor("arm64")}},
	}
	for arch, port := range debianPorts {
		if name := busyboxFor(arch); arch != here {
			bases[name] = Base{name: name, recipe: 1, arch: arch, cmd: "sh", fill: foreignBusybox(port)}
		}
	}
	return bases
}

func busyboxFor(arch string) string {
	if arch == runtime.GOARCH {
		return "busybox"
	}
	return "busybox-" + arch
}

// Busybox returns the layout directory of a small image: the static busybox of this machine with its applets as links, the users
// root, nobody (65534) and app (1000), a sticky /tmp and no /etc/resolv.conf. It is read-only; copy it before changing it.
func Busybox(t testing.TB) string { return get(t, "busybox") }

// Debian returns the layout directory of a minimal Debian (or Ubuntu) of this machine's release, with this machine's package
// sources, so that apt-get works in it wherever it works outside. It is read-only.
func Debian(t testing.TB) string { return get(t, "debian") }

// BusyboxFor returns the layout directory of what Busybox documents, for another architecture: a GOARCH that Debian has a port for.
// The program is Debian's for that architecture, so it runs only where it is emulated. It is read-only.
func BusyboxFor(t testing.TB, arch string) string {
	t.Helper()
	name := busyboxFor(arch)
	if _, ok := Bases()[name]; !ok {
		t.Fatalf("test base image: no busybox for %s", arch)
	}
	return get(t, name)
}

// Multi returns the layout directory of an index with the busybox images of amd64 and arm64, in this order. It is read-only.
func Multi(t testing.TB) string { return get(t, "multi") }

// ReadFile returns the content of a regular file of the one image in a layout that this package made.
func ReadFile(t testing.TB, dir, name string) []byte {
	t.Helper()
	img, err := onlyImage(dir)
	if err != nil {
		t.Fatalf("%s: %v", dir, err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatalf("%s: %v", dir, err)
	}
	content, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatalf("%s: %v", dir, err)
	}
	defer content.Close()
	for r := tar.NewReader(content); ; {
		h, err := r.Next()
		if err != nil {
			t.Fatalf("%s: look for %s: %v", dir, name, err)
		}
		if h.Name == name {
			b, err := io.ReadAll(r)
			if err != nil {
				t.Fatalf("%s: %s: %v", dir, name, err)
			}
			return b
		}
	}
}

func onlyImage(dir string) (v1.Image, error) {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	return index.Image(manifest.Manifests[0].Digest)
}

func get(t testing.TB, name string) string {
	t.Helper()
	dir, err := Bases()[name].Ensure(t.Context())
	if err != nil {
		t.Fatalf("test base image: %v", err)
	}
	return dir
}

// Ensure returns the layout directory of the image, making it first when no cache that this user can read holds it. Processes and
// users may call it at the same time: one makes the image, the others wait and use it.
func (b Base) Ensure(ctx context.Context) (string, error) {
	caches := cacheDirs()
	for _, cache := range caches {
		if dir := b.dir(cache); complete(dir) {
			return dir, nil
		}
	}
	var errs []error
	for _, cache := range caches {
		dir, err := b.makeOnce(ctx, cache)
		if err == nil {
			return dir, nil
		}
		errs = append(errs, err)
		if !errors.Is(err, fs.ErrPermission) && !errors.Is(err, unix.EROFS) {
			break // the directory is ours to use: the recipe itself went wrong, and would again
		}
	}
	return "", fmt.Errorf("make %s layout: %w", b.name, errors.Join(errs...))
}

// cacheDirs lists the places for images, best first. The system-wide one comes before the user's own, because root prepares it for
// accounts that cannot make a Debian themselves.
func cacheDirs() []string {
	if dir := os.Getenv("COOPER_TEST_CACHE"); dir != "" {
		return []string{dir}
	}
	dirs := []string{"/var/cache/cooper-test"}
	if dir, err := os.UserCacheDir(); err == nil {
		dirs = append(dirs, filepath.Join(dir, "cooper-test"))
	}
	return dirs
}

// dir ends in the plain name, which Serve takes for the repository.
func (b Base) dir(cache string) string {
	return filepath.Join(cache, fmt.Sprintf("base-%d-%s", b.recipe, runtime.GOARCH), b.name)
}

// complete trusts the rename that ends makeOnce: a layout that is there is whole.
func complete(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "index.json"))
	return err == nil
}

func (b Base) makeOnce(ctx context.Context, cache string) (string, error) {
	dir := b.dir(cache)
	parent := filepath.Dir(dir)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	if complete(dir) { // someone made it while we waited
		return dir, nil
	}
	scratch, err := os.MkdirTemp(parent, b.name+".making-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(scratch)
	made, err := b.make(ctx, scratch)
	if err != nil {
		return "", err
	}
	return dir, os.Rename(made, dir)
}

// make writes the layout somewhere beneath scratch and returns where.
func (b Base) make(ctx context.Context, scratch string) (string, error) {
	dir := filepath.Join(scratch, b.name)
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return "", err
	}
	tag := layout.WithAnnotations(map[string]string{ocispec.AnnotationRefName: Tag})
	if len(b.of) > 0 {
		index, err := b.index(ctx)
		if err != nil {
			return "", err
		}
		if err := path.AppendIndex(index, tag); err != nil {
			return "", err
		}
		return dir, readable(dir)
	}
	layer := filepath.Join(scratch, "layer.tar")
	if err := b.writeLayer(ctx, layer, scratch); err != nil {
		return "", err
	}
	img, err := b.image(layer)
	if err != nil {
		return "", err
	}
	if err := path.AppendImage(img, tag, layout.WithPlatform(v1.Platform{OS: "linux", Architecture: b.arch})); err != nil {
		return "", err
	}
	return dir, readable(dir)
}

// index puts the images of other layouts into one.
func (b Base) index(ctx context.Context) (v1.ImageIndex, error) {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, name := range b.of {
		base := Bases()[name]
		dir, err := base.Ensure(ctx)
		if err != nil {
			return nil, err
		}
		img, err := onlyImage(dir)
		if err != nil {
			return nil, err
		}
		platform := &v1.Platform{OS: "linux", Architecture: base.arch}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: platform}})
	}
	return index, nil
}

func (b Base) writeLayer(ctx context.Context, file, scratch string) (err error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := tar.NewWriter(f)
	if err := b.fill(ctx, w, scratch); err != nil {
		return err
	}
	return w.Close()
}

func (b Base) image(layerTar string) (v1.Image, error) {
	layer, err := tarball.LayerFromFile(layerTar, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err = mutate.ConfigFile(img, &v1.ConfigFile{
		Architecture: b.arch,
		OS:           "linux",
		Created:      v1.Time{Time: epoch},
		RootFS:       v1.RootFS{Type: "layers"},
		Config:       v1.Config{Env: []string{searchPath}, Cmd: []string{b.cmd}},
	})
	if err != nil {
		return nil, err
	}
	return mutate.Append(img, mutate.Addendum{
		Layer:   layer,
		History: v1.History{Created: v1.Time{Time: epoch}, CreatedBy: "cooper testimage " + b.name},
	})
}

// readable lets every account of the machine read the layout, whatever umask and temporary files left.
func readable(dir string) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() {
			return os.Chmod(path, 0o755)
		}
		return os.Chmod(path, 0o644)
	})
}
