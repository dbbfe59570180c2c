package sandbox

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/first"
)

// calls are those that make a new process the command, in their order.
type calls []first.Call

// add adds a call. What it returns is to be changed at once.
func (c *calls) add(what string, number uintptr, args ...first.Arg) *first.Call {
	*c = append(*c, first.Call{What: what, Number: number, Args: args})
	return &(*c)[len(*c)-1]
}

// opened adds a call that opens a file or a socket.
func (c *calls) opened(what string, number uintptr, args ...first.Arg) *first.Result {
	r := new(first.Result)
	c.add(what, number, args...).Keep = r
	return r
}

const null = first.Int(0)

func (c *calls) mount(what, source, target, kind string, flags int64) *first.Call {
	return c.add(what, unix.SYS_MOUNT, first.Text(source), first.Text(target), first.Text(kind), first.Int(flags), null)
}

func (c *calls) prctl(what string, option int, arg uintptr) *first.Call {
	return c.add(what, unix.SYS_PRCTL, first.Int(option), first.Int(arg), null, null, null)
}

// write writes a text to a file.
func (c *calls) write(name, text string) {
	what := "write to " + name
	f := c.opened(what, unix.SYS_OPENAT, first.Int(unix.AT_FDCWD), first.Text(name), first.Int(unix.O_WRONLY|unix.O_CLOEXEC), null)
	c.add(what, unix.SYS_WRITE, f, first.Text(text), first.Int(len(text))).Least = int64(len(text))
	c.add(what, unix.SYS_CLOSE, f)
}

// leaveBuilder undoes what a process has of who started it, and has the kernel prefer to kill it.
func (c *calls) leaveBuilder() error {
	c.dieWithBuilder()
	c.hide()
	c.newKeyring()
	return c.oomScore()
}

// dieWithBuilder makes the kernel kill the process when the thread that started it is gone. Changing ids undoes that.
func (c *calls) dieWithBuilder() {
	c.prctl("ask for a death signal", unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL))
}

// hide keeps every process from looking into this one that has not all the builder's capabilities, until it executes the command.
func (c *calls) hide() {
	c.prctl("hide", unix.PR_SET_DUMPABLE, 0)
}

// newKeyring gives the process a keyring of its own. A filter around the builder that forbids what has to do with keyrings, as those
// of containers do, holds for the process as well, so the builder's is out of its reach.
func (c *calls) newKeyring() {
	c.add("make a keyring", unix.SYS_KEYCTL, first.Int(unix.KEYCTL_JOIN_SESSION_KEYRING), null).Tolerate = []unix.Errno{unix.EPERM, unix.ENOSYS}
}

// restartClocks gives the process clocks that begin with it: since when the machine runs is not its business. The time of day stays.
// Where the kernel has no such namespace, or the builder is itself in one that moves its clocks, they are the builder's.
func (c *calls) restartClocks() error {
	offsets, err := os.ReadFile("/proc/self/timens_offsets")
	if err != nil {
		return nil
	}
	for field := range strings.FieldsSeq(string(offsets)) {
		if n, err := strconv.ParseInt(field, 10, 64); err == nil && n != 0 {
			return nil
		}
	}
	var text string
	for _, clock := range []struct {
		name string
		id   int32
	}{{"monotonic", unix.CLOCK_MONOTONIC}, {"boottime", unix.CLOCK_BOOTTIME}} {
		var now unix.Timespec
		if err := unix.ClockGettime(clock.id, &now); err != nil {
			return os.NewSyscallError("clock_gettime", err)
		}
		text += clock.name + " -" + strconv.FormatInt(now.Sec, 10) + " 0\n"
	}
	c.add("make a time namespace", unix.SYS_UNSHARE, first.Int(unix.CLONE_NEWTIME))
	c.write("/proc/self/timens_offsets", text)
	const what = "enter a time namespace"
	ns := c.opened(what, unix.SYS_OPENAT, first.Int(unix.AT_FDCWD), first.Text("/proc/self/ns/time_for_children"), first.Int(unix.O_RDONLY|unix.O_CLOEXEC), null)
	c.add(what, unix.SYS_SETNS, ns, first.Int(unix.CLONE_NEWTIME))
	return nil
}

// loopback brings up the only interface of a new network namespace.
func (c *calls) loopback() {
	const what = "bring up the loopback interface"
	request := make(first.Bytes, 40) // struct ifreq
	copy(request, "lo")
	binary.NativeEndian.PutUint16(request[unix.IFNAMSIZ:], unix.IFF_UP)
	socket := c.opened(what, unix.SYS_SOCKET, first.Int(unix.AF_INET), first.Int(unix.SOCK_DGRAM|unix.SOCK_CLOEXEC), null)
	c.add(what, unix.SYS_IOCTL, socket, first.Int(unix.SIOCSIFFLAGS), request)
}

// oomScore makes the kernel take the process before the builder. It never lowers what is set: that takes a privilege.
func (c *calls) oomScore() error {
	const least = 500
	b, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return err
	}
	current, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return err
	}
	c.write("/proc/self/oom_score_adj", strconv.Itoa(max(current, least)))
	return nil
}

func (c *calls) limits(limits []rlimit) {
	for _, l := range limits {
		value := binary.NativeEndian.AppendUint64(binary.NativeEndian.AppendUint64(nil, l.soft), l.hard)
		c.add("set a limit", unix.SYS_PRLIMIT64, null, first.Int(l.resource), first.Bytes(value), null)
	}
}

// emptyInput makes standard input the /dev/null that is in the root: the builder's own could be given another mode by who is root.
func (c *calls) emptyInput() {
	const what = "open /dev/null"
	empty := c.opened(what, unix.SYS_OPENAT, first.Int(unix.AT_FDCWD), first.Text("/dev/null"), first.Int(unix.O_RDWR|unix.O_CLOEXEC), null)
	c.add(what, unix.SYS_DUP3, empty, first.Int(0), null)
}

// workDir goes to a directory, but through no magic link (CVE-2024-21626).
func (c *calls) workDir(dir string) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_MAGICLINKS}
	what := "working directory " + dir
	d := c.opened(what, unix.SYS_OPENAT2, first.Int(unix.AT_FDCWD), first.Text(dir),
		first.Bytes(unsafe.Slice((*byte)(unsafe.Pointer(&how)), unix.SizeofOpenHow)), first.Int(unix.SizeofOpenHow))
	c.add(what, unix.SYS_FCHDIR, d)
}

// become gives up all capabilities but some, and makes the process a user.
func (c *calls) become(s Spec, keep capabilities, inherit bool) error {
	for n := range uint(64) {
		if keep&(1<<n) == 0 {
			c.prctl("give up a capability", unix.PR_CAPBSET_DROP, uintptr(n)).Tolerate = []unix.Errno{unix.EINVAL} // the kernel has no more
		}
	}
	c.prctl("keep capabilities", unix.PR_SET_KEEPCAPS, 1)
	denied, err := setgroupsDenied()
	if err != nil {
		return err
	}
	if !denied {
		var groups []byte
		for _, g := range s.Groups {
			groups = binary.NativeEndian.AppendUint32(groups, g)
		}
		c.add("set groups", unix.SYS_SETGROUPS, first.Int(len(s.Groups)), first.Bytes(groups))
	}
	uid, gid := first.Int(s.UID), first.Int(s.GID)
	c.add("set group", unix.SYS_SETRESGID, gid, gid, gid)
	c.add("set user", unix.SYS_SETRESUID, uid, uid, uid)
	c.prctl("set capabilities", unix.PR_SET_KEEPCAPS, 0)
	var inheritable capabilities
	if inherit {
		inheritable = keep
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets []byte // struct __user_cap_data_struct, of the lower and the higher half
	for _, shift := range []int{0, 32} {
		for _, set := range []capabilities{keep, keep, inheritable} {
			sets = binary.NativeEndian.AppendUint32(sets, uint32(set>>shift))
		}
	}
	c.add("set capabilities", unix.SYS_CAPSET, first.Bytes(unsafe.Slice((*byte)(unsafe.Pointer(&header)), unsafe.Sizeof(header))), first.Bytes(sets))
	for n := range uint(64) {
		if inheritable&(1<<n) != 0 {
			c.add("set capabilities", unix.SYS_PRCTL, first.Int(unix.PR_CAP_AMBIENT), first.Int(unix.PR_CAP_AMBIENT_RAISE), first.Int(n), null, null).Tolerate = []unix.Errno{unix.EINVAL}
		}
	}
	c.dieWithBuilder()
	c.hide() // which changing ids may undo as well (fs.suid_dumpable)
	return nil
}

// setgroupsDenied reports whether no process here may have supplementary groups, as in a user namespace that its user made alone.
func setgroupsDenied() (bool, error) {
	b, err := os.ReadFile("/proc/self/setgroups")
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return strings.TrimSpace(string(b)) == "deny", err
}

// filter puts up a seccomp filter. If it has questions, its listener goes to the builder.
func (c *calls) filter(program []unix.SockFilter, asks bool) {
	const what = "put up the seccomp filter"
	var flags uintptr
	if asks {
		flags = listenerFlags()
	}
	listener := c.opened(what, unix.SYS_SECCOMP, first.Int(unix.SECCOMP_SET_MODE_FILTER), first.Int(flags), first.Filter(program))
	if asks {
		*c = append(*c, first.Send("send the seccomp filter's listener", listener))
	}
}

// listenerFlags are those of a filter with a listener. Linux 5.19: once the supervisor has a call, a signal that does not kill no longer
// interrupts it. No program expects that of chown.
func listenerFlags() uintptr {
	const killable = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, killable, 0); errno == unix.EFAULT { // it looks for a program
		return killable
	}
	return unix.SECCOMP_FILTER_FLAG_NEW_LISTENER
}

// executing is how the calls that execute the command begin, in errors.
const executing = "execute "

// execute executes the command, which is looked for as by a shell.
func (c *calls) execute(args, env []string) {
	argv, envp := &first.Shared{Arg: first.List(args)}, &first.Shared{Arg: first.List(env)}
	try := func(file string) *first.Call {
		return c.add(executing+file, unix.SYS_EXECVE, first.Text(file), argv, envp)
	}
	if strings.Contains(args[0], "/") {
		try(args[0])
		return
	}
	for _, dir := range filepath.SplitList(variable(env, "PATH")) {
		if !filepath.IsAbs(dir) {
			continue
		}
		file := filepath.Join(dir, args[0])
		look := c.add(executing+file, unix.SYS_FACCESSAT, first.Int(unix.AT_FDCWD), first.Text(file), first.Int(unix.X_OK))
		look.Tolerate, look.Skip = []unix.Errno{unix.ENOENT, unix.ENOTDIR, unix.EACCES, unix.ENAMETOOLONG}, 1
		try(file).Tolerate = []unix.Errno{unix.EACCES} // it may be a directory; but what is there and has no interpreter is the command
	}
}
