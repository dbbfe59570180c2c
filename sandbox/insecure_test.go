package sandbox_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox"
)

func TestInsecureHasAllCapabilitiesAndNoFilter(t *testing.T) {
	builder := namespaces()
	f := probed(t, func(s *sandbox.Spec) { s.Insecure, s.Args = true, append(s.Args, "no calls") })
	last, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		t.Fatal(err)
	}
	var n uint
	fmt.Sscan(string(last), &n)
	full := fmt.Sprintf("%016x", uint64(1)<<(n+1)-1)
	for field, want := range map[string]string{
		"CapEff": full, "CapPrm": full, "CapBnd": full, "CapInh": full, "CapAmb": full, "Seccomp": "0", "Uid": "0 0 0 0",
	} {
		if got := f.Status[field]; got != want {
			t.Errorf("%s is %s, want %s", field, got, want)
		}
	}
	for name, link := range f.Namespaces {
		if shared := name == "net"; (link == builder[name]) != shared {
			t.Errorf("namespace %s is %s, the builder's is %s; shared should be %v: what is shared, the command has power over", name, link, builder[name], shared)
		}
	}
}

func TestInsecureCanMountAndMakeNamespaces(t *testing.T) {
	for _, c := range []struct {
		name, script string
		network      sandbox.Network
	}{
		{"tmpfs and bind", "mkdir /a /b && mount -t tmpfs t /a && echo x > /a/f && mount --bind /a /b && cat /b/f", sandbox.Host},
		{"overlay", "mkdir /a && mount -t tmpfs t /a && mkdir /a/l /a/u /a/w /a/m && echo x > /a/l/f && mount -t overlay -o userxattr,lowerdir=/a/l,upperdir=/a/u,workdir=/a/w o /a/m && echo y >> /a/m/f && test -e /a/u/f && head -n 1 /a/m/f", sandbox.Host},
		{"proc", "mkdir /a && mount -t proc p /a && test -e /a/1/status && echo x", sandbox.Host},
		{"nested user namespace", "unshare -r -m sh -c 'mount -t tmpfs t /tmp && echo x'", sandbox.Host},
		{"sysctl of the own network", "echo 1 > /proc/sys/net/ipv4/ip_forward && echo x", sandbox.None},
		{"sysfs", "test -d /sys/class/net/lo && grep -q '^sysfs /sys sysfs rw' /proc/mounts && echo x", sandbox.None},
		{"address of its own", "ip addr add 10.9.8.7/32 dev lo && echo x", sandbox.None},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := busybox(t)
			for _, a := range []string{"mount", "umount", "unshare"} {
				symlink(t, "busybox", filepath.Join(root, "bin", a))
			}
			before := mountsHere(t)
			s := shell(t, root, c.script)
			s.Insecure, s.Network = true, c.network
			if got := mustRun(t, s); got != "x\n" {
				t.Errorf("got %q", got)
			}
			if after := mountsHere(t); after != before {
				t.Errorf("mounts reached the builder; before\n%s\nafter\n%s", before, after)
			}
			s = shell(t, root, c.script)
			s.Network = c.network
			if out, err := run(t, s); err == nil {
				t.Errorf("the same works without being insecure: %s", out)
			}
		})
	}
}

func mountsHere(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// All capabilities are a tool against whoever shares the user namespace.
func TestInsecureHasNoPowerOverTheBuilder(t *testing.T) {
	root, outside := busybox(t), sentinel(t)
	for _, a := range []string{"mount", "umount", "nsenter"} {
		symlink(t, "busybox", filepath.Join(root, "bin", a))
	}
	locked := t.TempDir()
	write(t, filepath.Join(locked, "file"), "", 0o644)
	script := fmt.Sprintf(`
		mkdir /m /p
		test -e %[1]s && echo outside is in sight
		mount -o remount,rw /locked 2>/dev/null && touch /locked/x 2>/dev/null && echo read-only mount became writable
		umount /locked 2>/dev/null && echo mount of the builder came off
		echo end`, outside)
	s := shell(t, root, script)
	s.Insecure = true
	s.Mounts = []sandbox.Mount{{Source: locked, Target: "/locked", ReadOnly: true}}
	if got := mustRun(t, s); got != "end\n" {
		t.Errorf("the command broke out: %s", got)
	}
	if _, err := os.Stat(filepath.Join(locked, "x")); err == nil {
		t.Error("a command wrote to a read-only mount")
	}
}

// Who registers a binary format for the builder's user namespace decides what
// every program that the builder or another RUN starts really is.
func TestInsecureCannotTakeOverWhatOthersExecute(t *testing.T) {
	root, share := busybox(t), t.TempDir()
	symlink(t, "busybox", filepath.Join(root, "bin/mount"))
	s := shell(t, root, `mkdir /m && mount -t binfmt_misc none /m && echo ':evil:M::\x7fELF::/bin/busybox:F' > /m/register
		> /share/ready; while test ! -e /share/go; do :; done; /bin/busybox true 2>/dev/null && echo not in force`)
	s.Insecure = true
	s.Mounts = []sandbox.Mount{{Source: share, Target: "/share"}}
	done := make(chan string, 1)
	go func() {
		out, err := run(t, s)
		done <- fmt.Sprint(out, err)
	}()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if _, err := os.Stat(filepath.Join(share, "ready")); err == nil {
			break
		}
	}
	if got, err := run(t, shell(t, busybox(t), "/bin/busybox echo clean")); got != "clean\n" || err != nil {
		t.Errorf("a program in another sandbox is not itself any more: %q, %v", got, err)
	}
	write(t, filepath.Join(share, "go"), "", 0o644)
	if got := <-done; strings.Contains(got, "not in force") {
		t.Logf("this kernel has no binary formats per user namespace: %s", got)
	}
}

func TestInsecureCannotStopTheBuild(t *testing.T) {
	s := probing(t, busybox(t), "traced")
	s.Insecure = true
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := sandbox.Run(ctx, s); err == nil || !strings.Contains(err.Error(), "trace") {
		t.Errorf("run ended with %v: a command that is traced by the builder can hold or fool it", err)
	}
	if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); !errors.Is(err, unix.ECHILD) {
		t.Errorf("a process is left: %v", err)
	}
}

func TestInsecureKeepsOwnersOfTheBuild(t *testing.T) {
	root := busybox(t)
	s := shell(t, root, "touch /tmp/f && mkdir /tmp/d && chmod 4755 /tmp/f && id -u && stat -c %u:%g:%a /tmp/f")
	s.Insecure = true
	if got := mustRun(t, s); got != "0\n0:0:4755\n" {
		t.Errorf("inside: %q", got)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(root, "tmp/f"), &st); err != nil || st.Uid != 0 || st.Mode&0o7777 != 0o4755 {
		t.Errorf("outside the file is %d %o, %v; want what the command made", st.Uid, st.Mode, err)
	}
	if left := strings.Join(names(root), " "); left != "bin etc tmp" {
		t.Errorf("root holds %s", left)
	}
}

// fileCapability is what setcap writes: NET_BIND_SERVICE, permitted and effective.
var fileCapability = []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

// The kernel notes in a file's capabilities whose root they hold for, and a
// namespace between the builder and the command must not show in the layer.
func TestFileCapabilitiesAreTheBuilders(t *testing.T) {
	for _, insecure := range []bool{false, true} {
		_, root := overlay(t, busybox(t))
		write(t, filepath.Join(root, "tmp/f"), "", 0o755)
		s := probing(t, root, "setcap", "/tmp/f")
		s.Insecure = insecure
		mustRun(t, s)
		got := make([]byte, 100)
		n, err := unix.Getxattr(filepath.Join(root, "tmp/f"), "security.capability", got)
		if err != nil || !bytes.Equal(got[:max(n, 0)], fileCapability) {
			t.Errorf("insecure %v: capabilities are %x, %v; want %x", insecure, got[:max(n, 0)], err, fileCapability)
		}
	}
}

// probing is a Spec that runs the probe with arguments.
func probing(t *testing.T, root string, args ...string) sandbox.Spec {
	t.Helper()
	self, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(root, "probe"), string(self), 0o755)
	s := shell(t, root, "")
	s.Args = append([]string{"/probe", "probe"}, args...)
	for _, dir := range []string{"/lib", "/lib64", "/usr/lib"} {
		if _, err := os.Stat(dir); err == nil {
			s.Mounts = append(s.Mounts, sandbox.Mount{Source: dir, Target: dir, ReadOnly: true})
		}
	}
	return s
}
