package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cooper-build/cooper/internal/ocidiff"
	"github.com/cooper-build/cooper/internal/testimage"
	"github.com/cooper-build/cooper/sandbox/userns"
)

// buildkit is a rootless BuildKit daemon of this test.
type buildkit struct{ bin, dir string }

// startBuildKit starts buildkitd from $COOPER_TEST_BUILDKIT, a directory with buildkitd, buildctl, rootlesskit
// and runc. BuildKit itself needs subordinate ids, so the account without them has no peer to compare with.
func startBuildKit(t *testing.T) *buildkit {
	t.Helper()
	if m, err := userns.Plan(userns.Options{}); err != nil || m.Kind == userns.Single {
		t.Skip("needs subordinate ids: BuildKit does not run without them")
	}
	bin := os.Getenv("COOPER_TEST_BUILDKIT")
	if bin == "" {
		t.Skip("COOPER_TEST_BUILDKIT names no directory with buildkitd, buildctl, rootlesskit and runc: .ci/buildkit makes one")
	}
	dir, err := os.MkdirTemp("", "bk") // short: the path of a unix socket is at most 108 bytes long
	if err != nil {
		t.Fatal(err)
	}
	b := &buildkit{bin: bin, dir: dir}
	c := b.command(context.Background(), "rootlesskit", "--net=host", "--copy-up=/etc", "--copy-up=/run",
		"buildkitd", "--rootless", "--oci-worker-snapshotter=overlayfs", "--root", dir+"/root", "--addr", b.address())
	var log bytes.Buffer
	c.Stdout, c.Stderr = &log, &log
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Process.Signal(syscall.SIGTERM); err != nil {
			t.Errorf("stop BuildKit: %v", err)
		}
		c.Wait() //nolint:errcheck // its exit status is that of the signal
		if out, err := b.command(context.Background(), "rootlesskit", "rm", "-rf", dir+"/root").CombinedOutput(); err != nil {
			t.Errorf("clean up after BuildKit: %v\n%s", err, out)
		}
		os.RemoveAll(dir)
	})
	deadline := time.Now().Add(time.Minute)
	for b.command(context.Background(), "buildctl", "--addr", b.address(), "debug", "workers").Run() != nil {
		if time.Now().After(deadline) {
			t.Fatalf("BuildKit does not answer:\n%s", log.Bytes())
		}
		time.Sleep(100 * time.Millisecond)
	}
	return b
}

func (b *buildkit) address() string { return "unix://" + b.dir + "/sock" }

func (b *buildkit) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, filepath.Join(b.bin, name), args...)
	c.Env = append(os.Environ(), "PATH="+b.bin+":"+os.Getenv("PATH"), "HOME="+b.dir, "XDG_RUNTIME_DIR="+b.dir)
	return c
}

// build builds a context with the named bases and returns the image.
func (b *buildkit) build(t *testing.T, dir string, bases map[string]string, opts ...string) *ocidiff.Image {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out.tar")
	args := []string{"--addr", b.address(), "build", "--progress=plain", "--frontend", "dockerfile.v0",
		"--local", "context=" + dir, "--local", "dockerfile=" + dir, "--output", "type=oci,oci-mediatypes=true,dest=" + out}
	for name, layout := range bases {
		args = append(args, "--oci-layout", name+"="+layout, "--opt", "context:"+name+"=oci-layout://"+name+"@"+firstDigest(t, layout))
	}
	if text, err := b.command(t.Context(), "buildctl", append(args, opts...)...).CombinedOutput(); err != nil {
		t.Fatalf("BuildKit: %v\n%s", err, text)
	}
	img, err := ocidiff.Load(out)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func firstDigest(t *testing.T, layout string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(layout, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var index ocispec.Index
	if err := json.Unmarshal(text, &index); err != nil {
		t.Fatal(err)
	}
	return index.Manifests[0].Digest.String()
}

func cooperImage(t *testing.T, dir string, bases map[string]string, flags ...string) *ocidiff.Image {
	t.Helper()
	out := filepath.Join(t.TempDir(), "layout")
	args := []string{"--root", newStore(t), "build", "--progress=plain", "--policy", "none", "-o", "type=oci,tar=false,dest=" + out}
	for name, layout := range bases {
		args = append(args, "--build-context", name+"=oci-layout://"+layout+":latest")
	}
	if text, err := exec.Command("cooper", append(append(args, flags...), dir)...).CombinedOutput(); err != nil {
		t.Fatalf("cooper: %v\n%s", err, text)
	}
	img, err := ocidiff.Load(out)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func TestPackagesHaveTheOwnersThatBuildKitGives(t *testing.T) {
	bk := startBuildKit(t)
	bases := map[string]string{"debian": testimage.Debian(t)}
	dir := t.TempDir()
	file := "FROM debian\nRUN apt-get update && apt-get install -y --no-install-recommends jq openssh-client libcap2-bin && setcap cap_net_bind_service=+ep /usr/bin/jq\n"
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(file), 0o644); err != nil {
		t.Fatal(err)
	}
	want := owners(bk.build(t, dir, bases).Tree)
	got := owners(cooperImage(t, dir, bases).Tree)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("types, modes, owners and attributes (-BuildKit +cooper):\n%s", d)
	}
	if jq := got["/usr/bin/jq"]; jq.Type != "file" || jq.Xattrs["security.capability"] == "" {
		t.Errorf("/usr/bin/jq is %+v: it is not installed or lost its capability", jq)
	}
}

// owners is a tree without contents, which for logs and caches depend on when they were made.
func owners(tree map[string]ocidiff.Entry) map[string]ocidiff.Entry {
	out := map[string]ocidiff.Entry{}
	for name, e := range tree {
		e.Size, e.Content = 0, ""
		out[name] = e
	}
	return out
}
