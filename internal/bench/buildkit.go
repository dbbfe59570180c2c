package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

//go:embed oneshot.sh
var oneShot string

// A buildkitStore is the root directory of a rootless BuildKit: with a daemon that runs all the time, or one for each build.
type buildkitStore struct {
	programs
	dir    string
	server *exec.Cmd
}

func openOneShot(_ context.Context, p programs, dir string) (store, error) {
	s := &buildkitStore{programs: p, dir: dir}
	return s, s.configure()
}

func openBuildKit(ctx context.Context, p programs, dir string) (store, error) {
	s := &buildkitStore{programs: p, dir: dir}
	if err := s.configure(); err != nil {
		return nil, err
	}
	log, err := os.Create(s.dir + "/daemon.log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	args := s.serverArgs()
	s.server = exec.CommandContext(ctx, args[0], args[1:]...)
	s.server.Env = s.env()
	s.server.Stdout, s.server.Stderr = log, log
	s.server.Cancel = func() error { return s.server.Process.Signal(syscall.SIGTERM) }
	if err := s.server.Start(); err != nil {
		return nil, err
	}
	return s, s.answers(ctx)
}

func (s *buildkitStore) configure() error {
	config := fmt.Sprintf("[registry.%q]\n  http = true\n", s.registry)
	return os.WriteFile(s.dir+"/buildkitd.toml", []byte(config), 0o644)
}

func (s *buildkitStore) address() string { return "unix://" + s.dir + "/sock" }

func (s *buildkitStore) env() []string {
	return environment(s.dir, "PATH="+s.buildkit+":"+os.Getenv("PATH"))
}

func (s *buildkitStore) serverArgs() []string {
	return []string{filepath.Join(s.buildkit, "rootlesskit"), "--net=host", "--copy-up=/etc", "--copy-up=/run",
		filepath.Join(s.buildkit, "buildkitd"), "--rootless", "--oci-worker-snapshotter=overlayfs", "--oci-worker-gc=false",
		"--config", s.dir + "/buildkitd.toml", "--root", s.dir + "/root", "--addr", s.address()}
}

func (s *buildkitStore) answers(ctx context.Context) error {
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		ask := exec.CommandContext(ctx, filepath.Join(s.buildkit, "buildctl"), "--addr", s.address(), "debug", "workers")
		if ask.Run() == nil {
			return nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("BuildKit does not answer:%s", tail(s.dir+"/daemon.log"))
		}
	}
}

func (s *buildkitStore) build(b build) command {
	args := []string{filepath.Join(s.buildkit, "buildctl"), "--addr", s.address(), "build", "--progress=plain", "--frontend", "dockerfile.v0",
		"--local", "context=" + b.context, "--local", "dockerfile=" + b.context, "--opt", "force-network-mode=none"}
	for _, a := range b.args {
		args = append(args, "--opt", "build-arg:"+a)
	}
	if b.layout != "" {
		level := map[string]string{"gzip": "6", "zstd": "3"}[b.codec]
		args = append(args, "--output", "type=oci,dest="+b.layout+",compression="+b.codec+",compression-level="+level)
	}
	if s.server == nil {
		// The shell gets the daemon's command as words up to "--", and the client's after it.
		args = append(append(append([]string{"sh", "-c", oneShot, "oneshot"}, s.serverArgs()...), "--"), args...)
	}
	return command{args: args, env: s.env()}
}

func (s *buildkitStore) daemon() int {
	if s.server == nil {
		return 0
	}
	return s.server.Process.Pid
}

func (s *buildkitStore) close() error {
	if s.server != nil {
		if err := s.server.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
		if err := s.server.Wait(); err != nil && !strings.Contains(err.Error(), "signal") && s.server.ProcessState == nil {
			return err
		}
	}
	return remove(s.dir)
}
