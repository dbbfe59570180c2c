package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/cooper-build/cooper/builder"
	"github.com/cooper-build/cooper/sandbox/userns"
)

func newDU() *cobra.Command {
	var format string
	var asJSON, verbose bool
	c := &cobra.Command{
		Use:   "du",
		Short: "Show what takes space in the local store",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if format != "" && format != "json" && format != "table" {
				return usageError{fmt.Errorf("--format %q: table or json expected", format)}
			}
			if asJSON {
				format = "json"
			}
			show := func(items []builder.Item) error {
				if format == "json" {
					return printJSON(c.OutOrStdout(), items)
				}
				return printUsage(c.OutOrStdout(), items, verbose)
			}
			there, err := findStore(c)
			if err != nil {
				return err
			}
			if !there {
				return show(nil)
			}
			return insideStore(c, func(root string) error {
				items, err := builder.Usage(c.Context(), root)
				if err != nil {
					return err
				}
				return show(items)
			})
		},
	}
	c.Flags().StringVar(&format, "format", "", "table, or json: one object on each line")
	c.Flags().BoolVar(&asJSON, "json", false, "the same as --format json")
	c.Flags().BoolVar(&verbose, "verbose", false, "list blobs and facts one by one, too")
	return c
}

// insideStore runs do with the store's directory inside a user namespace, by running this program again there: a store
// has files of all the ids that images have.
func insideStore(c *cobra.Command, do func(root string) error) error {
	root, err := storeRoot(c)
	if err != nil {
		return err
	}
	if _, inside := userns.Inside(); inside {
		return do(root)
	}
	kind, err := sandboxKind("", "")
	if err != nil {
		return err
	}
	code, err := userns.Enter(c.Context(), os.Args, os.Environ(), userns.Options{Only: kind})
	if err != nil {
		return err
	}
	if code != 0 {
		return exitCode(code)
	}
	return nil
}

// usageLine has the names that docker buildx du gives its fields.
type usageLine struct {
	ID          string
	Type        string
	Description string
	Size        int64 // on disk
	Bytes       int64 // the lengths of the files
	LastUsedAt  *time.Time
	Parents     []string
	Images      []string
	InUse       bool
	Shared      bool
	Reclaimable bool
	Unusable    bool
}

func printJSON(w io.Writer, items []builder.Item) error {
	e := json.NewEncoder(w)
	for _, i := range items {
		line := usageLine{
			ID: i.ID, Type: i.Type, Description: i.Description, Size: i.Size.Disk, Bytes: i.Size.Bytes, Parents: i.Parents, Images: i.Images,
			InUse: i.InUse, Shared: i.Shared, Reclaimable: i.Reclaimable, Unusable: i.Unusable,
		}
		if !i.LastUsed.IsZero() {
			at := i.LastUsed.UTC()
			line.LastUsedAt = &at
		}
		if err := e.Encode(line); err != nil {
			return err
		}
	}
	return nil
}

func printUsage(out io.Writer, items []builder.Item, verbose bool) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "ID\tTYPE\tRECLAIMABLE\tSIZE\tLAST USED\tDESCRIPTION")
	rest := map[string]*builder.Item{}
	var order []string
	for _, i := range items {
		if (i.Type == builder.TypeBlob || i.Type == builder.TypeFact) && !verbose {
			name := fmt.Sprint(i.Type, i.Description, i.Reclaimable)
			if rest[name] == nil {
				rest[name] = &builder.Item{Type: i.Type, Description: i.Description, Reclaimable: i.Reclaimable}
				order = append(order, name)
			}
			sum := rest[name]
			sum.Size.Disk += i.Size.Disk
			sum.Reclaimable = sum.Reclaimable && i.Reclaimable
			if i.LastUsed.After(sum.LastUsed) {
				sum.LastUsed = i.LastUsed
			}
			continue
		}
		printItem(w, i)
	}
	for _, name := range order {
		printItem(w, *rest[name])
	}
	t := builder.Sum(items)
	fmt.Fprintf(w, "\nShared:\t%s\nReclaimable:\t%s\nTotal:\t%s\n", size(t.Shared), size(t.Reclaimable), size(t.All))
	return w.Flush()
}

func printItem(w io.Writer, i builder.Item) {
	id := i.ID
	switch {
	case id == "":
		id = "-"
	case len(id) > 19 && i.Type != builder.TypeCache:
		id = id[:19]
	}
	reclaimable := "no"
	switch {
	case i.InUse:
		reclaimable = "in use"
	case i.Unusable:
		reclaimable = "unusable"
	case i.Reclaimable:
		reclaimable = "yes"
	}
	used := "-"
	if !i.LastUsed.IsZero() {
		used = i.LastUsed.UTC().Format("2006-01-02 15:04")
	}
	fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", id, i.Type, reclaimable, size(i.Size.Disk), used, i.Description)
}

func size(n int64) string { return units.HumanSize(float64(n)) }

// parseSize reads a size as docker does: 10GB, 512m, a number of bytes.
func parseSize(flag, s string) (int64, error) {
	n, err := units.RAMInBytes(s)
	if err == nil && n < 0 {
		err = errors.New("it is negative")
	}
	if err != nil {
		return 0, usageError{fmt.Errorf("%s %q: a size such as 10GB expected: %w", flag, s, err)}
	}
	return n, nil
}
