package main

import (
	"context"
	"fmt"
	"io"

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
	held    bool
	events  []builder.Event
	started map[string]*client.Vertex
	status  chan *client.SolveStatus
	ended   chan error
}

func newScreen(ctx context.Context, w io.Writer, mode string, held bool) (*screen, error) {
	display, err := progressui.NewDisplay(w, progressui.DisplayMode(mode))
	if err != nil {
		return nil, usageError{fmt.Errorf("--progress %s: %w", mode, err)}
	}
	s := &screen{
		held:    held,
		started: map[string]*client.Vertex{},
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
	if s.held {
		s.events = append(s.events, e)
		return
	}
	s.status <- s.translate(e)
}

// discard forgets what a held screen kept.
func (s *screen) discard() {
	s.events = nil
	s.close()
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
		out.SourceInfo = &pb.SourceInfo{Filename: w.File}
		out.Range = []*pb.Range{{Start: &pb.Position{Line: int32(w.Line)}, End: &pb.Position{Line: int32(w.Line)}}}
	}
	return out
}
