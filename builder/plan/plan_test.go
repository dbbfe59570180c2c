package plan

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// images is a Resolver that knows its keys and remembers what it was asked.
type images struct {
	known map[string]ocispec.Image

	mu    sync.Mutex
	asked []string
}

func (im *images) ResolveImage(_ context.Context, ref string, p ocispec.Platform) (digest.Digest, []byte, error) {
	im.mu.Lock()
	defer im.mu.Unlock()
	im.asked = append(im.asked, ref)
	img, ok := im.known[ref]
	if !ok {
		return "", nil, fmt.Errorf("%s: %w", ref, errNoImage)
	}
	if img.OS == "" {
		img.Platform = p
	}
	config, err := json.Marshal(img)
	if err != nil {
		return "", nil, err
	}
	return digest.FromString(ref), config, nil
}

// ReadFile and ResolveRevision know nothing of remote contexts.
func (im *images) ReadFile(_ context.Context, _ []Step, _ Ref, path string, _ int64) ([]byte, error) {
	return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
}

func (im *images) ResolveRevision(context.Context, Op) (Revision, error) {
	return Revision{}, errors.New("unreachable")
}

var errNoImage = errors.New("no such image")

// library is the Resolver of tests that do not care.
func library() *images {
	return &images{known: map[string]ocispec.Image{
		"docker.io/library/busybox:latest": image(ocispec.ImageConfig{Env: []string{"PATH=/bin"}}, 2),
		"docker.io/library/debian:latest":  image(ocispec.ImageConfig{}, 1),
	}}
}

// image has n layers, each followed by an entry of the history without one.
func image(c ocispec.ImageConfig, n int) ocispec.Image {
	img := ocispec.Image{Config: c}
	img.RootFS.Type = "layers"
	for i := range n {
		img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, digest.FromString(fmt.Sprint("layer", i)))
		img.History = append(img.History, ocispec.History{CreatedBy: fmt.Sprint("base ", i)}, ocispec.History{CreatedBy: "CMD", EmptyLayer: true})
	}
	return img
}

// project writes files, with their directories, and gives the directory.
func project(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// lines joins the lines of a Dockerfile.
func lines(l ...string) string { return strings.Join(l, "\n") + "\n" }

// planned is a graph with a single target.
type planned struct {
	*Graph
	Target
}

func mustMake(t *testing.T, r Request, res Resolver) planned {
	t.Helper()
	g, err := Make(t.Context(), r, res)
	if err != nil {
		t.Fatalf("Make: %v", err)
	}
	checkGraph(t, g)
	if len(g.Targets) != 1 || g.Index {
		t.Fatalf("%d targets, index %v: one image expected", len(g.Targets), g.Index)
	}
	return planned{g, g.Targets[0]}
}

func mustPlan(t *testing.T, l ...string) planned {
	t.Helper()
	return mustMake(t, Request{Context: project(t, map[string]string{"Dockerfile": lines(l...)})}, library())
}

// checkGraph holds for every graph, whatever the Dockerfile says.
func checkGraph(t testing.TB, g *Graph) {
	t.Helper()
	used := map[Ref]bool{}
	for _, target := range g.Targets {
		used[target.Result] = true
	}
	for i := len(g.Steps) - 1; i >= 0; i-- {
		step := g.Steps[i]
		if !used[Ref(i)] {
			t.Errorf("step %d (%s) is needed by none", i, step.Name)
		}
		if step.Name == "" {
			t.Errorf("step %d has no name", i)
		}
		for _, in := range Inputs(step.Op) {
			if in < 0 || in >= Ref(i) {
				t.Errorf("step %d (%s) reads step %d, which does not come before it", i, step.Name, in)
			}
			used[in] = true
		}
	}
}

// stepNamed finds the one step whose name contains part.
func stepNamed(t *testing.T, g planned, part string) (Ref, Step) {
	t.Helper()
	found := Scratch
	for i, s := range g.Steps {
		if strings.Contains(s.Name, part) {
			if found != Scratch {
				t.Fatalf("steps %d and %d are both named %q", found, i, part)
			}
			found = Ref(i)
		}
	}
	if found == Scratch {
		t.Fatalf("no step is named %q in %q", part, stepNames(g))
	}
	return found, g.Steps[found]
}

func opNamed[T Op](t *testing.T, g planned, part string) T {
	t.Helper()
	_, s := stepNamed(t, g, part)
	op, ok := s.Op.(T)
	if !ok {
		t.Fatalf("step %q is a %T", s.Name, s.Op)
	}
	return op
}

func stepNames(g planned) []string {
	names := []string{}
	for _, s := range g.Steps {
		names = append(names, s.Name)
	}
	return names
}

func layerNames(g planned) []string {
	names := []string{}
	for _, r := range g.Layers {
		names = append(names, g.Steps[r].Name)
	}
	return names
}
