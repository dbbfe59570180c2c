package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/rogpeppe/go-internal/testscript"
)

// The commands of stories that look into OCI layouts. They read them with the standard library alone: what cooper writes is judged by
// something that shares no code with it.

func readJSON(ts *testscript.TestScript, file string, v any) {
	b, err := os.ReadFile(file)
	ts.Check(err)
	if err := json.Unmarshal(b, v); err != nil {
		ts.Fatalf("%s: %v", file, err)
	}
}

func blobFile(dir string, d ocispec.Descriptor) string {
	return filepath.Join(dir, "blobs", d.Digest.Algorithm().String(), d.Digest.Encoded())
}

// imageOf returns the descriptor and manifest of the one image of a layout; signatures beside it are not images.
func imageOf(ts *testscript.TestScript, dir string) (ocispec.Descriptor, ocispec.Manifest) {
	var index ocispec.Index
	readJSON(ts, filepath.Join(dir, "index.json"), &index)
	var found []ocispec.Descriptor
	for _, d := range index.Manifests {
		var m ocispec.Manifest
		readJSON(ts, blobFile(dir, d), &m)
		if m.Config.MediaType == ocispec.MediaTypeImageConfig && m.Subject == nil && !strings.HasPrefix(d.Annotations[ocispec.AnnotationRefName], "sha256-") {
			found = append(found, d)
		}
	}
	found = slices.CompactFunc(found, func(a, b ocispec.Descriptor) bool { return a.Digest == b.Digest })
	if len(found) != 1 {
		ts.Fatalf("%s holds %d images, want one", dir, len(found))
	}
	var m ocispec.Manifest
	readJSON(ts, blobFile(dir, found[0]), &m)
	return found[0], m
}

// sameDigest compares the images of two layouts.
func sameDigest(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: [!] same-digest DIR DIR")
	}
	a, _ := imageOf(ts, ts.MkAbs(args[0]))
	b, _ := imageOf(ts, ts.MkAbs(args[1]))
	if (a.Digest == b.Digest) == neg {
		ts.Fatalf("%s is %s, %s is %s", args[0], a.Digest, args[1], b.Digest)
	}
}

// layerFiles prints what the layers above the busybox base hold, each layer under a heading.
func layerFiles(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: layer-files DIR")
	}
	dir := ts.MkAbs(args[0])
	_, m := imageOf(ts, dir)
	_, base := imageOf(ts, ts.Getenv("BUSYBOX"))
	n := 0
	for _, layer := range m.Layers {
		if slices.ContainsFunc(base.Layers, func(d ocispec.Descriptor) bool { return d.Digest == layer.Digest }) {
			continue
		}
		n++
		fmt.Fprintf(ts.Stdout(), "layer %d\n", n)
		r := tar.NewReader(bytes.NewReader(plain(ts, blobFile(dir, layer))))
		for {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			ts.Check(err)
			fmt.Fprintln(ts.Stdout(), describe(h))
		}
	}
}

func describe(h *tar.Header) string {
	kind := map[byte]string{tar.TypeReg: "-", tar.TypeDir: "d", tar.TypeSymlink: "l", tar.TypeLink: "h", tar.TypeChar: "c", tar.TypeBlock: "b", tar.TypeFifo: "p"}[h.Typeflag]
	line := fmt.Sprintf("%s%04o %d:%d %s", kind, h.Mode&0o7777, h.Uid, h.Gid, strings.TrimSuffix(h.Name, "/"))
	if h.Linkname != "" {
		line += " -> " + h.Linkname
	}
	return line
}

// plain returns the bytes of a blob, uncompressed when it is gzip.
func plain(ts *testscript.TestScript, file string) []byte {
	b, err := os.ReadFile(file)
	ts.Check(err)
	if !bytes.HasPrefix(b, []byte{0x1f, 0x8b}) {
		return b
	}
	r, err := gzip.NewReader(bytes.NewReader(b))
	ts.Check(err)
	out, err := io.ReadAll(r)
	ts.Check(err)
	return out
}

// showConfig prints an image's config, indented.
func showConfig(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: show-config DIR")
	}
	dir := ts.MkAbs(args[0])
	_, m := imageOf(ts, dir)
	b, err := os.ReadFile(blobFile(dir, m.Config))
	ts.Check(err)
	var out bytes.Buffer
	ts.Check(json.Indent(&out, b, "", "  "))
	fmt.Fprintln(ts.Stdout(), out.String())
}

// blobBytes looks for a text in every file of a layout, compressed ones unpacked.
func blobBytes(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: [!] blob-bytes DIR TEXT")
	}
	holder := ""
	for _, file := range filesOf(ts, ts.MkAbs(args[0])) {
		if bytes.Contains(plain(ts, file), []byte(args[1])) {
			holder = file
		}
	}
	if (holder != "") == neg {
		ts.Fatalf("%q is held by %q", args[1], holder)
	}
}

func filesOf(ts *testscript.TestScript, dir string) []string {
	var files []string
	ts.Check(filepath.WalkDir(dir, func(file string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			files = append(files, file)
		}
		return err
	}))
	if len(files) == 0 {
		ts.Fatalf("%s is empty", dir)
	}
	return files
}

// eachTampered changes one byte in the middle of each blob of a layout in turn, runs the command, which must refuse with the given
// exit code, and puts the byte back: "each-tampered 4 DIR cooper verify ...".
func eachTampered(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: each-tampered CODE DIR PROGRAM ARG...")
	}
	for _, file := range filesOf(ts, filepath.Join(ts.MkAbs(args[1]), "blobs")) {
		good, err := os.ReadFile(file)
		ts.Check(err)
		bad := bytes.Clone(good)
		bad[len(bad)/2] ^= 1
		ts.Check(os.Chmod(file, 0o644))
		ts.Check(os.WriteFile(file, bad, 0o644))
		ts.Logf("one bit of %s is changed", filepath.Base(file))
		exits(ts, false, append([]string{args[0]}, args[2:]...))
		ts.Check(os.WriteFile(file, good, 0o644))
	}
}
