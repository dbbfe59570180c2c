package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"text/tabwriter"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/snapshot"
)

func newImages() *cobra.Command {
	return &cobra.Command{
		Use:   "images",
		Short: "List the images of the local store",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			images, err := listImages(c)
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 3, ' ', 0)
			fmt.Fprintln(w, "NAME\tDIGEST\tSIZE\tCREATED")
			var unreadable []error
			for _, i := range images {
				if i.Err != nil {
					unreadable = append(unreadable, fmt.Errorf("image %s %s: %w", i.Name, i.Digest, i.Err))
					continue
				}
				name, created := cmp.Or(i.Name, "<none>"), "-"
				if i.Created != nil {
					created = i.Created.UTC().Format("2006-01-02 15:04:05")
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", name, i.Digest, units.HumanSize(float64(i.Size)), created)
			}
			return errors.Join(append(unreadable, w.Flush())...)
		},
	}
}

// listImages returns no image where there is no store.
func listImages(c *cobra.Command) ([]image.Entry, error) {
	if there, err := findStore(c); !there {
		return nil, err
	}
	content, err := openContent(c)
	if errors.Is(err, snapshot.ErrNoStore) {
		return nil, nil // the first build has not come so far
	}
	if err != nil {
		return nil, err
	}
	images, err := content.List()
	return images, errors.Join(err, content.Close())
}

// openContent opens the blobs and names of the local store, and makes none.
func openContent(c *cobra.Command) (*image.Layout, error) {
	root, err := storeRoot(c)
	if err != nil {
		return nil, err
	}
	if err := snapshot.Check(root); err != nil {
		return nil, err
	}
	content := filepath.Join(root, "content")
	if _, err := os.Lstat(content); errors.Is(err, fs.ErrNotExist) {
		return nil, hinted{fmt.Errorf("%w of images in %s", snapshot.ErrNoStore, content), "'cooper build' makes one"}
	}
	return image.CreateLayout(content)
}

func newPush() *cobra.Command {
	return &cobra.Command{
		Use:   "push NAME [AS]",
		Short: "Send an image of the local store, with its signatures, to a registry",
		Args:  cobra.RangeArgs(1, 2),
		RunE: func(c *cobra.Command, args []string) error {
			name, err := fullName(args[0])
			if err != nil {
				return err
			}
			as := name
			if len(args) == 2 {
				if as, err = fullName(args[1]); err != nil {
					return err
				}
			}
			content, err := openContent(c)
			if err != nil {
				return err
			}
			defer content.Close() // ends what was only read
			p, err := content.Publication(name)
			if err != nil {
				return hinted{fmt.Errorf("image %s: %w", name, err), "list what there is with 'cooper images'"}
			}
			p.Names = []string{as}
			options, err := registry(c, nil)
			if err != nil {
				return err
			}
			sink := image.NewClient(options).NewRegistrySink()
			if err := sink.Publish(c.Context(), content, p); err != nil {
				return fmt.Errorf("push %s: %w", as, err)
			}
			fmt.Fprintf(c.ErrOrStderr(), "pushed %s %s\n", as, p.Image.Digest)
			return nil
		},
	}
}
