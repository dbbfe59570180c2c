package main

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cooper-build/cooper/internal/testimage"
)

// killedDockerfile takes every path on which a build writes to its store: an imported base, RUN, COPY between stages, a cache mount.
const killedDockerfile = `FROM base AS one
RUN --mount=type=cache,target=/cache seq 1 2000 | tee /cache/n > /one
FROM base
COPY --from=one /one /one
RUN for i in $(seq 1 200); do echo $i > /file$i; done
RUN rm /file1? && ln /file2 /again
USER app
`

// TestAKilledBuildLeavesAStoreThatWorks kills builds with SIGKILL at random moments. After each, the same build on the same store must
// end well and give the image that a store without a history gives.
func TestAKilledBuildLeavesAStoreThatWorks(t *testing.T) {
	const rounds, perStore = 50, 10
	context := t.TempDir()
	if err := os.WriteFile(filepath.Join(context, "Dockerfile"), []byte(killedDockerfile), 0o644); err != nil {
		t.Fatal(err)
	}
	base := testimage.Busybox(t)
	cooper := func(store string, more ...string) (*exec.Cmd, *bytes.Buffer) {
		args := []string{"--root", store, "build", "-q", "--build-context", "base=oci-layout://" + base + ":latest", "-t", "killed:1"}
		cmd := exec.Command("cooper", append(append(args, more...), context)...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=1700000000")
		return cmd, &stderr
	}
	build := func(store string) string {
		t.Helper()
		cmd, stderr := cooper(store)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("build: %v\n%s", err, stderr)
		}
		return strings.TrimSpace(string(out))
	}

	began := time.Now()
	want := build(newStore(t))
	whole := time.Since(began)
	store := newStore(t)
	for round := range rounds {
		if round%perStore == 0 {
			store = newStore(t) // so that builds are killed while they import the base, too
		}
		victim, _ := cooper(store, "--no-cache")
		if err := victim.Start(); err != nil {
			t.Fatal(err)
		}
		after := rand.N(whole)
		time.Sleep(after)
		victim.Process.Kill()
		victim.Wait()
		if got := build(store); got != want {
			t.Fatalf("round %d, killed after %v of %v: the next build gives %s, want %s: the store kept something half made", round, after, whole, got, want)
		}
	}
}

// newStore returns a store's directory that is removed with the test by root of a user namespace, who alone can.
func newStore(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "store")
	t.Cleanup(func() {
		if out, err := exec.Command("remove-tree", dir).CombinedOutput(); err != nil {
			t.Errorf("remove the store: %v\n%s", err, out)
		}
	})
	return dir
}
