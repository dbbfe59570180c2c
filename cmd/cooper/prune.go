package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder"
	"github.com/cooper-build/cooper/sandbox/userns"
)

func newPrune() *cobra.Command {
	var all, force bool
	var keep string
	var filters []string
	c := &cobra.Command{
		Use:   "prune",
		Short: "Remove what the local store can do without, least recently used first",
		Long: "Remove images without a tag, and snapshots, cache mounts and blobs that no tagged image of the store was made from, least\n" +
			"recently used first. What a running build uses stays, and no build is waited for.",
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			limits, err := pruneLimits(all, keep, filters)
			if err != nil {
				return err
			}
			there, err := findStore(c)
			if err != nil {
				return err
			}
			if _, inside := userns.Inside(); !inside && there && !force {
				if err := confirm(c, all); err != nil {
					return err
				}
			}
			if !there {
				printFreed(c, 0)
				return nil
			}
			return insideStore(c, func(root string) error { return prune(c, root, limits) })
		},
	}
	c.Flags().BoolVarP(&all, "all", "a", false, "also tagged images, what they were made from, and what verify moved away")
	c.Flags().StringVar(&keep, "keep-storage", "", "stop when the store takes no more than this `SIZE`")
	c.Flags().StringArrayVar(&filters, "filter", nil, "`until=24h`: only what was not used for so long; type=snapshot, cache, image, blob, fact, tree or quarantine")
	c.Flags().BoolVarP(&force, "force", "f", false, "do not ask")
	return c
}

func pruneLimits(all bool, keep string, filters []string) (builder.Limits, error) {
	l := builder.Limits{All: all}
	if keep != "" {
		n, err := parseSize("--keep-storage", keep)
		if err != nil {
			return l, err
		}
		l.Keep = n
	}
	for _, f := range filters {
		name, value, _ := strings.Cut(f, "=")
		switch name {
		case "until", "unused-for":
			d, err := time.ParseDuration(value)
			if err == nil && d < 0 {
				err = errors.New("it is negative")
			}
			if err != nil {
				return l, usageError{fmt.Errorf("--filter %s: a time such as 24h expected: %w", f, err)}
			}
			l.Age = d
		case "type":
			t, err := builder.ParseType(value)
			if err != nil {
				return l, usageError{fmt.Errorf("--filter %s: %w", f, err)}
			}
			l.Types = append(l.Types, t)
		default:
			return l, usageError{fmt.Errorf("--filter %q: until=TIME or type=TYPE expected", f)}
		}
	}
	return l, nil
}

// confirm asks a person, and refuses where there is none.
func confirm(c *cobra.Command, all bool) error {
	if _, err := unix.IoctlGetTermios(int(os.Stdin.Fd()), unix.TCGETS); err != nil {
		return usageError{errors.New("prune removes without a way back, and there is no terminal to ask on: pass --force")}
	}
	what := "images without a tag and everything else that no tagged image was made from"
	if all {
		what = "all images and everything else that no running build uses"
	}
	fmt.Fprintf(c.ErrOrStderr(), "This removes %s. Go on? [y/N] ", what)
	answer, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if err != nil {
		return err
	}
	if a := strings.ToLower(strings.TrimSpace(answer)); a != "y" && a != "yes" {
		return errors.New("nothing was removed")
	}
	return nil
}

func prune(c *cobra.Command, root string, limits builder.Limits) error {
	result, err := builder.Prune(c.Context(), root, limits)
	if result == nil {
		return err
	}
	if len(result.Removed) > 0 {
		if printErr := printRemoved(c, result); err == nil {
			err = printErr
		}
	}
	if result.InUse > 0 {
		fmt.Fprintf(c.ErrOrStderr(), "%d items that running builds use were left\n", result.InUse)
	}
	if result.Foreign > 0 {
		fmt.Fprintf(c.ErrOrStderr(), "%d items with files of ids that are not yours any more were left: an administrator can remove them\n", result.Foreign)
	}
	printFreed(c, result.Freed)
	return err
}

func printFreed(c *cobra.Command, n int64) { fmt.Fprintf(c.OutOrStdout(), "Total:\t%s\n", size(n)) }

func printRemoved(c *cobra.Command, result *builder.Pruned) error {
	out := c.OutOrStdout()
	for _, i := range result.Removed {
		if i.Type == builder.TypeFact {
			continue
		}
		if _, err := fmt.Fprintf(out, "%s\t%s\t%s\t%s\n", i.ID, i.Type, size(i.Size.Disk), i.Description); err != nil {
			return err
		}
	}
	return nil
}
