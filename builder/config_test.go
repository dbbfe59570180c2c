package builder

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func at(s int64) *time.Time {
	t := time.Unix(s, 0).UTC()
	return &t
}

func TestHistoryHasOneEntryForEachLayer(t *testing.T) {
	run := func(s string) ocispec.History { return ocispec.History{CreatedBy: s} }
	empty := func(s string) ocispec.History { return ocispec.History{CreatedBy: s, EmptyLayer: true} }
	times := func(n ...int64) (out []finishedLayer) {
		for _, s := range n {
			out = append(out, finishedLayer{Created: *at(s)})
		}
		return out
	}
	based := ocispec.History{CreatedBy: "base", Created: at(1)}
	tests := []struct {
		name       string
		all, base  []ocispec.History
		baseLayers int
		ours       []finishedLayer
		squashed   bool
		want       []ocispec.History
	}{{
		name:       "times come from the layers and fill the gaps",
		all:        []ocispec.History{based, empty("ENV"), run("RUN a"), empty("CMD"), run("RUN b")},
		base:       []ocispec.History{based},
		baseLayers: 1,
		ours:       times(10, 20),
		want: []ocispec.History{
			based,
			{CreatedBy: "ENV", EmptyLayer: true, Created: at(10)},
			{CreatedBy: "RUN a", Created: at(10)},
			{CreatedBy: "CMD", EmptyLayer: true, Created: at(10)},
			{CreatedBy: "RUN b", Created: at(20)},
		},
	}, {
		name:       "a base without history is padded before our entries",
		all:        []ocispec.History{run("RUN a")},
		baseLayers: 1,
		ours:       times(10),
		want: []ocispec.History{
			{CreatedBy: "unknown layer of the base image", Comment: "cooper", Created: at(10)},
			{CreatedBy: "RUN a", Created: at(10)},
		},
	}, {
		name: "only metadata",
		all:  []ocispec.History{based, empty("CMD")}, base: []ocispec.History{based}, baseLayers: 1,
		want: []ocispec.History{based, {CreatedBy: "CMD", EmptyLayer: true, Created: at(1)}},
	}, {
		name: "squashed layers keep their entries without the commands, one of them with the layer",
		all:  []ocispec.History{based, run("RUN a"), run("RUN b"), empty("CMD")}, base: []ocispec.History{based}, baseLayers: 1,
		ours: times(20), squashed: true,
		want: []ocispec.History{
			based,
			{CreatedBy: "removed by policy", EmptyLayer: true, Created: at(20)},
			{CreatedBy: "removed by policy", Comment: "squashed by policy", Created: at(20)},
			{CreatedBy: "removed by policy", EmptyLayer: true, Created: at(20)},
		},
	}}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := history(tt.all, tt.base, tt.baseLayers, tt.ours, tt.squashed)
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("history (-want +got):\n%s", d)
			}
		})
	}
}

func TestEpochClampsOurTimesAndKeepsTheBases(t *testing.T) {
	h := []ocispec.History{{Created: at(500)}, {Created: at(500)}, {Created: at(50)}, {}}
	clamp(h, h[:1], *at(100))
	want := []ocispec.History{{Created: at(500)}, {Created: at(100)}, {Created: at(50)}, {Created: at(100)}}
	if d := cmp.Diff(want, h); d != "" {
		t.Errorf("clamped history (-want +got):\n%s", d)
	}
}
