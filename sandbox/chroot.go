package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/chroot"
	"github.com/cooper-build/cooper/sandbox/filter"
	"github.com/cooper-build/cooper/sandbox/first"
)

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
	if s.ShmSize != defaultShmSize && s.Note != nil {
		s.Note("in a chroot /dev/shm is a directory as large as the file system that it is on, whatever --shm-size says")
	}
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
	command := chroot.Command{Root: s.Root, Dir: s.StateDir, Name: s.Hostname, Nodes: nodes, Stdout: out.stdout.write, Stderr: out.stderr.write}
	todo, err := chrootCalls(s, nodes)
	command.Calls = todo
	return command, errors.Join(err, out.giveTo(s.UID))
}

// chrootCalls are what a process does to become a command in a chroot.
func chrootCalls(s Spec, nodes bool) (calls, error) {
	env, err := environment(s)
	if err != nil {
		return nil, err
	}
	limits, err := ulimits(s.Ulimits, hardLimit)
	if err != nil {
		return nil, err
	}
	rules, err := chrootRules(s)
	if err != nil {
		return nil, err
	}
	program, err := filter.Compile(chroot.Asking(rules, nodes))
	if err != nil {
		return nil, err
	}
	var todo calls
	if err := todo.leaveBuilder(); err != nil {
		return nil, err
	}
	if s.Limits.CPUs > 0 {
		var ours unix.CPUSet
		if err := unix.SchedGetaffinity(0, &ours); err != nil {
			return nil, os.NewSyscallError("sched_getaffinity", err)
		}
		some, err := choose(ours, s.Limits.CPUs)
		if err != nil {
			return nil, err
		}
		todo.add("choose processors", unix.SYS_SCHED_SETAFFINITY, null, first.Int(unsafe.Sizeof(some)), first.Bytes(unsafe.Slice((*byte)(unsafe.Pointer(&some)), unsafe.Sizeof(some))))
	}
	todo.add("enter the root directory", unix.SYS_CHDIR, first.Text(s.Root))
	todo.add("change the root directory", unix.SYS_CHROOT, first.Text("."))
	if nodes {
		todo.emptyInput()
	}
	todo.add("set the umask", unix.SYS_UMASK, first.Int(0o022))
	todo.workDir(s.Dir)
	// What leads out of a chroot is what the builder has and the process has not: that keeps it from tracing the builder.
	if err := todo.become(s, allowedCapabilities()&^(1<<unix.CAP_SYS_CHROOT), false); err != nil {
		return nil, err
	}
	todo.prctl("give up new privileges", unix.PR_SET_NO_NEW_PRIVS, 1)
	todo = append(todo, chroot.Confine())
	todo.filter(program, true)
	todo.limits(limits)
	todo.execute(s.Args, env)
	return todo, nil
}

// aboutOthers are calls that one process can do to another of the same user, whatever capabilities that has, and that no
// pid namespace keeps from the builder here. What they do to the caller itself is allowed: its number is then 0.
var aboutOthers = []struct {
	name string
	self []filter.Condition
}{
	{"prlimit64", []filter.Condition{equal(0, 0)}},
	{"sched_setaffinity", []filter.Condition{equal(0, 0)}},
	{"sched_setattr", []filter.Condition{equal(0, 0)}},
	{"sched_setparam", []filter.Condition{equal(0, 0)}},
	{"sched_setscheduler", []filter.Condition{equal(0, 0)}},
	{"setpriority", []filter.Condition{equal(0, unix.PRIO_PROCESS), equal(1, 0)}},
	{"ioprio_set", []filter.Condition{equal(0, 1), equal(1, 0)}}, // IOPRIO_WHO_PROCESS
	{"chroot", nil},
	{"migrate_pages", nil},
	{"move_pages", nil},
	{"process_mrelease", nil},
	{"get_robust_list", nil},
}

// chrootRules are those of every sandbox without what only a pid namespace makes harmless.
func chrootRules(s Spec) ([]filter.Rule, error) {
	rules, err := callRules()
	if err != nil {
		return nil, err
	}
	for _, c := range aboutOthers {
		rules = slices.DeleteFunc(rules, func(r filter.Rule) bool { return r.Name == c.name && r.Action == filter.Allow })
		if c.self != nil && !(c.name == "sched_setaffinity" && s.Limits.CPUs > 0) {
			rules = append(rules, allow(c.name, c.self...))
		}
	}
	return rules, nil
}

var errMoved = errors.New("the command moved it elsewhere, or made a link to it, which cannot be done to a mount")
