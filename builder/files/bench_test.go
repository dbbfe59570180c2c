package files

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cooper-build/cooper/builder/plan"
)

// BenchmarkUnchangedContext is what a build costs whose 50,000 context files did not change.
func BenchmarkUnchangedContext(b *testing.B) {
	tree, c := largeContext(b, 50_000), dockerfile("/", "/x")
	cache := NewHashCache()
	cache.now = func() time.Time { return time.Now().Add(time.Hour) }
	if _, err := Digest(b.Context(), tree, c, cache); err != nil {
		b.Fatal(err)
	}
	saved, _ := cache.Save()
	for b.Loop() {
		if _, err := Digest(b.Context(), tree, c, LoadHashCache(saved)); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkNewContext is what a build costs that sees the 50,000 files of its context for the first time.
func BenchmarkNewContext(b *testing.B) {
	const files = 50_000
	tree, c := largeContext(b, files), dockerfile("/", "/x")
	for b.Loop() {
		if _, err := Digest(b.Context(), tree, c, NewHashCache()); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(files)*float64(b.N)/b.Elapsed().Seconds(), "files/s")
}

// BenchmarkCopy is what it costs to copy 10,000 small files.
func BenchmarkCopy(b *testing.B) {
	tree := largeContext(b, 10_000)
	for b.Loop() {
		to := b.TempDir()
		err := Apply(b.Context(), to, []plan.Action{dockerfile("/", "/x")}, func(plan.Ref) (Tree, error) { return tree, nil }, Options{})
		if err != nil {
			b.Fatal(err)
		}
	}
}

func largeContext(b *testing.B, files int) Tree {
	root := b.TempDir()
	for i := range files {
		p := filepath.Join(root, fmt.Sprintf("d%d/e%d/f%d", i%50, i%500/50, i))
		must(b, os.MkdirAll(filepath.Dir(p), 0o755))
		must(b, os.WriteFile(p, []byte(p), 0o644))
	}
	return Tree{Dir: root, Local: true, Exclude: []string{"**/node_modules", "*.log", ".git"}}
}
