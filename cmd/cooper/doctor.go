package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/cooper-build/cooper/sandbox/doctor"
	"github.com/cooper-build/cooper/sandbox/userns"
)

func newDoctor() *cobra.Command {
	var json, tryProc bool
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Tell what a build can do on this machine, and what would let it do more",
		Long: "Tries what a build needs from the machine: namespaces, ids, overlay, seccomp, network, the store's place.\n" +
			"The exit code is 0 if a build can run and 1 if not.",
		Args: func(c *cobra.Command, args []string) error {
			if err := cobra.NoArgs(c, args); err != nil {
				return usageError{err}
			}
			return nil
		},
		RunE: func(c *cobra.Command, _ []string) error {
			if tryProc {
				return tellProc(c)
			}
			return examine(c, json)
		},
	}
	c.Flags().BoolVar(&json, "json", false, "for programs")
	c.Flags().BoolVar(&tryProc, "try-proc", false, "what doctor calls itself with")
	hide(c, "try-proc")
	return c
}

// examine runs this program again where a build would run, and tells what is found there; or why there is no such place.
func examine(c *cobra.Command, json bool) error {
	root, err := storeRoot(c)
	if err != nil {
		return err
	}
	if root, err = filepath.Abs(root); err != nil {
		return err
	}
	o := doctor.Options{Store: root, Path: filepath.SplitList(os.Getenv("PATH")), TryProc: []string{os.Args[0], "doctor", "--try-proc"}}
	if ids, inside := userns.Inside(); inside {
		return tell(c, doctor.Diagnose(doctor.Examine(c.Context(), o, ids)), json)
	}
	kind, err := sandboxKind("", "")
	if err != nil {
		return err
	}
	code, err := userns.Enter(c.Context(), os.Args, os.Environ(), userns.Options{Only: kind})
	if err != nil {
		return tell(c, doctor.Diagnose(doctor.Outside(o, err)), json)
	}
	if code != 0 {
		return exitCode(code)
	}
	return nil
}

// tell prints a report. That nothing can be built is the answer, not an error of ours.
func tell(c *cobra.Command, r doctor.Report, json bool) error {
	text := r.Text()
	if json {
		b, err := r.JSON()
		if err != nil {
			return err
		}
		text = string(b) + "\n"
	}
	if _, err := fmt.Fprint(c.OutOrStdout(), text); err != nil {
		return err
	}
	if !r.CanBuild {
		return exitCode(exitFailed)
	}
	return nil
}

func tellProc(c *cobra.Command) error {
	if err := doctor.TryProc(); err != nil {
		fmt.Fprintln(c.OutOrStdout(), err)
		return exitCode(exitFailed)
	}
	return nil
}
