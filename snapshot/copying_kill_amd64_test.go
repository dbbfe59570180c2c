package snapshot

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cooper-build/cooper/internal/killpoint"
)

// TestCopyingDisturbed is TestKilledAtEveryCall and TestEveryCallFails where nothing is mounted.
func TestCopyingDisturbed(t *testing.T) {
	t.Run("killed", TestKilledAtEveryCall)
	t.Run("failing", TestEveryCallFails)
}

// TestATreeIsNotCopiedForTheNextStep counts the calls by which a process makes a step that changes one file: they are the same
// for a small tree and for a large one, and none of them mounts.
func TestATreeIsNotCopiedForTheNextStep(t *testing.T) {
	var counts []int
	for _, files := range []int{20, 20000} {
		s := newCopyingStore(t)
		change(t, s, "", "first", func(dir string) {
			for i := range files {
				if i%100 == 0 {
					must(t, os.Mkdir(filepath.Join(dir, fmt.Sprint("d", i/100)), 0o755))
				}
				must(t, os.WriteFile(filepath.Join(dir, fmt.Sprint("d", i/100), fmt.Sprint(i)), []byte("x"), 0o644))
			}
		})
		must(t, s.Close())
		calls := disturbed(t, s, "next", killpoint.Fault{}).Calls
		counts = append(counts, len(calls))
		for _, c := range calls {
			if slices.Contains([]string{"mount", "umount"}, c.Name) {
				t.Errorf("%s of %s: where a seccomp filter refuses it, no step can be made", c.Name, c.Path)
			}
		}
		if files > 20 && counts[0] != counts[1] {
			t.Errorf("%d calls with 20 files in the tree, %d with %d: %v", counts[0], counts[1], files, calls[:min(len(calls), 100)])
		}
	}
}
