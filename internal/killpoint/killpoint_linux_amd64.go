// Package killpoint runs a program and ends it, or lets a call fail, at its n-th call that changes a file system.
//
// It traces the program's system calls with ptrace, so the code under test has no seams and pays nothing. It is for tests.
package killpoint

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Fault is what happens at the chosen call.
type Fault struct {
	At    int           // the call, counted from 1; 0: none
	Errno syscall.Errno // what the call fails with, undone; 0: SIGKILL before it is done
}

// A Call is one that changes a file system, or syncs it.
type Call struct {
	Name string
	Path string // what the call is about: the file of its descriptor, or its last path
}

// A Result is how the program ended.
type Result struct {
	Calls  []Call
	Hit    bool // the fault happened
	Exit   int  // its exit code, -1 when it was killed
	Output string
}

// A Program is what is run.
type Program struct {
	Path   string
	Args   []string // without the program's name
	Env    []string
	Dir    string // writes to files below it count; other calls always do
	Mounts bool   // in a mount namespace of its own
}

// Run runs a program. Its output goes to the result.
func Run(p Program, fault Fault) (Result, error) {
	runtime.LockOSThread() // all of ptrace must come from the thread that started the program
	defer runtime.UnlockOSThread()
	out, err := os.CreateTemp("", "killpoint-")
	if err != nil {
		return Result{}, err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return Result{}, err
	}
	defer null.Close()
	sys := &syscall.SysProcAttr{Ptrace: true}
	if p.Mounts {
		sys.Unshareflags = syscall.CLONE_NEWNS
	}
	pid, err := syscall.ForkExec(p.Path, append([]string{p.Path}, p.Args...), &syscall.ProcAttr{
		Env: p.Env, Files: []uintptr{null.Fd(), out.Fd(), out.Fd()}, Sys: sys,
	})
	if err != nil {
		return Result{}, fmt.Errorf("start %s: %w", p.Path, err)
	}
	t := tracer{dir: p.Dir, pid: pid, fault: fault, failing: map[int]bool{}}
	if err := t.attend(); err != nil {
		_ = unix.Kill(pid, unix.SIGKILL)
		return Result{}, fmt.Errorf("trace %s: %w", p.Path, err)
	}
	text, err := os.ReadFile(out.Name())
	t.result.Output = string(text)
	return t.result, err
}

type tracer struct {
	dir     string
	pid     int
	fault   Fault
	failing map[int]bool // threads whose present call shall fail
	result  Result
}

func (t *tracer) attend() error {
	var status unix.WaitStatus
	if _, err := wait(t.pid, &status); err != nil {
		return err
	}
	options := unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_EXITKILL
	if err := unix.PtraceSetOptions(t.pid, options); err != nil {
		return err
	}
	if err := unix.PtraceSyscall(t.pid, 0); err != nil {
		return err
	}
	for {
		tid, err := wait(-1, &status)
		if errors.Is(err, unix.ECHILD) {
			return nil
		}
		if err != nil {
			return err
		}
		if status.Exited() || status.Signaled() {
			if tid == t.pid {
				t.result.Exit = status.ExitStatus() // -1 for a signal
			}
			continue
		}
		var signal int
		switch {
		case status.StopSignal() == unix.SIGTRAP|0x80:
			t.stop(tid)
		case status.StopSignal() != unix.SIGTRAP && status.StopSignal() != unix.SIGSTOP:
			signal = int(status.StopSignal())
		}
		if err := unix.PtraceSyscall(tid, signal); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
}

// wait waits for what this thread started or traces, and for nothing else of this process.
func wait(pid int, status *unix.WaitStatus) (int, error) {
	for {
		tid, err := unix.Wait4(pid, status, unix.WALL|unix.WNOTHREAD, nil)
		if err != unix.EINTR {
			return tid, err
		}
	}
}

// syscallInfo is struct ptrace_syscall_info.
type syscallInfo struct {
	op    uint8
	_     [3]uint8
	arch  uint32
	ip    uint64
	sp    uint64
	nr    uint64
	args  [6]uint64
	spare [2]uint64
}

func (t *tracer) stop(tid int) {
	var info syscallInfo
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(tid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno != 0 {
		return // it died
	}
	var regs unix.PtraceRegs
	if info.op != unix.PTRACE_SYSCALL_INFO_ENTRY {
		if t.failing[tid] && unix.PtraceGetRegs(tid, &regs) == nil {
			delete(t.failing, tid)
			regs.Rax = -uint64(t.fault.Errno)
			_ = unix.PtraceSetRegs(tid, &regs)
		}
		return
	}
	call, changes := t.describe(tid, &info)
	if !changes {
		return
	}
	t.result.Calls = append(t.result.Calls, call)
	if len(t.result.Calls) != t.fault.At {
		return
	}
	t.result.Hit = true
	if t.fault.Errno == 0 {
		_ = unix.Kill(t.pid, unix.SIGKILL)
		return
	}
	if unix.PtraceGetRegs(tid, &regs) == nil {
		regs.Orig_rax = ^uint64(0) // no call
		if unix.PtraceSetRegs(tid, &regs) == nil {
			t.failing[tid] = true
		}
	}
}

// kinds are the calls that count, with the argument that says what they are about: a descriptor, or a path.
func kinds() map[uint64]struct {
	name string
	fd   int
	path int
} {
	type kind = struct {
		name     string
		fd, path int
	}
	return map[uint64]kind{
		unix.SYS_WRITE: {"write", 0, -1}, unix.SYS_PWRITE64: {"write", 0, -1}, unix.SYS_WRITEV: {"write", 0, -1},
		unix.SYS_COPY_FILE_RANGE: {"write", 2, -1}, unix.SYS_SENDFILE: {"write", 0, -1}, unix.SYS_FTRUNCATE: {"truncate", 0, -1},
		unix.SYS_FSYNC: {"fsync", 0, -1}, unix.SYS_FDATASYNC: {"fsync", 0, -1}, unix.SYS_SYNCFS: {"syncfs", 0, -1},
		unix.SYS_FCHMOD: {"chmod", 0, -1}, unix.SYS_FCHOWN: {"chown", 0, -1}, unix.SYS_FSETXATTR: {"setxattr", 0, -1},
		unix.SYS_RENAME: {"rename", -1, 1}, unix.SYS_RENAMEAT: {"rename", -1, 3}, unix.SYS_RENAMEAT2: {"rename", -1, 3},
		unix.SYS_UNLINK: {"unlink", -1, 0}, unix.SYS_RMDIR: {"unlink", -1, 0}, unix.SYS_UNLINKAT: {"unlink", -1, 1},
		unix.SYS_MKDIR: {"mkdir", -1, 0}, unix.SYS_MKDIRAT: {"mkdir", -1, 1}, unix.SYS_MKNODAT: {"mknod", -1, 1},
		unix.SYS_LINKAT: {"link", -1, 3}, unix.SYS_SYMLINKAT: {"symlink", -1, 2},
		unix.SYS_CHMOD: {"chmod", -1, 0}, unix.SYS_FCHMODAT: {"chmod", -1, 1}, unix.SYS_FCHMODAT2: {"chmod", -1, 1},
		unix.SYS_LCHOWN: {"chown", -1, 0}, unix.SYS_FCHOWNAT: {"chown", -1, 1}, unix.SYS_UTIMENSAT: {"utimes", -1, 1},
		unix.SYS_SETXATTR: {"setxattr", -1, 0}, unix.SYS_LSETXATTR: {"setxattr", -1, 0},
		unix.SYS_MOUNT: {"mount", -1, 1}, unix.SYS_MOVE_MOUNT: {"mount", -1, 3}, unix.SYS_UMOUNT2: {"umount", -1, 0},
	}
}

func (t *tracer) describe(tid int, info *syscallInfo) (Call, bool) {
	if info.nr == unix.SYS_OPENAT {
		if info.args[2]&unix.O_CREAT == 0 {
			return Call{}, false
		}
		return Call{"create", t.text(tid, info.args[1])}, true
	}
	k, ok := kinds()[info.nr]
	if !ok {
		return Call{}, false
	}
	if k.path >= 0 {
		return Call{k.name, t.text(tid, info.args[k.path])}, true
	}
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", tid, info.args[k.fd]))
	// The runtime writes to descriptors of its own, and the program to its output.
	return Call{k.name, path}, err == nil && (path == t.dir || strings.HasPrefix(path, filepath.Clean(t.dir)+"/"))
}

// text reads a string of the program.
func (t *tracer) text(tid int, at uint64) string {
	var buf [4096]byte
	n, err := unix.PtracePeekData(tid, uintptr(at), buf[:256])
	if err != nil {
		return ""
	}
	text, _, _ := strings.Cut(string(buf[:n]), "\x00")
	return text
}
