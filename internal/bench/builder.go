package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// A builder is a program that builds images, in one way of using it.
type builder struct {
	name string
	how  string // for the page: how it is called
	open func(ctx context.Context, p programs, dir string) (store, error)
	// steps reads from what the builder printed how many RUN and COPY there were, and how many of them were not cached.
	steps func(log string) (steps, ran int)
}

// A store is what one builder keeps, in a directory of its own, and the daemon that serves it where there is one.
type store interface {
	build(b build) command
	daemon() int // process id, or 0
	close() error
}

// A build is one call of a builder.
type build struct {
	context string
	args    []string // NAME=VALUE
	stages  bool     // has stages that can run at the same time
	layout  string   // file to write the image to as an OCI layout, or none
	codec   string   // of the layers in the layout
}

// programs say where the builders are.
type programs struct {
	cooper   string
	buildkit string // directory with buildkitd, buildctl, rootlesskit and runc
	registry string // host:port of the registry
}

// progressSteps counts the steps of a Dockerfile that change files, and those of them that were run, in the plain progress of BuildKit's
// progressui, which cooper prints too.
func progressSteps(log string) (steps, ran int) {
	step := regexp.MustCompile(`^(#\d+) \[[^\]]*\d+/\d+\] (?:RUN|COPY) `)
	cached := regexp.MustCompile(`^(#\d+) CACHED`)
	seen, known := map[string]bool{}, map[string]bool{}
	for line := range strings.Lines(log) {
		if m := step.FindStringSubmatch(line); m != nil {
			seen[m[1]] = true
		}
		if m := cached.FindStringSubmatch(line); m != nil && seen[m[1]] {
			known[m[1]] = true
		}
	}
	return len(seen), len(seen) - len(known)
}

func builders() []builder {
	return []builder{
		{name: "cooper", open: openCooper("--policy", "none", "-o", "type=cacheonly"), steps: progressSteps,
			how: "`cooper build --policy none -o type=cacheonly`: nothing is made but what stays in the store, as with BuildKit"},
		{name: "cooper, stored", open: openCooper(), steps: progressSteps,
			how: "`cooper build`: the default policy is evaluated and an image is stored, with layers compressed by gzip"},
		{name: "BuildKit", open: openBuildKit, steps: progressSteps,
			how: "`buildctl build` without an exporter, against a rootless buildkitd that has been running since before the measurement"},
		{name: "BuildKit, one-shot", open: openOneShot, steps: progressSteps,
			how: "rootlesskit, buildkitd and buildctl started and stopped for each build, as buildctl-daemonless.sh does"},
		{name: "Buildah", open: openBuildah("buildah"), steps: buildahSteps,
			how: "`buildah build --layers`; an image is stored, with layers not compressed"},
		{name: "Podman", open: openBuildah("podman"), steps: buildahSteps,
			how: "`podman build --layers`; an image is stored, with layers not compressed"},
	}
}

// environment is what every builder is started with, plus its own.
func environment(home string, own ...string) []string {
	return append([]string{"HOME=" + home, "XDG_RUNTIME_DIR=" + home, "PATH=" + os.Getenv("PATH"), "LANG=C.UTF-8", "TZ=UTC"}, own...)
}

// remove deletes a directory with files of subordinate ids in it.
func remove(dir string) error {
	out, err := exec.Command("unshare", "--map-root-user", "--map-auto", "rm", "-rf", "--one-file-system", dir).CombinedOutput()
	if err != nil {
		return fmt.Errorf("remove %s: %w: %s", dir, err, out)
	}
	return nil
}

type cooperStore struct {
	program, dir string
	flags        []string
}

func openCooper(flags ...string) func(context.Context, programs, string) (store, error) {
	return func(_ context.Context, p programs, dir string) (store, error) {
		return cooperStore{p.cooper, dir, flags}, nil
	}
}

func (s cooperStore) build(b build) command {
	args := []string{s.program, "--root", filepath.Join(s.dir, "store"), "build", "--progress", "plain", "--network", "none", "--keep-storage", "none"}
	if b.layout != "" {
		args = append(args, "--policy", "none", "-o", "type=oci,dest="+b.layout+",compression="+b.codec)
	} else {
		args = append(args, s.flags...)
	}
	for _, a := range b.args {
		args = append(args, "--build-arg", a)
	}
	return command{args: append(args, b.context), env: environment(s.dir)}
}

func (cooperStore) daemon() int { return 0 }

func (s cooperStore) close() error { return remove(s.dir) }
