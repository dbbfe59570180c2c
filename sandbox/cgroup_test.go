package sandbox

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// hierarchy is a directory with what the kernel would put into one of control groups.
func hierarchy(t *testing.T, files map[string]string) (root *os.File, read func(name string) string) {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		at := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o755), os.WriteFile(at, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root, func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err.Error()
		}
		return string(b)
	}
}

func TestBuilderMakesRoomInAGroupThatItHasForItself(t *testing.T) {
	own := cgroupFacts{Unified: true, Own: "/user/run.scope", Delegated: "/user"}
	for _, c := range []struct {
		name  string
		facts cgroupFacts
		procs string
		want  string
		moved bool
	}{
		{"alone", own, "41\n42\n", "/user/run.scope", true},
		{"has moved before", cgroupFacts{Unified: true, Own: "/user/run.scope/cooper-builder", Delegated: "/user"}, "", "/user/run.scope", false},
		{"a shell is there, too", own, "7\n41\n42\n", "", false},
		{"a process of another pid namespace is there", own, "0\n41\n42\n", "", false},
		{"nothing is delegated", cgroupFacts{Unified: true, Own: "/user/run.scope"}, "41\n42\n", "", false},
		{"version 1", cgroupFacts{}, "", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			root, read := hierarchy(t, map[string]string{
				"user/run.scope/cgroup.procs":                c.procs,
				"user/run.scope/cgroup.subtree_control":      "",
				"user/run.scope/cooper-builder/cgroup.procs": "",
			})
			at, ok := ownParent(root, c.facts, []int{42, 41})
			if at != c.want || ok != (c.want != "") {
				t.Errorf("parent is %q, %v, want %q", at, ok, c.want)
			}
			// each write replaces the one before in a file, and adds to it in the kernel
			if moved := read("user/run.scope/cooper-builder/cgroup.procs") != ""; moved != c.moved {
				t.Errorf("the builder was moved: %v, want %v", moved, c.moved)
			}
			if enabled := read("user/run.scope/cgroup.subtree_control"); strings.Contains(enabled, "+cpu") != c.moved {
				t.Errorf("controllers are %q", enabled)
			}
		})
	}
}

func TestGroupKeepsWhatItHasControllersFor(t *testing.T) {
	asked := Limits{Memory: 512 << 20, Processes: 100, CPUs: 1.5, Time: 7}
	files := map[string]string{
		"g/memory.max": "", "g/memory.swap.max": "", "g/memory.oom.group": "", "g/pids.max": "", "g/cpu.max": "",
		"g/memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 1\n",
	}
	root, read := hierarchy(t, files)
	g := &cgroup{parent: root, name: "g"}
	g.limit(asked)
	got := map[string]string{}
	for name := range files {
		got[name] = read(name)
	}
	want := map[string]string{
		"g/memory.max": "536870912", "g/memory.swap.max": "0", "g/memory.oom.group": "1", "g/pids.max": "100", "g/cpu.max": "150000 100000",
		"g/memory.events": files["g/memory.events"],
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("the group's files (-want +got):\n%s", d)
	}
	if left := g.unkept(asked); left != (Limits{Time: 7}) {
		t.Errorf("left to keep are %+v, want the time only", left)
	}
	if !g.outOfMemory() {
		t.Error("the kernel killed in the group, and nobody will know why the command ended")
	}

	root, _ = hierarchy(t, map[string]string{"g/pids.max": ""})
	g = &cgroup{parent: root, name: "g"}
	g.limit(asked)
	if left := g.unkept(asked); left != (Limits{Memory: 512 << 20, CPUs: 1.5, Time: 7}) {
		t.Errorf("left to keep are %+v: a limit that nobody keeps is none", left)
	}
	if g.outOfMemory() {
		t.Error("out of memory without a limit of it")
	}
}

func TestHalfAProcessorIsNeverMadeAWholeOne(t *testing.T) {
	four := choiceOf(1, 3, 5, 7)
	for _, c := range []struct {
		cpus float64
		want []int
	}{{0, []int{1, 3, 5, 7}}, {1, []int{1}}, {3, []int{1, 3, 5}}, {4, []int{1, 3, 5, 7}}, {7.5, []int{1, 3, 5, 7}}, {0.5, nil}, {2.5, nil}} {
		got, err := choose(four, c.cpus)
		if c.want == nil {
			if err == nil {
				t.Errorf("%v processors became %d", c.cpus, got.Count())
			}
			continue
		}
		if err != nil || got != choiceOf(c.want...) {
			t.Errorf("%v processors: %v, %v, want %v", c.cpus, got, err, c.want)
		}
	}
}

// A limit that is found broken when the command has ended by itself did not end it.
func TestEndOfTheCommandCountsWhereALimitCameTooLate(t *testing.T) {
	ctx, dog := newWatchdog(context.Background(), Limits{})
	dog.kill(beyondProcesses(1))
	for script, want := range map[string]string{"exit 0": "<nil>", "exit 3": "exit code 3", "kill -9 $$": "killed, because it had more than 1 processes and threads (--pids-limit)"} {
		if err := verdict(ctx, ended(t, script), false); errorText(err) != want {
			t.Errorf("%s gives %v, want %s", script, err, want)
		}
	}
}

func ended(t *testing.T, script string) *os.ProcessState {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", script)
	cmd.Run()
	return cmd.ProcessState
}

func errorText(err error) string {
	if err == nil {
		return "<nil>"
	}
	return err.Error()
}

func choiceOf(cpus ...int) (set unix.CPUSet) {
	for _, i := range cpus {
		set.Set(i)
	}
	return set
}
