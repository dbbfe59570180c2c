// Command cooper builds container images from Dockerfiles, without a daemon and without root.
//
// This package turns flags and environment into requests, draws progress, prints errors and chooses exit
// codes. It is the only one that reads the environment, prints or exits.
package main

import (
	"context"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	// A build is short and its heap small: collecting it rarely, until it is large after all, saves a twentieth of its time.
	debug.SetGCPercent(400)
	debug.SetMemoryLimit(64 << 20)
	os.Exit(run(os.Args[1:]))
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
