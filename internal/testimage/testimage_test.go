package testimage

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

func TestBusyboxIsAValidLayoutWithTheDocumentedTree(t *testing.T) {
	img := open(t, Busybox(t))
	if err := validate.Image(img); err != nil {
		t.Errorf("layout does not validate: %v", err)
	}
	got := entries(t, img)
	for path, want := range map[string]string{
		"bin/busybox":     "- 755 0:0",
		"bin/sh":          "l 777 0:0 -> busybox",
		"usr/bin/env":     "l 777 0:0 -> ../../bin/busybox",
		"etc/passwd":      "- 644 0:0",
		"home/app/":       "d 755 1000:1000",
		"tmp/":            "d 1777 0:0",
		"etc/hostname":    "",
		"etc/resolv.conf": "",
	} {
		if got[path] != want {
			t.Errorf("%s: got %q, want %q", path, got[path], want)
		}
	}
}

func TestDebianHoldsNothingOfTheMachineThatMadeIt(t *testing.T) {
	img := open(t, Debian(t))
	if err := validate.Image(img, validate.Fast); err != nil {
		t.Errorf("layout does not validate: %v", err)
	}
	got := entries(t, img)
	for _, path := range []string{"etc/resolv.conf", "etc/hostname", "dev/null"} {
		if got[path] != "" {
			t.Errorf("%s is in the image: %s", path, got[path])
		}
	}
	if got["usr/bin/apt-get"] == "" {
		t.Error("no usr/bin/apt-get in the image")
	}
	if got["etc/gshadow"] != "- 640 0:42" {
		t.Errorf("etc/gshadow: got %q, want the group shadow to survive", got["etc/gshadow"])
	}
}

func TestTwoMakersAtOnceGiveOneImageWithEqualBytes(t *testing.T) {
	here, there := t.TempDir(), t.TempDir()
	var wg sync.WaitGroup
	for _, cache := range []string{here, here, here, there} {
		wg.Go(func() {
			if _, err := Bases()["busybox"].makeOnce(context.Background(), cache); err != nil {
				t.Errorf("make: %v", err)
			}
		})
	}
	wg.Wait()
	if diff := cmp.Diff(fileSums(t, here), fileSums(t, there)); diff != "" {
		t.Errorf("the same recipe gave different bytes (-one +other):\n%s", diff)
	}
}

func TestACacheThatCannotBeWrittenIsStillRead(t *testing.T) {
	cache := t.TempDir()
	want, err := Bases()["busybox"].makeOnce(t.Context(), cache)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(want + ".lock"); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(want), 0o555); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Chmod(filepath.Dir(want), 0o755) })
	t.Setenv("COOPER_TEST_CACHE", cache)
	if got := Busybox(t); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if _, err := os.Stat(want + ".lock"); err == nil {
		t.Error("reading the cache wrote a lock file into it")
	}
}

func TestServeGivesTheLayoutsImageUnderItsName(t *testing.T) {
	dir := Busybox(t)
	host := Serve(t, dir)
	ref, err := name.ParseReference(host + "/busybox:latest")
	if err != nil {
		t.Fatal(err)
	}
	served, err := remote.Image(ref)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := digestOf(t, served), digestOf(t, open(t, dir)); got != want {
		t.Errorf("served digest %s, want %s", got, want)
	}
}

func open(t *testing.T, dir string) v1.Image {
	t.Helper()
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	img, err := index.Image(manifest.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// entries describes every entry of the image by its path.
func entries(t *testing.T, img v1.Image) map[string]string {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	content, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer content.Close()
	found := map[string]string{}
	for r := tar.NewReader(content); ; {
		h, err := r.Next()
		if err == io.EOF {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		kind := map[byte]string{tar.TypeReg: "-", tar.TypeDir: "d", tar.TypeSymlink: "l", tar.TypeLink: "h"}[h.Typeflag]
		line := fmt.Sprintf("%s %o %d:%d", kind, h.Mode, h.Uid, h.Gid)
		if h.Linkname != "" {
			line += " -> " + h.Linkname
		}
		path := h.Name
		if h.Typeflag == tar.TypeDir {
			path = filepath.Clean(path) + "/"
		}
		found[path] = line
	}
}

func digestOf(t *testing.T, img v1.Image) v1.Hash {
	t.Helper()
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func fileSums(t *testing.T, dir string) map[string]string {
	t.Helper()
	sums := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		sums[rel] = fmt.Sprintf("%x", sha256.Sum256(b))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return sums
}
