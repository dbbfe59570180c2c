// Mkbase makes the base images that it is asked for by name, unless the cache has them, and prints their layout directories.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/cooper-build/cooper/internal/testimage"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	for _, name := range os.Args[1:] {
		base, ok := testimage.Bases()[name]
		if !ok {
			fmt.Fprintf(os.Stderr, "mkbase: no base image is called %q\n", name)
			os.Exit(2)
		}
		dir, err := base.Ensure(ctx)
		if err != nil {
			fmt.Fprintf(os.Stderr, "mkbase: %v\n", err)
			os.Exit(1)
		}
		fmt.Println(dir)
	}
}
