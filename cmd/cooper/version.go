package main

import (
	"fmt"
	"runtime/debug"

	"github.com/spf13/cobra"
)

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the versions of cooper and of every module in it",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			info, ok := debug.ReadBuildInfo()
			if !ok {
				return fmt.Errorf("this executable carries no build information")
			}
			w := c.OutOrStdout()
			fmt.Fprintf(w, "cooper %s %s\n", info.Main.Version, info.GoVersion)
			for _, m := range info.Deps {
				fmt.Fprintf(w, "%s %s\n", m.Path, m.Version)
			}
			return nil
		},
	}
}
