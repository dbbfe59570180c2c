package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/nstest"
	"github.com/cooper-build/cooper/sandbox"
)

// The watchdog looks 20 times a second, and a bomb can take every process number of the machine in less.
func TestBetweenTwoLooksABombIsBoundedByTheKernel(t *testing.T) {
	for _, c := range []struct {
		limit int
		asked []sandbox.Ulimit
		want  string
	}{
		{60, nil, "3008"},
		{60, []sandbox.Ulimit{{Name: "nproc", Soft: 1000, Hard: 1500}}, "1000"},
		{0, []sandbox.Ulimit{{Name: "nproc", Soft: 1000, Hard: 1500}}, "1000"},
	} {
		s := shell(t, busybox(t), "grep 'Max processes' /proc/self/limits")
		s.Limits.Processes, s.Ulimits = c.limit, c.asked
		out, err := run(t, s)
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if f := strings.Fields(out); len(f) < 3 || f[2] != c.want {
			t.Errorf("limit %d, ulimits %v: %q, want %s: a RUN keeps every other program of the machine from starting", c.limit, c.asked, out, c.want)
		}
	}
}

func TestCommandThatGoesBeyondALimitIsKilledAndSaidSo(t *testing.T) {
	for _, c := range []struct {
		name   string
		limits sandbox.Limits
		spec   func(root string) sandbox.Spec
		limit  string
		oom    bool
	}{
		{"time", sandbox.Limits{Time: 200 * time.Millisecond}, func(root string) sandbox.Spec {
			return shell(t, root, "trap '' TERM INT HUP; while true; do sleep 1000; done")
		}, "time", false},
		{"bomb of processes", sandbox.Limits{Processes: 60}, func(root string) sandbox.Spec {
			return shell(t, root, "while true; do sleep 1000 & done")
		}, "pids", false},
		{"time in a chroot", sandbox.Limits{Time: 200 * time.Millisecond}, func(root string) sandbox.Spec {
			return inChroot(t, root, "trap '' TERM INT HUP; while true; do sleep 1000; done")
		}, "time", false},
		{"bomb of processes in a chroot", sandbox.Limits{Processes: 60}, func(root string) sandbox.Spec {
			return inChroot(t, root, "while true; do sleep 1000 & done")
		}, "pids", false},
		{"bomb of processes that doubles", sandbox.Limits{Processes: 60}, func(root string) sandbox.Spec {
			return shell(t, root, "trap '' TERM INT HUP; bomb() { bomb | bomb & }; bomb; exec sleep 1000")
		}, "pids", false},
		{"memory bomb", sandbox.Limits{Memory: 64 << 20}, func(root string) sandbox.Spec {
			return probing(t, root, "eat")
		}, "memory", true},
		{"memory bomb in a child", sandbox.Limits{Memory: 64 << 20}, func(root string) sandbox.Spec {
			s := probing(t, root)
			s.Args = []string{"/bin/sh", "-c", "/probe probe eat & wait; true"}
			return s
		}, "memory", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if strings.Contains(c.name, "chroot") {
				needsRoot(t)
			}
			s := c.spec(busybox(t))
			s.Limits = c.limits
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			err := sandbox.Run(ctx, s)
			var limit *sandbox.LimitError
			if !errors.As(err, &limit) || limit.Limit != c.limit || limit.Hint() == "" {
				t.Fatalf("error is %v, want one about the limit %s: the command takes the whole machine with it", err, c.limit)
			}
			var exit *sandbox.ExitError
			if !errors.As(err, &exit) || exit.Code != 137 || exit.OOM != c.oom {
				t.Errorf("end is %+v", exit)
			}
		})
	}
}

func TestCommandWithinItsLimitsIsLeftAlone(t *testing.T) {
	root := busybox(t)
	big, err := os.Create(filepath.Join(root, "big"))
	if err != nil {
		t.Fatal(err)
	}
	defer big.Close()
	size := int64(256 << 20)
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err == nil && st.Type == unix.TMPFS_MAGIC {
		size = 16 << 20 // there it is memory
	}
	if err := big.Truncate(size); err != nil {
		t.Fatal(err)
	}
	var notes []string
	s := probing(t, root, "map", "/big") // pages that the kernel can take back are not the command's
	s.Limits = sandbox.Limits{Memory: 128 << 20, Processes: 100, Time: time.Minute}
	s.Note = func(n string) { notes = append(notes, n) }
	if out := mustRun(t, s); out != "mapped\n" {
		t.Errorf("got %q", out)
	}
	if len(notes) != 1 || !strings.Contains(notes[0], "--memory and --pids-limit") {
		t.Errorf("notes are %q, want one that says how the limits are kept", notes)
	}
}

func TestFilesInMemoryAreBoundedByTheLimitOfMemory(t *testing.T) {
	s := shell(t, busybox(t), "set -- $(df -k /t | grep /t) $(df -k /dev/shm | grep shm); echo $2 $8")
	s.Mounts = []sandbox.Mount{{Kind: sandbox.Tmpfs, Target: "/t"}}
	s.Limits.Memory = 32 << 20
	if got := mustRun(t, s); got != "32768 32768\n" {
		t.Errorf("tmpfs and /dev/shm have %q KiB, want 32768: what lies there is counted by nobody", got)
	}
}

func TestCommandHasTheProcessorsItWasGiven(t *testing.T) {
	list := func(s sandbox.Spec) string {
		t.Helper()
		return strings.TrimSpace(mustRun(t, s))
	}
	s := shell(t, busybox(t), "while read name list; do case $name in Cpus_allowed_list:) echo $list; esac; done < /proc/self/status")
	s.Limits.CPUs = 1
	if got := list(s); strings.ContainsAny(got, "-,") {
		t.Errorf("processors are %s, want one", got)
	}
	s = probing(t, busybox(t), "widen")
	s.Limits.CPUs = 1
	if got := list(s); got != unix.EPERM.Error()+" 1" {
		t.Errorf("a command that asked for more got %q", got)
	}
	if runtime.NumCPU() == 1 {
		return
	}
	s.Limits.CPUs = 0.5
	_, err := run(t, s)
	var hint interface{ Hint() string }
	if !errors.As(err, &hint) || !strings.Contains(hint.Hint(), "Delegate=yes") {
		t.Errorf("error is %v, want one that says what half a processor takes", err)
	}
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		t.Fatal(err)
	}
	for i := 0; one.Count() == 0; i++ {
		if all.IsSet(i) {
			one.Set(i)
		}
	}
	setTasks(t, one)
	defer setTasks(t, all)
	s = probing(t, busybox(t), "widen")
	if got := list(s); got != "<nil> "+fmt.Sprint(all.Count()) {
		t.Errorf("without a limit: %q", got)
	}
	s = shell(t, busybox(t), "grep Cpus_allowed_list /proc/self/status")
	if got := list(s); strings.ContainsAny(strings.TrimPrefix(got, "Cpus_allowed_list:"), "-,") {
		t.Errorf("the command got processors that its builder does not have: %s", got)
	}
}

// setTasks gives this process processors, as taskset does. Threads that begin meanwhile have those of the thread that made them, so that
// all have them after the second time.
func setTasks(t *testing.T, set unix.CPUSet) {
	t.Helper()
	for range 2 {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			tid, _ := strconv.Atoi(task.Name())
			if err := unix.SchedSetaffinity(tid, &set); err != nil && !errors.Is(err, unix.ESRCH) {
				t.Fatal(err)
			}
		}
	}
}

// eat uses 128 MiB and stays.
func eat() {
	b := make([]byte, 128<<20)
	for i := 0; i < len(b); i += 4096 {
		b[i] = 1
	}
	time.Sleep(time.Hour)
	fmt.Println(b[0])
}

// mapFile has all of a file in its memory for a while.
func mapFile(name string) {
	fd, err := unix.Open(name, unix.O_RDONLY, 0)
	var st unix.Stat_t
	if err == nil {
		err = unix.Fstat(fd, &st)
	}
	if err == nil {
		_, err = unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	time.Sleep(300 * time.Millisecond)
	fmt.Println("mapped")
	os.Exit(0)
}

// widen asks for all processors and counts what it has.
func widen() {
	var all, have unix.CPUSet
	for i := range 1024 {
		all.Set(i)
	}
	err := unix.SchedSetaffinity(0, &all)
	unix.SchedGetaffinity(0, &have)
	fmt.Println(err, have.Count())
	os.Exit(0)
}

// sudo and its like are programs of setuid root. The user of a RUN may gain by them what root has there, unless that is shut off.
func TestProgramOfSetuidRootGivesRootUnlessNothingMayBeGained(t *testing.T) {
	if nstest.Single() {
		return // there is one user only
	}
	for noNewPrivs, want := range map[bool]string{false: "1000 0\n", true: "1000 1000\n"} {
		root := busybox(t)
		s := probing(t, root, "who")
		if err := os.Chmod(filepath.Join(root, "probe"), os.ModeSetuid|0o755); err != nil {
			t.Fatal(err)
		}
		s.UID, s.GID, s.NoNewPrivs = 1000, 1000, noNewPrivs
		if got := mustRun(t, s); got != want {
			t.Errorf("no new privileges %v: real and effective user are %q, want %q", noNewPrivs, got, want)
		}
	}
}

// COOPER_TEST_DELEGATED says that the tests were started in a control group that is delegated to them and has nobody else in it.
func TestGroupOfTheBuildKeepsLimitsExactly(t *testing.T) {
	if os.Getenv("COOPER_TEST_DELEGATED") == "" {
		t.Log("no group is delegated to the tests: TestGroupKeepsWhatItHasControllersFor sees what would be written")
		return
	}
	unkept := func(note string) { t.Errorf("a limit is not kept by a group: %s", note) }
	s := probing(t, busybox(t))
	s.Args = []string{"/bin/sh", "-c", "/probe probe eat & wait; true"}
	s.Limits, s.Note = sandbox.Limits{Memory: 64 << 20}, unkept
	_, err := run(t, s)
	var limit *sandbox.LimitError
	if !errors.As(err, &limit) || limit.Limit != "memory" {
		t.Errorf("memory: error is %v", err)
	}

	s = shell(t, busybox(t), "n=0; while test $n -lt 100; do sleep 1000 & n=$((n+1)); done 2>/dev/null; echo all")
	s.Limits, s.Note = sandbox.Limits{Processes: 20}, unkept
	if out, err := run(t, s); err == nil || strings.Contains(out, "all") {
		t.Errorf("processes: a command with 20 started 100: %q, %v", out, err)
	}

	s = shell(t, busybox(t), "cat /proc/self/cgroup; (while true; do true; done) & (while true; do true; done) & sleep 2; read a b < /proc/$!/stat; set -- $b; echo ticks ${13}")
	s.Limits, s.Note = sandbox.Limits{CPUs: 0.4}, unkept
	out := mustRun(t, s)
	_, ticks, _ := strings.Cut(out, "ticks ")
	n := 0
	if fmt.Sscan(ticks, &n); n == 0 || n > 70 { // a half of 40 ticks a second, for two seconds
		t.Errorf("processors: one of two processes had %d ticks in 2 s: %q", n, out)
	}
	if left, _ := filepath.Glob("/sys/fs/cgroup/*/cooper-run-*"); len(left) > 0 {
		t.Errorf("groups are left: %q", left)
	}
}
