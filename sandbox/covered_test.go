package sandbox_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox"
	"github.com/cooper-build/cooper/sandbox/userns"
)

// A pod and an ordinary container cover parts of their /proc, and then no
// namespace beneath them gets a fresh one. The test covers a file and enters a
// further user namespace, in which that cover is locked.
func TestWhereProcIsCoveredTheCommandReachesNobody(t *testing.T) {
	for _, security := range []string{"sandbox", "insecure"} {
		t.Run(security, func(t *testing.T) { whereProcIsCovered(t, security) })
	}
}

// Two commands have one user and the same capabilities, which is all that ptrace's check asks for.
func TestWhereProcIsCoveredCommandsDoNotReachEachOther(t *testing.T) {
	for _, c := range [][2]string{{"sandbox", "sandbox"}, {"insecure", "sandbox"}, {"sandbox", "insecure"}} {
		builder := exec.Command("/proc/self/exe", "beside", busybox(t), busybox(t), t.TempDir(), t.TempDir(), c[0], c[1])
		builder.Args[0] = os.Args[0]
		builder.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
		b, err := builder.CombinedOutput()
		if err != nil {
			t.Fatalf("builder: %v\n%s", err, b)
		}
		if out := string(b); !strings.Contains(out, "looked at") || strings.Contains(out, "token of the other") || strings.Contains(out, "file of the other") {
			t.Errorf("%s beside %s: a RUN reads the secrets of the one beside it: %s", c[1], c[0], out)
		}
	}
}

// playBeside runs a command, and another that looks for it.
func playBeside(args []string) {
	enterCovered()
	spec := func(root, state, security, script string, out io.Writer) sandbox.Spec {
		return sandbox.Spec{Root: root, StateDir: state, Insecure: security == "insecure", Args: []string{"/bin/sh", "-c", script},
			Env: []string{"PATH=/bin"}, Stdout: out, Stderr: out}
	}
	ready, begun := io.Pipe()
	ended := make(chan error, 1)
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		s := spec(args[0], args[2], args[4], "echo file of the other > /tmp/secret; echo ready; sleep 60", begun)
		s.Env = append(s.Env, "TOKEN=token of the other")
		ended <- sandbox.Run(ctx, s)
	}()
	if _, err := io.ReadFull(ready, make([]byte, len("ready\n"))); err != nil {
		fmt.Println("the other:", err)
		os.Exit(1)
	}
	err := sandbox.Run(context.Background(), spec(args[1], args[3], args[5], `
		n=0; for p in /proc/[0-9]*; do n=$((n+1)); cat $p/environ; cat $p/root/tmp/secret; done 2>/dev/null; echo looked at $n`, os.Stdout))
	stop()
	<-ended
	if err != nil {
		fmt.Println("run:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func whereProcIsCovered(t *testing.T, security string) {
	root, state := busybox(t), t.TempDir()
	old(t, root)
	builder := exec.Command("/proc/self/exe", "covered", root, state, security)
	builder.Args[0] = os.Args[0]
	builder.Env = append(os.Environ(), "COOPER_CANARY=secret-of-the-builder")
	builder.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	b, err := builder.CombinedOutput()
	out := string(b)
	if err != nil {
		t.Fatalf("builder: %v\n%s", err, out)
	}
	if !strings.Contains(out, "note: the kernel refuses a fresh /proc") {
		t.Errorf("nobody is told about the weaker /proc: %s", out)
	}
	if strings.Contains(out, "secret-of-the-builder") {
		t.Errorf("the command read the builder's environment: %s", out)
	}
	for _, want := range []string{"self 0\n", "kill refused\n", "root refused\n", "oom_score_adj refused\n", "fd refused\n", "end\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q: %s", want, out)
		}
	}
}

func playInContainer(args []string) {
	enterCovered()
	script := fmt.Sprintf(`
		test -e /proc/self/status; echo self $?
		for p in /proc/[0-9]*; do cat $p/environ; done 2>/dev/null | grep -a CANARY
		kill -9 %[1]d 2>/dev/null || echo kill refused
		ls /proc/%[1]d/root/ >/dev/null 2>&1 || echo root refused
		(echo 1000 > /proc/%[1]d/oom_score_adj) 2>/dev/null || echo oom_score_adj refused
		readlink /proc/%[1]d/fd/0 || head -c 1 /proc/%[1]d/fd/3 2>/dev/null || echo fd refused
		echo end`, os.Getpid())
	network := sandbox.Host
	if args[2] == "insecure" {
		network = sandbox.None // so that a fresh /sys is tried, too
	}
	err := sandbox.Run(context.Background(), sandbox.Spec{
		Root: args[0], StateDir: args[1], Insecure: args[2] == "insecure", Network: network,
		Args:   []string{"/bin/sh", "-c", script},
		Env:    []string{"PATH=/bin"},
		Limits: sandbox.Limits{Processes: 20}, // not of those that the outer /proc shows, too
		Note:   func(note string) { fmt.Println("note:", note) },
		Stdout: os.Stdout, Stderr: os.Stderr,
	})
	if err != nil {
		fmt.Println("run:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// enterCovered covers a part of /proc and runs this program again in a user namespace, unless this is it.
func enterCovered() {
	if _, ok := userns.Inside(); !ok {
		if err := unix.Mount("/dev/null", "/proc/keys", "", unix.MS_BIND, ""); err != nil {
			fmt.Println("cover:", err)
			os.Exit(1)
		}
		code, err := userns.Enter(context.Background(), os.Args, os.Environ(), userns.Options{})
		if err != nil {
			fmt.Println("enter:", err)
		}
		os.Exit(code)
	}
}
