package sandbox_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/nstest"
	"github.com/cooper-build/cooper/owner"
	"github.com/cooper-build/cooper/sandbox"
)

func TestCommandSeesItsUlimits(t *testing.T) {
	s := shell(t, busybox(t), "ulimit -Sn; ulimit -Hn; ulimit -Sc; ulimit -Hc; ulimit -St; ulimit -Ht; ulimit -Su")
	s.Ulimits = []sandbox.Ulimit{{Name: "nofile", Soft: 100, Hard: 200}, {Name: "cpu", Soft: 50, Hard: 60}, {Name: "nproc", Soft: 1000, Hard: 1000}}
	if got, want := mustRun(t, s), "100\n200\n0\n0\n50\n60\n1000\n"; got != want {
		t.Errorf("limits inside are %q, want %q", got, want)
	}
	s = shell(t, busybox(t), "ulimit -Hs")
	var now unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &now); err != nil {
		t.Fatal(err)
	}
	s.Ulimits = []sandbox.Ulimit{{Name: "nofile", Soft: 10, Hard: int64(now.Max) + 1}}
	_, err := run(t, s)
	var hint interface{ Hint() string }
	if !errors.As(err, &hint) || !strings.Contains(hint.Hint(), fmt.Sprintf("nofile=%d or less", now.Max)) {
		t.Errorf("error is %v, want a hint with the hard limit %d", err, now.Max)
	}
}

func TestCgroupParent(t *testing.T) {
	parent := os.Getenv("COOPER_TEST_CGROUP")
	s := shell(t, busybox(t), "cat /proc/self/cgroup")
	s.CgroupParent = parent
	if parent == "" { // no delegation: the likely case
		s.CgroupParent = "/cooper-none"
		_, err := run(t, s)
		var hint interface{ Hint() string }
		if !errors.As(err, &hint) || hint.Hint() == "" || !strings.Contains(err.Error(), "cgroup parent /cooper-none") {
			t.Errorf("error is %v, want it to name the parent and to have a hint", err)
		}
		return
	}
	if out := mustRun(t, s); !strings.Contains(out, "/"+filepath.Base(parent)+"/cooper-run-") {
		t.Errorf("control groups of the command are %s, want one below %s", out, parent)
	}
	if left, err := filepath.Glob(filepath.Join("/sys/fs/cgroup", parent, "cooper-*")); err != nil || len(left) > 0 {
		t.Errorf("groups are left: %v, %v", left, err)
	}
}

func TestCommandReachesASocketThatIsMounted(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long/", 40))
	mkdir(t, dir)
	socket, err := sandbox.Listen(dir, "agent.sock", 0, 0, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	go func() {
		for {
			c, err := socket.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "the agent\n")
			c.Close()
		}
	}()
	for _, network := range []sandbox.Network{sandbox.Host, sandbox.None} {
		f := probed(t, func(s *sandbox.Spec) {
			root := s.Root
			old(t, root)
			before := listing(t, root)
			t.Cleanup(func() {
				if diff := cmp.Diff(before, listing(t, root)); diff != "" {
					t.Errorf("the mount point is in the layer (-before +after):\n%s", diff)
				}
			})
			s.Network = network
			s.Args = []string{"/probe", "probe", "dial", "/run/buildkit/ssh_agent.0"}
			s.Mounts = append(s.Mounts, sandbox.Mount{Source: filepath.Join(dir, "agent.sock"), Target: "/run/buildkit/ssh_agent.0"})
		})
		if f.Agent != "the agent\n" || f.Mode != "Srw-------" {
			t.Errorf("network %d: the command read %q from a socket with mode %s", network, f.Agent, f.Mode)
		}
	}
}

// dial answers for the probe.
func dial(path string) (answer, mode string) {
	if st, err := os.Stat(path); err == nil {
		mode = st.Mode().String()
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		return err.Error(), mode
	}
	b, _ := io.ReadAll(c)
	return string(b), mode
}

func TestSocketHasTheOwnerAndModeThatWereAskedFor(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		uid, gid uint32
		mode     os.FileMode
	}{{0, 0, 0o600}, {0, 0, 0o666}, {1000, 1001, 0o660}} {
		name := fmt.Sprint(c)
		l, err := sandbox.Listen(dir, name, c.uid, c.gid, c.mode)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil {
			t.Fatal(err)
		}
		if nstest.Single() {
			fd, err := unix.Open(filepath.Join(dir, name), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			recorded, err := owner.Read("/proc/self/fd/"+strconv.Itoa(fd), st.Mode)
			unix.Close(fd)
			if err != nil {
				t.Fatal(err)
			}
			st.Uid, st.Gid = recorded.UID, recorded.GID
		}
		if st.Mode != unix.S_IFSOCK|uint32(c.mode) || st.Uid != c.uid || st.Gid != c.gid {
			t.Errorf("socket is %o of %d:%d, want %v", st.Mode, st.Uid, st.Gid, c)
		}
	}
	for _, name := range []string{"", ".", "..", "../x", "a/b"} {
		if l, err := sandbox.Listen(dir, name, 0, 0, 0o600); err == nil {
			l.Close()
			t.Errorf("a socket was made under the name %q", name)
		}
	}
	if _, err := sandbox.Listen(dir, fmt.Sprint(struct {
		uid, gid uint32
		mode     os.FileMode
	}{0, 0, 0o600}), 0, 0, 0o600); err == nil {
		t.Error("a second socket took the place of the first")
	}
}
