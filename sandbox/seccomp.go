package sandbox

import (
	"fmt"
	"maps"
	"slices"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

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

// seccompFilter returns Docker's allow-list made stricter: fewer calls, four
// kinds of sockets, and the native architecture only, because the 32-bit and
// x32 doors of the kernel lead to the same rooms with other numbers. What is
// not allowed gives EPERM, but for sockets (see absentSockets); clone3 gives ENOSYS, which makes C libraries fall
// back to clone, whose flags a filter can see.
func seccompFilter() (*configs.Seccomp, error) {
	spec := &specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: allowed}}}
	profile, err := seccomp.GetDefaultProfile(spec)
	if err != nil {
		return nil, fmt.Errorf("seccomp profile: %w", err)
	}
	filter := &configs.Seccomp{DefaultAction: configs.Errno}
	for _, rule := range profile.Syscalls {
		action, ok := seccompActions[rule.Action]
		if !ok {
			return nil, fmt.Errorf("seccomp profile: unknown action %s", rule.Action)
		}
		args, err := seccompArgs(rule.Args)
		if err != nil {
			return nil, err
		}
		for _, name := range rule.Names {
			if action == configs.Allow && slices.Contains(denied, name) {
				continue
			}
			filter.Syscalls = append(filter.Syscalls, &configs.Syscall{Name: name, Action: action, ErrnoRet: rule.ErrnoRet, Args: args})
		}
	}
	for _, family := range families {
		filter.Syscalls = append(filter.Syscalls, allow("socket", equal(0, family)))
	}
	filter.Syscalls = append(filter.Syscalls,
		allow("socket", equal(0, unix.AF_NETLINK), equal(2, unix.NETLINK_ROUTE)),
		allow("socketpair", equal(0, unix.AF_UNIX)))
	filter.Syscalls = append(filter.Syscalls, absentSockets()...)
	return filter, nil
}

// emulate sends to a supervisor what it answers. Everything else stays as it is.
func emulate(config *configs.Config, listener string) {
	// The supervisor keeps its own in this limit, which the kernel does not look at.
	config.Rlimits = slices.DeleteFunc(config.Rlimits, func(l configs.Rlimit) bool { return l.Type == unix.RLIMIT_LOCKS })
	filter := config.Seccomp
	filter.ListenerPath = listener
	for _, c := range rootemu.Calls() {
		filter.Syscalls = slices.DeleteFunc(filter.Syscalls, func(s *configs.Syscall) bool { return s.Name == c.Name && s.Action == configs.Allow })
		send := func(args ...*configs.Arg) {
			filter.Syscalls = append(filter.Syscalls, &configs.Syscall{Name: c.Name, Action: configs.Notify, Args: args})
		}
		switch c.Only {
		case rootemu.Always:
			send()
		case rootemu.AnyBit:
			var all uint64
			for _, bit := range c.Bits {
				send(&configs.Arg{Index: c.Arg, Value: bit, ValueTwo: bit, Op: configs.MaskEqualTo})
				all |= bit
			}
			filter.Syscalls = append(filter.Syscalls, allow(c.Name, &configs.Arg{Index: c.Arg, Value: all, Op: configs.MaskEqualTo}))
		case rootemu.Equal:
			send(equal(c.Arg, c.Value))
			filter.Syscalls = append(filter.Syscalls, allow(c.Name, &configs.Arg{Index: c.Arg, Value: c.Value, Op: configs.NotEqualTo}))
		}
	}
}

// absentSockets answer for other families as a kernel without them does. Programs are prepared for that and not
// for EPERM: useradd and sshd give up where they may not open an audit socket, and go on where there is none.
func absentSockets() []*configs.Syscall {
	refuse := func(errno uint, args ...*configs.Arg) *configs.Syscall {
		return &configs.Syscall{Name: "socket", Action: configs.Errno, ErrnoRet: &errno, Args: args}
	}
	rules := []*configs.Syscall{
		refuse(uint(unix.EPROTONOSUPPORT), equal(0, unix.AF_NETLINK), &configs.Arg{Index: 2, Value: unix.NETLINK_ROUTE, Op: configs.NotEqualTo}),
		refuse(uint(unix.EAFNOSUPPORT), &configs.Arg{Index: 0, Value: unix.AF_NETLINK, Op: configs.GreaterThan}),
	}
	for family := range uint64(unix.AF_NETLINK) {
		if !slices.Contains(families, family) {
			rules = append(rules, refuse(uint(unix.EAFNOSUPPORT), equal(0, family)))
		}
	}
	return rules
}

func allow(name string, args ...*configs.Arg) *configs.Syscall {
	return &configs.Syscall{Name: name, Action: configs.Allow, Args: args}
}

func equal(index uint, value uint64) *configs.Arg {
	return &configs.Arg{Index: index, Value: value, Op: configs.EqualTo}
}

var seccompActions = map[specs.LinuxSeccompAction]configs.Action{
	specs.ActAllow: configs.Allow,
	specs.ActErrno: configs.Errno,
}

var seccompOperators = map[specs.LinuxSeccompOperator]configs.Operator{
	specs.OpNotEqual:     configs.NotEqualTo,
	specs.OpLessThan:     configs.LessThan,
	specs.OpLessEqual:    configs.LessThanOrEqualTo,
	specs.OpEqualTo:      configs.EqualTo,
	specs.OpGreaterEqual: configs.GreaterThanOrEqualTo,
	specs.OpGreaterThan:  configs.GreaterThan,
	specs.OpMaskedEqual:  configs.MaskEqualTo,
}

func seccompArgs(args []specs.LinuxSeccompArg) ([]*configs.Arg, error) {
	var converted []*configs.Arg
	for _, a := range args {
		op, ok := seccompOperators[a.Op]
		if !ok {
			return nil, fmt.Errorf("seccomp profile: operator %s is none of %v", a.Op, slices.Collect(maps.Keys(seccompOperators)))
		}
		converted = append(converted, &configs.Arg{Index: a.Index, Value: a.Value, ValueTwo: a.ValueTwo, Op: op})
	}
	return converted, nil
}
