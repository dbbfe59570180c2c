package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cooper-build/cooper/builder/plan"
)

// A source is where the context and the Dockerfile come from, as the command line has it.
type source struct {
	context string // a directory or a URL; empty if it is on standard input
	file    string // empty: not given, or on standard input
	stdin   stdinUse
}

// stdinUse says what standard input is.
type stdinUse int

const (
	stdinUnused stdinUse = iota
	stdinDockerfile
	stdinContext // or a Dockerfile without a context
)

// parseSource reads the argument of build and --file.
func parseSource(context, file string) (source, error) {
	s := source{context: context, file: file}
	fail := func(err error, hint string) (source, error) { return source{}, usageError{hinted{err, hint}} }
	if strings.HasPrefix(file, "http://") || strings.HasPrefix(file, "https://") {
		return fail(fmt.Errorf("--file %s: a Dockerfile on a server is not supported", file),
			"make it the context: cooper build URL; or read it from standard input: curl URL | cooper build -f - PATH")
	}
	if file == "-" {
		s.file, s.stdin = "", stdinDockerfile
	}
	switch {
	case context == "":
		return fail(errors.New("the context is empty"), `name one, such as "." for this directory`)
	case context == "-" && file == "-":
		return fail(errors.New("standard input cannot be both the context and the Dockerfile"), "put the Dockerfile into the archive, and name it with -f")
	case context == "-":
		s.context, s.stdin = "", stdinContext
		return s, nil
	}
	info, err := os.Stat(context)
	switch {
	case err == nil && info.IsDir():
		return s, nil
	case plan.IsRemote(context):
		return s, nil
	case err == nil:
		return fail(fmt.Errorf("context %s is not a directory", context), "an archive is sent as standard input: cooper build - < "+context)
	}
	return fail(fmt.Errorf("context: %w", err), "a directory, a git or http(s) URL, or - for standard input is expected")
}

// dir is the context if it is a directory of this machine, else empty.
func (s source) dir() string {
	if info, err := os.Stat(s.context); err == nil && info.IsDir() {
		return s.context
	}
	return ""
}
