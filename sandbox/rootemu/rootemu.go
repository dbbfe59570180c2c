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
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/notify"
)

// Supervisor answers for the processes below one filter.
type Supervisor struct {
	listener *notify.Listener
	handlers map[int32]handler
	ended    chan struct{}
	failed   func(error)

	// The rest belongs to the goroutine of run.
	first   creds // of the first process
	ids     table
	begun   bool // the first process has its mark
	root    int  // the root directory of every process that never called chroot, -1 until there is a process
	rootDev uint64
	pending []pending
	execs   map[int]execution
	buffer  [4096]byte
}

// Start begins to answer what comes to a filter's listener, which is closed in the end. uid, gid and groups are those of the first process.
// failed is told, on another goroutine, when the supervisor cannot go on: then the processes wait for answers and are to be killed.
func Start(listener int, uid, gid uint32, groups []uint32, failed func(error)) (*Supervisor, error) {
	l, err := notify.Listen(listener)
	if err != nil {
		return nil, fmt.Errorf("emulate root: %w", err)
	}
	s := &Supervisor{listener: l, failed: failed, ended: make(chan struct{}), handlers: map[int32]handler{}, first: newCreds(uid, gid, groups), root: -1, execs: map[int]execution{}}
	for _, c := range calls() {
		s.handlers[int32(c.number)] = c.handle
	}
	go s.run()
	return s, nil
}

// Close ends the supervisor. When no process is left that it answers for, every file has its owner afterwards.
func (s *Supervisor) Close() error {
	if s == nil {
		return nil
	}
	if err := s.listener.Stop(); err != nil {
		return fmt.Errorf("emulate root: %w", err) // and leave the goroutine what it uses
	}
	<-s.ended
	return s.listener.Close()
}

func (s *Supervisor) run() {
	defer close(s.ended)
	err := s.listener.Serve(s.answer)
	s.settle(0)
	for _, p := range s.pending {
		unix.Close(p.dir)
	}
	if s.root >= 0 {
		unix.Close(s.root)
	}
	if err != nil {
		s.failed(fmt.Errorf("emulate root: %w", err))
	}
}

// A request is one system call of a process.
type request struct {
	*notify.Call
	pid int
	who creds
}

type handler func(*Supervisor, *request) notify.Answer

func (s *Supervisor) answer(n *notify.Call) notify.Answer {
	handle, ok := s.handlers[n.Number]
	if !ok {
		return notify.Pass
	}
	r := &request{Call: n, pid: int(n.PID)}
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
func (s *Supervisor) begin(r *request) notify.Answer {
	if s.begun || r.Number != unix.SYS_EXECVE { // once begun, it found a way to lose the mark, and fools itself
		return notify.Pass
	}
	root, err := unix.Open("/proc/"+strconv.Itoa(r.pid)+"/root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return notify.Refuse(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		unix.Close(root)
		return notify.Refuse(err)
	}
	if s.root >= 0 {
		unix.Close(s.root)
	}
	s.root, s.rootDev = root, uint64(st.Dev)
	r.who = s.first
	if errno := s.become(r, s.first); errno != 0 {
		return notify.Refuse(errno) // without it the command would run as somebody else; a signal makes it try again
	}
	s.begun = true
	return execve(s, r)
}
