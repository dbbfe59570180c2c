package sandbox

/*
#include "guard.h"
*/
import "C"

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// guard is a process that kills a command when this process has died. The
// kernel's death signal does so, too, but not once the command has changed its
// ids or asked to be left alone.
type guard struct {
	process *exec.Cmd
	alive   *os.File // the guard sees it closed when we are gone
}

// startGuard begins to guard the first process of a pid namespace, which has
// not executed its command yet.
func startGuard(pid int) (_ *guard, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("guard: %w", err)
		}
	}()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	command := os.NewFile(uintptr(fd), "pidfd")
	defer command.Close()
	read, alive, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer read.Close()
	g := &guard{alive: alive, process: &exec.Cmd{
		Path:        "/proc/self/exe",
		Args:        []string{"cooper-guard"},
		Env:         []string{C.COOPER_GUARD_ENV + "=1"},
		Dir:         "/",
		ExtraFiles:  []*os.File{read, command},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true}, // out of reach of who kills the builder's process group
	}}
	if err := g.process.Start(); err != nil {
		alive.Close()
		return nil, err
	}
	return g, nil
}

// end waits for the guard, which goes with the command.
func (g *guard) end() error {
	if g == nil {
		return nil
	}
	err := errors.Join(g.alive.Close(), g.process.Wait())
	if err != nil {
		return fmt.Errorf("sandbox: guard: %w", err)
	}
	return nil
}
