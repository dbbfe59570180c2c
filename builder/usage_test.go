package builder

import (
	"fmt"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/cooper-build/cooper/snapshot"
)

// Every step of a long chain is in an image, so each has it from all that stand above. When a name was passed on as often as
// it had arrived, their number doubled at every step, and a build of 500 ended by filling the memory.
func TestALongChainNamesItsImageOnce(t *testing.T) {
	inv := &inventory{snapshots: map[string]*Item{}, blobs: map[digest.Digest]*Item{}, images: map[digest.Digest][]*Item{}, ties: map[digest.Digest]int{}}
	const steps = 100
	for i := range steps {
		e := snapshot.Entry{Kind: snapshot.KindSnapshot, IDMap: "m", Name: fmt.Sprint(i)}
		if i > 0 {
			e.Needs = []snapshot.ID{snapshot.ID(fmt.Sprint(i - 1))}
		}
		item := &Item{Type: TypeSnapshot, ID: e.Name, entry: e, Images: []string{"app"}, fromImage: i == steps-1}
		inv.snapshots[snapshotKey("m", snapshot.ID(e.Name))] = item
	}
	inv.connect()
	inv.judge()
	for _, i := range inv.snapshots {
		if !slices.Equal(i.Images, []string{"app"}) || i.Reclaimable {
			t.Fatalf("step %s is of %v, reclaimable: %t", i.ID, i.Images, i.Reclaimable)
		}
	}
}
