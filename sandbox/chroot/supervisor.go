package chroot

import (
	"errors"
	"fmt"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/filter"
	"github.com/cooper-build/cooper/sandbox/notify"
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
	answer func(*supervisor, *notify.Call) notify.Answer
}

// supervisor answers for the processes below one filter.
type supervisor struct {
	*notify.Listener
	root     string // the command's root directory, as /proc names it
	nodes    bool   // there are devices in it
	handlers map[int32]func(*supervisor, *notify.Call) notify.Answer
	ended    chan error
}

func supervise(listener int, c Command) (*supervisor, error) {
	l, err := notify.Listen(listener)
	if err != nil {
		return nil, err
	}
	s := &supervisor{Listener: l, root: c.Root, nodes: c.Nodes, ended: make(chan error, 1), handlers: map[int32]func(*supervisor, *notify.Call) notify.Answer{}}
	for _, c := range handlers(c.Name, c.Nodes) {
		s.handlers[int32(c.number)] = c.answer
	}
	go func() {
		runtime.LockOSThread() // and never let go: whose files it opens is a matter of the thread
		s.ended <- s.Serve(s.answer)
	}()
	return s, nil
}

func (s *supervisor) answer(n *notify.Call) notify.Answer {
	if handle, ok := s.handlers[n.Number]; ok {
		return handle(s, n)
	}
	return notify.Pass
}

// close stops answering: what would be asked fails with ENOSYS from now on.
func (s *supervisor) close() error {
	if err := s.Stop(); err != nil {
		return err
	}
	if err := errors.Join(<-s.ended, s.Close()); err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	return nil
}
