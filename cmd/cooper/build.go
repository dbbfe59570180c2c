package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cooper-build/cooper/builder"
	"github.com/cooper-build/cooper/sandbox/userns"
)

// build answers from the cache where it can; otherwise it does the work inside a user namespace, by running
// this program again there.
func build(c *cobra.Command, f buildFlags, contextArg string) error {
	files := reports{iidFile: f.iidFile, metadataFile: f.metadataFile}
	if err := files.clear(); err != nil {
		return err
	}
	if err := refuse(c); err != nil {
		return err
	}
	question, err := parseCall(f.call)
	if err != nil {
		return err
	}
	if question != nil && files != (reports{}) {
		return usageError{errors.New("--call and --check build nothing that --iidfile or --metadata-file could tell of: leave those out")}
	}
	look, err := parseDisplay(f.progress, f.quiet, os.Getenv("BUILDKIT_PROGRESS"))
	if err != nil {
		return err
	}
	src, err := parseSource(contextArg, f.file)
	if err != nil {
		return err
	}
	_, inside := userns.Inside()
	req, out, err := f.request(c, src, inside)
	if !inside && errors.Is(err, errReadOnce) {
		return f.enter(c.Context(), nil)
	}
	if err != nil {
		return err
	}
	req.CachedOnly = !inside
	stdin, err := readStandardInput(src, &req)
	if err != nil {
		return err
	}
	req.NoImage = !out.carryImage() && !req.Push && !look.printsID && files.iidFile == ""
	j := job{req: req, out: out, files: files, look: look, c: c}
	switch {
	case !inside && stdin != nil && stdin.isOnce:
		err = builder.ErrNotCached // and what is sent is left to the process that will store it
	case question != nil:
		err = question.ask(c.Context(), req, c.OutOrStdout())
	default:
		err = j.run(c.Context())
	}
	if errors.Is(err, builder.ErrNotCached) {
		return f.enter(c.Context(), stdin)
	}
	return err
}

func readStandardInput(src source, req *builder.Request) (*input, error) {
	if src.stdin == stdinUnused {
		return nil, nil
	}
	from, err := standardInput()
	if err != nil {
		return nil, err
	}
	return readInput(from, src, req)
}

// enter runs this program again inside a user namespace, with standard input as it was.
func (f *buildFlags) enter(ctx context.Context, stdin *input) error {
	kind, err := f.kind()
	if err != nil {
		return err
	}
	if err := stdin.handOver(); err != nil {
		return err
	}
	code, err := userns.Enter(ctx, os.Args, os.Environ(), userns.Options{Only: kind})
	if err != nil {
		return err
	}
	if code != 0 {
		return exitCode(code)
	}
	return nil
}

// A job is a build and how it is shown.
type job struct {
	req   builder.Request
	out   outputs
	files reports
	look  display
	c     *cobra.Command
}

// run builds, and tells people and files how it ended. After ErrNotCached it has told nobody anything.
func (j job) run(ctx context.Context) error {
	if err := j.out.prepare(os.Stdout); err != nil {
		return err
	}
	screen, err := newScreen(ctx, os.Stderr, j.look.mode, j.req.CachedOnly)
	if err != nil {
		return err
	}
	j.req.Events = screen.show
	result, err := builder.Build(ctx, j.req)
	if errors.Is(err, builder.ErrNotCached) {
		return errors.Join(err, screen.discard())
	}
	if closeErr := screen.close(); err == nil {
		err = closeErr
	}
	if !screen.raw {
		screen.printExplained(j.c.ErrOrStderr())
	}
	if j.look.talks() {
		screen.printWarnings(j.c.ErrOrStderr())
	}
	if err != nil {
		err = screen.explain(err, j.look.mode == "quiet")
		return errors.Join(err, j.files.failed(err, screen.failed.name, screen.forMetadata()))
	}
	about := screen.forMetadata()
	if j.req.VerifyCache {
		about["cooper.verifyCache"] = verifications(result.Verified)
		if j.look.mode != "rawjson" {
			printVerified(j.c.ErrOrStderr(), result.Verified)
		}
	}
	if err := j.files.succeeded(result, j.req.Names, j.out.carryImage() || j.req.Push, about); err != nil {
		return err
	}
	j.tell(result)
	return differing(result.Verified)
}

// tell prints what was built.
func (j job) tell(r *builder.Result) {
	switch {
	case j.look.printsID && j.out.usesStdout():
		fmt.Fprintln(j.c.ErrOrStderr(), imageID(r)) // standard output is the image
	case j.look.printsID:
		fmt.Fprintln(j.c.OutOrStdout(), imageID(r))
	case j.look.talks():
		printFindings(j.c.ErrOrStderr(), r.Findings)
		if r.Image.Digest != "" {
			fmt.Fprintf(j.c.ErrOrStderr(), "image %s%s\n", r.Image.Digest, named(j.req.Names))
		}
	}
}

func named(names []string) string {
	if len(names) == 0 {
		return ""
	}
	return " " + strings.Join(names, " ")
}

// A display is what --progress and --quiet ask for.
type display struct {
	mode     string // of BuildKit's display
	printsID bool
}

// talks says whether people read standard error.
func (d display) talks() bool { return d.mode != "quiet" && d.mode != "rawjson" }

// parseDisplay is as in buildx: quiet prints the image's id in the end, none does not, and the environment is for those
// who do not choose.
func parseDisplay(progress string, quiet bool, env string) (display, error) {
	switch progress {
	case "quiet":
		quiet = true
	case "none":
		progress = "quiet"
	case "":
		progress = "auto"
	}
	if quiet {
		if progress != "auto" && progress != "quiet" {
			return display{}, usageError{fmt.Errorf("--progress=%s and --quiet cannot be used together", progress)}
		}
		return display{"quiet", true}, nil
	}
	if progress == "auto" && env != "" {
		progress = env
		if env == "none" {
			progress = "quiet"
		}
	}
	return display{mode: progress}, nil
}

// wantsWarnings says whether the environment asks for warnings in the metadata file.
func wantsWarnings() bool {
	on, err := strconv.ParseBool(os.Getenv("BUILDX_METADATA_WARNINGS"))
	return err == nil && on
}
