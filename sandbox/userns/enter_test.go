package userns_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/userns"
)

// The test binary plays three parts: the tests, a parent that calls Enter
// ("enter"), and what runs inside (the words after it).
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "enter" {
		play(os.Args[2:])
	}
	if len(os.Args) > 1 && os.Args[1] == "who" {
		_, ok := userns.Inside()
		fmt.Println("inside", ok)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func play(part []string) {
	if _, ok := userns.Inside(); ok {
		os.Exit(inside(part))
	}
	ctx := context.Background()
	if part[0] == "cancelled" {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, 300*time.Millisecond)
		defer cancel()
	}
	var o userns.Options
	if os.Getenv("SINGLE") != "" {
		o.Only = userns.Single
	}
	code, err := userns.Enter(ctx, os.Args, os.Environ(), o)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(99)
	}
	os.Exit(code)
}

// report is what the inside sees of itself.
type report struct {
	Map         userns.Map
	UID, GID    int
	CapEff      string
	Comm        string
	Environment []string
	Args        []string
	Descriptors []string
	RootOptions string
	MountNS     string
	Grandchild  string
}

func inside(part []string) int {
	switch part[0] {
	case "report":
		m, _ := userns.Inside()
		r := report{Map: m, UID: os.Getuid(), GID: os.Getgid(), Environment: os.Environ(), Args: os.Args}
		r.CapEff = statusField("CapEff")
		comm, _ := os.ReadFile("/proc/self/comm")
		r.Comm = strings.TrimSpace(string(comm))
		for fd := range 16 {
			if target, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd)); err == nil {
				flags, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
				if flags&unix.FD_CLOEXEC == 0 {
					r.Descriptors = append(r.Descriptors, target)
				}
			}
		}
		mounts, _ := os.ReadFile("/proc/self/mountinfo")
		r.RootOptions = string(mounts)
		r.MountNS, _ = os.Readlink("/proc/self/ns/mnt")
		grandchild, err := exec.Command("/proc/self/exe", "who").Output()
		r.Grandchild = fmt.Sprint(strings.TrimSpace(string(grandchild)), err)
		json.NewEncoder(os.Stdout).Encode(r)
		return 0
	case "exit":
		return 42
	case "die":
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
	case "wait", "cancelled":
		got := make(chan os.Signal, 1)
		signal.Notify(got, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
		fmt.Println("ready", os.Getpid())
		fmt.Println("got", <-got)
		return 7
	}
	return 1
}

func statusField(name string) string {
	b, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(rest)
		}
	}
	return ""
}

func parent(env []string, part ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], append([]string{"enter"}, part...)...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stderr = os.Stderr
	// no controlling terminal, or a signal to the parent alone would be
	// taken for one that the terminal has sent to both
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd
}

func TestEnterMakesTheCallerRootWithThePlannedMap(t *testing.T) {
	for _, single := range []string{"", "1"} {
		t.Run("single="+single, func(t *testing.T) {
			out, err := parent([]string{"SINGLE=" + single, "CANARY=x y"}, "report", "an arg").Output()
			if err != nil {
				t.Fatalf("enter: %v", err)
			}
			var r report
			if err := json.Unmarshal(out, &r); err != nil {
				t.Fatalf("%v in %q", err, out)
			}
			want, err := userns.Plan(userns.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if single == "" && r.Map.String() != want.String() {
				t.Errorf("map inside is %s (%s), planned was %s", r.Map, r.Map.Why, want)
			}
			if single != "" && (r.Map.Kind != userns.Single || len(r.Map.UIDs) != 1 || r.Map.UIDs[0].Count != 1) {
				t.Errorf("map inside is %s, want a single id", r.Map)
			}
			t.Logf("map %s", r.Map)
			if r.UID != 0 || r.GID != 0 {
				t.Errorf("ids inside are %d:%d, want root", r.UID, r.GID)
			}
			if n, _ := strconv.ParseUint(r.CapEff, 16, 64); n&(1<<unix.CAP_SYS_ADMIN) == 0 {
				t.Errorf("capabilities inside are %s, want SYS_ADMIN among them", r.CapEff)
			}
			if !strings.HasPrefix(os.Args[0][strings.LastIndex(os.Args[0], "/")+1:], r.Comm) {
				t.Errorf("process name is %q", r.Comm)
			}
			for _, d := range r.Descriptors { // others may come from whoever started the tests
				if strings.HasPrefix(d, "socket:") || strings.HasPrefix(d, "/memfd:") {
					t.Errorf("programs started inside would inherit %s", d)
				}
			}
			for line := range strings.Lines(r.RootOptions) {
				if strings.Contains(line, " shared:") || strings.Contains(line, " master:") {
					t.Errorf("mount is not private, mounts would travel: %s", line)
				}
			}
			if ours, _ := os.Readlink("/proc/self/ns/mnt"); ours == r.MountNS {
				t.Error("mount namespace is the caller's")
			}
			if r.Args[2] != "report" || r.Args[3] != "an arg" {
				t.Errorf("arguments inside are %q", r.Args)
			}
			if r.Grandchild != "inside false<nil>" {
				t.Errorf("a program started inside says %q, want it to know that Enter did not start it", r.Grandchild)
			}
			environment := strings.Join(r.Environment, "\n")
			if !strings.Contains(environment, "CANARY=x y") || strings.Contains(environment, "_COOPER") {
				t.Errorf("environment inside is %q", r.Environment)
			}
		})
	}
}

func TestExitStatusIsPassedThrough(t *testing.T) {
	for part, want := range map[string]int{"exit": 42, "die": 137} {
		cmd := parent(nil, part)
		cmd.Run()
		if got := cmd.ProcessState.ExitCode(); got != want {
			t.Errorf("exit status after %q is %d, want %d", part, got, want)
		}
	}
}

func TestSignalsReachTheInsideAndItsAnswerTheOutside(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT} {
		t.Run(s.String(), func(t *testing.T) {
			caught := make(chan os.Signal, 1) // or the child ignores what who started the tests did, as nohup does
			signal.Notify(caught, s)
			defer signal.Stop(caught)
			p := startWaiting(t, "wait")
			p.cmd.Process.Signal(s)
			rest, _ := p.readLine()
			p.cmd.Wait()
			if want := "got " + s.String(); rest != want || p.cmd.ProcessState.ExitCode() != 7 {
				t.Errorf("inside said %q and the status is %d, want %q and 7", rest, p.cmd.ProcessState.ExitCode(), want)
			}
		})
	}
}

func TestEndOfContextAsksTheInsideToStop(t *testing.T) {
	p := startWaiting(t, "cancelled")
	rest, _ := p.readLine()
	p.cmd.Wait()
	if rest != "got terminated" || p.cmd.ProcessState.ExitCode() != 7 {
		t.Errorf("inside said %q and the status is %d", rest, p.cmd.ProcessState.ExitCode())
	}
}

func TestInsideDiesWithTheOutside(t *testing.T) {
	p := startWaiting(t, "wait")
	p.cmd.Process.Kill()
	p.cmd.Wait()
	deadline := time.Now().Add(20 * time.Second)
	for alive(p.pid) {
		if time.Now().After(deadline) {
			syscall.Kill(p.pid, syscall.SIGKILL)
			t.Fatal("the inside survived its parent and would go on building unseen")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func alive(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && !bytes.Contains(b, []byte(") Z "))
}

type waiting struct {
	cmd *exec.Cmd
	out *os.File
	pid int
}

func (w waiting) readLine() (string, error) {
	var line []byte
	b := make([]byte, 1)
	for {
		if n, err := w.out.Read(b); n == 0 || err != nil {
			return string(line), err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
		line = append(line, b[0])
	}
}

func startWaiting(t *testing.T, part string) waiting {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { read.Close() })
	cmd := parent(nil, part)
	cmd.Stdout = write
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	write.Close()
	w := waiting{cmd: cmd, out: read}
	line, err := w.readLine()
	if _, scanErr := fmt.Sscanf(line, "ready %d", &w.pid); scanErr != nil {
		t.Fatalf("inside said %q, %v", line, err)
	}
	return w
}
