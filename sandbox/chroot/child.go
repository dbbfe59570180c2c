package chroot

/*
#include "keeper.h"
*/
import "C"

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"github.com/opencontainers/runc/libcontainer/seccomp"
	"golang.org/x/sys/unix"
)

// init becomes a command, if this process was started for that. Like package first it does so before main begins, because this
// package is initialised before those that take longer.
func init() {
	if C.cooper_chroot_child() != 0 {
		become()
		os.Exit(255)
	}
}

// controlFD is where the builder is, in the order of Start's ExtraFiles.
const controlFD = 3

// become becomes the command. If it returns, that failed and the builder was told.
func become() {
	// What follows changes this thread alone, and it is the one that the command gets.
	runtime.LockOSThread()
	control := os.NewFile(controlFD, "control")
	var c Command
	err := json.NewDecoder(control).Decode(&c)
	if err == nil {
		err = c.become()
	}
	fmt.Fprint(control, err)
}

// become goes through the walls in the order in which each can still be put up. It returns only with an error.
func (c *Command) become() error {
	for _, l := range c.Limits {
		if err := unix.Setrlimit(l.Type, &unix.Rlimit{Cur: l.Soft, Max: l.Hard}); err != nil {
			return fmt.Errorf("limit %d: %w", l.Type, err)
		}
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(c.OOMScore)), 0); err != nil {
		return err
	}
	if c.Processors.Count() > 0 {
		if err := unix.SchedSetaffinity(0, &c.Processors); err != nil {
			return os.NewSyscallError("sched_setaffinity", err)
		}
	}
	// A keyring without a name, which golang.org/x/sys cannot ask for.
	if _, _, errno := unix.Syscall(unix.SYS_KEYCTL, unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0); errno != 0 && errno != unix.EPERM && errno != unix.ENOSYS {
		return os.NewSyscallError("keyctl", errno) // where it is refused, the command can do nothing with a keyring either
	}
	if err := c.enter(); err != nil {
		return err
	}
	program, err := c.program()
	if err != nil {
		return err
	}
	if err := c.restrict(); err != nil {
		return err
	}
	if err := unix.Exec(program, c.Args, c.Env); err != nil {
		return fmt.Errorf("exec %s: %w", program, err)
	}
	return nil
}

// enter goes into the root and to the working directory. Nothing that is open leads out afterwards.
func (c *Command) enter() error {
	if err := unix.CloseRange(controlFD, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return os.NewSyscallError("close_range", err)
	}
	if err := unix.Chdir(c.Root); err != nil {
		return &os.PathError{Op: "chdir", Path: c.Root, Err: err}
	}
	if err := unix.Chroot("."); err != nil {
		return os.NewSyscallError("chroot", err)
	}
	unix.Umask(0)
	err := os.MkdirAll(c.Dir, 0o755)
	unix.Umask(0o022)
	if err != nil {
		return err
	}
	return os.Chdir(c.Dir)
}

// program finds the command on the path that it is given.
func (c *Command) program() (string, error) {
	name := c.Args[0]
	if strings.Contains(name, "/") {
		return name, nil
	}
	for _, dir := range filepath.SplitList(c.path()) {
		file := filepath.Join(dir, name)
		if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", &fs.PathError{Op: "exec", Path: name, Err: errors.New("executable file not found in $PATH")}
}

func (c *Command) path() string {
	path := ""
	for _, e := range c.Env {
		if value, ok := strings.CutPrefix(e, "PATH="); ok {
			path = value
		}
	}
	return path
}

// restrict gives up what the command is not to have.
func (c *Command) restrict() error {
	keep, err := parseCapabilities(c.Capabilities)
	if err != nil {
		return err
	}
	if err := keep.bound(); err != nil {
		return err
	}
	if err := c.changeIDs(); err != nil {
		return err
	}
	if err := keep.set(); err != nil {
		return err
	}
	// Changing ids has cleared it.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	if err := confine(); err != nil {
		return err
	}
	listener, err := seccomp.InitSeccomp(c.Filter)
	if err != nil {
		return fmt.Errorf("seccomp: %w", err)
	}
	if listener < 0 {
		return errors.New("seccomp: the filter has no listener")
	}
	defer unix.Close(listener)
	if err := unix.Sendmsg(controlFD, []byte{0}, unix.UnixRights(listener), nil, 0); err != nil {
		return os.NewSyscallError("sendmsg", err)
	}
	unix.CloseOnExec(listener)
	return nil
}

// changeIDs is for this thread: Go's own functions would ask all threads to do the same.
func (c *Command) changeIDs() error {
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	var groups unsafe.Pointer
	if len(c.Groups) > 0 {
		groups = unsafe.Pointer(&c.Groups[0])
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(c.Groups)), uintptr(groups), 0); errno != 0 {
		return os.NewSyscallError("setgroups", errno)
	}
	gid, uid := uintptr(c.GID), uintptr(c.UID)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, gid, gid, gid); errno != 0 {
		return os.NewSyscallError("setresgid", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid); errno != 0 {
		return os.NewSyscallError("setresuid", errno)
	}
	return nil
}
