package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
)

// A record is what the page is written from. It is kept, so that one case can be measured again without all others.
type record struct {
	Machine []string
	Cases   map[string]measured
	Floors  measured
}

// measured are the results of one case, and when and of what they are.
type measured struct {
	Date, Of string
	Load     float64 // of the machine, before
	Results  []result
}

// The part of the page between these lines is written by hand and kept.
const (
	handBegins = "<!-- written by hand: kept by make bench -->"
	handEnds   = "<!-- end of what is written by hand -->"
)

// writePage writes the page anew, but for what is written by hand.
func (r record) writePage(file string) error {
	hand := "\nNothing yet.\n"
	if b, err := os.ReadFile(file); err == nil {
		if _, rest, ok := strings.Cut(string(b), handBegins); ok {
			hand, _, _ = strings.Cut(rest, handEnds)
		}
	}
	var t strings.Builder
	r.head(&t)
	t.WriteString("\n## Targets\n\n" + r.targets())
	t.WriteString("\n## Where the time goes\n\n" + handBegins + hand + handEnds + "\n")
	t.WriteString("\n## What the same work costs\n\nThe plainest program that does a part of a case, measured in the same way, median of " + fmt.Sprint(floorRuns) + " runs.\n\n")
	t.WriteString("| work | wall | CPU |\n| --- | --- | --- |\n")
	for _, f := range r.Floors.Results {
		t.WriteString("| " + f.Builder + " | " + f.cells() + " |\n")
	}
	t.WriteString("\n## Cases\n")
	for _, c := range append(cases(), hugeCase()) {
		if m, ok := r.Cases[c.name]; ok {
			m.section(&t, c)
		}
	}
	return replace(file, []byte(t.String()))
}

func (r record) head(t *strings.Builder) {
	t.WriteString(`# Benchmarks

Written by ` + "`make bench`" + `, which installs the other builders, measures all cases as an account with subordinate ids, and writes this page.

    make bench                                                     everything
    make bench BENCHFLAGS='-case no-change,pull'                   some cases; the others keep the figures they have
    make bench BENCHFLAGS='-case pull -builders cooper -runs 1'    a look, which is not written down
    make bench BENCHFLAGS='-scale 0.02 -runs 1'                    whether it works, in a few minutes; not written down
    make bench-go                                                  the Go benchmarks of single packages

## How it is measured

- Wall is from the start of a program to its end. CPU is user and system time of the program and all its descendants, and of the BuildKit
  daemon and all of its own, in steps of 10 ms, until they are at rest. Peak is the resident memory of the largest single process of all runs; of the daemon's
  children only those that still live at the end of a build are seen.
- Builders take turns, in each round in another order, after a sync. Figures are medians, with the shortest and longest run; ratios are of
  medians.
- A run counts when it ended well, its output shows that as many steps ran, and as many were known, as the case is about, and an exported
  image has layers of the codec that was asked for. A builder that fails once in a case has no figures there.
- Every builder has a store of its own for each case, on one file system, which started by root is a new ext4 on a loop device; *cold* is a
  new, empty store for each run. Files of contexts and of
  the registry are in the page cache.
- Nothing is pruned meanwhile: cooper is called with ` + "`--keep-storage none`" + `, the daemon's garbage collection is off.
- Images come from Debian's docker-registry on loopback. RUN has no network, but with Buildah and Podman, whose chroot isolation cannot
  do without one.
- gzip is at level 6 and zstd at level 3 with every builder.
- The large base is busybox, a layer of 53,580 entries and 1.37 GB, and three of 1,710, 1,140 and 570 entries: many small files and
  few large ones, as in an image for developers; three quarters text, five in a hundred links, two tenths of the files owned by other users.

The builders:

`)
	for _, b := range builders() {
		fmt.Fprintf(t, "- **%s**: %s.\n", b.name, b.how)
	}
	t.WriteString("\nThe machine:\n\n")
	for _, line := range r.Machine {
		t.WriteString("- " + line + "\n")
	}
}

// targets is the table of what is to be reached.
func (r record) targets() string {
	var t strings.Builder
	t.WriteString("| case | target | measured | reached |\n| --- | --- | --- | --- |\n")
	for _, c := range append(cases(), hugeCase()) {
		m, ok := r.Cases[c.name]
		if !ok {
			continue
		}
		for _, want := range c.targets {
			fmt.Fprintf(&t, "| %s | %s | %s |\n", c.title, want, m.against(want))
		}
	}
	fmt.Fprintf(&t, "| peak memory in any of these | at most 120 MB | %s |\n", r.memory(120))
	return t.String()
}

func (t target) String() string {
	with := ""
	if t.build {
		with = ", with the build before"
	}
	switch {
	case t.of != "":
		return fmt.Sprintf("at most %.3gx %s%s", t.ratio, t.of, with)
	case t.what == "peak":
		return fmt.Sprintf("at most %.0f MB", t.limit)
	case t.what == "cpu":
		return fmt.Sprintf("at most %.0f ms of CPU", t.limit*1000)
	}
	return fmt.Sprintf("at most %.3g s", t.limit)
}

// against is what was measured and whether that is enough, as two cells.
func (m measured) against(t target) string {
	ours, ok := m.of(t.ours)
	if !ok {
		return "not measured | –"
	}
	if t.of == "" {
		v, text := ours.peak(), fmt.Sprintf("%.0f MB", ours.peak())
		switch t.what {
		case "wall":
			v, text = median(ours.Figures, wall).Seconds(), seconds(median(ours.Figures, wall))
		case "cpu":
			v, text = median(ours.Figures, cpu).Seconds(), seconds(median(ours.Figures, cpu))
		}
		return text + " | " + yes(v <= t.limit)
	}
	theirs, ok := m.of(t.of)
	if !ok {
		return t.of + " not measured | –"
	}
	a, b := ours.Figures, theirs.Figures
	if t.build {
		a, b = ours.withBefore(), theirs.withBefore()
	}
	x, y := median(a, wall), median(b, wall)
	ratio := float64(x) / float64(y)
	text := fmt.Sprintf("%.3gx (%s : %s)", ratio, seconds(x), seconds(y))
	if t.ours != "" {
		text += " " + t.ours
	}
	return text + " | " + yes(ratio <= t.ratio)
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "**no**"
}

// of finds the figures of a builder that has some.
func (m measured) of(name string) (result, bool) {
	if name == "" {
		name = "cooper"
	}
	i := slices.IndexFunc(m.Results, func(r result) bool { return r.Builder == name && len(r.Figures) > 0 })
	if i < 0 {
		return result{}, false
	}
	return m.Results[i], true
}

// memory is the largest peak of cooper in the usual cases.
func (r record) memory(limit float64) string {
	largest, in := 0.0, ""
	for _, c := range cases() {
		for _, result := range r.Cases[c.name].Results {
			if p := result.peak(); strings.HasPrefix(result.Builder, "cooper") && p > largest {
				largest, in = p, c.title
			}
		}
	}
	if in == "" {
		return "not measured | –"
	}
	return fmt.Sprintf("%.0f MB (%s) | %s", largest, in, yes(largest <= limit))
}

func (m measured) section(t *strings.Builder, c benchCase) {
	fmt.Fprintf(t, "\n### %s\n\n`%s`: %s %s, %s, load %.1f before.\n\n", c.title, c.name, c.does, m.Of, m.Date, m.Load)
	t.WriteString("| builder | runs | wall | CPU | peak | cooper's ratio |\n| --- | --- | --- | --- | --- | --- |\n")
	ours, _ := m.of("")
	for _, r := range m.Results {
		if len(r.Figures) == 0 {
			fmt.Fprintf(t, "| %s | | fails: %s | | | |\n", r.Builder, cell(r.Failure))
			continue
		}
		ratio := ""
		if len(ours.Figures) > 0 && r.Builder != ours.Builder {
			ratio = fmt.Sprintf("%.3gx", float64(median(ours.Figures, wall))/float64(median(r.Figures, wall)))
		}
		fmt.Fprintf(t, "| %s | %d | %s | %.0f MB | %s |\n", r.Builder, len(r.Figures), r.cells(), r.peak(), ratio)
		if len(r.Before) > 0 {
			before := result{Figures: r.Before}
			fmt.Fprintf(t, "| %s, the build before | %d | %s | %.0f MB | |\n", r.Builder, len(r.Before), before.cells(), before.peak())
		}
	}
	if len(c.only) > 0 {
		t.WriteString("\nThe other builders are left out to save time.\n")
	}
}

// cells are wall and CPU.
func (r result) cells() string {
	if len(r.Figures) == 0 {
		return "fails: " + cell(r.Failure) + " | "
	}
	return fmt.Sprintf("%s (%s) | %s", seconds(median(r.Figures, wall)), r.spread(), seconds(median(r.Figures, cpu)))
}

// cell is text on one line of a table, shortened.
func cell(s string) string {
	s = strings.ReplaceAll(strings.Join(strings.Fields(s), " "), "|", `\|`)
	if len(s) > 300 {
		s = s[:300] + " ..."
	}
	return s
}
