package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// What cases of the suite may use besides their own files; docs/testing.md lists it.

// remoteText is what the server has at /plain.txt; cases name its checksum.
const remoteText = "remote\n"

// startServer serves files over http, and a git repository at /git/repo.git. It returns host:port.
func startServer(t *testing.T) string {
	t.Helper()
	mux := http.NewServeMux()
	file := func(name string, header http.Header, body []byte) {
		mux.HandleFunc("GET /"+name, func(w http.ResponseWriter, r *http.Request) {
			for k, v := range header {
				w.Header()[k] = v
			}
			http.ServeContent(w, r, "", time.Unix(1_500_000_000, 0), bytes.NewReader(body))
		})
	}
	plain := http.Header{"Content-Type": {"text/plain"}}
	file("plain.txt", plain, []byte(remoteText))
	file("t.tar", http.Header{"Content-Type": {"application/x-tar"}}, tarOf("d/a", "a\n"))
	file("named", http.Header{"Content-Disposition": {`attachment; filename="given.txt"`}}, []byte(remoteText))
	file("dir/{$}", plain, []byte(remoteText))
	mux.Handle("GET /redirect", http.RedirectHandler("/plain.txt", http.StatusFound))
	mux.Handle("/git/", http.StripPrefix("/git", gitServer(t)))
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://")
}

// gitServer makes a repository with the branch main, the tag v1 below it and a Dockerfile in a directory.
func gitServer(t *testing.T) http.Handler {
	t.Helper()
	root := t.TempDir()
	script := `
git init -q -b main work && cd work
mkdir sub && printf 'FROM busybox\nCOPY f /f\n' > sub/Dockerfile && echo one > sub/f && echo top > README
chmod 755 README && ln -s sub/f link
git add . && git commit -q -m one && git tag v1
echo two > sub/f && git commit -q -a -m two
cd .. && git clone -q --bare work repo.git`
	c := exec.Command("sh", "-ec", script)
	c.Dir = root
	c.Env = append(os.Environ(), "HOME="+root, "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.org", "GIT_AUTHOR_DATE=@1500000000 +0000",
		"GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.org", "GIT_COMMITTER_DATE=@1500000000 +0000")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("make a git repository: %v\n%s", err, out)
	}
	handler, err := gitBackend(root)
	if err != nil {
		t.Fatal(err)
	}
	return handler
}

// gitBackend is git's own smart http server for the repositories below a directory.
func gitBackend(root string) (http.Handler, error) {
	git, err := exec.LookPath("git")
	if err != nil {
		return nil, err
	}
	return &cgi.Handler{
		Path: git, Args: []string{"http-backend"}, Dir: root,
		Env: []string{"GIT_PROJECT_ROOT=" + root, "GIT_HTTP_EXPORT_ALL=1", "HOME=" + root},
	}, nil
}

// tarOf is an archive of files, given as name and content.
func tarOf(files ...string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i+1 < len(files); i += 2 {
		h := &tar.Header{Name: files[i], Mode: 0o640, Uid: 7, Gid: 8, Size: int64(len(files[i+1])), ModTime: time.Unix(1_500_000_000, 0)}
		if err := w.WriteHeader(h); err != nil {
			panic(err)
		}
		if _, err := w.Write([]byte(files[i+1])); err != nil {
			panic(err)
		}
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// platformsLayout is a layout with an index of three images, each with its platform in the file /platform.
func platformsLayout(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	blob := func(mediaType string, v any) ocispec.Descriptor {
		text, isBytes := v.([]byte)
		if !isBytes {
			var err error
			if text, err = json.Marshal(v); err != nil {
				t.Fatal(err)
			}
		}
		sum := sha256.Sum256(text)
		name := hex.EncodeToString(sum[:])
		putFile(t, filepath.Join(dir, "blobs", "sha256", name), text)
		return ocispec.Descriptor{MediaType: mediaType, Digest: digest.NewDigestFromEncoded(digest.SHA256, name), Size: int64(len(text))}
	}
	version := specs.Versioned{SchemaVersion: 2}
	images := ocispec.Index{Versioned: version, MediaType: ocispec.MediaTypeImageIndex}
	for _, p := range []ocispec.Platform{
		{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm64"}, {OS: "linux", Architecture: "s390x"},
	} {
		layer := tarOf("platform", p.OS+"/"+p.Architecture+"\n")
		config := blob(ocispec.MediaTypeImageConfig, ocispec.Image{
			Platform: p, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(layer)}},
			History: []ocispec.History{{CreatedBy: "platform"}},
		})
		m := blob(ocispec.MediaTypeImageManifest, ocispec.Manifest{
			Versioned: version, MediaType: ocispec.MediaTypeImageManifest, Config: config,
			Layers: []ocispec.Descriptor{blob(ocispec.MediaTypeImageLayer, layer)},
		})
		m.Platform = &p
		images.Manifests = append(images.Manifests, m)
	}
	top := blob(ocispec.MediaTypeImageIndex, images)
	top.Annotations = map[string]string{ocispec.AnnotationRefName: "latest"}
	text, err := json.Marshal(ocispec.Index{Versioned: version, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{top}})
	if err != nil {
		t.Fatal(err)
	}
	putFile(t, filepath.Join(dir, "index.json"), text)
	putFile(t, filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`))
	return dir
}

func putFile(t *testing.T, file string, text []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, text, 0o644); err != nil {
		t.Fatal(err)
	}
}
