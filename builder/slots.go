package builder

import (
	"context"
	"sync"
)

// slots bound how much is done at a time. A step waits for other steps only; a layer is written with what they leave.
type slots struct {
	total int

	mu      sync.Mutex
	steps   int
	layers  int
	changed chan struct{} // closed when a slot becomes free
}

// layersAtOnce bounds the memory of layers that are written, whatever the machine.
const layersAtOnce = 4

func newSlots(total int) *slots { return &slots{total: total, changed: make(chan struct{})} }

// step takes a slot for a step, and returns what gives it back.
func (s *slots) step(ctx context.Context) (func(), error) {
	return s.take(ctx, &s.steps, func() bool { return s.steps < s.total })
}

// layer takes a slot for a layer, and returns what gives it back.
func (s *slots) layer(ctx context.Context) (func(), error) {
	return s.take(ctx, &s.layers, func() bool { return s.steps+s.layers < s.total && s.layers < layersAtOnce })
}

func (s *slots) take(ctx context.Context, count *int, free func() bool) (func(), error) {
	for {
		s.mu.Lock()
		if free() {
			*count++
			s.mu.Unlock()
			return func() { s.give(count) }, nil
		}
		changed := s.changed
		s.mu.Unlock()
		if err := wait(ctx, changed); err != nil {
			return nil, err
		}
	}
}

func (s *slots) give(count *int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*count--
	close(s.changed)
	s.changed = make(chan struct{})
}
