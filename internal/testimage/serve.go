package testimage

import (
	"io"
	"log"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Serve starts a registry on loopback, in this process and over plain http, with the referrers API, and returns its host:port. Every
// tagged image and index of the given layouts is in it, in the repository that the layout's directory is named after: Busybox is served as
// host/busybox:latest. It stops with the test.
func Serve(t testing.TB, layouts ...string) string {
	t.Helper()
	quiet := log.New(io.Discard, "", 0)
	server := httptest.NewServer(registry.New(registry.Logger(quiet), registry.WithReferrersSupport(true)))
	t.Cleanup(server.Close)
	host := strings.TrimPrefix(server.URL, "http://")
	for _, dir := range layouts {
		if err := upload(dir, host); err != nil {
			t.Fatalf("serve %s: %v", dir, err)
		}
	}
	return host
}

func upload(dir, host string) error {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return err
	}
	for _, d := range manifest.Manifests {
		tag := d.Annotations[ocispec.AnnotationRefName]
		if tag == "" {
			continue
		}
		ref, err := name.NewTag(host+"/"+filepath.Base(dir)+":"+tag, name.Insecure)
		if err != nil {
			return err
		}
		if err := push(ref, index, d); err != nil {
			return err
		}
	}
	return nil
}

// push uploads one manifest of a layout with all that it names.
func push(ref name.Tag, of v1.ImageIndex, d v1.Descriptor) error {
	switch {
	case d.MediaType.IsImage():
		img, err := of.Image(d.Digest)
		if err != nil {
			return err
		}
		return remote.Write(ref, img)
	case d.MediaType.IsIndex():
		index, err := of.ImageIndex(d.Digest)
		if err != nil {
			return err
		}
		return remote.WriteIndex(ref, index)
	}
	return nil
}
