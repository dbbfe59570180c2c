package sandbox_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cooper-build/cooper/internal/nstest"
	"github.com/cooper-build/cooper/sandbox"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "probe" {
		probe()
	}
	if len(os.Args) > 5 && os.Args[1] == "builder" {
		playBuilder(os.Args[2], os.Args[3], os.Args[4], os.Args[5:])
	}
	if len(os.Args) > 7 && os.Args[1] == "beside" {
		playBeside(os.Args[2:])
	}
	if len(os.Args) > 4 && os.Args[1] == "covered" {
		playInContainer(os.Args[2:])
	}
	if len(os.Args) > 5 && os.Args[1] == "isolation" {
		playIsolation(os.Args[2], os.Args[3], os.Args[4], os.Args[5])
	}
	nstest.Main(m)
}

// applets are what the tests call of busybox.
var applets = []string{"sh", "true", "false", "cat", "grep", "ls", "id", "sleep", "touch", "mkdir", "rm", "rmdir", "mv", "ln", "echo", "ip", "hostname", "uname", "head", "dd", "kill", "env", "stat", "readlink", "pwd", "chmod", "chown", "test", "seq", "yes", "df"}

// busybox makes a root directory with a static busybox and an /etc, and
// without /proc, /dev, /sys or any of the files the sandbox generates.
func busybox(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatalf("these tests need the package busybox-static: %v", err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(t.TempDir(), "root")
	mkdir(t, filepath.Join(root, "bin"))
	mkdir(t, filepath.Join(root, "etc"))
	mkdir(t, filepath.Join(root, "tmp"))
	write(t, filepath.Join(root, "bin/busybox"), string(b), 0o755)
	write(t, filepath.Join(root, "etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n", 0o644)
	for _, a := range applets {
		symlink(t, "busybox", filepath.Join(root, "bin", a))
	}
	return root
}

func mkdir(t *testing.T, path string) {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
}

func symlink(t *testing.T, target, path string) {
	t.Helper()
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

func shell(t *testing.T, root, script string) sandbox.Spec {
	t.Helper()
	return sandbox.Spec{
		Root:     root,
		Args:     []string{"/bin/sh", "-c", script},
		Env:      []string{"PATH=/bin", "HOME=/root"},
		StateDir: stateDir(t),
	}
}

// stateDir fails the test if a run leaves something in it.
func stateDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() {
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("a run left %v in its state directory", left)
		}
	})
	return dir
}

// run runs s and returns what it printed.
func run(t *testing.T, s sandbox.Spec) (string, error) {
	t.Helper()
	var out bytes.Buffer
	s.Stdout, s.Stderr = &out, &out
	err := sandbox.Run(context.Background(), s)
	return out.String(), err
}

// mustRun is run for commands that have to succeed.
func mustRun(t *testing.T, s sandbox.Spec) string {
	t.Helper()
	out, err := run(t, s)
	if err != nil {
		t.Fatalf("run %q: %v\n%s", s.Args, err, out)
	}
	return out
}

func TestExitStatusAndOutputOfTheCommand(t *testing.T) {
	root := busybox(t)
	for _, c := range []struct {
		name, script, output string
		want                 sandbox.ExitError
	}{
		{"success", "echo out; echo err >&2; echo out", "out\nerr\nout\n", sandbox.ExitError{}},
		{"failure", "echo before; exit 42", "before\n", sandbox.ExitError{Code: 42}},
		// pid 1 is immune to signals from inside that it does not handle
		{"signal of a child", "sh -c 'kill -9 $$'; exit $?", "Killed\n", sandbox.ExitError{Code: 137}},
		{"status of sh for a missing command", "nonsense 2>/dev/null", "", sandbox.ExitError{Code: 127}},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, err := run(t, shell(t, root, c.script))
			var got sandbox.ExitError
			var exit *sandbox.ExitError
			if errors.As(err, &exit) {
				got = *exit
			} else if err != nil {
				t.Fatalf("run: %v", err)
			}
			if got != c.want {
				t.Errorf("end is %+v, want %+v", got, c.want)
			}
			if out != c.output {
				t.Errorf("output is %q, want %q", out, c.output)
			}
		})
	}
}

func TestCommandThatDoesNotExistIsNamed(t *testing.T) {
	s := shell(t, busybox(t), "")
	s.Args = []string{"nonsense", "arg"}
	_, err := run(t, s)
	var exit *sandbox.ExitError
	if err == nil || errors.As(err, &exit) || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("error is %v, want one that names the command", err)
	}
}

// What is found on the path and cannot be executed is the command all the same: another of its name further along is not what was meant.
func TestACommandWithoutItsInterpreterIsNotLookedForFurther(t *testing.T) {
	root := busybox(t)
	mkdir(t, filepath.Join(root, "one"))
	mkdir(t, filepath.Join(root, "two"))
	write(t, filepath.Join(root, "one", "both"), "#!/none\n", 0o755)
	write(t, filepath.Join(root, "two", "both"), "#!/bin/sh\necho the wrong one\n", 0o755)
	write(t, filepath.Join(root, "one", "second"), "#!/bin/sh\necho not executable\n", 0o644)
	write(t, filepath.Join(root, "two", "second"), "#!/bin/sh\necho the second\n", 0o755)
	for name, want := range map[string][2]string{
		"both":   {"", "start both: execute /one/both: no such file or directory"},
		"second": {"the second\n", ""},
		"none":   {"", "start none: executable file not found in $PATH"},
	} {
		s := shell(t, root, "")
		s.Args, s.Env = []string{name}, []string{"PATH=relative:/none:/one:/two:/bin"}
		out, err := run(t, s)
		said := ""
		if err != nil {
			said = err.Error()
		}
		if out != want[0] || said != want[1] {
			t.Errorf("%s: it printed %q and ended with %q, want %q and %q", name, out, said, want[0], want[1])
		}
	}
}
