// Package chroot runs a command in a root directory where no namespace can be made: as root of a container, with what the kernel
// gives to such a root.
//
// Start begins a command, Wait returns how it ended, once nothing is left of all that it has started. The walls are those that need
// no namespace: a chroot that the command cannot repeat, fewer capabilities than the builder has, a seccomp filter, no new
// privileges, and Landlock, which keeps signals and abstract sockets inside as well. A supervisor in this process answers for the
// devices that cannot be made there. A process between both, the keeper, ends all that the command has started.
//
// The package prepares nothing in the root and cleans nothing up, and knows nothing of mounts, images or builds.
package chroot

/*
#include "keeper.h"
*/
import "C"

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/first"
)

// Command is what to run. All of it is needed.
type Command struct {
	Root string // a directory
	Name string // of the machine
	Dir  string // on a file system with programs

	// Calls are what the process does to become the command. They go into Root, call Confine, put up a filter with the rules of
	// Asking, and send its listener.
	Calls []first.Call

	// Nodes says that the devices are in Root's /dev. Where they cannot be made, the supervisor answers for them.
	Nodes bool

	Stdout, Stderr *os.File
}

// Process is a command that has begun.
type Process struct {
	keeper     *exec.Cmd
	alive      *os.File // the keeper ends everything when this closes
	status     *os.File
	supervisor *supervisor
}

// Start begins the command. A nil error means that it is executing. The calling goroutine keeps its thread until Wait has returned,
// since the kernel takes the end of a thread for that of the process.
func Start(c Command) (_ *Process, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("chroot: %w", err)
		}
	}()
	rules, err := Ruleset(c.Root, allAccess, unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET|unix.LANDLOCK_SCOPE_SIGNAL)
	if err != nil {
		return nil, err
	}
	defer rules.Close()
	channel, err := first.Open(c.Dir, c.Calls, rules)
	if err != nil {
		return nil, err
	}
	defer channel.Close()
	read, alive, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer read.Close()
	status, write, err := os.Pipe()
	if err != nil {
		alive.Close()
		return nil, err
	}
	defer write.Close()
	p := &Process{alive: alive, status: status, keeper: &exec.Cmd{
		Path:        "/proc/self/exe",
		Args:        []string{"cooper-chroot"},
		Env:         []string{C.COOPER_CHROOT_ENV + "=1"},
		Dir:         "/",
		Stdout:      c.Stdout,
		Stderr:      c.Stderr,
		ExtraFiles:  append(channel.Files(), read, write),
		SysProcAttr: &syscall.SysProcAttr{Setsid: true}, // out of reach of who kills the builder's process group
	}}
	if err := p.keeper.Start(); err != nil {
		alive.Close()
		status.Close()
		return nil, err
	}
	channel.Started()
	if err := p.begin(c, channel); err != nil {
		return nil, errors.Join(err, p.end(), status.Close())
	}
	return p, nil
}

// begin gets the listener of the child's filter, and returns when the child has become the command.
func (p *Process) begin(c Command, channel *first.Channel) error {
	err := channel.Proceed(func(listener int) (err error) {
		p.supervisor, err = supervise(listener, c)
		return err
	})
	if err == nil && p.supervisor == nil {
		err = errors.New("the child ended before it began")
	}
	return err
}

// Pid is the process that is above all of the command's.
func (p *Process) Pid() int { return p.keeper.Process.Pid }

// Wait waits for the end of the command, or for that of done, and ends what is left of it. The status is that of the command, or
// that of SIGKILL if it had none.
func (p *Process) Wait(done <-chan struct{}) (syscall.WaitStatus, error) {
	told := make(chan syscall.WaitStatus, 1)
	go func() {
		status := syscall.WaitStatus(unix.SIGKILL)
		var b [4]byte
		if _, err := io.ReadFull(p.status, b[:]); err == nil {
			status = syscall.WaitStatus(binary.NativeEndian.Uint32(b[:]))
		}
		told <- status
	}()
	var status syscall.WaitStatus
	ended := false
	select {
	case status = <-told:
		ended = true
	case <-done:
	}
	err := p.end()
	if !ended {
		status = <-told // the keeper is gone, so this does not wait
	}
	p.status.Close()
	if err != nil {
		return status, fmt.Errorf("chroot: %w", err)
	}
	return status, nil
}

// end ends everything.
func (p *Process) end() error {
	err := errors.Join(p.alive.Close(), p.keeper.Wait())
	if p.supervisor != nil {
		err = errors.Join(err, p.supervisor.close())
	}
	return err
}
