package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/cooper-build/cooper/builder/policy"
)

// contextPolicy is the name of a policy that comes with a build context.
const contextPolicy = "cooper-policy.yaml"

// maxPolicyFile is more than a policy may have, and all that is read of one.
const maxPolicyFile = 1<<20 + 1

// loadPolicy takes a profile's name, a file, or the context's own policy. contextDir is empty for a context that is no
// directory of this machine: what a stranger's server sends does not choose how it is judged.
func loadPolicy(name, contextDir string) (*policy.Policy, error) {
	switch name {
	case "none", "default", "strict":
		return policy.Profile(name)
	case "":
		if contextDir == "" {
			return policy.Profile("default")
		}
		text, err := readContextPolicy(contextDir)
		if errors.Is(err, os.ErrNotExist) {
			return policy.Profile("default")
		}
		if err != nil {
			return nil, usageError{fmt.Errorf("policy of the context: %w", err)}
		}
		return policy.Parse(text, contextPolicy)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, usageError{fmt.Errorf("--policy: %w", err)}
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxPolicyFile))
	if err != nil {
		return nil, usageError{fmt.Errorf("--policy: %w", err)}
	}
	return policy.Parse(text, name)
}

// readContextPolicy reads a file that whoever wrote the context made: a link may not lead out of it, and a pipe,
// on which an ordinary open would wait forever, is refused. A link to nothing is an error, not a missing policy.
func readContextPolicy(dir string) ([]byte, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if _, err := root.Lstat(contextPolicy); err != nil {
		return nil, err
	}
	f, err := root.OpenFile(contextPolicy, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s is a link to a file that is not there", contextPolicy)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", contextPolicy)
	}
	return io.ReadAll(io.LimitReader(f, maxPolicyFile))
}
