package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
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

	steps, ran int  // how many RUN and COPY there are, and how many of them a measured build must run
	stages     bool // some steps can run at the same time
	large      bool // stands on the large base
	targets    []target
}

// A target is a figure that is to be reached.
type target struct {
	of    string  // the builder to compare with, or "" for a figure that is no ratio
	ours  string  // which of our rows; "" is "cooper"
	ratio float64 // of the medians of wall time
	build bool    // with the build before, where the case is primed
	what  string  // "wall", "cpu" or "peak" when of is ""
	limit float64 // seconds, or MB
}

// A workload is how large everything is.
type workload struct {
	scale    float64
	registry string
}

func (w workload) count(n int) int { return max(1, int(float64(n)*w.scale)) }

const (
	treeFiles = 50_000
	treeBytes = 200_000_000
	fileBytes = 500_000_000
	hugeBytes = 8_000_000_000
)

func cases() []benchCase {
	return slices.Concat(stepCases(), baseCases(), copyCases(), exportCases())
}

func stepCases() []benchCase {
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
			only: []string{"cooper", "cooper, stored", "BuildKit", "Buildah"},
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
		{
			name: "stages", title: "four independent stages of 3 s", fill: warm, runs: 5,
			only: []string{"cooper", "cooper, stored", "BuildKit", "Buildah"},
			does: "Four stages, each with a RUN that sleeps for 3 s, and a last one that copies a file from each; new in every build. Buildah is " +
				"called with `--jobs 4`: by default it runs one at a time.",
			write: writeStages, steps: 8, ran: 8, stages: true,
			targets: []target{{what: "wall", limit: 3.5}},
		},
	}
}

func baseCases() []benchCase {
	return []benchCase{
		{
			name: "pull", title: "base of 1.4 GB, 57,000 files, pulled cold + 10 RUN", fill: cold, runs: 3, large: true,
			only: []string{"cooper", "cooper, stored", "BuildKit", "Buildah"},
			does: "The large base comes from the registry into an empty store; then 10 RUN steps, each of which writes a small file.",
			write: func(dir string, round int, w workload) error {
				return w.runSteps(dir, w.baseName(), 10, fmt.Sprint(round), fmt.Sprint(round))
			},
			steps: 10, ran: 10,
			targets: []target{{of: "BuildKit", ratio: 0.5}, {of: "Buildah", ratio: 0.2, ours: "cooper, stored"}},
		},
		{
			name: "large-base", title: "base of 1.4 GB present + 10 RUN", fill: warm, runs: 5, large: true,
			only: []string{"cooper", "cooper, stored", "BuildKit"},
			does: "10 RUN steps on the large base, each of which writes a small file that no build before had.",
			write: func(dir string, round int, w workload) error {
				return w.runSteps(dir, w.baseName(), 10, fmt.Sprint(round), fmt.Sprint(round))
			},
			steps: 10, ran: 10,
			targets: []target{{of: "BuildKit", ratio: 0.3}},
		},
	}
}

func copyCases() []benchCase {
	tree := func(change bool) func(string, int, workload) error {
		return func(dir string, round int, w workload) error {
			if round == 0 {
				return w.writeContext(dir, true, false)
			}
			if !change {
				return nil
			}
			return os.WriteFile(treeFile(dir+"/tree", w.count(treeFiles)/2), fmt.Appendf(nil, "changed in round %d\n", round), 0o644)
		}
	}
	return []benchCase{
		{
			name: "copy-tree-cold", title: "COPY of 50,000 files (200 MB), cold", fill: cold, runs: 5,
			only:  []string{"cooper", "cooper, stored", "BuildKit"},
			does:  "COPY of a directory into an image from scratch, in an empty store.",
			write: tree(false), steps: 1, ran: 1,
			targets: []target{{of: "BuildKit", ratio: 0.5}},
		},
		{
			name: "copy-tree-no-change", title: "COPY of 50,000 files (200 MB), no change", fill: warm, runs: 5,
			only:  []string{"cooper", "cooper, stored", "BuildKit", "BuildKit, one-shot"},
			does:  "The same COPY built again as it was.",
			write: tree(false), steps: 1, ran: 0,
			targets: []target{{of: "BuildKit", ratio: 0.3}},
		},
		{
			name: "copy-tree-one-changed", title: "COPY of 50,000 files (200 MB), one file changed", fill: warm, runs: 5,
			only:  []string{"cooper", "cooper, stored", "BuildKit"},
			does:  "The same COPY after one of the files got other content.",
			write: tree(true), steps: 1, ran: 1,
			targets: []target{{of: "BuildKit", ratio: 0.5}},
		},
		{
			name: "copy-file-cold", title: "COPY of one 500 MB file, cold", fill: cold, runs: 5,
			only: []string{"cooper", "cooper, stored", "BuildKit"},
			does: "COPY of one file into an image from scratch, in an empty store.",
			write: func(dir string, round int, w workload) error {
				if round > 0 {
					return nil
				}
				return w.writeContext(dir, false, true)
			},
			steps: 1, ran: 1,
			targets: []target{{of: "BuildKit", ratio: 0.5}},
		},
	}
}

func exportCases() []benchCase {
	write := func(dir string, round int, w workload) error {
		if round > 0 {
			return nil
		}
		return w.writeContext(dir, true, true)
	}
	export := func(codec string) benchCase {
		return benchCase{
			name: "export-" + codec, title: "export as OCI layout with " + codec, fill: primed, runs: 3, codec: codec,
			only: []string{"cooper", "BuildKit"},
			does: "The image of the 50,000 files and the 500 MB file to a tar file with an OCI layout. A build before, without an output, has made it in an " +
				"empty store; what a builder tars and compresses then already, it does not do again, so that build counts too.",
			write: write, steps: 2, ran: 0,
			targets: []target{{of: "BuildKit", ratio: 0.6}, {of: "BuildKit", ratio: 0.6, build: true}},
		}
	}
	return []benchCase{export("gzip"), export("zstd")}
}

// hugeCase takes minutes and 30 GB of disk, so it runs only when it is asked for.
func hugeCase() benchCase {
	return benchCase{
		name: "huge", title: "one file of 8 GB, exported with gzip", fill: cold, runs: 1, codec: "gzip",
		only: []string{"cooper", "BuildKit"},
		does: "COPY of one file of 8 GB into an image from scratch, in an empty store, and its export as OCI layout.",
		write: func(dir string, round int, w workload) error {
			if round > 0 {
				return nil
			}
			if err := os.WriteFile(dir+"/Dockerfile", []byte("FROM scratch\nCOPY large /large\n"), 0o644); err != nil {
				return err
			}
			return writeLarge(dir+"/large", int64(hugeBytes*w.scale))
		},
		steps: 1, ran: 1,
		targets: []target{{what: "peak", limit: 200}},
	}
}

func writeStages(dir string, round int, w workload) error {
	var text strings.Builder
	for i := range 4 {
		fmt.Fprintf(&text, "%s AS s%d\nRUN sleep 3 && echo %d > /file-%d\n", w.from("busybox"), i, round, i)
	}
	fmt.Fprintln(&text, w.from("busybox"))
	for i := range 4 {
		fmt.Fprintf(&text, "COPY --from=s%d /file-%d /\n", i, i)
	}
	return os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(text.String()), 0o644)
}

// writeContext makes a context for COPY: a tree of small files, a large file, or both.
func (w workload) writeContext(dir string, tree, large bool) error {
	text := "FROM scratch\n"
	if tree {
		text += "COPY tree /tree\n"
		if err := writeTree(dir+"/tree", w.count(treeFiles), int64(treeBytes*w.scale)); err != nil {
			return err
		}
	}
	if large {
		text += "COPY large /large\n"
		if err := writeLarge(dir+"/large", int64(fileBytes*w.scale)); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(text), 0o644)
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
