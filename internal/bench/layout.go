package main

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"io"
	"os"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// checkLayout says what is wrong with an OCI layout in a tar file: too few layers that are compressed as they were to be.
func checkLayout(file, codec string, layers int) error {
	var index ocispec.Index
	if err := decode(file, "index.json", &index); err != nil {
		return err
	}
	if len(index.Manifests) != 1 {
		return fmt.Errorf("%d manifests in the layout, want 1", len(index.Manifests))
	}
	var manifest ocispec.Manifest
	if err := decode(file, "blobs/sha256/"+index.Manifests[0].Digest.Encoded(), &manifest); err != nil {
		return err
	}
	n := 0
	for _, l := range manifest.Layers {
		if l.MediaType == "application/vnd.oci.image.layer.v1.tar+"+codec {
			n++
		}
	}
	if n < layers {
		return fmt.Errorf("%d layers of the image are compressed with %s, want %d", n, codec, layers)
	}
	return nil
}

func decode(file, name string, into any) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			return fmt.Errorf("no %s in the layout", name)
		}
		if err != nil {
			return err
		}
		if h.Name == name {
			return json.NewDecoder(r).Decode(into)
		}
	}
}
