package snapshot

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// TestDeepStacksAreShortened builds so many snapshots on one another that stand-ins are used. That more than the kernel can
// stack work is seen by make test-growth.
func TestDeepStacksAreShortened(t *testing.T) {
	s := newStore(t)
	id := importTar(t, s, "", "d etc", "f etc/base=b", "f etc/gone=g")
	const steps = deepStack + 10
	for i := range steps {
		id = change(t, s, id, ID(fmt.Sprintf("step%d", i)), func(dir string) {
			must(t, os.WriteFile(filepath.Join(dir, "etc", fmt.Sprintf("f%d", i)), fmt.Append(nil, i), 0o644))
			if i == 3 {
				must(t, os.Remove(filepath.Join(dir, "etc/gone")))
			}
			if i >= 2 { // what a step leaves is removed by the next but one, also across groups
				must(t, os.Remove(filepath.Join(dir, "etc", fmt.Sprintf("f%d", i-2))))
			}
		})
	}
	want := []string{
		"etc/", "etc/base=b",
		fmt.Sprintf("etc/f%d=%[1]d", steps-2), fmt.Sprintf("etc/f%d=%[1]d", steps-1),
	}
	wantTree(t, view(t, s, id), want...)
	dirs, err := s.layers(id)
	must(t, err)
	if len(dirs) > deepStack {
		t.Errorf("%d layers are stacked, want at most %d", len(dirs), deepStack)
	}
	chain, err := s.Chain(id)
	if err != nil || len(chain) != steps+1 {
		t.Errorf("the chain has %d snapshots (%v), want %d: stand-ins must not be seen", len(chain), err, steps+1)
	}

	// Nothing depends on a stand-in.
	groups, err := s.groups(id)
	must(t, err)
	must(t, s.Close())
	for _, g := range groups {
		must(t, os.RemoveAll(s.dir(g.standIn)))
	}
	wantTree(t, view(t, s, id), want...)

	// What was made again below gets other stand-ins.
	m, err := s.meta(id)
	must(t, err)
	if other := m; standInFor(id, m) == standInFor(id, meta{Made: other.Made + "x"}) {
		t.Error("a snapshot that was made again has the stand-in of the one before: it shows what is no longer there")
	}
}
