package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// How a store is filled before a run is measured.
type fill int

const (
	warm   fill = iota // once: it holds the same build, or that of the round before
	cold               // a new store for every run, with nothing in it
	primed             // a new store for every run, which holds the build already
)

// A benchCase is one thing that builders are compared in.
type benchCase struct {
	name, title string
	does        string
	fill        fill
	runs        int
	only        []string // builders; empty: all
	codec       string   // the result is written to an OCI layout with layers in it

	// write makes the context of a round, the first time in an empty directory, then on that of the round before.
	write func(dir string, round int, w workload) error
	args  func(round int) []string

	steps, ran int // how many RUN and COPY there are, and how many of them a measured build must run
	stages     bool
	targets    []target
}

// A target is a figure that issue 5 asks for.
type target struct {
	of    string  // the builder to compare with, or "" for a figure that is no ratio
	ours  string  // which of our rows; "" is "cooper"
	ratio float64 // of the medians of wall time
	what  string  // "wall", "cpu" or "peak" when of is ""
	limit float64 // seconds, or MB
}

// A workload is how large everything is.
type workload struct {
	scale    float64
	registry string
}

func (w workload) count(n int) int { return max(1, int(float64(n)*w.scale)) }

// peakTarget is asked of every case.
func peakTarget() target { return target{what: "peak", limit: 120} }

func cases() []benchCase {
	daemonless := []target{{of: "BuildKit, one-shot", ratio: 0.1}, {of: "Buildah", ratio: 0.1, ours: "cooper, stored"}, {of: "Podman", ratio: 0.1, ours: "cooper, stored"}}
	return []benchCase{
		{
			name: "no-change", title: "no-change rebuild, 30 steps", fill: warm, runs: 7,
			does:  "30 RUN steps, each of which writes a small file; built again as it was.",
			write: func(dir string, _ int, w workload) error { return w.runSteps(dir, "busybox", 30, "same", "same") },
			steps: 30, ran: 0,
			targets: append([]target{{of: "BuildKit", ratio: 0.4}, {what: "cpu", limit: 0.040}}, daemonless...),
		},
		{
			name: "30-runs", title: "30 RUN steps, base present", fill: warm, runs: 5,
			does: "30 RUN steps, each of which writes a small file that no build before had; the base is in the store.",
			write: func(dir string, round int, w workload) error {
				return w.runSteps(dir, "busybox", 30, fmt.Sprint(round), fmt.Sprint(round))
			},
			steps: 30, ran: 30,
			targets: []target{{of: "BuildKit", ratio: 0.25}, {of: "Buildah", ratio: 0.1, ours: "cooper, stored"}},
		},
		{
			name: "last-changed", title: "last of 30 steps changed", fill: warm, runs: 7,
			does: "30 RUN steps, the last of which is another one in every build.",
			write: func(dir string, round int, w workload) error {
				return w.runSteps(dir, "busybox", 30, "same", fmt.Sprint(round))
			},
			steps: 30, ran: 1,
			targets: []target{{of: "BuildKit", ratio: 0.4}},
		},
		{
			name: "first-run", title: "start to first RUN on a warm store", fill: warm, runs: 7,
			does: "One RUN of a shell that does nothing, with an ARG that has a new value in every build.",
			write: func(dir string, _ int, w workload) error {
				return w.dockerfile(dir, "busybox", "ARG ROUND", "RUN : $ROUND")
			},
			args:  func(round int) []string { return []string{fmt.Sprintf("ROUND=%d", round)} },
			steps: 1, ran: 1,
			targets: []target{{of: "BuildKit", ratio: 0.5}},
		},
	}
}

func (w workload) from(base string) string { return "FROM " + w.registry + "/" + base + ":latest" }

func (w workload) dockerfile(dir, base string, lines ...string) error {
	text := strings.Join(append([]string{w.from(base)}, lines...), "\n") + "\n"
	return os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(text), 0o644)
}

// runSteps writes n steps with the word in all but the last, which has its own.
func (w workload) runSteps(dir, base string, n int, word, last string) error {
	lines := make([]string, n)
	for i := range lines {
		if i == n-1 {
			word = last
		}
		lines[i] = fmt.Sprintf("RUN echo %s > /file-%d", word, i)
	}
	return w.dockerfile(dir, base, lines...)
}
