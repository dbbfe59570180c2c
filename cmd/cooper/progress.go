package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/progress/progressui"
	"github.com/opencontainers/go-digest"

	"github.com/cooper-build/cooper/builder"
)

// A screen draws a build's events with BuildKit's display.
//
// A held screen keeps them: an attempt to answer from the cache shows nothing unless it is the whole build.
type screen struct {
	raw     bool // programs read it
	held    bool
	events  []builder.Event
	started map[string]*client.Vertex
	lines   map[string][][]byte // the last of what each running step printed
	failed  failedStep
	status  chan *client.SolveStatus
	ended   chan error

	warnings  []client.VertexWarning
	explained []explained
}

// lastLines is how much of a failed step's output is repeated with the error.
const lastLines = 10

// A failedStep is the first step that failed, and the last it printed.
type failedStep struct {
	name  string
	lines [][]byte
}

func newScreen(ctx context.Context, w io.Writer, mode string, held bool) (*screen, error) {
	display, err := progressui.NewDisplay(w, progressui.DisplayMode(mode))
	if err != nil {
		return nil, usageError{fmt.Errorf("--progress %s: %w", mode, err)}
	}
	s := &screen{
		raw:     mode == "rawjson",
		held:    held,
		started: map[string]*client.Vertex{},
		lines:   map[string][][]byte{},
		status:  make(chan *client.SolveStatus),
		ended:   make(chan error, 1),
	}
	go func() {
		// The display ends when status is closed; an interrupted build still shows how far it came.
		_, err := display.UpdateFrom(context.WithoutCancel(ctx), s.status)
		s.ended <- err
	}()
	return s, nil
}

// show takes one event.
func (s *screen) show(e builder.Event) {
	s.remember(e)
	if s.held {
		s.events = append(s.events, e)
		return
	}
	s.status <- s.translate(e)
}

// remember keeps what is told in the end.
func (s *screen) remember(e builder.Event) {
	switch e.Kind {
	case builder.Explained:
		s.explained = append(s.explained, explained{e.Name, e.Explanation})
	case builder.Warned:
		s.warnings = append(s.warnings, *warning(digest.FromString(e.Step), e.Warning))
	case builder.Log:
		lines := append(s.lines[e.Step], bytes.Split(bytes.TrimSuffix(e.Data, []byte("\n")), []byte("\n"))...)
		s.lines[e.Step] = slices.Clone(lines[max(0, len(lines)-lastLines):])
	case builder.Failed:
		if s.failed.name == "" && !errors.Is(e.Err, context.Canceled) {
			s.failed = failedStep{e.Name, s.lines[e.Step]}
		}
		delete(s.lines, e.Step)
	case builder.Done, builder.Cached:
		delete(s.lines, e.Step)
	}
}

// explain adds to an error what the failed step printed, where the display has not shown it.
func (s *screen) explain(err error, unseen bool) error {
	if !unseen || s.failed.name == "" {
		return err
	}
	return withOutput{err, s.failed}
}

// printWarnings lists the warnings, as buildx does when all is over; the display shows only those of a step.
func (s *screen) printWarnings(w io.Writer) {
	switch len(s.warnings) {
	case 0:
		return
	case 1:
		fmt.Fprint(w, "\n1 warning found:\n")
	default:
		fmt.Fprintf(w, "\n%d warnings found:\n", len(s.warnings))
	}
	for _, one := range s.warnings {
		fmt.Fprintf(w, " - %s\n", one.Short)
		if one.URL != "" {
			fmt.Fprintf(w, "   %s\n", one.URL)
		}
	}
}

// forMetadata is what was asked for of what happened: warnings by the environment, explanations by a flag.
func (s *screen) forMetadata() map[string]any {
	m := map[string]any{}
	if wantsWarnings() && len(s.warnings) > 0 {
		m["buildx.build.warnings"] = s.warnings
	}
	if len(s.explained) > 0 {
		m["cooper.explain"] = s.explanations()
	}
	return m
}

// discard forgets what a held screen kept.
func (s *screen) discard() error {
	s.events = nil
	return s.close()
}

// close draws what is left and waits for the display to end.
func (s *screen) close() error {
	for _, e := range s.events {
		s.status <- s.translate(e)
	}
	close(s.status)
	return <-s.ended
}

func (s *screen) translate(e builder.Event) *client.SolveStatus {
	id := digest.FromString(e.Step)
	if e.Kind == builder.Log {
		return &client.SolveStatus{Logs: []*client.VertexLog{{Vertex: id, Stream: stream(e.Stderr), Data: e.Data, Timestamp: e.Time}}}
	}
	if e.Kind == builder.Explained {
		return s.explainLog(id, e)
	}
	if e.Kind == builder.Warned {
		return &client.SolveStatus{Warnings: []*client.VertexWarning{warning(id, e.Warning)}}
	}
	v, ok := s.started[e.Step]
	if !ok {
		v = &client.Vertex{Digest: id, Name: e.Name, Started: &e.Time}
		s.started[e.Step] = v
	}
	next := *v
	switch e.Kind {
	case builder.Done, builder.Cached, builder.Failed:
		next.Completed = &e.Time
		next.Cached = e.Kind == builder.Cached
		if e.Err != nil {
			next.Error = e.Err.Error()
		}
	}
	return &client.SolveStatus{Vertexes: []*client.Vertex{&next}}
}

func stream(stderr bool) int {
	if stderr {
		return 2
	}
	return 1
}

func warning(id digest.Digest, w *builder.Warning) *client.VertexWarning {
	out := &client.VertexWarning{Vertex: id, Level: 1, Short: []byte(w.Rule + ": " + w.Message), URL: w.URL}
	if w.Line > 0 {
		out.Short = fmt.Appendf(out.Short, " (line %d)", w.Line)
		out.SourceInfo = &pb.SourceInfo{Filename: w.File}
		out.Range = []*pb.Range{{Start: &pb.Position{Line: int32(w.Line)}, End: &pb.Position{Line: int32(w.Line)}}}
	}
	return out
}
