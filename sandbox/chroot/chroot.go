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
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"
)

// Command is what to run. All of it is needed.
type Command struct {
	Root string // a directory
	Args []string
	Env  []string
	Dir  string // inside Root; made if missing
	Name string // of the machine

	UID, GID uint32
	Groups   []uint32

	Capabilities []string // fewer than the caller has
	Filter       *configs.Seccomp
	Limits       []configs.Rlimit
	OOMScore     int
	Processors   unix.CPUSet // none is those of the caller

	// Nodes says that the devices are in Root's /dev. Where they cannot be made, the supervisor answers for them.
	Nodes bool

	Stdout, Stderr *os.File `json:"-"`
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
	calls := append(opening(), call{"uname", unix.SYS_UNAME, naming(c.Name)})
	if !c.Nodes {
		calls = append(calls, looking()...)
	}
	c.Filter = supervised(c.Filter, calls)
	for _, f := range []*os.File{c.Stdout, c.Stderr} { // or only root could open it by its name
		if err := f.Chown(int(c.UID), -1); err != nil {
			return nil, err
		}
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "control"), os.NewFile(uintptr(fds[1]), "control")
	defer ours.Close()
	defer theirs.Close()
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
		ExtraFiles:  []*os.File{theirs, read, write},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true}, // out of reach of who kills the builder's process group
	}}
	if err := p.keeper.Start(); err != nil {
		alive.Close()
		status.Close()
		return nil, err
	}
	theirs.Close()
	if err := p.begin(c, calls, ours); err != nil {
		return nil, errors.Join(err, p.end())
	}
	return p, nil
}

// begin tells the child what to become, gets the listener of its filter, and returns when it has become it.
func (p *Process) begin(c Command, calls []call, control *os.File) error {
	if err := json.NewEncoder(control).Encode(c); err != nil {
		return fmt.Errorf("the child is gone: %w", err)
	}
	listener, text, err := receive(control)
	if err != nil {
		return err
	}
	if listener >= 0 {
		if p.supervisor, err = supervise(listener, c.Root, c.Nodes, calls); err != nil {
			return err
		}
	}
	rest, err := io.ReadAll(control) // ends when the command is executed
	if err != nil {
		return err
	}
	if text += string(rest); text != "" {
		return errors.New(text)
	}
	if p.supervisor == nil {
		return errors.New("the child ended before it began")
	}
	return nil
}

// receive waits for what the child says first: its filter's listener, or an error's text.
func receive(control *os.File) (listener int, text string, err error) {
	data, rights := make([]byte, 64<<10), make([]byte, 64)
	var n, nRights int
	for {
		n, nRights, _, _, err = unix.Recvmsg(int(control.Fd()), data, rights, unix.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return -1, "", os.NewSyscallError("recvmsg", err)
	}
	if nRights == 0 {
		return -1, string(data[:n]), nil
	}
	messages, err := unix.ParseSocketControlMessage(rights[:nRights])
	if err != nil {
		return -1, "", err
	}
	got, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return -1, "", err
	}
	return got[0], "", nil
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
