package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cooper-build/cooper/internal/testimage"
)

// stubbornDockerfile's RUN ignores what it can, starts a process that is nobody's child, and changes its ids where it may, which
// takes the death signal of the kernel away.
const stubbornDockerfile = `FROM base
RUN --mount=type=tmpfs,target=/t --mount=type=secret,id=s,required=false trap '' TERM INT HUP QUIT; (sleep 1000 &); echo ready; as=$(su root -c true && echo su root); exec ${as:-sh} -c "trap '' TERM INT HUP QUIT; while true; do sleep 1000; done"
`

// TestASignalEndsABuildAndAllThatItStarted sends each signal to the process that the user started, and to no other.
func TestASignalEndsABuildAndAllThatItStarted(t *testing.T) {
	for _, c := range []struct {
		signal syscall.Signal
		code   int
	}{{syscall.SIGINT, exitInterrupted}, {syscall.SIGTERM, exitInterrupted}, {syscall.SIGHUP, exitInterrupted}, {syscall.SIGKILL, -1}} {
		t.Run(c.signal.String(), func(t *testing.T) { signalEnds(t, c.signal, c.code) })
	}
}

func signalEnds(t *testing.T, signal syscall.Signal, code int) {
	context, store := t.TempDir(), newStore(t)
	if err := os.WriteFile(filepath.Join(context, "Dockerfile"), []byte(stubbornDockerfile), 0o644); err != nil {
		t.Fatal(err)
	}
	var log logUntil
	log.ready = make(chan struct{})
	victim := exec.Command("cooper", "--root", store, "build", "--progress", "plain", "--build-context", "base=oci-layout://"+testimage.Busybox(t)+":latest", context)
	victim.Stderr = &log
	victim.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- victim.Wait() }()
	select {
	case <-log.ready:
	case err := <-ended:
		t.Fatalf("build: %v\n%s", err, log.text.String())
	}
	time.Sleep(300 * time.Millisecond) // until su is there
	family := descendants(t, victim.Process.Pid)
	if len(family) < 5 { // cooper twice, the guard, su, two of sleep
		t.Fatalf("the build has only these processes: %v", family)
	}
	if len(temporary(t, store)) == 0 {
		t.Fatal("the build has no temporary files where this test looks for them")
	}
	began := time.Now()
	victim.Process.Signal(signal)
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Errorf("the build goes on after %v", signal)
		victim.Process.Kill()
	}
	for len(family) > 0 && time.Since(began) < 5*time.Second {
		for stat := range family {
			if !lives(stat) {
				delete(family, stat)
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
	if len(family) > 0 {
		t.Errorf("after 5 s these processes live on, and write to a store that nobody watches: %v", family)
	}
	if got := victim.ProcessState.ExitCode(); got != code {
		t.Errorf("exit code %d, want %d\n%s", got, code, log.text.String())
	}
	if signal == syscall.SIGKILL {
		return // what is left is swept by the next build, see TestAKilledBuildLeavesAStoreThatWorks
	}
	if left := temporary(t, store); len(left) > 0 {
		t.Errorf("files are left: %q", left)
	}
}

// descendants are the processes below pid, as lives wants them.
func descendants(t *testing.T, pid int) map[process]string {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	parents, all := map[int]int{}, map[int]process{}
	for _, name := range names {
		p, parent, ok := readProcess(name)
		if ok {
			parents[p.pid], all[p.pid] = parent, p
		}
	}
	family := map[process]string{}
	for pid2, p := range all {
		for at := pid2; at > 1; at = parents[at] {
			if at == pid {
				command, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid2))
				family[p] = string(bytes.ReplaceAll(command, []byte{0}, []byte{' '}))
				break
			}
		}
	}
	return family
}

// A process is told from a later one of the same number by the time of its start.
type process struct {
	pid   int
	start string
}

func readProcess(dir string) (p process, parent int, ok bool) {
	b, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return p, 0, false
	}
	_, after, _ := strings.Cut(string(b), ") ")
	fields := strings.Fields(after)
	if len(fields) < 20 || fields[0] == "Z" { // a zombie whose parent is not ours
		return p, 0, false
	}
	fmt.Sscan(filepath.Base(dir), &p.pid)
	fmt.Sscan(fields[1], &parent)
	p.start = fields[19]
	return p, parent, true
}

func lives(p process) bool {
	now, _, ok := readProcess(fmt.Sprintf("/proc/%d", p.pid))
	return ok && now == p
}

// temporary lists what a build has made for itself and should have removed.
func temporary(t *testing.T, store string) []string {
	t.Helper()
	var left []string
	err := filepath.WalkDir(store, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrPermission) {
			return nil // what a layer holds
		}
		if path != store && strings.Contains(filepath.Base(filepath.Dir(path)), "tmp") {
			left = append(left, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return left
}

// logUntil keeps what is written and tells when the RUN is ready.
type logUntil struct {
	text  bytes.Buffer
	ready chan struct{}
	told  bool
}

func (l *logUntil) Write(b []byte) (int, error) {
	l.text.Write(b)
	if !l.told && strings.Contains(l.text.String(), " ready\n") {
		l.told = true
		close(l.ready)
	}
	return len(b), nil
}
