// Bench compares cooper with other builders: it runs the cases that docs/benchmarks.md describes, prints a table and writes that page.
// .ci/bench installs what it needs and starts it as an unprivileged account.
package main

import (
	"context"
	"flag"
	"fmt"
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
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	var (
		cooper   = flag.String("cooper", "cooper", "the `program` to measure")
		buildkit = flag.String("buildkit", "", "`directory` with buildkitd, buildctl, rootlesskit and runc")
		busybox  = flag.String("busybox", "", "`directory` with the OCI layout of the small base")
		cache    = flag.String("cache", "", "`directory` that keeps the large base and the results")
		work     = flag.String("work", "", "`directory` for everything else; it must be on the file system to measure")
		only     = flag.String("case", "", "`names` of the cases to run, with commas; default all")
		with     = flag.String("builders", "", "`names` of the builders to run, with commas between those of the table as in buildkit,buildah; default all")
		runs     = flag.Int("runs", 0, "how many `times` each builder runs a case, instead of what the case says")
		scale    = flag.Float64("scale", 1, "a `factor` for the sizes of bases and contexts")
	)
	flag.Parse()
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	todo, err := chooseCases(*only)
	if err != nil {
		return err
	}
	chosen, err := chooseBuilders(*with)
	if err != nil {
		return err
	}
	r, err := startRegistry(ctx, filepath.Join(*cache, "registry"), *work)
	if err != nil {
		return err
	}
	defer r.stop()
	if err := r.push(ctx, *busybox, "busybox"); err != nil {
		return err
	}
	b := &bench{
		programs: programs{cooper: *cooper, buildkit: *buildkit, registry: r.host},
		workload: workload{scale: *scale, registry: r.host},
		work:     *work, builders: chosen, runs: *runs,
		say: func(format string, args ...any) { fmt.Printf(format+"\n", args...) },
	}
	for _, c := range todo {
		results, err := b.run(ctx, c)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		for _, r := range results {
			fmt.Println(r)
		}
	}
	return nil
}

func chooseCases(names string) ([]benchCase, error) {
	if names == "" {
		return cases(), nil
	}
	var chosen []benchCase
	for name := range strings.SplitSeq(names, ",") {
		i := slices.IndexFunc(cases(), func(c benchCase) bool { return c.name == name })
		if i < 0 {
			return nil, fmt.Errorf("no case is called %q", name)
		}
		chosen = append(chosen, cases()[i])
	}
	return chosen, nil
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

func forwardTermination(p *os.Process) (stop func()) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM, os.Interrupt)
	go func() {
		for range c {
			p.Kill() //nolint:errcheck // it may have ended
		}
	}()
	return func() { signal.Stop(c); close(c) }
}
