// Command cooper builds container images from Dockerfiles, without a daemon and without root.
//
// This package turns flags and environment into requests, draws progress, prints errors and chooses exit
// codes. It is the only one that reads the environment, prints or exits.
package main

import (
	"context"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	collectRarely()
	os.Exit(run(os.Args[1:]))
}

// collectRarely lets the heap of a build, which is short and mostly small, grow to several times of what is alive: that saves a twentieth of
// its time. The limit of it all moves with what is alive: near a fixed one the collector would run all the time.
func collectRarely() {
	const least, room = 64 << 20, 20 << 20
	debug.SetGCPercent(400)
	debug.SetMemoryLimit(least)
	var collected func(struct{})
	collected = func(struct{}) {
		alive := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
		metrics.Read(alive)
		live := int64(alive[0].Value.Uint64())
		debug.SetMemoryLimit(max(least, live+live/4+room))
		runtime.AddCleanup(new([64]byte), collected, struct{}{})
	}
	runtime.AddCleanup(new([64]byte), collected, struct{}{})
}

// run is the whole program: it returns the exit code.
func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	root := newRoot()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	return report(ctx, os.Stderr, err)
}

func newRoot() *cobra.Command {
	c := &cobra.Command{
		Use:           "cooper",
		Short:         "Build container images without a daemon and without root",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	c.PersistentFlags().String("root", "", "the store's directory (default $XDG_DATA_HOME/cooper)")
	c.PersistentFlags().String("config", "", "docker's configuration `directory` (default $DOCKER_CONFIG, else ~/.docker)")
	c.PersistentFlags().StringSlice("plain-http", nil, "a registry `host[:port]` that speaks plain http; loopback hosts always may")
	c.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	c.AddCommand(newBuild(), newImages(), newPush(), newKeygen(), newVerify(), newDoctor(), newVersion(), newDU(), newPrune(), newStoreCommand())
	return c
}
