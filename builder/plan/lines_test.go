package plan

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestHistoryEntriesHaveTheLinesOfTheirInstructions(t *testing.T) {
	dockerfile := []byte(`FROM busybox AS one
ENV A=1
RUN <<EOF
echo
EOF
FROM busybox AS other
USER root
FROM one
COPY a \
  b /
USER 7
`)
	entries := func(created ...string) (h []ocispec.History) {
		for _, c := range created {
			h = append(h, ocispec.History{CreatedBy: c})
		}
		return h
	}
	all := entries("base", "ENV A=1", "RUN /bin/sh -c echo # buildkit", "COPY a b / # buildkit", "USER 7")
	tests := []struct {
		name, target string
		history      []ocispec.History
		want         []int
	}{
		{"through the stages below", "", all, []int{0, 2, 3, 9, 11}},
		{"target", "one", all[:3], []int{0, 2, 3}},
		{"target by number", "1", entries("base", "USER root"), []int{0, 7}},
		{"a trigger of the base before ours", "one", entries("base", "RUN trigger", "ENV A=1", "RUN x"), []int{0, 0, 2, 3}},
		{"what does not fit is unknown", "one", entries("base", "ENV A=1", "LABEL x=y"), []int{0, 0, 0}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if d := cmp.Diff(tt.want, historyLines(dockerfile, tt.target, tt.history)); d != "" {
				t.Errorf("a finding about USER would point at another line (-want +got):\n%s", d)
			}
		})
	}
}
