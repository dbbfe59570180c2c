package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A command is a program to measure, with all that its environment is to hold.
type command struct {
	args []string
	env  []string
	dir  string
}

// A figure is what one run of a program took, with everything it started.
type figure struct {
	Wall, CPU time.Duration
	PeakRSS   int64 // bytes, of the largest single process
}

// stragglers is how long a process may outlive the program that started it.
const stragglers = 10 * time.Second

// measure runs a command to its end under a process of its own, which waits for every descendant, so that what a program leaves to its
// orphans is counted too. Output goes to the file log.
func measure(ctx context.Context, c command, log string) (figure, error) {
	self, err := os.Executable()
	if err != nil {
		return figure{}, err
	}
	result := log + ".figure"
	cmd := exec.CommandContext(ctx, self, append([]string{"measure", result, "--"}, c.args...)...)
	cmd.Dir, cmd.Env = c.dir, c.env
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	out, err := os.Create(log)
	if err != nil {
		return figure{}, err
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		return figure{}, errors.Join(fmt.Errorf("%s: %w%s", filepath.Base(c.args[0]), err, tail(log)), context.Cause(ctx))
	}
	b, err := os.ReadFile(result)
	if err != nil {
		return figure{}, err
	}
	var f figure
	return f, json.Unmarshal(b, &f)
}

// tail is the end of a log, for an error.
func tail(log string) string {
	b, _ := os.ReadFile(log)
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return "\n  " + strings.Join(lines[max(0, len(lines)-5):], "\n  ")
}

// measureChild is the process that measure starts: it runs a program, writes the figure to a file, and ends as the program did.
func measureChild(result string, args []string) (int, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return 0, err
	}
	program, err := exec.LookPath(args[0])
	if err != nil {
		return 0, err
	}
	start := time.Now()
	p, err := os.StartProcess(program, args, &os.ProcAttr{Env: os.Environ(), Files: []*os.File{nil, os.Stdout, os.Stderr}})
	if err != nil {
		return 0, err
	}
	stop := forwardTermination(p)
	defer stop()
	state, err := p.Wait()
	if err != nil {
		return 0, err
	}
	f := figure{Wall: time.Since(start)}
	if err := reapOrphans(); err != nil {
		return 0, err
	}
	var used unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_CHILDREN, &used); err != nil {
		return 0, err
	}
	f.CPU = time.Duration(used.Utime.Nano() + used.Stime.Nano())
	f.PeakRSS = used.Maxrss << 10
	b, err := json.Marshal(f)
	if err != nil {
		return 0, err
	}
	return state.ExitCode(), os.WriteFile(result, b, 0o644)
}

// forwardTermination kills a program when its measurement is called off.
func forwardTermination(p *os.Process) (stop func()) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM, os.Interrupt)
	go func() {
		for range c {
			p.Kill() //nolint:errcheck // it may have ended
		}
	}()
	return func() { signal.Stop(c); close(c) }
}

// reapOrphans waits for what the program left running, and kills what stays. Podman's pause process may stay: it holds a user namespace
// for the next podman, and has used no time worth counting.
func reapOrphans() error {
	var stayed []string
	for deadline := time.Now().Add(stragglers); ; time.Sleep(time.Millisecond) {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if err == nil && pid > 0 {
			continue
		}
		if err != nil && err != unix.EINTR && err != unix.ECHILD {
			return err
		}
		left, err := orphans(os.Getpid())
		if err != nil {
			return err
		}
		if len(left) == 0 {
			break
		}
		if time.Now().Before(deadline) {
			continue
		}
		for _, p := range left {
			if !slices.Contains(stayed, p.name) { // once: killed, it may still have to end
				stayed = append(stayed, p.name)
			}
			if err := unix.Kill(p.pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
				return err
			}
		}
	}
	if len(stayed) > 0 {
		return fmt.Errorf("still running after the program had ended, and killed: %s", strings.Join(stayed, ", "))
	}
	return nil
}

// orphans are the children of a process that are not a pause process.
func orphans(parent int) ([]process, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(p process) bool {
		return p.parent != parent || p.name == "podman" || p.name == "podman pause" || p.name == "catatonit"
	}), nil
}
