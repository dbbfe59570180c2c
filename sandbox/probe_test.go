package sandbox_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox"
)

// findings are what the probe, a copy of this test binary, sees inside.
type findings struct {
	Status      map[string]string
	Namespaces  map[string]string
	Descriptors []string
	Environment []string
	Init        []string // environment of process 1
	Sockets     []string // what could be opened
	Pairs       []string
	Calls       map[string]string
	Readable    []string // masked files with content
	Writable    []string // paths that should not be
	Sys         []string
	Dev         []string
	Cwd         string
	Pid, Sid    int
	Core        unix.Rlimit
	Umask       int
	OOMScore    string
	Stdin       string
	Tty         string
	OldABI      string
	Agent, Mode string // of the socket that the probe was told to dial

	IDs                        int
	MachineRoot                bool
	Files                      map[string]string
	Devices, Mounts            []string
	Reached                    []string // ways to canaries
	Abstract, Loopback, Signal string
	OldArch                    string
	Uptime                     float64
}

// probe looks around and never returns.
func probe() {
	if len(os.Args) > 2 && os.Args[2] == "x32" {
		answer := make(chan unix.Errno)
		go func() {
			runtime.LockOSThread()
			_, _, errno := unix.RawSyscall(0x40000000|unix.SYS_GETPID, 0, 0, 0)
			answer <- errno
		}()
		select {
		case errno := <-answer:
			fmt.Printf("answered %d", errno)
		case <-time.After(time.Second): // the filter kills the thread and leaves the others
			fmt.Print("killed")
		}
		os.Exit(0)
	}
	if len(os.Args) > 3 && os.Args[2] == "dial" {
		var f findings
		f.Agent, f.Mode = dial(os.Args[3])
		json.NewEncoder(os.Stdout).Encode(f)
		os.Exit(0)
	}
	if len(os.Args) > 2 && os.Args[2] == "traced" {
		unix.RawSyscall(unix.SYS_PTRACE, unix.PTRACE_TRACEME, 0, 0)
		unix.Kill(os.Getpid(), unix.SIGUSR1)
		time.Sleep(time.Hour)
	}
	if len(os.Args) > 2 && os.Args[2] == "who" {
		fmt.Println(os.Getuid(), os.Geteuid())
		os.Exit(0)
	}
	if len(os.Args) > 4 && os.Args[2] == "breakout" {
		breakOut(os.Args[3], os.Args[4])
	}
	if len(os.Args) > 2 && os.Args[2] == "undying" {
		undying()
	}
	if len(os.Args) > 3 && os.Args[2] == "zombies" {
		n, _ := strconv.Atoi(os.Args[3])
		zombies(n)
	}
	if len(os.Args) > 2 && os.Args[2] == "eat" {
		eat()
	}
	if len(os.Args) > 3 && os.Args[2] == "map" {
		mapFile(os.Args[3])
	}
	if len(os.Args) > 2 && os.Args[2] == "widen" {
		widen()
	}
	if len(os.Args) > 3 && os.Args[2] == "setcap" {
		if err := unix.Setxattr(os.Args[3], "security.capability", fileCapability, 0); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	f := findings{
		Status:     status(),
		Namespaces: namespaces(),
		Sockets:    sockets(),
		Pairs:      pairs(),
		Pid:        os.Getpid(),
	}
	if len(os.Args) > 5 && os.Args[2] == "all" {
		f.lookAround(os.Args[3:])
	}
	if len(os.Args) == 2 || os.Args[2] == "all" { // where they are allowed, some of them do harm to the probe
		f.Calls = calls()
	}
	for fd := range 64 {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err == nil && flags&unix.FD_CLOEXEC == 0 { // those with it are the Go runtime's own
			f.Descriptors = append(f.Descriptors, fmt.Sprint(fd))
		}
	}
	f.Environment = os.Environ()
	environ, _ := os.ReadFile("/proc/1/environ")
	f.Init = strings.Split(strings.TrimSuffix(string(environ), "\x00"), "\x00")
	for _, path := range []string{"/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/interrupts", "/proc/kmsg", "/proc/kallsyms", "/proc/sched_debug"} {
		if b, _ := read(path); len(b) > 0 {
			f.Readable = append(f.Readable, path)
		}
	}
	for _, dir := range []string{"/proc/acpi", "/proc/scsi", "/proc/asound"} {
		if entries, _ := os.ReadDir(dir); len(entries) > 0 {
			f.Readable = append(f.Readable, dir)
		}
	}
	for _, path := range []string{"/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity", "/proc/sys/user/max_user_namespaces"} {
		if w, err := os.OpenFile(path, os.O_WRONLY, 0); err == nil {
			w.Close()
			f.Writable = append(f.Writable, path)
		}
	}
	if os.Mkdir("/sys/x", 0o700) == nil {
		f.Writable = append(f.Writable, "/sys")
	}
	f.Sys, f.Dev = names("/sys"), names("/dev")
	f.Cwd, _ = os.Getwd()
	f.Sid, _ = unix.Getsid(0)
	unix.Getrlimit(unix.RLIMIT_CORE, &f.Core)
	f.Umask = unix.Umask(0)
	score, _ := os.ReadFile("/proc/self/oom_score_adj")
	f.OOMScore = strings.TrimSpace(string(score))
	n, err := os.Stdin.Read(make([]byte, 1))
	f.Stdin = fmt.Sprint(n, err)
	_, err = unix.Open("/dev/tty", unix.O_RDWR, 0)
	f.Tty = fmt.Sprint(err)
	out, err := exec.Command("/probe", "probe", "x32").Output()
	f.OldABI = fmt.Sprint(string(out), err)
	json.NewEncoder(os.Stdout).Encode(f)
	os.Exit(0)
}

func read(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, 100)
	n, err := f.Read(b)
	return b[:max(n, 0)], err
}

func names(dir string) []string {
	entries, _ := os.ReadDir(dir)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func status() map[string]string {
	fields := map[string]string{}
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return statusByCalls()
	}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		fields[name] = strings.Join(strings.Fields(value), " ")
	}
	return fields
}

// statusByCalls is what of it can be known without a /proc.
func statusByCalls() map[string]string {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	unix.Capget(&header, &data[0])
	set := func(low, high uint32) string { return fmt.Sprintf("%08x%08x", high, low) }
	var bound, ambient uint64
	for n := range 64 {
		if has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(n), 0, 0, 0); err == nil && has == 1 {
			bound |= 1 << n
		}
		if has, err := unix.PrctlRetInt(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_IS_SET, uintptr(n), 0, 0); err == nil && has == 1 {
			ambient |= 1 << n
		}
	}
	mode, _ := unix.PrctlRetInt(unix.PR_GET_SECCOMP, 0, 0, 0, 0)
	set1, _ := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	return map[string]string{
		"CapInh": set(data[0].Inheritable, data[1].Inheritable), "CapPrm": set(data[0].Permitted, data[1].Permitted),
		"CapEff": set(data[0].Effective, data[1].Effective), "CapBnd": fmt.Sprintf("%016x", bound), "CapAmb": fmt.Sprintf("%016x", ambient),
		"Seccomp": fmt.Sprint(mode), "NoNewPrivs": fmt.Sprint(set1),
	}
}

func namespaces() map[string]string {
	links := map[string]string{}
	for _, name := range []string{"user", "mnt", "pid", "ipc", "uts", "net", "cgroup", "time"} {
		links[name], _ = os.Readlink("/proc/self/ns/" + name)
	}
	return links
}

// sockets tries every family with every type, and every netlink protocol.
func sockets() []string {
	var opened []string
	try := func(family, kind, protocol int) {
		if fd, err := unix.Socket(family, kind, protocol); err == nil {
			unix.Close(fd)
			opened = append(opened, fmt.Sprintf("%d/%d/%d", family, kind, protocol))
		}
	}
	for family := range 64 {
		for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM, unix.SOCK_RAW, unix.SOCK_SEQPACKET} {
			if family != unix.AF_NETLINK {
				try(family, kind, 0)
			}
		}
	}
	for protocol := range 32 {
		try(unix.AF_NETLINK, unix.SOCK_RAW, protocol)
	}
	return opened
}

func pairs() []string {
	var opened []string
	for family := range 64 {
		if fds, err := unix.Socketpair(family, unix.SOCK_STREAM, 0); err == nil {
			unix.Close(fds[0])
			unix.Close(fds[1])
			opened = append(opened, fmt.Sprint(family))
		}
	}
	return opened
}

// calls makes each refused call with arguments that would not fail for another
// reason than the filter, as far as that can be had.
func calls() map[string]string {
	answers := map[string]string{}
	call := func(name string, number uintptr, args ...uintptr) {
		args = append(args, 0, 0, 0, 0, 0, 0)
		_, _, errno := unix.RawSyscall6(number, args[0], args[1], args[2], args[3], args[4], args[5])
		answers[name] = unix.ErrnoName(errno)
		if errno == 0 {
			answers[name] = "allowed"
		}
	}
	call("unshare user", unix.SYS_UNSHARE, unix.CLONE_NEWUSER)
	call("unshare mount", unix.SYS_UNSHARE, unix.CLONE_NEWNS)
	call("clone user", unix.SYS_CLONE, unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD))
	call("clone3", unix.SYS_CLONE3)
	call("setns", unix.SYS_SETNS, ^uintptr(0))
	call("socket audit", unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_AUDIT)
	call("socket packet", unix.SYS_SOCKET, unix.AF_PACKET, unix.SOCK_RAW)
	call("socket vsock", unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM)
	call("keyctl", unix.SYS_KEYCTL, 0)
	call("add_key", unix.SYS_ADD_KEY)
	call("request_key", unix.SYS_REQUEST_KEY)
	call("bpf", unix.SYS_BPF)
	call("perf_event_open", unix.SYS_PERF_EVENT_OPEN)
	call("userfaultfd", unix.SYS_USERFAULTFD)
	call("io_uring_setup", unix.SYS_IO_URING_SETUP)
	call("mount", unix.SYS_MOUNT)
	call("umount2", unix.SYS_UMOUNT2)
	call("pivot_root", unix.SYS_PIVOT_ROOT)
	call("open_tree", unix.SYS_OPEN_TREE)
	call("move_mount", unix.SYS_MOVE_MOUNT)
	call("fsopen", unix.SYS_FSOPEN)
	call("mount_setattr", unix.SYS_MOUNT_SETATTR)
	call("ptrace", unix.SYS_PTRACE, unix.PTRACE_TRACEME)
	call("process_vm_readv", unix.SYS_PROCESS_VM_READV)
	call("open_by_handle_at", unix.SYS_OPEN_BY_HANDLE_AT)
	call("personality without randomisation", unix.SYS_PERSONALITY, 0x0040000)
	call("init_module", unix.SYS_INIT_MODULE)
	call("syslog", unix.SYS_SYSLOG, 3)
	call("settimeofday", unix.SYS_SETTIMEOFDAY)
	call("swapon", unix.SYS_SWAPON)
	call("reboot", unix.SYS_REBOOT)
	call("kexec_load", unix.SYS_KEXEC_LOAD)
	return answers
}

// probed runs the probe in a root that has it and the libraries it may need.
func probed(t *testing.T, change func(*sandbox.Spec)) findings {
	t.Helper()
	s := probing(t, busybox(t))
	change(&s)
	var f findings
	out := mustRun(t, s)
	if err := json.Unmarshal([]byte(out), &f); err != nil {
		t.Fatalf("probe said %q: %v", out, err)
	}
	return f
}

func TestProcessIsConfined(t *testing.T) {
	t.Setenv("COOPER_CANARY", "a secret of the builder")
	leak, err := os.Open(".") // without close-on-exec, as a careless library would leave it
	if err != nil {
		t.Fatal(err)
	}
	defer leak.Close()
	if _, err := unix.FcntlInt(leak.Fd(), unix.F_SETFD, 0); err != nil {
		t.Fatal(err)
	}
	env := []string{"PATH=/bin", "HOME=/root", "EMPTY=", "X=a b=c", "X=last wins"}
	f := probed(t, func(s *sandbox.Spec) { s.Env, s.NoNewPrivs = env, true })

	const nine = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER | 1<<unix.CAP_FSETID | 1<<unix.CAP_SETGID |
		1<<unix.CAP_SETUID | 1<<unix.CAP_SETFCAP | 1<<unix.CAP_KILL | 1<<unix.CAP_SYS_CHROOT
	for field, want := range map[string]string{
		"CapEff": fmt.Sprintf("%016x", nine), "CapPrm": fmt.Sprintf("%016x", nine), "CapBnd": fmt.Sprintf("%016x", nine),
		"CapInh": "0000000000000000", "CapAmb": "0000000000000000",
		"Seccomp": "2", "NoNewPrivs": "1", "Uid": "0 0 0 0", "Gid": "0 0 0 0",
	} {
		if got := f.Status[field]; got != want {
			t.Errorf("%s is %s, want %s: more is a tool to break out with", field, got, want)
		}
	}
	ours := namespaces()
	for name, link := range f.Namespaces {
		shared := name == "user" || name == "net"
		if (link == ours[name]) != shared {
			t.Errorf("namespace %s inside is %s, ours is %s; shared should be %v", name, link, ours[name], shared)
		}
	}
	if diff := cmp.Diff([]string{"0", "1", "2"}, f.Descriptors); diff != "" {
		t.Errorf("descriptors, each more leads to a file of the builder (-want +got):\n%s", diff)
	}
	want := []string{"PATH=/bin", "HOME=/root", "EMPTY=", "X=last wins"}
	for _, got := range [][]string{f.Environment, f.Init} {
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("environment, others' variables may hold secrets (-want +got):\n%s", diff)
		}
	}
	if len(f.Readable) > 0 || len(f.Writable) > 0 || len(f.Sys) > 0 {
		t.Errorf("the machine can be read at %q, changed at %q, /sys holds %q", f.Readable, f.Writable, f.Sys)
	}
	f.Dev = slices.DeleteFunc(f.Dev, func(name string) bool { return name == "core" }) // only where the kernel has it
	dev := []string{"fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero"}
	if diff := cmp.Diff(dev, f.Dev); diff != "" {
		t.Errorf("devices (-want +got):\n%s", diff)
	}
	if f.Cwd != "/" || f.Pid != 1 || f.Core != (unix.Rlimit{}) || f.Umask != 0o022 || f.OOMScore < "500" || f.Stdin != "0 EOF" || f.Tty != unix.ENXIO.Error() {
		t.Errorf("surroundings are %+v", f)
	}
	if f.Sid == 0 {
		t.Error("process is in the session of the builder and could type into its terminal")
	}
	if runtime.GOARCH == "amd64" && f.OldABI != "killed<nil>" {
		t.Errorf("a call by its x32 number gave %q; the filter does not see those numbers", f.OldABI)
	}
}

func TestSystemCallsThatReachTheKernelTooDeep(t *testing.T) {
	for _, nnp := range []bool{true, false} {
		f := probed(t, func(s *sandbox.Spec) { s.NoNewPrivs = nnp })
		for call, answer := range f.Calls {
			want := "EPERM"
			switch call {
			case "clone3":
				want = "ENOSYS" // libraries then use clone, which the filter can judge
			case "socket audit":
				want = "EPROTONOSUPPORT" // useradd aborts at EPERM, and does without audit where there is none
			case "socket packet", "socket vsock":
				want = "EAFNOSUPPORT"
			}
			if answer != want {
				t.Errorf("NoNewPrivs %v: %s gives %s, want %s", nnp, call, answer, want)
			}
		}
		if f.Status["Seccomp"] != "2" {
			t.Errorf("NoNewPrivs %v: no filter", nnp)
		}
		// UNIX stream, dgram, raw (the kernel takes it for dgram), seqpacket;
		// INET and INET6 stream and dgram; NETLINK route only
		want := []string{"1/1/0", "1/2/0", "1/3/0", "1/5/0", "2/1/0", "2/2/0", "10/1/0", "10/2/0", "16/3/0"}
		got := slices.DeleteFunc(f.Sockets, func(s string) bool { return strings.HasPrefix(s, "10/") && !ipv6() })
		want = slices.DeleteFunc(want, func(s string) bool { return strings.HasPrefix(s, "10/") && !ipv6() })
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("NoNewPrivs %v: sockets, each other family is kernel code with a history of root exploits (-want +got):\n%s", nnp, diff)
		}
		if diff := cmp.Diff([]string{"1"}, f.Pairs); diff != "" {
			t.Errorf("NoNewPrivs %v: socket pairs (-want +got):\n%s", nnp, diff)
		}
	}
}

func ipv6() bool {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
	unix.Close(fd)
	return !errors.Is(err, unix.EAFNOSUPPORT)
}
