// Bench compares cooper with other builders: it runs the cases that docs/benchmarks.md describes, prints a table and writes that page.
// .ci/bench installs what it needs and starts it as an unprivileged account.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) > 3 && os.Args[1] == "measure" && os.Args[3] == "--" {
		status, err := measureChild(os.Args[2], os.Args[4:])
		if err != nil {
			fmt.Fprintln(os.Stderr, "bench measure:", err)
			status = 125
		}
		os.Exit(status)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, parseFlags()); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// options are the flags.
type options struct {
	programs
	busybox, cache, work, page string
	cases, builders            string
	date, of                   string
	runs                       int
	scale                      float64
	huge                       bool
}

func parseFlags() options {
	var o options
	flag.StringVar(&o.cooper, "cooper", "cooper", "the `program` to measure")
	flag.StringVar(&o.buildkit, "buildkit", "", "`directory` with buildkitd, buildctl, rootlesskit and runc")
	flag.StringVar(&o.busybox, "busybox", "", "`directory` with the OCI layout of the small base")
	flag.StringVar(&o.cache, "cache", "", "`directory` that keeps the large base and the results")
	flag.StringVar(&o.work, "work", "", "`directory` for everything else; its file system is the one to measure")
	flag.StringVar(&o.page, "page", "", "`file` to write anew, when everything that was run was run in full")
	flag.StringVar(&o.date, "date", "", "the `day` to write beside the figures")
	flag.StringVar(&o.of, "of", "", "the `commit` that is measured")
	flag.StringVar(&o.cases, "case", "", "`names` of the cases to run, with commas, or floors; default all")
	flag.StringVar(&o.builders, "builders", "", "`names` of builders to run: cooper, cooper-stored, buildkit, buildkit-one-shot, buildah, podman; default all")
	flag.IntVar(&o.runs, "runs", 0, "how many `times` each builder runs a case, instead of what the case says")
	flag.Float64Var(&o.scale, "scale", 1, "a `factor` for the sizes of bases and contexts")
	flag.BoolVar(&o.huge, "huge", false, "run the case with a file of 8 GB, too")
	flag.Parse()
	return o
}

// whole tells whether the results may be written down.
func (o options) whole() bool {
	return o.page != "" && o.builders == "" && o.runs == 0 && o.scale == 1
}

func run(ctx context.Context, o options) error {
	// Pause processes come to us when the podman that started them has ended.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	todo, floors, err := chooseCases(o.cases, o.huge)
	if err != nil {
		return err
	}
	chosen, err := chooseBuilders(o.builders)
	if err != nil {
		return err
	}
	r, err := startRegistry(ctx, filepath.Join(o.cache, "registry"), o.work)
	if err != nil {
		return err
	}
	defer r.stop()
	o.registry = r.host
	w := workload{scale: o.scale, registry: r.host}
	if err := r.push(ctx, o.busybox, "busybox"); err != nil {
		return err
	}
	large := ""
	if floors || slices.ContainsFunc(todo, func(c benchCase) bool { return c.large }) {
		if large, err = ensureBase(o.cache, o.busybox, w); err != nil {
			return err
		}
		if err := r.push(ctx, large, w.baseName()); err != nil {
			return err
		}
	}
	b := &bench{
		programs: o.programs, workload: w, work: o.work, builders: chosen, runs: o.runs,
		say: func(format string, args ...any) { fmt.Printf(format+"\n", args...) },
	}
	keep, err := openRecord(o)
	if err != nil {
		return err
	}
	for _, c := range todo {
		m := measured{Date: o.date, Of: o.of, Load: load()}
		if m.Results, err = b.run(ctx, c); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		keep.Cases[c.name] = m
		if err := keep.save(o); err != nil {
			return err
		}
	}
	if floors {
		keep.Floors = measured{Date: o.date, Of: o.of, Load: load()}
		if keep.Floors.Results, err = b.floors(ctx, large); err != nil {
			return err
		}
	}
	fmt.Print("\n", keep.targets())
	return keep.save(o)
}

// openRecord reads what was measured before on this machine, when what is measured now is to be added.
func openRecord(o options) (record, error) {
	r := record{Machine: machine(o.programs, o.work), Cases: map[string]measured{}}
	if !o.whole() {
		return r, nil
	}
	var old record
	err := readJSON(filepath.Join(o.cache, "results.json"), &old)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !slices.Equal(old.Machine, r.Machine) {
		return r, nil
	}
	return old, err
}

func (r record) save(o options) error {
	if !o.whole() {
		return nil
	}
	if err := writeJSON(filepath.Join(o.cache, "results.json"), r); err != nil {
		return err
	}
	return r.writePage(o.page)
}

func chooseCases(names string, huge bool) (chosen []benchCase, floors bool, err error) {
	all := cases()
	if names == "" {
		if huge {
			all = append(all, hugeCase())
		}
		return all, true, nil
	}
	all = append(all, hugeCase())
	for name := range strings.SplitSeq(names, ",") {
		if name == "floors" {
			floors = true
			continue
		}
		i := slices.IndexFunc(all, func(c benchCase) bool { return c.name == name })
		if i < 0 {
			return nil, false, fmt.Errorf("no case is called %q", name)
		}
		chosen = append(chosen, all[i])
	}
	return chosen, floors, nil
}

// flagName is how a builder is named in a flag: "cooper, stored" has a comma in it.
func (b builder) flagName() string {
	return strings.ReplaceAll(strings.ToLower(b.name), ", ", "-")
}

func chooseBuilders(names string) ([]builder, error) {
	if names == "" {
		return builders(), nil
	}
	var chosen []builder
	for name := range strings.SplitSeq(names, ",") {
		i := slices.IndexFunc(builders(), func(b builder) bool { return b.flagName() == name })
		if i < 0 {
			return nil, fmt.Errorf("no builder is called %q", name)
		}
		chosen = append(chosen, builders()[i])
	}
	return chosen, nil
}
