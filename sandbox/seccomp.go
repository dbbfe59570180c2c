package sandbox

import (
	"fmt"
	"slices"
	"sync"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/filter"
	"github.com/cooper-build/cooper/sandbox/rootemu"
)

// denied are system calls that Docker allows and a build does not need: they
// look into other processes, reach old kernel code, or are filtered below.
var denied = []string{
	"kcmp", "pidfd_getfd", "process_madvise", "process_vm_readv", "process_vm_writev", "ptrace",
	"name_to_handle_at", "open_by_handle_at", "fanotify_mark",
	"adjtimex", "clock_adjtime", "clock_adjtime64", "modify_ldt", "remap_file_pages",
	"add_key", "keyctl", "request_key", "bpf", "perf_event_open", "userfaultfd",
	"io_uring_setup", "io_uring_enter", "io_uring_register",
	"setns", "unshare", "mount", "umount", "umount2", "pivot_root", "mount_setattr", "move_mount", "open_tree",
	"fsopen", "fsconfig", "fsmount", "fspick",
	// socketcall hides its arguments behind a pointer, so no filter sees the family
	"socketcall", "socket", "socketpair",
}

// families of which a process may open sockets, beside NETLINK_ROUTE. The
// others have brought privilege escalations for years (ALG, RXRPC, VSOCK,
// PACKET, KEY, TIPC) and serve no build.
var families = []uint64{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6}

// The programs that nearly every RUN needs are made once: that takes longer than all else that a RUN needs.
var (
	ordinaryProgram = sync.OnceValues(func() ([]unix.SockFilter, error) { return program(callRules()) })
	emulatedProgram = sync.OnceValues(func() ([]unix.SockFilter, error) {
		rules, err := callRules()
		return program(asking(rules), err)
	})
)

func program(rules []filter.Rule, err error) ([]unix.SockFilter, error) {
	if err != nil {
		return nil, err
	}
	return filter.Compile(rules)
}

// seccompProgram returns the filter of a process.
func seccompProgram(s Spec, emulated bool) ([]unix.SockFilter, error) {
	if s.Limits.CPUs == 0 {
		if emulated {
			return emulatedProgram()
		}
		return ordinaryProgram()
	}
	rules, err := callRules()
	// or the command could give itself all of them
	rules = slices.DeleteFunc(rules, func(r filter.Rule) bool { return r.Name == "sched_setaffinity" })
	if emulated {
		rules = asking(rules)
	}
	return program(rules, err)
}

// Warm makes what nearly every Run needs once and takes longer than a Run: the filter. It is for who has a moment before the first.
func Warm() {
	if ids, err := readIDs(); err == nil {
		_, _ = seccompProgram(Spec{}, emulated(&Spec{}, ids)) // who needs it sees the error
	}
}

// callRules returns Docker's allow-list made stricter: fewer calls, four
// kinds of sockets, and the native architecture only, because the 32-bit and
// x32 doors of the kernel lead to the same rooms with other numbers. What is
// not allowed gives EPERM, but for sockets (see absentSockets); clone3 gives ENOSYS, which makes C libraries fall
// back to clone, whose flags a filter can see.
func callRules() ([]filter.Rule, error) {
	var names []string
	for _, c := range allowed {
		names = append(names, c.name)
	}
	spec := &specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: names}}}
	profile, err := seccomp.GetDefaultProfile(spec)
	if err != nil {
		return nil, fmt.Errorf("seccomp profile: %w", err)
	}
	var rules []filter.Rule
	for _, rule := range profile.Syscalls {
		r := filter.Rule{}
		switch rule.Action {
		case specs.ActAllow:
		case specs.ActErrno:
			r.Action = filter.Refuse
			if rule.ErrnoRet != nil {
				r.Errno = unix.Errno(*rule.ErrnoRet)
			}
		default:
			return nil, fmt.Errorf("seccomp profile: unknown action %s", rule.Action)
		}
		if r.Args, err = conditions(rule.Args); err != nil {
			return nil, err
		}
		for _, r.Name = range rule.Names {
			if r.Action == filter.Allow && slices.Contains(denied, r.Name) {
				continue
			}
			rules = append(rules, r)
		}
	}
	for _, family := range families {
		rules = append(rules, allow("socket", equal(0, family)))
	}
	rules = append(rules,
		allow("socket", equal(0, unix.AF_NETLINK), equal(2, unix.NETLINK_ROUTE)),
		allow("socketpair", equal(0, unix.AF_UNIX)))
	return append(rules, absentSockets()...), nil
}

// asking sends to a supervisor what it answers. Everything else stays as it is.
func asking(rules []filter.Rule) []filter.Rule {
	for _, c := range rootemu.Calls() {
		rules = slices.DeleteFunc(rules, func(r filter.Rule) bool { return r.Name == c.Name && r.Action == filter.Allow })
		send := func(args ...filter.Condition) {
			rules = append(rules, filter.Rule{Name: c.Name, Action: filter.Ask, Args: args})
		}
		switch c.Only {
		case rootemu.Always:
			send()
		case rootemu.AnyBit:
			var all uint64
			for _, bit := range c.Bits {
				send(filter.Condition{Index: c.Arg, Is: filter.Masked, Mask: bit, Value: bit})
				all |= bit
			}
			rules = append(rules, allow(c.Name, filter.Condition{Index: c.Arg, Is: filter.Masked, Mask: all}))
		case rootemu.Equal:
			send(equal(c.Arg, c.Value))
			rules = append(rules, allow(c.Name, filter.Condition{Index: c.Arg, Is: filter.NotEqual, Value: c.Value}))
		}
	}
	return rules
}

// absentSockets answer for other families as a kernel without them does. Programs are prepared for that and not
// for EPERM: useradd and sshd give up where they may not open an audit socket, and go on where there is none.
func absentSockets() []filter.Rule {
	refuse := func(errno unix.Errno, args ...filter.Condition) filter.Rule {
		return filter.Rule{Name: "socket", Action: filter.Refuse, Errno: errno, Args: args}
	}
	rules := []filter.Rule{
		refuse(unix.EPROTONOSUPPORT, equal(0, unix.AF_NETLINK), filter.Condition{Index: 2, Is: filter.NotEqual, Value: unix.NETLINK_ROUTE}),
		refuse(unix.EAFNOSUPPORT, filter.Condition{Index: 0, Is: filter.Greater, Value: unix.AF_NETLINK}),
	}
	for family := range uint64(unix.AF_NETLINK) {
		if !slices.Contains(families, family) {
			rules = append(rules, refuse(unix.EAFNOSUPPORT, equal(0, family)))
		}
	}
	return rules
}

func allow(name string, args ...filter.Condition) filter.Rule {
	return filter.Rule{Name: name, Args: args}
}

func equal(index uint, value uint64) filter.Condition {
	return filter.Condition{Index: index, Value: value}
}

var comparisons = map[specs.LinuxSeccompOperator]filter.Comparison{
	specs.OpNotEqual:     filter.NotEqual,
	specs.OpLessThan:     filter.Less,
	specs.OpLessEqual:    filter.LessOrEqual,
	specs.OpEqualTo:      filter.Equal,
	specs.OpGreaterEqual: filter.GreaterOrEqual,
	specs.OpGreaterThan:  filter.Greater,
	specs.OpMaskedEqual:  filter.Masked,
}

func conditions(args []specs.LinuxSeccompArg) ([]filter.Condition, error) {
	var converted []filter.Condition
	for _, a := range args {
		is, ok := comparisons[a.Op]
		if !ok {
			return nil, fmt.Errorf("seccomp profile: unknown operator %s", a.Op)
		}
		c := filter.Condition{Index: a.Index, Is: is, Value: a.Value}
		if is == filter.Masked {
			c.Mask, c.Value = a.Value, a.ValueTwo
		}
		converted = append(converted, c)
	}
	return converted, nil
}
