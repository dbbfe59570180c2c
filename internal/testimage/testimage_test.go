package testimage

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
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

func TestForeignBusyboxIsOfItsArchitecture(t *testing.T) {
	arch, machine := "arm64", elf.EM_AARCH64
	if runtime.GOARCH == arch {
		arch, machine = "amd64", elf.EM_X86_64
	}
	dir := BusyboxFor(t, arch)
	img := open(t, dir)
	if err := validate.Image(img); err != nil {
		t.Errorf("layout does not validate: %v", err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if config.Architecture != arch {
		t.Errorf("config says %s, want %s", config.Architecture, arch)
	}
	f, err := elf.NewFile(bytes.NewReader(ReadFile(t, dir, "bin/busybox")))
	if err != nil {
		t.Fatal(err)
	}
	if f.Machine != machine {
		t.Errorf("the program is for %v, want %v", f.Machine, machine)
	}
	if diff := cmp.Diff(entries(t, open(t, Busybox(t))), entries(t, img)); diff != "" {
		t.Errorf("the tree differs from the native one (-native +foreign):\n%s", diff)
	}
	if BusyboxFor(t, runtime.GOARCH) != Busybox(t) {
		t.Error("the machine's own architecture is not the plain busybox")
	}
}

func TestMultiIsAnIndexOfTwoArchitectures(t *testing.T) {
	host := Serve(t, Multi(t))
	ref, err := name.ParseReference(host + "/multi:latest")
	if err != nil {
		t.Fatal(err)
	}
	index, err := remote.Index(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Errorf("index does not validate: %v", err)
	}
	for _, arch := range []string{"amd64", "arm64"} {
		img, err := remote.Image(ref, remote.WithPlatform(v1.Platform{OS: "linux", Architecture: arch}))
		if err != nil {
			t.Fatal(err)
		}
		if got, want := digestOf(t, img), digestOf(t, open(t, BusyboxFor(t, arch))); got != want {
			t.Errorf("%s in the index is %s, want %s", arch, got, want)
		}
	}
}

func open(t *testing.T, dir string) v1.Image {
	t.Helper()
	img, err := onlyImage(dir)
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
