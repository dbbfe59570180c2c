package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/capabilities"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	_ "github.com/cooper-build/cooper/sandbox/first" // is the container's first process when it is started as that
	"github.com/cooper-build/cooper/sandbox/rootemu"
)

// allowed are the capabilities of the process: what package managers need to place files of
// many owners, and to act as their users. Docker's other five are dangerous
// (NET_RAW, MKNOD, SETPCAP) or useless (NET_BIND_SERVICE, AUDIT_WRITE) here.
var allowed = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID",
	"CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP", "CAP_KILL", "CAP_SYS_CHROOT",
}

// oomScore makes the kernel take the process before the builder.
const oomScore = 500

// contain runs the command in a container over the prepared root.
func contain(ctx context.Context, s Spec, scratch string) error {
	// libcontainer logs to standard error, where progress is drawn. What it
	// logs when something fails is in its errors as well.
	logrus.SetOutput(io.Discard)
	showCgroups()
	stayInCgroup()
	// What the kernel gives is only known when it is asked for.
	systems := []*configs.Mount{freshProc()}
	if s.Insecure && s.Network == None {
		systems = append(systems, freshSys()) // only who owns the network namespace may have one
	}
	for {
		err := start(ctx, s, scratch, systems)
		var refused *refusedError
		switch {
		case !errors.As(err, &refused):
			return err
		case refused.mount == "proc" && systems[0].Device == "proc":
			systems[0] = outerProc()
			if s.Note != nil {
				s.Note("the kernel refuses a fresh /proc because parts of the one here are covered, so commands see which processes run beside them, and their arguments; they cannot signal, trace, read or change them, and their own /proc is read-only")
			}
		case refused.mount == "sysfs" && len(systems) > 1:
			systems = systems[:1]
		default:
			return err
		}
	}
}

// stayInCgroup keeps the container in the builder's control groups. Where
// libcontainer may, that is as root of the machine, it makes new ones at the top
// of the hierarchy: out of the limits that the build was given, and left behind
// when the builder is killed. It copes with what it may not write to, and our
// mount namespace is our own. Failing means that there is nothing to write to.
func stayInCgroup() {
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	_ = unix.MountSetattr(unix.AT_FDCWD, "/sys/fs/cgroup", unix.AT_RECURSIVE, &attr)
}

// refusedError: a namespace may have a fresh /proc and /sys only where its own
// are uncovered, and in a pod or an ordinary container they are not.
type refusedError struct{ mount string }

func (e *refusedError) Error() string { return "the kernel refuses a fresh " + e.mount }

// start starts the command, with the given /proc and /sys, and waits.
func start(ctx context.Context, s Spec, scratch string, systems []*configs.Mount) error {
	config, err := containerConfig(s, filepath.Base(scratch), systems)
	if err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	group, err := newCgroup(s, "cooper-"+filepath.Base(scratch))
	if err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	noteUnkept(group.unkept(s.Limits), s.Note)
	return join(startIn(ctx, s, scratch, config, group), group.remove())
}

func startIn(ctx context.Context, s Spec, scratch string, config *configs.Config, group *cgroup) error {
	ids, err := readIDs()
	if err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	if !emulated(&s, ids) {
		return startContainer(ctx, s, scratch, config, group)
	}
	killing, kill := context.WithCancelCause(ctx)
	defer kill(nil)
	supervisor, err := rootemu.Start(scratch, s.UID, s.GID, s.Groups, kill)
	if err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	emulate(config, supervisor.Path())
	if s, err = believer(s); err != nil {
		err = fmt.Errorf("sandbox: %w", err)
	} else {
		err = startContainer(killing, s, scratch, config, group)
	}
	return join(err, supervisor.Close())
}

// believer is what a process starts as that will only believe to be another:
// root, as far as the kernel and libcontainer go.
func believer(s Spec) (Spec, error) {
	hasHome := slices.ContainsFunc(s.Env, func(e string) bool { return strings.HasPrefix(e, "HOME=") && e != "HOME=" })
	if !hasHome && s.UID != 0 {
		home, err := homeOf(s.Root, s.UID)
		if err != nil {
			return s, err
		}
		s.Env = append(slices.Clone(s.Env), "HOME="+home)
	}
	s.UID, s.GID, s.Groups = 0, 0, nil
	return s, nil
}

func startContainer(ctx context.Context, s Spec, scratch string, config *configs.Config, group *cgroup) error {
	container, err := libcontainer.Create(filepath.Join(scratch, "container"), filepath.Base(scratch), config)
	if err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	out, err := newOutput(s.Stdout, s.Stderr)
	if err != nil {
		return join(fmt.Errorf("sandbox: %w", err), destroy(container))
	}
	process := newProcess(s, out)
	ctx, dog := newWatchdog(ctx, group.unkept(s.Limits))
	defer dog.end()

	// The kernel sends the death signal when the thread that started the
	// process ends, so this goroutine keeps its thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	killsBefore := oomKills()
	var guard *guard
	if err = container.Start(process); err == nil {
		if guard, err = begin(ctx, s, group, dog, process, container); err != nil {
			process.Signal(unix.SIGKILL)
			process.Wait()
			err = join(err, guard.end())
		}
	}
	out.started()
	if err != nil {
		return join(startError(ctx, s, err), out.finish(), destroy(container))
	}
	state, err := await(ctx, process)
	if err == nil {
		if err = verdict(ctx, state, oomKills() > killsBefore); err != nil && group.outOfMemory() {
			err = beyondMemory(s.Limits.Memory)
		}
	}
	return join(err, guard.end(), out.finish(), destroy(container), checkMainThread())
}

// begin lets the command begin, guarded and within its limits. The guard is to be ended also after an error.
func begin(ctx context.Context, s Spec, group *cgroup, dog *watchdog, process *libcontainer.Process, container *libcontainer.Container) (*guard, error) {
	pid, err := process.Pid()
	if err != nil {
		return nil, err
	}
	if err := group.add(pid); err != nil {
		return nil, err
	}
	if err := pin(pid, group.unkept(s.Limits).CPUs, s.Insecure); err != nil {
		return nil, err
	}
	guard, err := startGuard(pid)
	if err != nil {
		return nil, err
	}
	if err := dog.watch(ctx, pid); err != nil {
		return guard, err
	}
	return guard, container.Exec()
}

func newProcess(s Spec, out *output) *libcontainer.Process {
	process := &libcontainer.Process{
		Init:   true,
		Args:   s.Args,
		Env:    s.Env,
		Cwd:    filepath.Clean(s.Dir),
		UID:    int(s.UID),
		GID:    int(s.GID),
		Stdout: out.stdout.write,
		Stderr: out.stderr.write,
	}
	for _, g := range s.Groups {
		process.AdditionalGroups = append(process.AdditionalGroups, int(g))
	}
	return process
}

// checkMainThread proves that no container got the first thread, see init.
func checkMainThread() error {
	process, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	thread, err := os.Readlink("/proc/thread-self/ns/mnt")
	if err != nil {
		return err
	}
	if process != thread {
		return errors.New("the main thread was lost to a container")
	}
	return nil
}

// await waits for the end of the process, or brings it about.
func await(ctx context.Context, process *libcontainer.Process) (*os.ProcessState, error) {
	ended := make(chan struct{})
	killerEnded := make(chan struct{})
	go func() {
		defer close(killerEnded)
		select {
		case <-ctx.Done():
			process.Signal(unix.SIGKILL) // the first of a pid namespace: the kernel kills the rest
		case <-ended:
		}
	}()
	state, err := process.Wait()
	close(ended)
	<-killerEnded
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = nil
	}
	if err != nil {
		return nil, fmt.Errorf("sandbox: wait: %w", err)
	}
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Stopped() {
		return nil, errors.Join(errTraced, reap(state.Pid()))
	}
	return state, nil
}

// errTraced: what is Insecure may make its parent its tracer, and a tracer
// learns of every signal as if it were the end.
var errTraced = errors.New("sandbox: the command asked its parent to trace it, and the parent is the builder, which does not")

// reap ends a process that was waited for and is not gone.
func reap(pid int) error {
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		return os.NewSyscallError("kill", err)
	}
	for {
		var status unix.WaitStatus
		_, err := unix.Wait4(pid, &status, 0, nil)
		if err == nil && status.Stopped() || errors.Is(err, unix.EINTR) {
			continue
		}
		return os.NewSyscallError("wait4", err)
	}
}

func destroy(container *libcontainer.Container) error {
	if err := container.Destroy(); err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	return nil
}

// verdict turns the end of the process into Run's answer.
func verdict(ctx context.Context, state *os.ProcessState, memoryShort bool) error {
	status, ok := state.Sys().(syscall.WaitStatus)
	if !ok {
		return fmt.Errorf("sandbox: unknown process state %s", state)
	}
	return judge(ctx, status, memoryShort)
}

func judge(ctx context.Context, status syscall.WaitStatus, memoryShort bool) error {
	var limit *LimitError
	if cause := context.Cause(ctx); cause != nil && (status.Signaled() || !errors.As(cause, &limit)) {
		return cause // the limit came too late where the command has ended by itself
	}
	e := &ExitError{Code: status.ExitStatus()}
	if status.Signaled() {
		e.Code = 128 + int(status.Signal())
		e.Signal = unix.SignalName(status.Signal())
	}
	if e.Code == 0 {
		return nil
	}
	e.OOM = e.Code == 128+int(unix.SIGKILL) && memoryShort
	return e
}

// oomKills returns how often the kernel has killed for lack of memory.
func oomKills() int {
	b, err := os.ReadFile("/proc/vmstat")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			kills, _ := strconv.Atoi(strings.TrimSpace(n))
			return kills
		}
	}
	return 0
}

// startError explains why the command could not be started.
func startError(ctx context.Context, s Spec, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	// libcontainer's child sends its errors as text
	for _, name := range []string{"proc", "sysfs"} {
		if text := err.Error(); strings.Contains(text, `mounting "`+name+`" to rootfs`) && strings.Contains(text, unix.EPERM.Error()) {
			return &refusedError{name}
		}
	}
	if len(s.Ulimits) > 0 && !strings.Contains(err.Error(), "exec: ") {
		return &hinted{fmt.Errorf("start %s: %w", s.Args[0], err), "the limits of --ulimit apply to the first process of the sandbox, too; try larger ones"}
	}
	return fmt.Errorf("start %s: %w", s.Args[0], err)
}

func containerConfig(s Spec, id string, systems []*configs.Mount) (*configs.Config, error) {
	filter, err := seccompFilter()
	if err != nil {
		return nil, err
	}
	limits, err := s.rlimits()
	if err != nil {
		return nil, err
	}
	if s.Limits.CPUs > 0 { // or the command could give itself all of them
		filter.Syscalls = slices.DeleteFunc(filter.Syscalls, func(c *configs.Syscall) bool { return c.Name == "sched_setaffinity" })
	}
	score, err := raisedOOMScore()
	if err != nil {
		return nil, err
	}
	umask := uint32(0o022)
	config := &configs.Config{
		Rootfs:   s.Root,
		Hostname: s.Hostname,
		Umask:    &umask,
		Namespaces: configs.Namespaces{
			{Type: configs.NEWNS}, {Type: configs.NEWPID}, {Type: configs.NEWIPC},
			{Type: configs.NEWUTS}, {Type: configs.NEWCGROUP},
		},
		RootPropagation: unix.MS_PRIVATE | unix.MS_REC,
		Mounts:          append(slices.Clip(systems), messageQueues()),
		Capabilities: &configs.Capabilities{
			Bounding: allowed, Effective: allowed, Permitted: allowed,
		},
		NoNewPrivileges: s.NoNewPrivs,
		NoNewKeyring:    keyringsRefused(),
		NoPivotRoot:     pivotRefused(),
		Seccomp:         filter,
		MaskPaths: []string{
			"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/key-users", "/proc/kmsg",
			"/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
			"/proc/kallsyms", "/proc/kpagecount", "/proc/kpagecgroup", "/proc/kpageflags", "/proc/vmallocinfo", "/proc/slabinfo",
		},
		ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		Rlimits:       limits,
		OomScoreAdj:   &score,
		// Without a group of libcontainer's; a unique name keeps it from taking
		// the builder's, or ours for the process, for its own.
		Cgroups:           &cgroups.Cgroup{Name: "cooper-none-" + id, Rootless: true, Resources: &cgroups.Resources{}},
		RootlessCgroups:   true,
		ParentDeathSignal: int(unix.SIGKILL),
	}
	if err := hideUptime(config); err != nil {
		return nil, err
	}
	switch s.Network {
	case None:
		config.Namespaces = append(config.Namespaces, configs.Namespace{Type: configs.NEWNET})
		config.Networks = []*configs.Network{{Type: "loopback"}}
	case Private:
		// Also what is Insecure cannot change it: it belongs to our user namespace.
		config.Namespaces = append(config.Namespaces, configs.Namespace{Type: configs.NEWNET, Path: s.network.Path()})
	}
	if s.Insecure && config.NoPivotRoot {
		return nil, &hinted{
			errors.New("the container around the builder refuses pivot_root, and without that an insecure command could uncover the builder's files"),
			"give that container a seccomp profile that allows pivot_root, or build without --security=insecure",
		}
	}
	if s.Insecure {
		return config, unlock(config)
	}
	return config, nil
}

// keyringsRefused reports whether a filter around the builder forbids what has to do with keyrings, as those of containers do. It
// holds for the process as well, so the builder's keyring is as far out of its reach as with a keyring of its own.
func keyringsRefused() bool {
	_, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_SESSION_KEYRING, false)
	return errors.Is(err, unix.EPERM)
}

// pivotRefused reports whether a filter around the builder forbids pivot_root, as those of containers do even where mounts are
// allowed. Then the root is moved over the old one, and only who may unmount can uncover that: nobody who is not Insecure.
func pivotRefused() bool {
	return errors.Is(unix.PivotRoot("", ""), unix.EPERM) // the kernel itself finds no such file
}

// unlock makes the container Insecure. Capabilities over the builder's own user
// namespace would be power over the builder, its mounts and its binfmt_misc, so
// the process gets a user namespace to be root of.
func unlock(config *configs.Config) error {
	uids, err := readIDMap("/proc/self/uid_map")
	if err != nil {
		return err
	}
	gids, err := readIDMap("/proc/self/gid_map")
	if err != nil {
		return err
	}
	config.Namespaces = append(config.Namespaces, configs.Namespace{Type: configs.NEWUSER})
	config.UIDMappings, config.GIDMappings = uids.identity(), gids.identity()
	all := capabilities.KnownCapabilities() // those that the kernel does not know are left out
	config.Capabilities = &configs.Capabilities{Bounding: all, Effective: all, Permitted: all, Inheritable: all, Ambient: all}
	config.Seccomp, config.MaskPaths, config.ReadonlyPaths = nil, nil, nil
	return nil
}

// raisedOOMScore never lowers what is set: that takes a privilege.
func raisedOOMScore() (int, error) {
	b, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return 0, err
	}
	current, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, err
	}
	return max(current, oomScore), nil
}

// safe are the mount flags of file systems that hold no programs.
const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

func freshProc() *configs.Mount {
	return &configs.Mount{Source: "proc", Destination: "/proc", Device: "proc", Flags: safe}
}

// outerProc shows the processes around the sandbox as well. They are out of
// reach all the same: signals need a process id of the own namespace, and
// whatever lies behind ptrace's check needs the capabilities of the builder.
// It is read-only for what has no such check: to write to the builder's
// oom_score_adj it is enough to have its user id, as root inside has.
func outerProc() *configs.Mount {
	return &configs.Mount{Source: "/proc", Destination: "/proc", Device: "bind", Flags: unix.MS_BIND | unix.MS_REC | unix.MS_RDONLY | safe}
}

func freshSys() *configs.Mount {
	return &configs.Mount{Source: "sysfs", Destination: "/sys", Device: "sysfs", Flags: safe}
}

func messageQueues() *configs.Mount {
	return &configs.Mount{Source: "mqueue", Destination: "/dev/mqueue", Device: "mqueue", Flags: safe}
}
