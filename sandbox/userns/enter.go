package userns

/*
#include "enter.h"
*/
import "C"

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// grace is how long a cancelled child may tidy up before it is killed.
const grace = 10 * time.Second

// Enter runs this same program with args (args[0] is its name) and env inside
// a new user and mount namespace, as root of it - or, for the kind Chroot, beside
// this one - and waits. Standard input,
// output and error are shared. SIGINT, SIGTERM, SIGHUP and SIGQUIT are passed
// on; the end of ctx is passed on as SIGTERM, ten seconds later as SIGKILL; and
// the child does not survive this process.
//
// A nil error means that the child ran; exitCode is its status, 128+n if
// signal n ended it.
func Enter(ctx context.Context, args, env []string, o Options) (exitCode int, err error) {
	f, err := gather()
	if err != nil {
		return 0, err
	}
	m, err := decide(f, o)
	if err != nil {
		return 0, err
	}
	if m.Kind == Chroot { // as in the child: what runs there has our user id
		if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
			return 0, os.NewSyscallError("prctl", err)
		}
	}
	// The kernel sends a parent-death signal when the *thread* that started
	// the child ends, so this goroutine keeps its thread until the child is gone.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	// Before there is a child, so that no signal finds it without its parent.
	signals := make(chan os.Signal, 8)
	for _, s := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT} {
		if !signal.Ignored(s) { // nohup and the like; the child inherits that
			signal.Notify(signals, s)
		}
	}
	defer signal.Stop(signals)

	child, err := start(m, f, args, env)
	var refused *helperError
	if errors.As(err, &refused) && o.Only == Many {
		return 0, unavailable(Many, refused.Error(), "an administrator can look at what /etc/subuid and /etc/subgid give to this user")
	}
	if errors.As(err, &refused) {
		m = single(f, refused.Error())
		child, err = start(m, f, args, env)
	}
	if err != nil {
		return 0, err
	}
	return attend(ctx, child, signals)
}

// helperError: newuidmap or newgidmap was run and refused.
type helperError struct {
	helper string
	output string
	err    error
}

func (e *helperError) Error() string {
	return fmt.Sprintf("%s refused the map: %s (%v)", e.helper, e.output, e.err)
}

func (e *helperError) Unwrap() error { return e.err }

// start returns once the child is in its namespaces, mapped and running.
func start(m Map, f facts, args, env []string) (_ *exec.Cmd, err error) {
	description, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("enter user namespace: %w", err)
	}
	control, theirs := os.NewFile(uintptr(fds[0]), "control"), os.NewFile(uintptr(fds[1]), "control")
	defer control.Close()
	defer theirs.Close()

	variable := C.COOPER_USERNS_ENV
	if m.Kind == Chroot {
		variable = C.COOPER_NO_USERNS_ENV
	}
	child := &exec.Cmd{
		Path:       "/proc/self/exe",
		Args:       args,
		Env:        append(env[:len(env):len(env)], variable+"="+string(description)),
		Stdin:      os.Stdin,
		Stdout:     os.Stdout,
		Stderr:     os.Stderr,
		ExtraFiles: []*os.File{theirs},
	}
	if err := child.Start(); err != nil {
		return nil, fmt.Errorf("enter user namespace: start self: %w", err)
	}
	theirs.Close()
	defer func() {
		if err != nil {
			child.Process.Kill()
			child.Wait()
		}
	}()

	if m.Kind != Chroot {
		if err := guide(control, child.Process.Pid, m, f); err != nil {
			return nil, err
		}
	}
	if err := awaitStep(control, C.STEP_DEATH, f); err != nil {
		return nil, err
	}
	return child, release(control)
}

// guide brings the child into its namespaces.
func guide(control *os.File, pid int, m Map, f facts) error {
	if err := awaitStep(control, C.STEP_UNSHARE, f); err != nil {
		return err
	}
	if err := writeMaps(pid, m, f); err != nil {
		return err
	}
	if err := release(control); err != nil {
		return err
	}
	for _, step := range []int{C.STEP_IDS, C.STEP_PRIVATE} {
		if err := awaitStep(control, step, f); err != nil {
			return err
		}
	}
	return nil
}

func release(control *os.File) error {
	if _, err := control.Write([]byte{1}); err != nil {
		return fmt.Errorf("enter user namespace: child is gone: %w", err)
	}
	return nil
}

// awaitStep reads how the child's next step ended.
func awaitStep(control *os.File, want int, f facts) error {
	var message [8]byte
	if _, err := io.ReadFull(control, message[:]); err != nil {
		return fmt.Errorf("enter user namespace: child ended before step %d: %w", want, err)
	}
	step := int(int32(binary.NativeEndian.Uint32(message[:4])))
	errno := syscall.Errno(binary.NativeEndian.Uint32(message[4:]))
	if step != want {
		return fmt.Errorf("enter user namespace: child is at step %d, not %d", step, want)
	}
	if errno == 0 {
		return nil
	}
	return refusal(step, errno, f)
}

const filterAdvice = "give the container a seccomp profile that allows it: seccompProfile: {type: Unconfined}, or type: Localhost with docs/seccomp.json of cooper, which a restricted pod may have; docs/kubernetes.md has whole pods"

// refusal explains what the kernel refused although the facts allowed it.
func refusal(step int, errno syscall.Errno, f facts) error {
	e := &Error{Err: errno}
	switch step {
	case C.STEP_UNSHARE:
		e.Problem = "the kernel or a security policy refused a new one"
		switch {
		case errno == syscall.ENOSPC:
			e.Advice = "the limit of nested or of all user namespaces is reached; see user.max_user_namespaces"
		case errno == syscall.EPERM && f.Filtered:
			e.Problem = "the seccomp filter of this container, or the kernel, refused a new one"
			e.Advice = filterAdvice
		case f.UID == 0 || errno != syscall.EPERM:
			e.Advice = "inside a container, its seccomp profile must allow unshare"
		default:
			e.Advice = "inside a container, its seccomp profile must allow unshare; in a chroot user namespaces are impossible"
		}
	case C.STEP_IDS:
		e.Problem = "become root of it"
		e.Advice = "a security module may deny privileges inside user namespaces"
	case C.STEP_PRIVATE:
		e.Problem = "make its mounts private"
		e.Advice = "a security module (AppArmor, or the seccomp profile of a container) must allow mount inside user namespaces"
	default:
		e.Problem = fmt.Sprintf("step %d", step)
	}
	return e
}

func writeMaps(pid int, m Map, f facts) error {
	if m.Kind == Many {
		groups := make(chan error, 1)
		go func() { groups <- runHelper(f.Newgidmap.Path, pid, m.GIDs) }()
		err := runHelper(f.Newuidmap.Path, pid, m.UIDs)
		if groupsErr := <-groups; groupsErr != nil {
			return groupsErr
		}
		return err
	}
	proc := "/proc/" + strconv.Itoa(pid)
	if m.Kind == Single {
		// Without privilege outside, the kernel wants this promise first: or
		// dropping a group could open what a negative ACL keeps shut.
		if err := writeProc(proc+"/setgroups", "deny"); err != nil {
			return err
		}
	}
	if err := writeProc(proc+"/gid_map", formatMap(m.GIDs)); err != nil {
		return err
	}
	return writeProc(proc+"/uid_map", formatMap(m.UIDs))
}

func writeProc(path, content string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(content)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return &Error{
			Problem: "write its id map",
			Advice:  "root without the capabilities SETUID, SETGID and SETFCAP cannot map its ids, and a security module may forbid it",
			Err:     err,
		}
	}
	return nil
}

func runHelper(path string, pid int, ranges []Range) error {
	var output bytes.Buffer
	helper := &exec.Cmd{
		Path:   path,
		Args:   append([]string{path, strconv.Itoa(pid)}, strings.Fields(formatMap(ranges))...),
		Env:    []string{},
		Stdout: &output,
		Stderr: &output,
	}
	if err := helper.Run(); err != nil {
		return &helperError{helper: path, output: strings.TrimSpace(output.String()), err: err}
	}
	return nil
}

// attend passes signals on until the child ends.
func attend(ctx context.Context, child *exec.Cmd, signals <-chan os.Signal) (int, error) {
	ended := make(chan struct{})
	forwarderEnded := make(chan struct{})
	go func() {
		defer close(forwarderEnded)
		forward(ctx, child.Process, signals, ended)
	}()
	err := child.Wait()
	close(ended)
	<-forwarderEnded

	status, ok := child.ProcessState.Sys().(syscall.WaitStatus)
	if !ok {
		return 0, fmt.Errorf("wait for child in user namespace: %w", err)
	}
	if status.Signaled() {
		return 128 + int(status.Signal()), nil
	}
	return status.ExitStatus(), nil
}

func forward(ctx context.Context, child *os.Process, signals <-chan os.Signal, ended <-chan struct{}) {
	cancelled := ctx.Done()
	var kill <-chan time.Time
	for {
		select {
		case <-ended:
			return
		case <-kill:
			child.Kill()
		case <-cancelled:
			child.Signal(syscall.SIGTERM)
			cancelled, kill = nil, time.After(grace)
		case s := <-signals:
			if !fromTerminal(s) {
				child.Signal(s)
			}
		}
	}
}

// fromTerminal reports whether the terminal has sent the signal to the child
// as well, as it does to its whole foreground process group: passed on, one
// Ctrl-C would count as two, and two mean "stop at once".
func fromTerminal(s os.Signal) bool {
	if s != syscall.SIGINT && s != syscall.SIGQUIT {
		return false
	}
	tty, err := os.OpenFile("/dev/tty", os.O_RDONLY|syscall.O_NOCTTY, 0)
	if err != nil {
		return false
	}
	defer tty.Close()
	foreground, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && foreground == unix.Getpgrp()
}
