package sandbox_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/nstest"
	"github.com/cooper-build/cooper/sandbox"
)

// watch is a writer that tells when a line has come.
type watch struct {
	mu    sync.Mutex
	text  bytes.Buffer
	ready chan struct{}
}

func (w *watch) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text.Write(b)
	if strings.Contains(w.text.String(), "ready\n") {
		select {
		case <-w.ready:
		default:
			close(w.ready)
		}
	}
	return len(b), nil
}

var errEnough = errors.New("enough")

func TestCancelKillsEverythingInside(t *testing.T) { inEach(t, cancelKillsEverythingInside) }

func cancelKillsEverythingInside(t *testing.T, chroot bool) {
	root := busybox(t)
	held := t.TempDir() // every process inside holds the fifo open
	if err := unix.Mkfifo(filepath.Join(held, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	out := &watch{ready: make(chan struct{})}
	s := shell(t, root, "trap '' TERM INT HUP; exec 3<>/held/fifo; (trap '' TERM; sleep 1000) & echo ready; sleep 1000; sleep 1000")
	s.Mounts = []sandbox.Mount{{Source: held, Target: "/held"}}
	s.Stdout, s.Chroot = out, chroot
	ctx, cancel := context.WithCancelCause(context.Background())
	done := make(chan error, 1)
	go func() { done <- sandbox.Run(ctx, s) }()
	<-out.ready
	cancel(errEnough)
	select {
	case err := <-done:
		if !errors.Is(err, errEnough) {
			t.Errorf("error is %v, want the cause of the cancellation", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("a cancelled command goes on")
	}
	// with no reader left, opening for writing without waiting fails
	if fd, err := unix.Open(filepath.Join(held, "fifo"), unix.O_WRONLY|unix.O_NONBLOCK, 0); !errors.Is(err, unix.ENXIO) {
		unix.Close(fd)
		t.Errorf("a process inside lives on after the cancellation (open gave %v)", err)
	}
}

func TestCancelledBeforeItStarts(t *testing.T) {
	root := busybox(t)
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errEnough)
	if err := sandbox.Run(ctx, shell(t, root, "touch /ran")); !errors.Is(err, errEnough) {
		t.Errorf("error is %v", err)
	}
	if _, err := os.Stat(filepath.Join(root, "ran")); err == nil {
		t.Error("the command ran all the same")
	}
}

func TestBackgroundProcessesEndWithTheCommand(t *testing.T) {
	inEach(t, backgroundProcessesEndWithTheCommand)
}

func backgroundProcessesEndWithTheCommand(t *testing.T, chroot bool) {
	root := busybox(t)
	held := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(held, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := shell(t, root, "exec 3<>/held/fifo; sleep 1000 & (sleep 1000 &); exec 3>&-; echo done")
	s.Mounts, s.Chroot = []sandbox.Mount{{Source: held, Target: "/held"}}, chroot
	done := make(chan string, 1)
	go func() {
		out, err := run(t, s)
		done <- fmt.Sprint(out, err)
	}()
	select {
	case got := <-done:
		if got != "done\n<nil>" {
			t.Errorf("run gave %q", got)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("a background process keeps the step from ending")
	}
	if fd, err := unix.Open(filepath.Join(held, "fifo"), unix.O_WRONLY|unix.O_NONBLOCK, 0); !errors.Is(err, unix.ENXIO) {
		unix.Close(fd)
		t.Errorf("a background process lives on (open gave %v)", err)
	}
}

// A process outside, reached over the shared network, can be handed the pipe.
func TestPipeHeldOutsideDoesNotHoldTheBuild(t *testing.T) {
	root := busybox(t)
	share := t.TempDir()
	// stands for descriptor passing: the test opens the command's own output
	out := &watch{ready: make(chan struct{})}
	s := shell(t, root, "readlink /proc/self/ns/pid > /share/ns; echo ready; while test ! -e /share/go; do sleep 0.01; done; echo last")
	s.Mounts = []sandbox.Mount{{Source: share, Target: "/share"}}
	s.Stdout = out
	done := make(chan error, 1)
	go func() { done <- sandbox.Run(context.Background(), s) }()
	<-out.ready
	ns, err := os.ReadFile(filepath.Join(share, "ns"))
	if err != nil {
		t.Fatal(err)
	}
	stolen := stealOutput(t, strings.TrimSpace(string(ns)))
	defer stolen.Close()
	write(t, filepath.Join(share, "go"), "", 0o644)
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("run: %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("whoever holds the pipe holds the build")
	}
	if got := out.text.String(); got != "ready\nlast\n" {
		t.Errorf("output is %q", got)
	}
}

func TestCommandStaysWithinTheLimitsOfTheBuild(t *testing.T) {
	share := t.TempDir()
	out := &watch{ready: make(chan struct{})}
	s := shell(t, busybox(t), "readlink /proc/self/ns/pid > /share/ns; echo ready; while test ! -e /share/go; do sleep 0.01; done")
	s.Mounts = []sandbox.Mount{{Source: share, Target: "/share"}}
	s.Stdout = out
	done := make(chan error, 1)
	go func() { done <- sandbox.Run(context.Background(), s) }()
	<-out.ready
	ns, err := os.ReadFile(filepath.Join(share, "ns"))
	if err != nil {
		t.Fatal(err)
	}
	ours, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := os.ReadFile(filepath.Join(processIn(t, strings.TrimSpace(string(ns))), "cgroup"))
	if err != nil {
		t.Fatal(err)
	}
	if string(theirs) != string(ours) {
		t.Errorf("control groups of the command are\n%s ours are\n%s", theirs, ours)
	}
	write(t, filepath.Join(share, "go"), "", 0o644)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// stealOutput opens standard output of the process whose pid namespace is ns.
func stealOutput(t *testing.T, ns string) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(processIn(t, ns), "fd/1"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// processIn returns the directory in /proc of a process in the pid namespace ns.
func processIn(t *testing.T, ns string) string {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if got, err := os.Readlink(link); err == nil && got == ns {
			return strings.TrimSuffix(link, "/ns/pid")
		}
	}
	t.Fatalf("no process in %s", ns)
	return ""
}

func TestMuchOutputArrivesWhole(t *testing.T) {
	s := shell(t, busybox(t), "seq 1 200000; echo end >&2")
	var out, errs bytes.Buffer
	s.Stdout, s.Stderr = &out, &errs
	if err := sandbox.Run(context.Background(), s); err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(out.String(), "\n199999\n200000\n") || out.Len() != 1288895 || errs.String() != "end\n" {
		t.Errorf("%d bytes of output and %q", out.Len(), errs.String())
	}
}

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

func TestBrokenWriterIsReportedAndDoesNotBlock(t *testing.T) {
	s := shell(t, busybox(t), "seq 1 200000")
	s.Stdout = broken{}
	if err := sandbox.Run(context.Background(), s); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("error is %v, want the writer's", err)
	}
}

func TestNetworkNoneHasOnlyLoopback(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	s := shell(t, busybox(t), "ip -o link; cat /proc/net/route; cat /etc/resolv.conf; ip -o addr")
	s.Network = sandbox.None
	out := mustRun(t, s)
	if strings.Count(out, "LOOPBACK,UP") != 1 || !strings.Contains(out, "inet 127.0.0.1/8") || strings.Contains(out, "eth0") || strings.Contains(out, "nameserver") {
		t.Errorf("network none has %s", out)
	}
	ours := namespaces()["net"]
	if got := mustRun(t, shell(t, busybox(t), "readlink /proc/self/ns/net")); strings.TrimSpace(got) != ours {
		t.Errorf("host network is %s, ours is %s", got, ours)
	}
}

func TestUserAndGroups(t *testing.T) {
	root := busybox(t)
	s := shell(t, root, "id -u; id -g; id -G; touch /tmp/mine && stat -c %u:%g /tmp/mine")
	if err := os.Chmod(filepath.Join(root, "tmp"), 0o777); err != nil {
		t.Fatal(err)
	}
	s.UID, s.GID, s.Groups = 1234, 1235, []uint32{1236, 65534}
	out, err := run(t, s)
	if err != nil {
		t.Fatal(err)
	}
	if want := "1234\n1235\n1235 1236 65534\n1234:1235\n"; out != want {
		t.Errorf("identity inside is %q, want %q", out, want)
	}
}

func TestWithRealIDsASingleOneIsAllThereIs(t *testing.T) {
	s := shell(t, busybox(t), "true")
	s.UID, s.RealIDs = 1234, true
	_, err := run(t, s)
	if !nstest.Single() {
		if err != nil {
			t.Error(err)
		}
		return
	}
	var hint interface{ Hint() string }
	if !errors.As(err, &hint) || !strings.Contains(hint.Hint(), "subordinate ids") {
		t.Errorf("error is %v, want a hint about subordinate ids", err)
	}
}

func TestGroupsOfTheBuilderStayOutside(t *testing.T) {
	if got := mustRun(t, shell(t, busybox(t), "id -G")); got != "0\n" {
		t.Errorf("groups inside are %q: the builder's groups open files to the command", got)
	}
}

func TestHostnameAndSharedMemory(t *testing.T) {
	s := shell(t, busybox(t), "hostname; cat /etc/hostname; set -- $(df -k /dev/shm); echo $9")
	s.Hostname, s.ShmSize = "builder", 2<<20
	if got := mustRun(t, s); got != "builder\nbuilder\n2048\n" {
		t.Errorf("got %q", got)
	}
}

func TestWrongSpecsAreRefused(t *testing.T) {
	root := busybox(t)
	for name, change := range map[string]func(*sandbox.Spec){
		"no command":     func(s *sandbox.Spec) { s.Args = nil },
		"relative root":  func(s *sandbox.Spec) { s.Root = "root" },
		"missing root":   func(s *sandbox.Spec) { s.Root = root + "/none" },
		"host injection": func(s *sandbox.Spec) { s.Hosts = []sandbox.HostEntry{{Name: "a\n10.0.0.1 b", IP: "10.0.0.2"}} },
		"host without ip": func(s *sandbox.Spec) {
			s.Hosts = []sandbox.HostEntry{{Name: "a", IP: "host-gateway"}}
		},
		"NUL in variable":     func(s *sandbox.Spec) { s.Env = []string{"A=b\x00c"} },
		"variable without =":  func(s *sandbox.Spec) { s.Env = []string{"HOME"} },
		"unknown mount kind":  func(s *sandbox.Spec) { s.Mounts = []sandbox.Mount{{Kind: 7, Target: "/m"}} },
		"missing bind source": func(s *sandbox.Spec) { s.Mounts = []sandbox.Mount{{Source: root + "/none", Target: "/m"}} },
	} {
		t.Run(name, func(t *testing.T) {
			s := shell(t, root, "touch /ran")
			change(&s)
			if _, err := run(t, s); err == nil {
				t.Error("accepted")
			}
			if _, err := os.Stat(filepath.Join(root, "ran")); err == nil {
				t.Error("the command ran")
			}
		})
	}
}

func TestManyAtOnce(t *testing.T) {
	cache := t.TempDir()
	var wg sync.WaitGroup
	for i := range 8 {
		root := busybox(t)
		old(t, root)
		before := listing(t, root)
		s := shell(t, root, fmt.Sprintf("echo %d; cat /etc/hosts > /dev/null; echo x >> /cache/%d", i, i))
		s.Mounts = []sandbox.Mount{{Source: cache, Target: "/cache"}}
		wg.Go(func() {
			out, err := run(t, s)
			if err != nil || out != fmt.Sprintln(i) {
				t.Errorf("run %d gave %q, %v", i, out, err)
			}
			if after := listing(t, root); len(after) != len(before) {
				t.Errorf("run %d left something in its root", i)
			}
		})
	}
	wg.Wait()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), cache) || strings.Contains(string(mounts), "/run-") {
		t.Errorf("mounts are left:\n%s", mounts)
	}
}

// The builder is this test binary, started again with a part to play.
func TestCommandDiesWithTheBuilder(t *testing.T) {
	for name, command := range map[string][]string{
		"with others":                  {"/bin/sh", "-c", "exec 3<>/share/fifo; sleep 1000 & echo ready; sleep 1000; true"},
		"without a death signal":       {"/probe", "probe", "undying"},
		"insecure, without the signal": {"/probe", "probe", "undying", "insecure"},
		"in a chroot":                  {"/bin/sh", "-c", "exec 3<>/share/fifo; sleep 1000 & echo ready; sleep 1000; true", "chroot"},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "in a chroot" {
				needsRoot(t)
			}
			diesWithTheBuilder(t, command)
		})
	}
}

func diesWithTheBuilder(t *testing.T, command []string) {
	root, state := busybox(t), t.TempDir()
	probing(t, root)
	share := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(share, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	builder := exec.Command("/proc/self/exe", append([]string{"builder", root, state, share}, command...)...)
	builder.Args[0] = os.Args[0]
	builder.Stderr = os.Stderr
	builder.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Setpgid: true} // its mounts die with it, as a real builder's do
	out, err := builder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := builder.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
		t.Fatal(err)
	}
	unix.Kill(-builder.Process.Pid, unix.SIGKILL) // and all of its process group, as a shell does
	builder.Wait()
	at := filepath.Join(share, "fifo")
	if command[len(command)-1] == "chroot" {
		at = filepath.Join(root, "share/fifo") // nothing was mounted there
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		fd, err := unix.Open(at, unix.O_WRONLY|unix.O_NONBLOCK, 0)
		if errors.Is(err, unix.ENXIO) {
			return
		}
		unix.Close(fd)
		if time.Now().After(deadline) {
			t.Fatal("the command survived the killed builder and goes on writing to its root")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// undying gets rid of the death signal, as a change of ids does, and stays.
func undying() {
	unix.Prctl(unix.PR_SET_PDEATHSIG, 0, 0, 0, 0)
	unix.Open("/share/fifo", unix.O_RDWR, 0)
	fmt.Println("ready")
	time.Sleep(time.Hour)
}

// playBuilder runs a command that does not end by itself.
func playBuilder(root, state, share string, command []string) {
	s := sandbox.Spec{
		Root: root, StateDir: state,
		Args:     command,
		Insecure: command[len(command)-1] == "insecure",
		Chroot:   command[len(command)-1] == "chroot",
		Env:      []string{"PATH=/bin"},
		Mounts:   []sandbox.Mount{{Source: share, Target: "/share"}},
		Stdout:   os.Stdout,
	}
	for _, dir := range []string{"/lib", "/lib64", "/usr/lib"} {
		if _, err := os.Stat(dir); err == nil && !s.Chroot { // where they would be copied, for a shell that needs none
			s.Mounts = append(s.Mounts, sandbox.Mount{Source: dir, Target: dir, ReadOnly: true})
		}
	}
	err := sandbox.Run(context.Background(), s)
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func TestCommandThatClosesItsOutputGoesOn(t *testing.T) {
	root := busybox(t)
	if out := mustRun(t, shell(t, root, "echo before; exec >&- 2>&-; sleep 0.3; touch /done")); out != "before\n" {
		t.Errorf("output is %q", out)
	}
	if _, err := os.Stat(filepath.Join(root, "done")); err != nil {
		t.Errorf("the step ended with its output and not with its command: %v", err)
	}
}

// The command is process 1, and most commands do not wait for children that others left to them.
func TestProcessesThatNobodyWaitsForEndWithTheCommand(t *testing.T) {
	s := probing(t, busybox(t), "zombies", "500")
	if out := mustRun(t, s); out != "500 zombies\n" {
		t.Errorf("got %q", out)
	}
}

// zombies starts processes, waits until they have ended, and waits for none of them.
func zombies(n int) {
	var last *os.Process
	for range n {
		p, err := os.StartProcess("/bin/true", []string{"true"}, &os.ProcAttr{})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		last = p
	}
	stat := fmt.Sprintf("/proc/%d/stat", last.Pid)
	for b, _ := os.ReadFile(stat); !bytes.Contains(b, []byte(") Z ")); b, _ = os.ReadFile(stat) {
		time.Sleep(time.Millisecond)
	}
	fmt.Println(n, "zombies")
	os.Exit(0)
}

// What starts for a command is what the command finds as /proc/self/exe, if it is a script that names that as its interpreter
// (CVE-2019-5736). It is a page of code that ends when nobody has written down what to do.
func TestACommandThatExecutesWhatStartedItFindsNothingOfTheBuilder(t *testing.T) {
	root := busybox(t)
	write(t, filepath.Join(root, "script"), "#!/proc/self/exe\n", 0o755)
	s := shell(t, root, "")
	s.Args = []string{"/script"}
	out, err := run(t, s)
	var exit *sandbox.ExitError
	if !errors.As(err, &exit) || exit.Code != 255 || out != "" {
		t.Errorf("it ended with %v and %q: a command that gets at the builder's program overwrites it, and runs as its user the next time", err, out)
	}
}

// Who is root inside could give the machine's /dev/null another mode or owner, if standard input were on a mount that can be written to.
func TestStandardInputIsTheNullDeviceOfTheSandbox(t *testing.T) {
	script := `id=$(sed -n 's/^mnt_id:[^0-9]*//p' /proc/self/fdinfo/0); grep "^$id " /proc/self/mountinfo | cut -d' ' -f5,6 | cut -d, -f1; cat; echo x > /proc/self/fd/0 && echo empty`
	for _, insecure := range []bool{false, true} {
		s := shell(t, busybox(t), script)
		s.Insecure = insecure
		out, err := run(t, s)
		if err != nil || out != "/dev/null ro\nempty\n" {
			t.Errorf("insecure %v: standard input is %q, %v, want the sandbox's own", insecure, out, err)
		}
	}
}

// BenchmarkTrue is one RUN of busybox true; user and system time are those of
// the children, per run.
func BenchmarkTrue(b *testing.B) {
	root := filepath.Join(b.TempDir(), "root")
	os.MkdirAll(filepath.Join(root, "bin"), 0o755)
	os.MkdirAll(filepath.Join(root, "etc"), 0o755)
	path, err := exec.LookPath("busybox")
	if err != nil {
		b.Fatal(err)
	}
	program, err := os.ReadFile(path)
	if err != nil {
		b.Fatal(err)
	}
	os.WriteFile(filepath.Join(root, "bin/true"), program, 0o755)
	state := b.TempDir()
	before := childTime(syscall.RUSAGE_CHILDREN) + childTime(syscall.RUSAGE_SELF)
	for b.Loop() {
		err := sandbox.Run(context.Background(), sandbox.Spec{Root: root, Args: []string{"/bin/true"}, Env: []string{"PATH=/bin"}, StateDir: state})
		if err != nil {
			b.Fatal(err)
		}
	}
	used := childTime(syscall.RUSAGE_CHILDREN) + childTime(syscall.RUSAGE_SELF) - before
	b.ReportMetric(float64(used.Microseconds())/1000/float64(b.N), "cpu-ms/op")
}

func childTime(who int) time.Duration {
	var usage syscall.Rusage
	syscall.Getrusage(who, &usage)
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
