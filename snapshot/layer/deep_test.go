package layer

import (
	"bytes"
	"runtime"
	"strings"
	"testing"

	"github.com/cooper-build/cooper/internal/nstest"
)

// Work is counted in allocations, of which every look at a path makes some.
func TestTheWorkForADeepPathGrowsWithItsLength(t *testing.T) {
	work := func(depth int) uint64 {
		layer := stream(t, file(strings.Repeat("d/", depth)+"f", "x"))
		root := newRoot(t)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		must(t, unpackInto(t, root, layer))
		runtime.ReadMemStats(&after)
		return after.Mallocs - before.Mallocs
	}
	work(10) // warm up
	short, long := work(100), work(400)
	if long > 8*short {
		t.Errorf("%d allocations for a path of 100 names and %d for one of 400: a layer of one small file with a long name stops the build for minutes", short, long)
	}
}

func TestDirectoriesThatALayerOnlyImpliesCountAsEntries(t *testing.T) {
	o := UnpackOptions{Single: nstest.Single(), MaxEntries: 10}
	err := unpackWith(t.Context(), newRoot(t), bytes.NewReader(stream(t, file(strings.Repeat("d/", 50)+"f", "x"))), o)
	if err == nil || !strings.Contains(err.Error(), "more than 10 entries") {
		t.Errorf("got error %v, want that there are too many entries: a layer within the limit could make two thousand times as many directories", err)
	}
}
