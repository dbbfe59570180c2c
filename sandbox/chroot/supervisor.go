package chroot

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/filter"
)

// Asking returns rules that ask a supervisor about some calls. nodes says that there are devices in the root.
func Asking(rules []filter.Rule, nodes bool) []filter.Rule {
	asked := handlers("", nodes)
	rules = slices.DeleteFunc(rules, func(r filter.Rule) bool {
		return r.Action == filter.Allow && slices.ContainsFunc(asked, func(c call) bool { return c.name == r.Name })
	})
	for _, c := range asked {
		rules = append(rules, filter.Rule{Name: c.name, Action: filter.Ask})
	}
	return rules
}

// handlers are the calls that the supervisor answers. name is that of the machine.
func handlers(name string, nodes bool) []call {
	calls := append(opening(), call{"uname", unix.SYS_UNAME, naming(name)})
	if !nodes {
		calls = append(calls, looking()...)
	}
	return calls
}

// call is a system call that the supervisor answers.
type call struct {
	name   string
	number uintptr
	answer func(*supervisor, *notification) answer
}

// answer is what a process gets: an error, a value, an open file, or what the kernel says.
type answer struct {
	pass  bool
	errno unix.Errno
	file  *os.File // closed when it was sent
	flags uint32   // of the new descriptor
}

var pass = answer{pass: true}

func refuse(err error) answer {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return answer{errno: errno}
	}
	return pass
}

// supervisor answers for the processes below one filter.
type supervisor struct {
	listener int
	stop     int    // an eventfd that ends serve
	root     string // the command's root directory, as /proc names it
	nodes    bool   // there are devices in it
	handlers map[int32]func(*supervisor, *notification) answer
	ended    chan error
}

func supervise(listener int, c Command) (*supervisor, error) {
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		unix.Close(listener)
		return nil, os.NewSyscallError("eventfd", err)
	}
	s := &supervisor{listener: listener, stop: stop, root: c.Root, nodes: c.Nodes, ended: make(chan error, 1), handlers: map[int32]func(*supervisor, *notification) answer{}}
	for _, c := range handlers(c.Name, c.Nodes) {
		s.handlers[int32(c.number)] = c.answer
	}
	// Linux 6.6: the process that waits is woken on the processor that answered. Before, answers are a bit slower.
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(listener), unix.SECCOMP_IOCTL_NOTIF_SET_FLAGS, unix.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
	go func() {
		runtime.LockOSThread() // and never let go: whose files it opens is a matter of the thread
		err := s.serve()
		unix.Close(listener)
		s.ended <- err
	}()
	return s, nil
}

// close stops answering: what would be asked fails with ENOSYS from now on.
func (s *supervisor) close() error {
	one := [8]byte{1}
	if _, err := unix.Write(s.stop, one[:]); err != nil {
		return os.NewSyscallError("write", err)
	}
	err := <-s.ended
	unix.Close(s.stop)
	if err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	return nil
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

// added is struct seccomp_notif_addfd.
type added struct {
	id       uint64
	flags    uint32
	source   uint32
	number   uint32
	newFlags uint32
}

// addfd is SECCOMP_IOCTL_NOTIF_ADDFD, which golang.org/x/sys does not have.
const addfd = 1<<30 | unsafe.Sizeof(added{})<<16 | '!'<<8 | 3

// serve answers until the last process is gone or close is called.
func (s *supervisor) serve() error {
	for {
		ready := []unix.PollFd{{Fd: int32(s.stop), Events: unix.POLLIN}, {Fd: int32(s.listener), Events: unix.POLLIN}}
		if _, err := unix.Poll(ready, -1); err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return os.NewSyscallError("poll", err)
		}
		if ready[0].Revents != 0 || ready[1].Revents&unix.POLLIN == 0 {
			return nil // close, or POLLHUP
		}
		var n notification
		if err := control(s.listener, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n)); err != nil {
			if errors.Is(err, unix.ENOENT) { // it died while it asked
				continue
			}
			return os.NewSyscallError("receive", err)
		}
		a := pass
		if handle, ok := s.handlers[n.call]; ok {
			a = handle(s, &n)
		}
		if err := s.reply(n.id, a); err != nil && !errors.Is(err, unix.ENOENT) {
			return os.NewSyscallError("send", err)
		}
	}
}

func (s *supervisor) reply(id uint64, a answer) error {
	if a.file != nil {
		defer a.file.Close()
		add := added{id: id, flags: unix.SECCOMP_ADDFD_FLAG_SEND, source: uint32(a.file.Fd()), newFlags: a.flags}
		err := control(s.listener, addfd, unsafe.Pointer(&add))
		if err == nil || errors.Is(err, unix.ENOENT) {
			return err
		}
		a = refuse(err) // it may have no room for one more
	}
	r := response{id: id, error: -int32(a.errno)}
	if a.pass {
		r.flags = unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE
	}
	return control(s.listener, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r))
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
