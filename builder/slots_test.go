package builder

import (
	"context"
	"errors"
	"testing"
)

func TestStepsComeBeforeLayers(t *testing.T) {
	s := newSlots(2)
	take := func(f func(context.Context) (func(), error)) func() {
		t.Helper()
		free, err := f(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return free
	}
	full := errors.New("full")
	refused := func(f func(context.Context) (func(), error)) bool {
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(full)
		free, err := f(ctx)
		if err == nil {
			free()
		}
		return errors.Is(err, full)
	}
	one, two := take(s.layer), take(s.layer)
	if !refused(s.layer) {
		t.Error("three layers are written on two slots")
	}
	step := take(s.step) // does not wait for layers
	one()
	if !refused(s.layer) {
		t.Error("a layer took the slot that a step has")
	}
	other := take(s.step)
	if !refused(s.step) {
		t.Error("three steps run on two slots")
	}
	two()
	step()
	other()
	take(s.layer)()
}

func TestALayerWaitsForASlot(t *testing.T) {
	s := newSlots(1)
	free, err := s.step(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error)
	go func() {
		_, err := s.layer(t.Context())
		got <- err
	}()
	free()
	if err := <-got; err != nil {
		t.Error(err)
	}
}
