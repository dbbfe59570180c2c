package emulate_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/cooper-build/cooper/internal/nstest"
	"github.com/cooper-build/cooper/internal/testimage"
	"github.com/cooper-build/cooper/sandbox"
	"github.com/cooper-build/cooper/sandbox/emulate"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	nstest.Main(m)
}

// foreign are architectures that this machine's sandboxes do not execute. The
// second is one of 32 bits, which the kernel of the machine could execute itself.
func foreign() []string {
	if runtime.GOARCH == "amd64" {
		return []string{"arm64", "386"}
	}
	return []string{"amd64", "386"}
}

// path is where the tests look for qemu.
var path = []string{"/usr/local/bin", "/usr/bin", "/bin"}

// needsTable skips where the kernel keeps one table for all.
func needsTable(t *testing.T) {
	t.Helper()
	fd, err := unix.Fsopen("binfmt_misc", unix.FSOPEN_CLOEXEC)
	if err == nil {
		defer unix.Close(fd)
		err = unix.FsconfigCreate(fd)
	}
	if err != nil {
		t.Skipf("kernel lacks binfmt_misc in user namespaces: %v", err)
	}
}

func root(t *testing.T, arch string) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "root")
	for _, dir := range []string{"bin", "etc", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	busybox := testimage.ReadFile(t, testimage.BusyboxFor(t, arch), "bin/busybox")
	if err := os.WriteFile(filepath.Join(root, "bin/busybox"), busybox, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, applet := range []string{"sh", "ls", "cat", "uname", "id", "sleep", "true", "grep", "seq", "wget", "stat", "touch", "su"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", applet)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func run(t *testing.T, root, script string, change func(*sandbox.Spec)) (string, error) {
	t.Helper()
	var out bytes.Buffer
	s := sandbox.Spec{Root: root, Args: []string{"/bin/sh", "-c", script}, Env: []string{"PATH=/bin"}, StateDir: t.TempDir(), Stdout: &out, Stderr: &out}
	if change != nil {
		change(&s)
	}
	err := sandbox.Run(context.Background(), s)
	return out.String(), err
}

func TestForeignProgramsRun(t *testing.T) {
	needsTable(t)
	for _, arch := range foreign() {
		t.Run(arch, func(t *testing.T) {
			root := root(t, arch)
			if out, err := run(t, root, "echo ran", nil); err == nil {
				t.Fatalf("a program for %s ran without an emulator: %s", arch, out)
			}
			machine := hostTable(t)
			e := emulate.New(path)
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					if err := e.Enable(arch); err != nil {
						t.Errorf("enable: %v", err)
					}
				})
			}
			wg.Wait()
			for _, c := range []struct {
				name, script, want string
				change             func(*sandbox.Spec)
			}{
				{"machine", "uname -m", machines[arch] + "\n", nil},
				{"pipes and children", "seq 1 1000 | grep -c 7; (sleep 0.01; echo child) & wait; test -e /proc/self/exe && echo proc", "271\nchild\nproc\n", nil},
				{"its own name", "exec -a echo /bin/busybox named", "named\n", nil},
				{"what cannot be read", "id -u", "0\n", func(s *sandbox.Spec) { os.Chmod(filepath.Join(s.Root, "bin/busybox"), 0o711) }},
				{"insecure", "uname -m", machines[arch] + "\n", func(s *sandbox.Spec) { s.Insecure = true }},
				{"without a network", "uname -m", machines[arch] + "\n", func(s *sandbox.Spec) { s.Network = sandbox.None }},
				{"no trace of qemu", "ls / /bin | grep -c qemu; grep -c binfmt /proc/mounts", "0\n0\n", func(s *sandbox.Spec) { s.Args[2] += "; true" }},
			} {
				out, err := run(t, root, c.script, c.change)
				if err != nil || out != c.want {
					t.Errorf("%s: got %q, %v; want %q", c.name, out, err, c.want)
				}
			}
			if now := hostTable(t); now != machine {
				t.Errorf("the machine's table changed from %q to %q", machine, now)
			}
			if err := e.Close(); err != nil {
				t.Error(err)
			}
			if out, err := run(t, root, "echo ran", nil); err == nil {
				t.Errorf("a program for %s runs after Close: %s", arch, out)
			}
		})
	}
}

var machines = map[string]string{"arm64": "aarch64", "amd64": "x86_64", "386": "i686"}

// A setuid program has the same effect as without emulation.
func TestForeignSetuidProgramsWork(t *testing.T) {
	needsTable(t)
	if nstest.Single() {
		t.Skip("needs subordinate ids")
	}
	root := root(t, foreign()[0])
	if err := os.Chmod(filepath.Join(root, "bin/busybox"), 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	users := "root::0:0:root:/:/bin/sh\napp::1000:1000:app:/:/bin/sh\n"
	if err := os.WriteFile(filepath.Join(root, "etc/passwd"), []byte(users), 0o644); err != nil {
		t.Fatal(err)
	}
	e := emulate.New(path)
	defer e.Close()
	if err := e.Enable(foreign()[0]); err != nil {
		t.Fatal(err)
	}
	asApp := func(s *sandbox.Spec) { s.UID, s.GID = 1000, 1000 }
	if out, err := run(t, root, "id -u; su root -c 'id -u'", asApp); err != nil || out != "1000\n0\n" {
		t.Errorf("got %q, %v; want su to make the user root", out, err)
	}
	inert := func(s *sandbox.Spec) { asApp(s); s.NoNewPrivs = true }
	if out, err := run(t, root, "su root -c 'id -u'", inert); err == nil {
		t.Errorf("su made the user root in spite of NoNewPrivs: %q", out)
	}
}

// hostTable describes the machine's binfmt_misc as the test's outermost view has it.
func hostTable(t *testing.T) string {
	t.Helper()
	entries, err := os.ReadDir("/proc/sys/fs/binfmt_misc")
	if err != nil {
		return err.Error()
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// What is registered is in force for the builder's own programs, too: they stay what they are.
func TestNativeProgramsStayNative(t *testing.T) {
	needsTable(t)
	e := emulate.New(path)
	defer e.Close()
	for _, arch := range foreign() {
		if err := e.Enable(arch); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command("uname", "-m").Output()
	if native := map[string]string{"amd64": "x86_64\n", "arm64": "aarch64\n"}[runtime.GOARCH]; err != nil || string(out) != native {
		t.Errorf("uname says %q, %v", out, err)
	}
}

func TestWithoutQemuTheErrorSaysWhatToInstall(t *testing.T) {
	if strings.Contains(hostTable(t), "qemu") {
		t.Skip("kernel lacks nothing here: the machine has emulators for everybody")
	}
	e := emulate.New([]string{t.TempDir()})
	defer e.Close()
	err := e.Enable(foreign()[0])
	hint, ok := err.(interface{ Hint() string })
	if !ok || !strings.Contains(hint.Hint(), "apt-get install qemu-user-static") {
		t.Errorf("error is %v, want a hint what to install", err)
	}
}

// The machine's table is played by the one of this namespace, shown at the place of the machine's.
func TestMachinesOwnEmulatorIsUsedWhereThereIsNoQemu(t *testing.T) {
	needsTable(t)
	arch := foreign()[0]
	e := emulate.New(path)
	defer e.Close()
	if err := e.Enable(arch); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("binfmt_misc", "/proc/sys/fs/binfmt_misc", "binfmt_misc", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount("/proc/sys/fs/binfmt_misc", unix.MNT_DETACH)
	bare := emulate.New([]string{t.TempDir()})
	defer bare.Close()
	if err := bare.Enable(arch); err != nil {
		t.Errorf("an emulator that is registered already is not enough: %v", err)
	}
	if err := bare.Enable("riscv64"); err == nil {
		t.Error("one architecture's emulator is taken for another's")
	}
}

func TestTwoEmulatorsShareANamespace(t *testing.T) {
	needsTable(t)
	arch := foreign()[0]
	root := root(t, arch)
	first, second := emulate.New(path), emulate.New(path)
	defer second.Close()
	for _, e := range []*emulate.Emulator{first, second, first} {
		if err := e.Enable(arch); err != nil {
			t.Fatal(err)
		}
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if out, err := run(t, root, "echo ran", nil); err != nil {
		t.Errorf("the end of one build's emulation ended another's: %q, %v", out, err)
	}
}
