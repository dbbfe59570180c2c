package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/cooper-build/cooper/builder"
	"github.com/cooper-build/cooper/snapshot"
)

func newStoreCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "store",
		Short: "Look after the local store",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return usageError{errors.New("store needs a command: cooper store verify")}
		},
	}
	c.AddCommand(newStoreVerify())
	return c
}

// findStore reports whether there is a store. Where none is, it says so and leaves it at that: nothing is made for who only
// looks. It asks outside of the user namespace, where a stranger's id can be seen.
func findStore(c *cobra.Command) (bool, error) {
	root, err := storeRoot(c)
	if err != nil {
		return false, err
	}
	err = snapshot.Check(root)
	if errors.Is(err, snapshot.ErrNoStore) {
		fmt.Fprintf(c.ErrOrStderr(), "there is no store in %s yet\n", root)
		return false, nil
	}
	return err == nil, err
}

func newStoreVerify() *cobra.Command {
	var repair bool
	c := &cobra.Command{
		Use:   "verify",
		Short: "Read everything in the local store and tell what is damaged",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			root, err := storeRoot(c)
			if err != nil {
				return err
			}
			if err := snapshot.Check(root); err != nil && !errors.Is(err, snapshot.ErrDamaged) {
				return err // also that there is none: it is not as it should be
			}
			return insideStore(c, func(root string) error { return verifyStore(c, root, repair) })
		},
	}
	c.Flags().BoolVar(&repair, "repair", false, "move what is damaged, and what depends on it, to the store's quarantine")
	return c
}

func verifyStore(c *cobra.Command, root string, repair bool) error {
	found, err := builder.VerifyStore(c.Context(), root, repair)
	var left int
	for _, d := range found {
		fmt.Fprintf(c.OutOrStdout(), "%s: %s\n", d.Where, d.What)
		switch {
		case d.Repair != "":
			fmt.Fprintf(c.OutOrStdout(), "    %s\n", d.Repair)
		case repair:
			fmt.Fprintf(c.OutOrStdout(), "    left as it is: it is in use, or not ours to change\n")
			left++
		default:
			left++
		}
	}
	if err != nil {
		return err
	}
	if left > 0 {
		hint := "move it out of the way with 'cooper store verify --repair': the next build makes it again"
		if repair {
			hint = "try again when no build is running"
		}
		return hinted{fmt.Errorf("store %s: %d things are damaged", root, left), hint}
	}
	if len(found) == 0 {
		fmt.Fprintln(c.OutOrStdout(), "the store is as it should be")
	}
	return nil
}
