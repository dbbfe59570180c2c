package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"

	"github.com/cooper-build/cooper/builder"
)

// explained is why a step ran, or that it did not.
type explained struct {
	name string
	*builder.Explanation
}

// explanation is that for programs, in the metadata file.
type explanation struct {
	Step    string   `json:"step"`
	Cached  bool     `json:"cached"`
	Reasons []string `json:"reasons,omitempty"`
}

// inOrder sorts what happened at the same time as the Dockerfile has it. The source and the copy of an ADD have one name,
// and are one step to people.
func (s *screen) inOrder() []explained {
	sorted := slices.SortedStableFunc(slices.Values(s.explained), func(a, b explained) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.name, b.name))
	})
	var out []explained
	for _, e := range sorted {
		i := slices.IndexFunc(out, func(o explained) bool { return o.name == e.name })
		if i < 0 {
			out = append(out, e)
			continue
		}
		both := *out[i].Explanation
		both.Hit = both.Hit && e.Hit
		both.Reasons = slices.Concat(both.Reasons, e.Reasons)
		out[i].Explanation = &both
	}
	return out
}

func (s *screen) explanations() []explanation {
	var all []explanation
	for _, e := range s.inOrder() {
		all = append(all, explanation{e.name, e.Hit, e.Reasons})
	}
	return all
}

// printExplained says a line for each step, once the build is over. It was asked for, so it is told also to those who
// want no progress.
func (s *screen) printExplained(w io.Writer) {
	if len(s.explained) == 0 {
		return
	}
	fmt.Fprintln(w, "\ncache:")
	for _, e := range s.inOrder() {
		if e.Hit {
			fmt.Fprintf(w, "  hit   %s\n", stepTitle(e.name))
			continue
		}
		fmt.Fprintf(w, "  miss  %s: %s\n", stepTitle(e.name), oneLine(strings.Join(e.Reasons, "; ")))
	}
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// stepTitle is the name of a step where it has a line with others: a RUN may be a script of many pages.
func stepTitle(name string) string {
	const most = 100
	name = oneLine(name)
	if r := []rune(name); len(r) > most {
		return string(r[:most]) + "..."
	}
	return name
}

// explainLog tells programs, for which the explanation is a line that the step printed. People see it in the end.
func (s *screen) explainLog(id digest.Digest, e builder.Event) *client.SolveStatus {
	if !s.raw {
		return &client.SolveStatus{}
	}
	text := "cache hit\n"
	if !e.Explanation.Hit {
		text = "cache miss: " + strings.Join(e.Explanation.Reasons, "; ") + "\n"
	}
	return &client.SolveStatus{Logs: []*client.VertexLog{{Vertex: id, Stream: stream(true), Data: []byte(text), Timestamp: e.Time}}}
}
