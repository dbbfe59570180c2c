package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// A bench runs cases in a directory of its own.
type bench struct {
	programs
	workload
	work     string // the stores, contexts and results
	builders []builder
	runs     int // instead of what the case says, when not 0
	say      func(format string, args ...any)
}

// longest is how long one build may take.
const longest = 20 * time.Minute

// A result is what one builder did in one case: figures, or the reason why there are none.
type result struct {
	Builder string
	Figures []figure
	Before  []figure // of the build before each of them, where the case is primed
	Failure string
}

// entrant is a builder in a case.
type entrant struct {
	builder
	store  store
	result result
}

// run measures all builders in turn, in every round in another order, after everything that is not to be measured has been done and the
// disk is at rest. A builder that fails once is out: what it did is no figure.
func (b *bench) run(ctx context.Context, c benchCase) ([]result, error) {
	context := filepath.Join(b.work, "context-"+c.name)
	if err := os.Mkdir(context, 0o755); err != nil {
		return nil, err
	}
	defer os.RemoveAll(context)
	if err := c.write(context, 0, b.workload); err != nil {
		return nil, err
	}
	var in []*entrant
	for _, builder := range b.builders {
		if len(c.only) == 0 || slices.Contains(c.only, builder.name) {
			in = append(in, &entrant{builder: builder, result: result{Builder: builder.name}})
		}
	}
	defer func() {
		for _, e := range in {
			if err := e.clear(); err != nil {
				b.say("%s: %v", e.name, err)
			}
		}
	}()
	if c.fill == warm {
		for _, e := range in {
			_, err := b.prime(ctx, c, e, context)
			e.fail(err)
		}
	}
	for round := 1; round <= b.rounds(c); round++ {
		if err := c.write(context, round, b.workload); err != nil {
			return nil, err
		}
		for i := range in {
			e := in[(i+round)%len(in)]
			if e.result.Failure != "" {
				continue
			}
			err := b.once(ctx, c, e, context, round)
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if err != nil {
				e.fail(err)
				continue
			}
			f := e.result.Figures[len(e.result.Figures)-1]
			b.say("%-22s %d  %-18s %8.3f s  cpu %8.3f s  peak %4d MB", c.name, round, e.name, f.Wall.Seconds(), f.CPU.Seconds(), f.PeakRSS/1e6)
		}
	}
	var all []result
	for _, e := range in {
		if e.result.Failure != "" {
			e.result.Figures, e.result.Before = nil, nil
			b.say("%-22s    %-18s %s", c.name, e.name, e.result.Failure)
		}
		all = append(all, e.result)
	}
	return all, nil
}

func (b *bench) rounds(c benchCase) int {
	if b.runs > 0 {
		return b.runs
	}
	return c.runs
}

func (e *entrant) fail(err error) {
	if err != nil && e.result.Failure == "" {
		e.result.Failure = err.Error()
	}
}

// clear ends the builder's daemon and removes its store.
func (e *entrant) clear() error {
	if e.store == nil {
		return nil
	}
	s := e.store
	e.store = nil
	return s.close()
}

// prime gives the builder a new store, and lets it build the context unless the case is a cold one.
func (b *bench) prime(ctx context.Context, c benchCase, e *entrant, dir string) (figure, error) {
	if err := e.clear(); err != nil {
		return figure{}, err
	}
	home, err := os.MkdirTemp(b.work, "s") // short: the path of a unix socket is at most 108 bytes long
	if err != nil {
		return figure{}, err
	}
	if e.store, err = e.open(ctx, b.programs, home); err != nil {
		return figure{}, errors.Join(err, remove(home))
	}
	if c.fill == cold {
		return figure{}, nil
	}
	syscall.Sync()
	return b.measure(ctx, e, b.call(c, dir, 0, ""))
}

func (b *bench) call(c benchCase, dir string, round int, layout string) build {
	call := build{context: dir, stages: c.stages, layout: layout, codec: c.codec}
	if c.args != nil {
		call.args = c.args(round)
	}
	return call
}

// once makes what the case wants before a run, measures the run, and looks whether it did what the case is about.
func (b *bench) once(ctx context.Context, c benchCase, e *entrant, dir string, round int) error {
	var before figure
	if c.fill != warm {
		var err error
		if before, err = b.prime(ctx, c, e, dir); err != nil {
			return err
		}
	}
	layout := ""
	if c.codec != "" {
		layout = filepath.Join(b.work, "layout.tar")
		defer os.Remove(layout)
	}
	syscall.Sync()
	f, err := b.measure(ctx, e, b.call(c, dir, round, layout))
	if err != nil {
		return err
	}
	if err := b.check(c, e, layout); err != nil {
		return err
	}
	e.result.Figures = append(e.result.Figures, f)
	if c.fill == primed {
		e.result.Before = append(e.result.Before, before)
	}
	return nil
}

func (b *bench) check(c benchCase, e *entrant, layout string) error {
	log, err := os.ReadFile(b.log())
	if err != nil {
		return err
	}
	if steps, ran := e.steps(string(log)); steps != c.steps || ran != c.ran {
		return fmt.Errorf("ran %d of %d steps, and the case is about %d of %d:%s", ran, steps, c.ran, c.steps, tail(b.log()))
	}
	if layout == "" {
		return nil
	}
	return checkLayout(layout, c.codec, c.steps)
}

func (b *bench) log() string { return filepath.Join(b.work, "log") }

// measure adds what the daemon does for a build to what the client does.
func (b *bench) measure(ctx context.Context, e *entrant, call build) (figure, error) {
	ctx, cancel := context.WithTimeout(ctx, longest)
	defer cancel()
	daemon := e.store.daemon()
	if daemon == 0 {
		return measure(ctx, e.store.build(call), b.log())
	}
	before, err := settledCPU(daemon)
	if err != nil {
		return figure{}, err
	}
	if err := resetPeaks(daemon); err != nil {
		return figure{}, err
	}
	f, err := measure(ctx, e.store.build(call), b.log())
	if err != nil {
		return f, err
	}
	after, err := settledCPU(daemon)
	if err != nil {
		return f, err
	}
	peak, err := peakRSS(daemon)
	f.CPU += after - before
	f.PeakRSS = max(f.PeakRSS, peak)
	return f, err
}
