// Package rootemu makes a process that is root with one id only believe that it has them all.
//
// A Supervisor answers the system calls that a seccomp filter sends it (Calls): it keeps the user and groups that a
// process believes to have, records the owners of files as package owner does, and shows them to whoever asks. Start
// comes before the process changes its ids, Close after the last one inside is gone.
//
// It is never a wall. Every process inside has the same one id for the kernel, with the same rights. The supervisor
// grants nothing: where a call is the kernel's to decide it goes on to the kernel, which judges the process itself. It
// does refuse what another user could not do, so that programs that try and then adapt do so, but who races it or
// asks the kernel in another way is not stopped. What a process can bring about is wrong owners in its own tree.
//
// Paths are resolved as the process would, from descriptors of its own root and working directory, never through a
// magic link. When that fails, for /proc, and after any error of its own, the supervisor lets the call go on.
//
// The package knows nothing of images, layers or containers.
package rootemu

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Supervisor answers for the processes below one filter.
type Supervisor struct {
	stop   int // an eventfd that ends serve
	ended  chan struct{}
	failed func(error)

	// The rest belongs to the goroutine of serve.
	listener int
	first    creds // of the first process
	ids      table
	begun    bool // the first process has its mark
	root     int  // the root directory of every process that never called chroot, -1 until there is a process
	rootDev  uint64
	pending  []pending
	execs    map[int]execution
	buffer   [4096]byte
}

// Start begins to answer what comes to a filter's listener, which is closed in the end. uid, gid and groups are those of the first process.
// failed is told, on another goroutine, when the supervisor cannot go on: then every call that it should answer fails with ENOSYS, and
// the processes should be killed.
func Start(listener int, uid, gid uint32, groups []uint32, failed func(error)) (*Supervisor, error) {
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		unix.Close(listener)
		return nil, fmt.Errorf("emulate root: %w", os.NewSyscallError("eventfd", err))
	}
	// Linux 6.6: the process that waits is woken on the processor that answered. Before, answers are a bit slower.
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(listener), unix.SECCOMP_IOCTL_NOTIF_SET_FLAGS, unix.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
	s := &Supervisor{stop: stop, listener: listener, failed: failed, ended: make(chan struct{}), first: newCreds(uid, gid, groups), root: -1, execs: map[int]execution{}}
	go s.run()
	return s, nil
}

// Close ends the supervisor. When no process is left that it answers for, every file has its owner afterwards.
func (s *Supervisor) Close() error {
	if s == nil {
		return nil
	}
	one := [8]byte{1}
	if _, err := unix.Write(s.stop, one[:]); err != nil {
		return fmt.Errorf("emulate root: %w", err) // and leave the goroutine what it uses
	}
	<-s.ended
	return os.NewSyscallError("close", unix.Close(s.stop))
}

func (s *Supervisor) run() {
	defer close(s.ended)
	err := s.serve()
	s.settle(0)
	s.release()
	if err != nil {
		s.failed(fmt.Errorf("emulate root: %w", err))
	}
}

func (s *Supervisor) release() {
	for _, p := range s.pending {
		unix.Close(p.dir)
	}
	if s.root >= 0 {
		unix.Close(s.root)
	}
	unix.Close(s.listener)
}

// notification is struct seccomp_notif.
type notification struct {
	id      uint64
	pid     uint32
	flags   uint32
	call    int32
	arch    uint32
	pointer uint64
	args    [6]uint64
}

// response is struct seccomp_notif_resp.
type response struct {
	id    uint64
	value int64
	error int32
	flags uint32
}

// serve answers until the last process is gone or Close is called.
func (s *Supervisor) serve() error {
	handlers := map[int32]handler{}
	for _, c := range calls() {
		handlers[int32(c.number)] = c.handle
	}
	for {
		ready := []unix.PollFd{{Fd: int32(s.listener), Events: unix.POLLIN}, {Fd: int32(s.stop), Events: unix.POLLIN}}
		if _, err := unix.Poll(ready, -1); err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return os.NewSyscallError("poll", err)
		}
		if ready[0].Revents&unix.POLLIN == 0 {
			return nil // POLLHUP, or Close
		}
		var n notification
		if err := control(s.listener, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n)); err != nil {
			if errors.Is(err, unix.ENOENT) { // it died while it asked
				continue
			}
			return os.NewSyscallError("receive", err)
		}
		a := pass
		if handle, ok := handlers[n.call]; ok {
			a = s.answer(&n, handle)
		}
		reply := response{id: n.id, value: a.value, error: -int32(a.errno)}
		if a.pass {
			reply = response{id: n.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
		}
		if err := control(s.listener, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&reply)); err != nil && !errors.Is(err, unix.ENOENT) {
			return os.NewSyscallError("send", err)
		}
	}
}

// A request is one system call of a process.
type request struct {
	*notification
	pid int
	who creds
}

// An answer is what the process gets: a value, an error, or, with pass, what the kernel says.
type answer struct {
	value int64
	errno unix.Errno
	pass  bool
}

type handler func(*Supervisor, *request) answer

var pass = answer{pass: true}

func refuse(errno unix.Errno) answer { return answer{errno: errno} }

// failure passes on the kernel's answer to what was done in a process's stead.
func failure(err error) answer {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return refuse(errno)
	}
	return pass
}

func (s *Supervisor) answer(n *notification, handle handler) answer {
	r := &request{notification: n, pid: int(n.pid)}
	index, marked := readMark(r.pid)
	if !marked {
		return s.begin(r)
	}
	r.who = s.ids.get(index, s.first)
	s.finishExec(r)
	s.settle(r.pid)
	return handle(s, r)
}

// begin answers for what has no mark: the process that installed the filter, until it executes the command. Then it
// gets the mark that all its children inherit.
func (s *Supervisor) begin(r *request) answer {
	if s.begun || r.call != unix.SYS_EXECVE { // once begun, it found a way to lose the mark, and fools itself
		return pass
	}
	root, err := unix.Open("/proc/"+strconv.Itoa(r.pid)+"/root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return failure(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		unix.Close(root)
		return failure(err)
	}
	if s.root >= 0 {
		unix.Close(s.root)
	}
	s.root, s.rootDev = root, uint64(st.Dev)
	r.who = s.first
	if errno := s.become(r, s.first); errno != 0 {
		return refuse(errno) // without it the command would run as somebody else; a signal makes it try again
	}
	s.begun = true
	return execve(s, r)
}

// valid reports whether the process still waits. Then what was read from it was its own, not that of another process
// which got its number.
func (s *Supervisor) valid(r *request) bool {
	id := r.id
	return control(s.listener, unix.SECCOMP_IOCTL_NOTIF_ID_VALID, unsafe.Pointer(&id)) == nil
}

// control talks to the kernel about notifications. A signal to this program, and its own scheduler sends many, must
// not become an answer.
func control(fd int, request uintptr, argument unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(argument))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return errno
	}
}
