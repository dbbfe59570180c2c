package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
)

// A buildahStore is the storage of Buildah, or of Podman, which builds with the same library.
type buildahStore struct {
	program, dir string
}

// buildahSteps counts as progressSteps does. Buildah prints a line for each step, and one after it when the step was cached; lines of
// stages that run at the same time are told apart by what they begin with.
func buildahSteps(log string) (steps, ran int) {
	line := regexp.MustCompile(`^(\[\d+/\d+\] )?(?:STEP \d+/\d+: (\w+)|(--> Using cache ))`)
	last := map[string]string{}
	for text := range strings.Lines(log) {
		m := line.FindStringSubmatch(text)
		if m == nil {
			continue
		}
		if m[3] == "" {
			last[m[1]] = m[2]
		}
		changes := last[m[1]] == "RUN" || last[m[1]] == "COPY"
		switch {
		case changes && m[3] == "":
			steps, ran = steps+1, ran+1
		case changes:
			ran--
		}
	}
	return steps, ran
}

// openBuildah lets a program have its storage, settings and temporary files in dir. The driver is overlay in the kernel, without
// fuse-overlayfs; isolation is chroot, the fastest that they have: it starts no runtime.
func openBuildah(program string) func(context.Context, programs, string) (store, error) {
	return func(_ context.Context, p programs, dir string) (store, error) {
		settings := filepath.Join(dir, ".config/containers")
		if err := os.MkdirAll(settings, 0o755); err != nil {
			return nil, err
		}
		files := map[string]string{
			"storage.conf":    fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = %q\nrunroot = %q\n", dir+"/graph", dir+"/run"),
			"registries.conf": fmt.Sprintf("[[registry]]\nlocation = %q\ninsecure = true\n", p.registry),
			"policy.json":     `{"default": [{"type": "insecureAcceptAnything"}]}`,
		}
		for name, text := range files {
			if err := os.WriteFile(filepath.Join(settings, name), []byte(text), 0o644); err != nil {
				return nil, err
			}
		}
		return buildahStore{program, dir}, nil
	}
}

func (s buildahStore) build(b build) command {
	// chroot isolation can have no network of its own.
	args := []string{s.program, "build", "--layers", "--isolation", "chroot", "--network", "host"}
	if b.stages {
		args = append(args, "--jobs", "4")
	}
	for _, a := range b.args {
		args = append(args, "--build-arg", a)
	}
	args = append(args, "--file", b.context+"/Dockerfile")
	if b.layout != "" {
		id := s.dir + "/id"
		push := `"$@" && exec "$0" push --compression-format ` + b.codec + ` "$(cat ` + id + `)" oci-archive:` + b.layout
		args = append([]string{"sh", "-c", push, s.program}, append(args, "--iidfile", id)...)
	}
	return command{args: append(args, b.context), env: environment(s.dir, "TMPDIR="+s.dir)}
}

func (buildahStore) daemon() int { return 0 }

// close ends Podman's pause process first: it outlives every podman.
func (s buildahStore) close() error {
	if b, err := os.ReadFile(filepath.Join(s.dir, "libpod/tmp/pause.pid")); err == nil {
		if pid, err := strconv.Atoi(string(bytes.TrimSpace(b))); err == nil {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
				return fmt.Errorf("stop the pause process of %s: %w", s.program, err)
			}
		}
	}
	return remove(s.dir)
}
