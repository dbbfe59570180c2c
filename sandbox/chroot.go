package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/chroot"
)

// allowedInChroot are the capabilities of a process that has no namespaces. SYS_CHROOT leads out of a chroot, and is what the builder
// has and the process has not: that keeps it from tracing the builder.
var allowedInChroot = slices.DeleteFunc(slices.Clone(allowed), func(c string) bool { return c == "CAP_SYS_CHROOT" })

// runInChroot is Run where no namespace can be made.
func runInChroot(ctx context.Context, s Spec) (err error) {
	if err := possibleInChroot(s); err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	scratch, err := os.MkdirTemp(s.StateDir, "run-")
	if err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	defer func() { err = join(err, os.RemoveAll(scratch)) }()
	d, err := openDressing(s.Root, scratch)
	if err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	defer func() {
		if undressErr := d.restore(); undressErr != nil {
			err = join(err, fmt.Errorf("sandbox: %w", undressErr))
		}
	}()
	if err := d.dress(ctx, s); err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	return startInChroot(ctx, s, d.nodes)
}

// possibleInChroot refuses what takes a namespace or a mount.
func possibleInChroot(s Spec) error {
	const hint = "build where user namespaces can be made: docs/sandbox.md, 'Rungs', says what that takes"
	no := func(what, why string) error { return &hinted{fmt.Errorf("%s: %s", what, why), hint} }
	switch {
	case s.Insecure:
		return no("--security=insecure", "in a chroot it would be the builder itself")
	case s.Network != Host:
		return no("a network of its own", "in a chroot a command has that of the builder")
	case s.CgroupParent != "":
		return no("--cgroup-parent", "a command in a chroot stays in the builder's control group")
	case s.Limits.Memory > 0:
		return no("--memory", "in a chroot it cannot be seen what the processes of all users take; limit the container instead")
	}
	for _, m := range s.Mounts {
		if m.Kind == Tmpfs && m.Size > 0 {
			return no("mount "+m.Target, "in a chroot a tmpfs is a directory, and nothing limits its size")
		}
	}
	if why := chroot.Impossible(); why != "" {
		return no("no command can run in a chroot here", why)
	}
	return nil
}

// startInChroot runs the command in the dressed root.
func startInChroot(ctx context.Context, s Spec, nodes bool) error {
	out, err := newOutput(s.Stdout, s.Stderr)
	if err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	command, err := chrootCommand(s, out, nodes)
	if err != nil {
		out.started()
		return join(fmt.Errorf("sandbox: %w", err), out.finish())
	}
	noteUnkept(s.Limits, s.Note)
	ctx, dog := newWatchdog(ctx, s.Limits)
	defer dog.end()

	// The kernel sends a death signal when the thread that started a process ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	killsBefore := oomKills()
	process, err := chroot.Start(command)
	out.started()
	if err != nil {
		return join(startError(ctx, s, err), out.finish())
	}
	if err := dog.watchBelow(ctx, process.Pid()); err != nil {
		dog.kill(err)
	}
	status, err := process.Wait(ctx.Done())
	if err == nil {
		err = judge(ctx, status, oomKills() > killsBefore)
	}
	return join(err, out.finish())
}

func chrootCommand(s Spec, out *output, nodes bool) (chroot.Command, error) {
	c := chroot.Command{
		Root: s.Root, Args: s.Args, Env: s.Env, Dir: s.Dir, Name: s.Hostname,
		UID: s.UID, GID: s.GID, Groups: s.Groups,
		Capabilities: allowedInChroot, Nodes: nodes,
		Stdout: out.stdout.write, Stderr: out.stderr.write,
	}
	var err error
	if c.Filter, err = chrootFilter(s); err != nil {
		return c, err
	}
	if c.Limits, err = ulimits(s.Ulimits, hardLimit); err != nil {
		return c, err
	}
	if c.OOMScore, err = raisedOOMScore(); err != nil {
		return c, err
	}
	if s.Limits.CPUs > 0 {
		var ours unix.CPUSet
		if err := unix.SchedGetaffinity(0, &ours); err != nil {
			return c, os.NewSyscallError("sched_getaffinity", err)
		}
		if c.Processors, err = choose(ours, s.Limits.CPUs); err != nil {
			return c, err
		}
	}
	hasHome := slices.ContainsFunc(s.Env, func(e string) bool { return strings.HasPrefix(e, "HOME=") && e != "HOME=" })
	if !hasHome {
		home, err := homeOf(s.Root, s.UID)
		if err != nil {
			return c, err
		}
		c.Env = append(slices.Clone(s.Env), "HOME="+home)
	}
	return c, nil
}

// aboutOthers are calls that one process can do to another of the same user, whatever capabilities that has, and that no
// pid namespace keeps from the builder here. What they do to the caller itself is allowed: its number is then 0.
var aboutOthers = []struct {
	name string
	self []*configs.Arg
}{
	{"prlimit64", []*configs.Arg{equal(0, 0)}},
	{"sched_setaffinity", []*configs.Arg{equal(0, 0)}},
	{"sched_setattr", []*configs.Arg{equal(0, 0)}},
	{"sched_setparam", []*configs.Arg{equal(0, 0)}},
	{"sched_setscheduler", []*configs.Arg{equal(0, 0)}},
	{"setpriority", []*configs.Arg{equal(0, unix.PRIO_PROCESS), equal(1, 0)}},
	{"ioprio_set", []*configs.Arg{equal(0, 1), equal(1, 0)}}, // IOPRIO_WHO_PROCESS
	{"chroot", nil},
	{"migrate_pages", nil},
	{"move_pages", nil},
	{"process_mrelease", nil},
	{"get_robust_list", nil},
}

// chrootFilter is the filter of every sandbox without what only a pid namespace makes harmless.
func chrootFilter(s Spec) (*configs.Seccomp, error) {
	filter, err := seccompFilter()
	if err != nil {
		return nil, err
	}
	for _, c := range aboutOthers {
		filter.Syscalls = slices.DeleteFunc(filter.Syscalls, func(s *configs.Syscall) bool { return s.Name == c.name && s.Action == configs.Allow })
		if c.self != nil && !(c.name == "sched_setaffinity" && s.Limits.CPUs > 0) {
			filter.Syscalls = append(filter.Syscalls, allow(c.name, c.self...))
		}
	}
	return filter, nil
}

var errMoved = errors.New("the command moved it elsewhere, or made a link to it, which cannot be done to a mount")
