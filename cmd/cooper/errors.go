package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"

	"github.com/cooper-build/cooper/builder"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/policy"
)

// Exit codes; README.md documents them.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitDenied      = 3 // policy refused the image
	exitUnverified  = 4 // a signature, digest or verdict did not verify
	exitDiffers     = 5 // --verify-cache found a result that is not the same when it is made again
	exitInterrupted = 130
)

// A usageError is a mistake in the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// An exitCode ends the program with the code of the process that did the work, which has said why already.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// An unverified error says that what was asked about is not as signed.
type unverified struct{ error }

func (e unverified) Unwrap() error { return e.error }

// A differs error says that a result in the store is not what its step gives.
type differs struct{ error }

func (e differs) Unwrap() error { return e.error }

// A hinted error says what to do next.
type hinted struct {
	error
	hint string
}

func (h hinted) Hint() string  { return h.hint }
func (h hinted) Unwrap() error { return h.error }

// A withOutput error comes with the last that the failed step printed.
type withOutput struct {
	error
	step failedStep
}

func (e withOutput) Unwrap() error { return e.error }

// print shows it as BuildKit's display does.
func (e withOutput) print(w io.Writer) {
	fmt.Fprintf(w, "------\n > %s:\n", e.step.name)
	for _, line := range e.step.lines {
		fmt.Fprintf(w, "%s\n", line)
	}
	fmt.Fprintln(w, "------")
}

// printFindings has no use for an error: a terminal that cannot be written to cannot be told so.
func printFindings(w io.Writer, findings []policy.Finding) {
	_ = policy.WriteText(w, findings)
}

// report prints an error for a person - what, where, why, what next - and returns the exit code.
func report(ctx context.Context, w io.Writer, err error) int {
	var code exitCode
	if errors.As(err, &code) {
		return int(code)
	}
	if err == nil {
		return exitOK
	}
	if ctx.Err() != nil {
		fmt.Fprintln(w, "cooper: interrupted")
		return exitInterrupted
	}
	var output withOutput
	if errors.As(err, &output) {
		output.print(w)
	}
	var located *plan.Error
	if errors.As(err, &located) {
		fmt.Fprint(w, located.Excerpt())
	}
	var denied *builder.DeniedError
	if errors.As(err, &denied) {
		printFindings(w, denied.Findings)
	}
	fmt.Fprintf(w, "cooper: %v\n", err)
	var hint interface{ Hint() string }
	if errors.As(err, &hint) && hint.Hint() != "" {
		fmt.Fprintf(w, "hint: %s\n", hint.Hint())
	} else if errors.Is(err, syscall.ENOSPC) {
		fmt.Fprintln(w, "hint: free some space, or keep the store on another file system (--root)")
	}
	var usage usageError
	var bad unverified
	var other differs
	switch {
	case denied != nil:
		return exitDenied
	case errors.As(err, &usage):
		fmt.Fprintln(w, "See 'cooper COMMAND --help'.")
		return exitUsage
	case errors.As(err, &other):
		return exitDiffers
	case errors.As(err, &bad):
		return exitUnverified
	}
	return exitFailed
}
