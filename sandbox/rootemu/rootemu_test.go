package rootemu_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/nstest"
	"github.com/cooper-build/cooper/sandbox"
	"github.com/cooper-build/cooper/sandbox/rootemu"
)

func TestMain(m *testing.M) {
	nstest.Main(m)
}

// The tests here run with many ids as well. There the kernel answers, and so says whether the tests are right.

// probe runs testdata/probe.c in a sandbox and returns its lines.
func probe(t *testing.T, change func(*sandbox.Spec), args ...string) []string {
	t.Helper()
	root := newRoot(t)
	var out bytes.Buffer
	s := sandbox.Spec{Root: root, Args: append([]string{"/probe"}, args...), Env: []string{"PATH=/bin"}, StateDir: t.TempDir(), Stdout: &out, Stderr: &out}
	change(&s)
	if err := sandbox.Run(t.Context(), s); err != nil {
		t.Fatalf("run %q: %v\n%s", s.Args, err, out.String())
	}
	return strings.Split(strings.TrimRight(out.String(), "\n"), "\n")
}

// newRoot makes a root directory with the probe and a shell.
func newRoot(t *testing.T) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "root")
	for _, dir := range []string{"bin", "etc", "tmp"} {
		must(t, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	busybox, err := exec.LookPath("busybox")
	must(t, err)
	program, err := os.ReadFile(busybox)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(root, "bin/busybox"), program, 0o755))
	for _, a := range []string{"sh", "id", "cp", "chown", "chmod", "printf"} {
		must(t, os.Symlink("busybox", filepath.Join(root, "bin", a)))
	}
	must(t, os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"), 0o644))
	compile := exec.Command("gcc", "-static", "-O1", "-w", "-pthread", "-o", filepath.Join(root, "probe"), "testdata/probe.c")
	if out, err := compile.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", compile.Args, err, out)
	}
	must(t, os.Chmod(root, 0o755))
	must(t, os.Chmod(filepath.Join(root, "tmp"), 0o777))
	return root
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func asRoot(*sandbox.Spec) {}

func TestTheCommandBeginsAsItsUser(t *testing.T) {
	for _, nnp := range []bool{false, true} {
		got := probe(t, func(s *sandbox.Spec) { s.UID, s.GID, s.Groups, s.NoNewPrivs = 1000, 1001, []uint32{7, 5}, nnp }, "first")
		want := []string{"/probe: 1000 1000 1000 1000 / 1001 1001 1001 1001", "groups: 2 5 7", "HOME=/home/app", "/tmp/f: 100644 1000:1001", "back to root: EPERM"}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("NoNewPrivs %v (-want +got):\n%s", nnp, d)
		}
	}
}

// TestIdsChangeAsTheKernelChangesThem tries all calls with all arguments from all states, and compares with the model.
func TestIdsChangeAsTheKernelChangesThem(t *testing.T) {
	states := [][3]int{{0, 0, 0}, {1, 1, 1}, {1, 0, 2}, {0, 1, 2}, {1, 2, 0}, {1, 2, 1}}
	for which, name := range []string{"users", "groups"} {
		lines := probe(t, asRoot, name)
		if len(lines) != len(states)*160 {
			t.Fatalf("%s: %d lines, want %d", name, len(lines), len(states)*160)
		}
		for _, line := range lines {
			var state, privileged int
			var call, result string
			var a [3]int
			var got [2][4]int
			_, err := fmt.Sscanf(line, "%d %s %d %d %d privileged=%d: %s : %d %d %d %d / %d %d %d %d", &state, &call, &a[0], &a[1], &a[2], &privileged, &result,
				&got[0][0], &got[0][1], &got[0][2], &got[0][3], &got[1][0], &got[1][1], &got[1][2], &got[1][3])
			if err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			s := states[state]
			before := [4]uint32{uint32(s[0]), uint32(s[1]), uint32(s[2]), uint32(s[1])}
			may := s[1] == 0 // who changes users is privileged by the user before the call
			if which == 1 {
				may = privileged == 1
			}
			after, errno := rootemu.Change(call, before, [3]uint32{uint32(a[0]), uint32(a[1]), uint32(a[2])}, may)
			want := "0"
			switch {
			case call == "setfs":
				want = fmt.Sprint(before[3])
			case errno != 0:
				want = unix.ErrnoName(errno)
			}
			var gotIDs [4]uint32
			for i, id := range got[which] {
				gotIDs[i] = uint32(id)
			}
			if result != want || gotIDs != after {
				t.Errorf("%s: %s\nthe model says %s %v", name, line, want, after)
			}
		}
	}
}

func TestWhoKeepsCapabilitiesMaySwitchUntilItGivesThemUp(t *testing.T) {
	want := `group: EPERM
groups: EPERM
user, after it gave that up: EPERM
group, which it did not: EPERM
group, as another program: 0
user, as another program: EPERM
group: 0
groups: 0
user, after it gave that up: EPERM
group, which it did not: 0
group, as another program: EPERM
user, as another program: EPERM`
	if d := cmp.Diff(strings.Split(want, "\n"), probe(t, asRoot, "kept")); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestFilesBelongToWhoMakesThem(t *testing.T) {
	want := `linkat: 0
bind: 0
device: EPERM
root's directory: EACCES
root's file: EACCES
root's file to read: 0
mkdir in root's: EACCES
symlink in root's: EACCES
rename into root's: EACCES
link into root's: EACCES
access: EACCES
access to read: 0
access to a directory: EACCES
access to own: 0
not there: ENOENT
there: EEXIST
device of root: EPERM
file: 100644 1000:1001
relative: 100644 1000:1001
up: 100644 1000:1001
creat: 100600 1000:1001
dangling: 120777 0:0
through: 100600 1000:1001
openat2: 100640 1000:1001
tmpfile: 100600 1000:1001
dir: 40750 1000:1001
link: 120777 1000:1001
pipe: 10600 1000:1001
node: 100600 1000:1001
socket: 140755 1000:1001
renamed: 100644 1000:1001
../sticky/file: 100644 1000:40
../sticky/dir: 42755 1000:40
../sticky/dir/deeper: 100644 1000:40
../sticky/root: 100644 0:40`
	if d := cmp.Diff(strings.Split(want, "\n"), probe(t, asRoot, "creation")); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestOwnersChange(t *testing.T) {
	want := `chown clears the bits: 100755 5:6
chown to nobody clears them too: 100755 5:6
group: 100755 5:7
user: 100755 8:7
other name: 100755 8:7
link: 120777 9:10
not what it leads to: 100755 8:7
through the link: 100755 11:12
not the link: 120777 9:10
through an absolute link: 100755 13:14
by a path with dots: 100755 15:16
directory keeps its bits: 40755 1:2
pipe: 10600 3:4
renamed pipe: 10600 3:4
renamed link: 120777 9:10
fchown: 100755 20:21
fchown of a path: EBADF
fchownat: 100755 23:24
fchownat of a descriptor: 100755 25:26
fchownat of a link: 120777 27:28
by /proc/self/fd: 100755 30:31
stats: 30 31 30 31, same file 1
unlinked: 30:31
a new link is root's: 120777 0:0
absent: ENOENT
bad address: EFAULT
give away: EPERM
same: 0
foreign group: EPERM
another's: EPERM
capability: EPERM
own group: 0
own group: 100644 1000:5
capability of root: 0
attributes: 20 security.capability
after chown: 0
of a link: 0 ENODATA
access list: 0
its mode: 40761 0:0
the list: 44, mask 5, 24 system.posix_acl_access
no list: 0
gone: ENODATA
default list: 44
record: ENODATA
dot dot above the root: 0
by a path above the root: 100644 40:41
null: 0`
	if d := cmp.Diff(strings.Split(want, "\n"), probe(t, asRoot, "changes")); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestProcessesKeepWhoTheyAre(t *testing.T) {
	want := `orphan: 1000
thread: 1000
after vfork: 0
limit: 0 0
groups: 0 3 3 5 9 EINVAL 3
./tool: 1000 0 0 0 / 1001 1001 1001 1001
./owned: 1000 70 70 70 / 1001 1001 1001 1001
./gtool: 1000 1000 1000 1000 / 1001 71 71 71
/probe: 1000 1000 1000 1000 / 1001 1001 1001 1001
/probe: 1000 1000 1000 1000 / 1001 1001 1001 1001
./tool: 1000 1000 1000 1000 / 1001 1001 1001 1001
cannot execute: EACCES
is who it was: 1000 1000 1000 1000 / 1001 1001 1001 1001
peer: 0
peer is 1000:1001, us 1
chroot: EPERM
in a jail: 100644 50:51
by a link in it: 100644 52:53
by a path out of it: 100644 54:55
from outside: 100644 54:55
outside: 100644 0:0`
	if d := cmp.Diff(strings.Split(want, "\n"), probe(t, asRoot, "processes")); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// TestADeadSupervisorEndsTheRun by taking its listener away.
func TestADeadSupervisorEndsTheRun(t *testing.T) {
	if !nstest.Single() {
		t.Log("there is no supervisor with many ids; the single-id run of this test is the one that counts")
		return
	}
	root := newRoot(t)
	s := sandbox.Spec{Root: root, Args: []string{"/bin/sh", "-c", "echo up; while :; do id -u; done"}, Env: []string{"PATH=/bin"}, StateDir: t.TempDir()}
	s.Stdout = writerFunc(func(b []byte) (int, error) { takeListeners(t); return len(b), nil })
	ended := make(chan error, 1)
	go func() { ended <- sandbox.Run(t.Context(), s) }()
	select {
	case err := <-ended:
		if err == nil || !strings.Contains(err.Error(), "emulate root") {
			t.Errorf("the run ended with %v; a command that is nobody any more must not go on", err)
		}
	case <-time.After(time.Minute):
		t.Error("the run hangs")
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func takeListeners(t *testing.T) {
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Error(err)
		return
	}
	defer null.Close()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Error(err)
	}
	for _, fd := range fds {
		n, _ := strconv.Atoi(fd.Name())
		if to, _ := os.Readlink("/proc/self/fd/" + fd.Name()); strings.Contains(to, "seccomp") {
			if err := unix.Dup3(int(null.Fd()), n, unix.O_CLOEXEC); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestInventedCredentialsDoNotFillTheBuildersMemory: what a process believes to be is kept by the builder.
func TestInventedCredentialsDoNotFillTheBuildersMemory(t *testing.T) {
	if !nstest.Single() {
		t.Log("there is no supervisor with many ids; the single-id run of this test is the one that counts")
		return
	}
	got := probe(t, asRoot, "invent")
	if want := []string{"groups: EAGAIN", "users: EAGAIN", "known: 0"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q: a command could take all the memory of the machine", got, want)
	}
}
