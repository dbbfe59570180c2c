package main

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cooper-build/cooper/internal/testimage"
)

// A grown is one build on a store, and what it took.
type grown struct {
	id   string
	peak int64 // the memory of its largest process, in bytes
}

func buildOn(t *testing.T, store, context string, more ...string) grown {
	t.Helper()
	args := []string{"--root", store, "build", "-q", "--build-context", "base=oci-layout://" + testimage.Busybox(t) + ":latest"}
	cmd := exec.Command("cooper", append(append(args, more...), context)...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		t.Fatalf("cooper %s: %v\n%s", strings.Join(more, " "), err, &errOut)
	}
	used := cmd.ProcessState.SysUsage().(*syscall.Rusage) // of all processes that were waited for, the largest
	return grown{strings.TrimSpace(out.String()), used.Maxrss << 10}
}

// inStore lists the names of all files of a store and their sizes. Files that other ids hide are no matter here.
func inStore(t *testing.T, store string) map[string]int64 {
	t.Helper()
	files := map[string]int64{}
	err := filepath.WalkDir(store, func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return nil
		}
		if info, err := e.Info(); err == nil {
			files[strings.TrimPrefix(name, store)] = info.Size()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func contextOf(t *testing.T, dockerfile string, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(dockerfile), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(dir, f), []byte(f), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// A build that changes nothing must leave nothing: else the thousandth has a store that is full of them.
func TestACachedBuildLeavesTheStoreAsItIs(t *testing.T) {
	const builds = 5
	store := newStore(t)
	context := contextOf(t, "FROM base\nCOPY used /used\nRUN --mount=type=cache,target=/c echo a > /a\nRUN --mount=type=bind,target=/m ls /m > /b\n", "used")
	first := buildOn(t, store, context)
	buildOn(t, store, context) // remembers the hashes of a context that had changed just now
	want := inStore(t, store)
	for range builds {
		if got := buildOn(t, store, context); got.id != first.id {
			t.Fatalf("image %s, want %s", got.id, first.id)
		}
	}
	if d := cmp.Diff(want, inStore(t, store)); d != "" {
		t.Errorf("%d builds without changes changed the store (-before +after):\n%s", builds, d)
	}
}

// An image of as many layers as there can be, as a base and as a result. Registries and other tools take no more.
func TestABaseOf127Layers(t *testing.T) {
	const layers = 127
	store := newStore(t)
	var base strings.Builder
	base.WriteString("FROM base\n")
	for i := range layers - 1 {
		fmt.Fprintf(&base, "COPY used /layer%d\n", i)
	}
	out := filepath.Join(t.TempDir(), "deep")
	buildOn(t, store, contextOf(t, base.String(), "used"), "-o", "type=oci,dest="+out+",tar=false", "-t", "deep:latest")
	top := "FROM deep\nRUN [ $(ls -d /layer* | wc -l) = 126 ] && rm /layer0 && echo top > /top\nCOPY used /layer1\nRUN [ ! -e /layer0 ] && ls /layer1\n"
	buildOn(t, newStore(t), contextOf(t, top, "used"), "--build-context", "deep=oci-layout://"+out+":latest")
}
