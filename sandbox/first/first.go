// Package first starts the first process of a sandbox.
//
// The builder writes down all the system calls that the process makes on its way to the command, and a program of a page (program.c) makes
// them. So what a sandbox is stands in one place, in Go, in the order in which it happens; and what starts for each command is as small
// as a process can be.
package first

/*
#include "program.h"
*/
import "C"

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

func init() {
	// Ties main's goroutine to the first thread, which the Go runtime promises only to those who ask before main begins: goroutines
	// enter namespaces on threads that they then give up. The first thread of a process cannot be given up, so /proc/self would show,
	// and keep alive, such a namespace for good.
	runtime.LockOSThread()
}

// Pause are the calls at which the process waits, from Ready to Proceed.
func Pause() []Call {
	return []Call{
		{What: "tell the builder", Number: unix.SYS_WRITE, Args: []Arg{Int(C.CONTROL), Bytes{0}, Int(1)}, Least: 1},
		{What: "wait for the builder", Number: unix.SYS_READ, Args: []Arg{Int(C.CONTROL), Bytes{0}, Int(1)}, Least: 1},
	}
}

// Send sends a descriptor that a call returned to Proceed's caller.
func Send(what string, r *Result) Call {
	return Call{What: what, Number: unix.SYS_SENDMSG, Args: []Arg{Int(C.CONTROL), Descriptor{r}, Int(0)}, Least: 1}
}

// Channel is how the builder and the process talk until the command is executed.
type Channel struct {
	calls   []Call
	control *os.File
	theirs  []*os.File // and ours until Started
	given   []*os.File
}

// Open writes calls down, for a process that is given some descriptors. The caller starts it with Files, of which the second is the program
// to execute, and closes the channel in the end. dir is a directory on a file system with programs.
func Open(dir string, calls []Call, given ...*os.File) (_ *Channel, err error) {
	text, err := write(calls, len(given))
	if err != nil {
		return nil, err
	}
	c := &Channel{calls: calls}
	defer func() {
		if err != nil {
			c.Started()
		}
	}()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	c.control = os.NewFile(uintptr(fds[0]), "control")
	c.theirs = append(c.theirs, os.NewFile(uintptr(fds[1]), "control"))
	file, err := program(dir)
	if err != nil {
		return nil, errors.Join(err, c.control.Close())
	}
	c.theirs = append(c.theirs, file)
	// Linux 6.3 to 6.5 want to be told that it is not to be executed, where that is forbidden (vm.memfd_noexec=2).
	fd, err := unix.MemfdCreate("calls", unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate("calls", unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, errors.Join(os.NewSyscallError("memfd_create", err), c.control.Close())
	}
	list := os.NewFile(uintptr(fd), "calls")
	c.theirs = append(c.theirs, list)
	if _, err := list.Write(text); err != nil {
		return nil, errors.Join(err, c.control.Close())
	}
	c.given = given
	return c, nil
}

// Files are the first of the process's ExtraFiles.
func (c *Channel) Files() []*os.File { return slices.Concat(c.theirs, c.given) }

// Started is called once the process has them.
func (c *Channel) Started() {
	for _, f := range c.theirs {
		f.Close()
	}
	c.theirs = nil
}

// Close lets the process go, if it is still waiting for us: it ends then.
func (c *Channel) Close() error {
	c.Started()
	return c.control.Close()
}

// ErrNothingExecuted is that of a process whose last calls all failed with an error that was tolerated.
var ErrNothingExecuted = errors.New("none of the programs could be executed")

// CallError says which call of the process failed.
type CallError struct {
	What  string
	Errno unix.Errno
}

func (e *CallError) Error() string { return e.What + ": " + e.Errno.Error() }
func (e *CallError) Unwrap() error { return e.Errno }

// Ready returns when the process has come to its Pause. The error is a *CallError if a call failed; the process has ended then.
func (c *Channel) Ready() error {
	_, executed, err := c.receive()
	if executed {
		return errors.New("the first process ended before it was ready")
	}
	return err
}

// Proceed lets the process go on and returns when it has executed its command, or has been killed. What the process sends
// meanwhile goes to sent. The error is a *CallError if a call failed; the process has ended then.
func (c *Channel) Proceed(sent func(fd int) error) error {
	err := unix.Send(int(c.control.Fd()), []byte{0}, unix.MSG_NOSIGNAL)
	if err != nil && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) { // then it says why it is gone
		return os.NewSyscallError("send", err)
	}
	for {
		fd, executed, err := c.receive()
		if executed || err != nil {
			return err
		}
		if fd < 0 { // which the kernel does where there is no room for one more
			return errors.New("the descriptor that the first process sent was lost; is the limit of open files reached?")
		}
		if err := sent(fd); err != nil {
			return err
		}
	}
}

// receive returns a descriptor, or -1 if the process sent none. The socket closes when the command is executed.
func (c *Channel) receive() (fd int, executed bool, err error) {
	message, rights := make([]byte, 8), make([]byte, unix.CmsgSpace(4))
	for {
		n, nRights, _, _, err := unix.Recvmsg(int(c.control.Fd()), message, rights, unix.MSG_CMSG_CLOEXEC)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ECONNRESET): // which comes once, before what was sent earlier
			continue
		case err != nil:
			return -1, false, os.NewSyscallError("recvmsg", err)
		case nRights > 0:
			fd, err := parseRights(rights[:nRights])
			return fd, false, err
		case n == len(message):
			return -1, false, c.failure(binary.NativeEndian.Uint32(message), binary.NativeEndian.Uint32(message[4:]))
		}
		return -1, n == 0, nil
	}
}

func parseRights(b []byte) (int, error) {
	messages, err := unix.ParseSocketControlMessage(b)
	if err != nil {
		return -1, err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return -1, err
	}
	return fds[0], nil
}

func (c *Channel) failure(index, errno uint32) error {
	before := int32(C.BEFORE)
	if index == uint32(before) {
		return errors.New("the first process could not close what is open (close_range); a seccomp profile of a container may forbid it")
	}
	if int(index) >= len(c.calls) {
		return ErrNothingExecuted
	}
	return &CallError{c.calls[index].What, unix.Errno(errno)}
}

// Command is the process that Start starts.
type Command struct {
	Calls          []Call
	Given          []*os.File             // descriptors for the calls
	Dir            string                 // on a file system with programs
	Namespaces     uintptr                // CLONE_NEW* flags of those that it begins in
	Users, Groups  []syscall.SysProcIDMap // of its user namespace, if that is one of them
	SetGroups      bool                   // setgroups(2) is allowed in it
	Stdout, Stderr *os.File
}

// Process is a first process.
type Process struct {
	*Channel
	*os.Process
}

// Start starts the process. It makes its calls up to the Pause meanwhile. Its standard input is empty.
func Start(c Command) (*Process, error) {
	channel, err := Open(c.Dir, c.Calls, c.Given...)
	if err != nil {
		return nil, fmt.Errorf("first process: %w", err)
	}
	cmd := &exec.Cmd{
		Path:       "/proc/self/fd/" + strconv.Itoa(C.PROGRAM_FILE),
		Args:       []string{"cooper-first"},
		Env:        []string{}, // nobody reads it, and nil is ours
		Dir:        "/",
		Stdout:     c.Stdout,
		Stderr:     c.Stderr,
		ExtraFiles: channel.Files(),
		SysProcAttr: &syscall.SysProcAttr{
			Setsid: true, Cloneflags: c.Namespaces,
			UidMappings: c.Users, GidMappings: c.Groups, GidMappingsEnableSetgroups: c.SetGroups,
		},
	}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("first process: %w", err), channel.Close())
	}
	channel.Started()
	return &Process{channel, cmd.Process}, nil
}
