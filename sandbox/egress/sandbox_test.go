package egress_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cooper-build/cooper/sandbox"
	"github.com/cooper-build/cooper/sandbox/egress"
)

// busybox is a root directory in which a sandbox can do a little.
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
	for _, dir := range []string{"bin", "etc", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "bin/busybox"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, applet := range []string{"sh", "wget", "ip", "cat", "nslookup", "ls", "nc", "echo", "mount", "readlink", "unshare", "sleep", "timeout"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", applet)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// script runs a shell script in a sandbox whose network is Private.
func script(t *testing.T, e *events, o egress.Options, text string, change func(*sandbox.Spec)) (string, error) {
	t.Helper()
	o.Log, o.Note = e.log, e.note
	var out bytes.Buffer
	s := sandbox.Spec{
		Root: busybox(t), Args: []string{"/bin/sh", "-c", text}, Env: []string{"PATH=/bin"},
		Network: sandbox.Private, Egress: o, StateDir: t.TempDir(), Stdout: &out, Stderr: &out,
	}
	if change != nil {
		change(&s)
	}
	err := sandbox.Run(context.Background(), s)
	return out.String(), err
}

func TestRunReachesTheWorldByName(t *testing.T) {
	go http.Serve(world.listen(t, 80), web("good"))
	at, _ := world.resolver(t, zone{"good.example": {good4}})
	e := &events{}
	out, err := script(t, e, egress.Options{Resolvers: resolvers(at)}, "cat /etc/resolv.conf; wget -qO- http://good.example/", nil)
	if err != nil || !strings.Contains(out, "nameserver 127.0.0.11\n") || !strings.Contains(out, "good for good.example") {
		t.Fatalf("got %q, %v", out, err)
	}
	if c := e.all(); len(c) != 1 || c[0].Host != "good.example" || c[0].Received == 0 {
		t.Errorf("reported %+v", c)
	}
}

func TestRunThatIsRefusedFailsAndSaysWhy(t *testing.T) {
	at, _ := world.resolver(t, zone{"good.example": {good4}, "evil.example": {evil4}})
	e := &events{}
	_, err := script(t, e, egress.Options{Resolvers: resolvers(at), Policy: rules(t, "good.example")}, "timeout 20 wget -qO- http://evil.example/", nil)
	var exit *sandbox.ExitError
	if !errors.As(err, &exit) {
		t.Errorf("run: %v, want that the command fails", err)
	}
	if got := e.all(); len(got) == 0 || !strings.Contains(got[0].Refused, "allow=evil.example") {
		t.Errorf("reported %+v", got)
	}
}

func TestHostsOfASpecCountAsAnswers(t *testing.T) {
	go http.Serve(world.listen(t, 80), web("good"))
	e := &events{}
	out, err := script(t, e, egress.Options{Policy: rules(t, "mirror.example:80")}, "wget -qO- http://mirror.example/", func(s *sandbox.Spec) {
		s.Hosts = []sandbox.HostEntry{{Name: "mirror.example", IP: good4}}
	})
	if err != nil || !strings.Contains(out, "good") {
		t.Errorf("got %q, %v, reported %+v", out, err, e.all())
	}
}

// Also a command that is root and has every capability over itself.
func TestRunCannotChangeItsNetwork(t *testing.T) {
	for _, insecure := range []bool{false, true} {
		e := &events{}
		out, err := script(t, e, egress.Options{}, `
			try() { if "$@" >/tmp/out 2>&1; then echo "DID: $*"; fi; }
			try ip route add 198.51.100.0/24 dev lo
			try ip route del default
			try ip -6 route del default
			try ip rule add from all lookup 5
			try ip link set lo down
			try ip addr add 192.0.2.99/32 dev lo
			try ip link add dummy0 type dummy
			try ip link add a type veth peer name b
			try ip tuntap add dev tun0 mode tun
			[ -w /proc/sys/net/ipv4/ip_forward ] && ( echo 1 > /proc/sys/net/ipv4/ip_forward ) 2>/dev/null && echo "DID: ip_forward"
			ip link show | busybox grep -c mtu
		`, func(s *sandbox.Spec) { s.Insecure = insecure })
		if err != nil {
			t.Fatalf("run: %v\n%s", err, out)
		}
		if strings.Contains(out, "DID") {
			t.Errorf("insecure=%v: a command changed its network, so an attacker takes the way out that nobody judges:\n%s", insecure, out)
		}
		if !strings.Contains(out, "\n1\n") && !strings.HasPrefix(out, "1\n") {
			t.Errorf("insecure=%v: there is more than the loopback interface:\n%s", insecure, out)
		}
	}
}

func TestRunHasNothingOfTheBuildersNetwork(t *testing.T) {
	abstract, err := net.Listen("unix", "@cooper-egress-test")
	if err != nil {
		t.Fatal(err)
	}
	defer abstract.Close()
	e := &events{}
	out, err := script(t, e, egress.Options{}, "readlink /proc/self/ns/net; cat /proc/net/unix; ls -l /proc/self/fd", nil)
	if err != nil {
		t.Fatalf("run: %v\n%s", err, out)
	}
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out, own) {
		t.Error("the command is in the builder's network: an attacker reaches everything that the user can")
	}
	if strings.Contains(out, "cooper-egress-test") {
		t.Error("an abstract socket of the machine is in reach: an attacker talks to the user's session bus and the like")
	}
	if strings.Contains(out, "socket:") || strings.Contains(out, "net:[") && strings.Count(out, "net:[") > 1 {
		t.Errorf("the command inherited a socket or a namespace:\n%s", out)
	}
}

func TestServiceOfARunNeedsNoPrivilegeForLowPorts(t *testing.T) {
	e := &events{}
	out, err := script(t, e, egress.Options{}, "echo hello | nc -l -p 80 & sleep 1; nc 127.0.0.1 80 </dev/null", nil)
	if err != nil || !strings.Contains(out, "hello") {
		t.Errorf("got %q, %v", out, err)
	}
}
