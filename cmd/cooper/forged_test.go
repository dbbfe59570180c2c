package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cooper-build/cooper/internal/testimage"
)

// TestAnImageThatClaimsAnothersLayersIsRefused forges an image whose config has the DiffIDs of a base that the store
// knows, over a layer of its own (the class of BuildKit's fixes of 0.33.1).
func TestAnImageThatClaimsAnothersLayersIsRefused(t *testing.T) {
	store, context := newStore(t), t.TempDir()
	if err := os.WriteFile(filepath.Join(context, "Dockerfile"), []byte("FROM base\nRUN cat /etc/passwd\nUSER 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	build := func(layout string) (string, error) {
		out, err := exec.Command("cooper", "--root", store, "build", "--progress=plain",
			"--build-context", "base=oci-layout://"+layout+":latest", context).CombinedOutput()
		return string(out), err
	}
	honest := testimage.Busybox(t)
	forged := forge(t, honest)
	if out, err := build(honest); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for range 2 { // the second time nothing may be remembered of the first
		out, err := build(forged)
		if err == nil {
			t.Fatalf("an image was built from a base that got another image's tree: its publisher chooses what later builds and policy see\n%s", out)
		}
		if !strings.Contains(out, "promised") {
			t.Errorf("error does not name the wrong DiffID:\n%s", out)
		}
	}
}

// forge copies a layout and puts another layer under its config.
func forge(t *testing.T, layout string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "forged")
	if out, err := exec.Command("cp", "-r", "--no-preserve=mode", layout, dir).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	put := func(content []byte) (digest.Digest, int64) {
		d := digest.FromBytes(content)
		if err := os.WriteFile(filepath.Join(dir, "blobs", "sha256", d.Encoded()), content, 0o644); err != nil {
			t.Fatal(err)
		}
		return d, int64(len(content))
	}
	get := func(name string, v any) {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err == nil {
			err = json.Unmarshal(text, v)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	encode := func(v any) []byte {
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	var index ocispec.Index
	get("index.json", &index)
	var manifest ocispec.Manifest
	get("blobs/sha256/"+index.Manifests[0].Digest.Encoded(), &manifest)

	var blob bytes.Buffer
	zip := gzip.NewWriter(&blob)
	w := tar.NewWriter(zip)
	if err := w.WriteHeader(&tar.Header{Name: "evil", Typeflag: tar.TypeReg, Mode: 0o4755}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := zip.Close(); err != nil {
		t.Fatal(err)
	}
	manifest.Layers[0].Digest, manifest.Layers[0].Size = put(blob.Bytes())
	index.Manifests[0].Digest, index.Manifests[0].Size = put(encode(manifest))
	if err := os.WriteFile(filepath.Join(dir, "index.json"), encode(index), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}
