// Package notify answers for the processes below a seccomp filter: the calls that the filter asks about come here, and wait
// (seccomp_unotify(2)).
package notify

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Call is a system call that waits for its answer.
type Call struct {
	ID     uint64
	PID    uint32 // of the thread
	Number int32
	Args   [6]uint64
}

// Answer is what a process gets: an error, a value, an open file, or what the kernel says.
type Answer struct {
	Pass  bool // the kernel makes the call
	Errno unix.Errno
	Value int64
	File  *os.File // closed when it was sent
	Flags uint32   // of its descriptor there
}

// Pass lets the kernel answer.
var Pass = Answer{Pass: true}

// Refuse answers with the error that err is or wraps, or lets the kernel find one.
func Refuse(err error) Answer {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return Answer{Errno: errno}
	}
	return Pass
}

// Listener is where the calls of one filter come.
type Listener struct {
	fd   int
	stop int // an eventfd that ends Serve
}

// Listen takes over the descriptor that the filter's process got.
func Listen(fd int) (*Listener, error) {
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("eventfd", err)
	}
	// Linux 6.6: the process that waits is woken on the processor that answered. Before, answers are a bit slower.
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_SET_FLAGS, unix.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
	return &Listener{fd, stop}, nil
}

// Stop makes Serve return. What is asked afterwards fails with ENOSYS, once the listener is closed.
func (l *Listener) Stop() error {
	one := [8]byte{1}
	_, err := unix.Write(l.stop, one[:])
	return os.NewSyscallError("write", err)
}

// Close comes after Serve has returned and Stop was called.
func (l *Listener) Close() error {
	return errors.Join(os.NewSyscallError("close", unix.Close(l.fd)), os.NewSyscallError("close", unix.Close(l.stop)))
}

// Serve answers until the last process is gone or Stop is called.
func (l *Listener) Serve(answer func(*Call) Answer) error {
	for {
		ready := []unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}, {Fd: int32(l.stop), Events: unix.POLLIN}}
		if _, err := unix.Poll(ready, -1); err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return os.NewSyscallError("poll", err)
		}
		if ready[1].Revents != 0 || ready[0].Revents&unix.POLLIN == 0 {
			return nil // Stop, or POLLHUP
		}
		var n notification
		if err := l.control(unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n)); err != nil {
			if errors.Is(err, unix.ENOENT) { // it died while it asked
				continue
			}
			return os.NewSyscallError("receive", err)
		}
		a := answer(&Call{n.id, n.pid, n.call, n.args})
		if err := l.reply(n.id, a); err != nil && !errors.Is(err, unix.ENOENT) {
			return os.NewSyscallError("send", err)
		}
	}
}

// Valid reports whether the process still waits. Then what was read from it was its own, not that of another process
// which got its number.
func (l *Listener) Valid(c *Call) bool {
	id := c.ID
	return l.control(unix.SECCOMP_IOCTL_NOTIF_ID_VALID, unsafe.Pointer(&id)) == nil
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

func (l *Listener) reply(id uint64, a Answer) error {
	if a.File != nil {
		defer a.File.Close()
		add := added{id: id, flags: unix.SECCOMP_ADDFD_FLAG_SEND, source: uint32(a.File.Fd()), newFlags: a.Flags}
		err := l.control(addfd, unsafe.Pointer(&add))
		if err == nil || errors.Is(err, unix.ENOENT) {
			return err
		}
		a = Refuse(err) // it may have no room for one more
	}
	r := response{id: id, value: a.Value, error: -int32(a.Errno)}
	if a.Pass {
		r.flags = unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE
	}
	return l.control(unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r))
}

// control talks to the kernel about notifications. A signal to this program, and its own scheduler sends many, must
// not become an answer.
func (l *Listener) control(request uintptr, argument unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(l.fd), request, uintptr(argument))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return errno
	}
}
