package egress_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/egress"
)

// Addresses of the world.
const (
	good4 = "203.0.113.7"
	good6 = "2001:db8:1::7"
	evil4 = "203.0.113.66"
)

func resolvers(at netip.AddrPort) []netip.AddrPort { return []netip.AddrPort{at} }

// everyWay runs f with each way to catch connections.
func everyWay(t *testing.T, f func(t *testing.T, way egress.Ability)) {
	t.Helper()
	for name, way := range map[string]egress.Ability{"held": egress.Held, "redirected": egress.Redirected, "at ports": egress.AtPorts} {
		t.Run(name, func(t *testing.T) { f(t, way) })
	}
}

func TestConnectionsGoOutAndAreReported(t *testing.T) {
	go http.Serve(world.listen(t, 80), web("good"))
	at, _ := world.resolver(t, zone{"good.example": {good4, good6}, "long.good.example": {good4}})
	everyWay(t, func(t *testing.T, way egress.Ability) {
		for _, c := range []struct {
			url, reply string
			want       egress.Conn
		}{
			{"http://" + good4 + "/", "good for " + good4, egress.Conn{Addr: netip.MustParseAddr(good4)}},
			{"http://[" + good6 + "]/", "good for [" + good6 + "]", egress.Conn{Addr: netip.MustParseAddr(good6)}},
			{"http://good.example/", "good for good.example", egress.Conn{Addr: netip.MustParseAddr(good4), Host: "good.example", Source: egress.FromHTTP}},
			{"http://GOOD.example./", "good for GOOD.example.", egress.Conn{Addr: netip.MustParseAddr(good4), Host: "good.example", Source: egress.FromHTTP}},
			{"http://long.good.example/", "good for long.good.example", egress.Conn{Addr: netip.MustParseAddr(good4), Host: "long.good.example", Source: egress.FromHTTP}},
			{"http://10.1.2.3/", "good for 10.1.2.3", egress.Conn{Addr: netip.MustParseAddr("10.1.2.3")}},
			{"http://192.168.1.1/", "good for 192.168.1.1", egress.Conn{Addr: netip.MustParseAddr("192.168.1.1")}},
		} {
			n := openBy(t, egress.Options{Resolvers: resolvers(at)}, way)
			out, err := n.command(t, "", "curl", "-sS", "-4", "--max-time", "20", c.url)
			if strings.Contains(c.url, "[") {
				out, err = n.command(t, "", "curl", "-sS", "--max-time", "20", c.url)
			}
			if err != nil || strings.TrimSpace(out) != c.reply {
				t.Errorf("%s: got %q, %v; want %q", c.url, out, err, c.reply)
			}
			n.end(t)
			got := n.all()
			if len(got) != 1 {
				t.Errorf("%s: reported %+v, want one connection", c.url, got)
				continue
			}
			if got[0].Sent < 20 || got[0].Received < int64(len(c.reply)) {
				t.Errorf("%s: %d bytes sent and %d received were counted", c.url, got[0].Sent, got[0].Received)
			}
			c.want.Port, c.want.Rule, c.want.Sent, c.want.Received = 80, "default", got[0].Sent, got[0].Received
			if got[0] != c.want {
				t.Errorf("%s: reported %+v, want %+v", c.url, got[0], c.want)
			}
		}
	})
}

func TestSearchDomainsApply(t *testing.T) {
	go http.Serve(world.listen(t, 80), web("good"))
	at, _ := world.resolver(t, zone{"mirror.corp.example": {"10.0.0.5"}})
	n := open(t, egress.Options{Resolvers: resolvers(at)})
	if out, err := n.command(t, "search lab.example corp.example\n", "curl", "-sS", "http://mirror/"); err != nil || !strings.Contains(out, "good") {
		t.Errorf("a short name gave %q, %v", out, err)
	}
}

func TestResolvConfOfTheMachineIsCarriedOver(t *testing.T) {
	c := egress.ParseResolvConf("# made by hand\nsearch a.example\nsearch b.example c.example\nnameserver 127.0.0.53\nnameserver nonsense\nnameserver fe80::1%eth0\noptions edns0 ndots:2\noptions rotate\nnameserver 192.0.2.1\nnameserver 192.0.2.2\n")
	if got, want := fmt.Sprint(c.Resolvers), "[127.0.0.53:53 [fe80::1%eth0]:53 192.0.2.1:53]"; got != want {
		t.Errorf("resolvers are %s, want %s", got, want)
	}
	if got, want := c.For(netip.MustParseAddr("127.0.0.11")), "search b.example c.example\nnameserver 127.0.0.11\noptions edns0 ndots:2 rotate\n"; got != want {
		t.Errorf("inside: %q, want %q", got, want)
	}
	if got := fmt.Sprint(egress.ParseResolvConf("").Resolvers); got != "[127.0.0.1:53]" {
		t.Errorf("without any, the resolver is %s, want the machine's own", got)
	}
}

func TestHostThatDoesNotListenRefusesAsItDoesWithoutUs(t *testing.T) {
	n := open(t, egress.Options{})
	for _, address := range []string{good4 + ":81", "[" + good6 + "]:81"} {
		if _, err := n.dial(address); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("connect to the closed port %s: %v, want that it is refused", address, err)
		}
	}
	n.end(t)
	for _, c := range n.all() {
		if !errors.Is(c.Err, syscall.ECONNREFUSED) || c.Refused != "" {
			t.Errorf("reported as %+v, want it allowed and refused by its host", c)
		}
	}
}

// The client waits as long as the destination lets it, and then tries again
// elsewhere, instead of talking to us.
func TestHostThatDoesNotAnswerIsWaitedFor(t *testing.T) {
	n := open(t, egress.Options{})
	// nobody has this address on the machine's link
	out, err := n.command(t, "", "curl", "-sS", "--connect-timeout", "1", "http://198.51.100.77/")
	if err == nil || !strings.Contains(out, "28") {
		t.Errorf("curl said %q, %v; want its error 28, a connection that timed out", out, err)
	}
	start := time.Now()
	n.end(t)
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("the end of the network took %s: it waits for a host that does not answer", took)
	}
}

func TestServerThatSpeaksFirstIsHeardAtOnce(t *testing.T) {
	world.serve(t, 22, func(c *net.TCPConn) {
		fmt.Fprint(c, "SSH-2.0-hello\r\n")
		io.Copy(c, c)
	})
	everyWay(t, func(t *testing.T, way egress.Ability) {
		n := openBy(t, egress.Options{}, way)
		conn, err := n.dial(good4 + ":22")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		b := make([]byte, 15)
		if _, err := io.ReadFull(conn, b); err != nil || string(b) != "SSH-2.0-hello\r\n" {
			t.Fatalf("greeting is %q, %v", b, err)
		}
		// what looks like the beginning of a request, and is not, is not kept
		start := time.Now()
		for _, s := range []string{"G", "ET", "\x16", "\x03 rest"} {
			fmt.Fprint(conn, s)
			if _, err := io.ReadFull(conn, b[:len(s)]); err != nil || string(b[:len(s)]) != s {
				t.Fatalf("%q came back as %q, %v", s, b[:len(s)], err)
			}
		}
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("an odd protocol was delayed by %s", took)
		}
	})
}

func TestHalfClosedConnectionsCarryTheRest(t *testing.T) {
	digest := func(r io.Reader) string {
		h := sha256.New()
		n, _ := io.Copy(h, r)
		return fmt.Sprintf("%d %x", n, h.Sum(nil))
	}
	data := make([]byte, 8<<20)
	rand.NewChaCha8([32]byte{}).Read(data)
	world.serve(t, 443, func(c *net.TCPConn) { // reads to the end, then answers
		fmt.Fprintln(c, digest(c))
		c.Write(data)
	})
	everyWay(t, func(t *testing.T, way egress.Ability) {
		n := openBy(t, egress.Options{}, way)
		conn, err := n.dial(good4 + ":443")
		if err != nil {
			t.Fatal(err)
		}
		conn.Write(data)
		conn.CloseWrite()
		reply, err := io.ReadAll(conn)
		conn.Close()
		if err != nil {
			t.Fatal(err)
		}
		want := digest(bytes.NewReader(data)) + "\n"
		if !bytes.Equal(reply, append([]byte(want), data...)) {
			t.Errorf("%d bytes came back, or others than were sent", len(reply))
		}
		n.end(t)
		if c := n.all()[0]; c.Sent != int64(len(data)) || c.Received != int64(len(reply)) {
			t.Errorf("counted %d and %d bytes, want %d and %d", c.Sent, c.Received, len(data), len(reply))
		}
	})
}

func TestSlowReaderSlowsTheSender(t *testing.T) {
	sent := make(chan int, 1)
	world.serve(t, 80, func(c *net.TCPConn) {
		c.SetWriteDeadline(time.Now().Add(time.Second))
		total := 0
		for {
			n, err := c.Write(make([]byte, 64<<10))
			total += n
			if err != nil {
				sent <- total
				return
			}
		}
	})
	n := open(t, egress.Options{})
	conn, err := n.dial(good4 + ":80")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := <-sent; got > 64<<20 {
		t.Errorf("%d bytes were taken from a server while the command read nothing: the builder would fill its memory", got)
	}
}

func TestResetIsPassedOn(t *testing.T) {
	world.serve(t, 80, func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 5))
		c.SetLinger(0)
	})
	n := open(t, egress.Options{})
	conn, err := n.dial(good4 + ":80")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "hello")
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("after the server's reset, reading gives %v; a broken download would look complete", err)
	}
}

func TestManyConnectionsAtOnce(t *testing.T) {
	world.serve(t, 80, echo)
	n := open(t, egress.Options{})
	const many = 500
	var conns []*net.TCPConn
	for range many {
		conn, err := n.dial(good4 + ":80")
		if err != nil {
			t.Fatalf("connection %d: %v", len(conns), err)
		}
		defer conn.Close()
		conns = append(conns, conn)
	}
	var wg sync.WaitGroup
	for i, conn := range conns {
		wg.Go(func() {
			want := []byte(strings.Repeat(fmt.Sprintf("connection %d\n", i), 1000))
			go func() {
				conn.Write(want)
				conn.CloseWrite()
			}()
			if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, want) {
				t.Errorf("connection %d got %d bytes, %v; want %d of its own", i, len(got), err, len(want))
			}
		})
	}
	wg.Wait()
	n.end(t)
	if got := len(n.all()); got != many {
		t.Errorf("%d connections were reported, want %d", got, many)
	}
}

func TestGitClones(t *testing.T) {
	dir := t.TempDir()
	git := func(args ...string) {
		t.Helper()
		cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "init.defaultBranch=main"}, args...)...)
		cmd.Env = append(os.Environ(), "HOME="+dir, "GIT_CONFIG_NOSYSTEM=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
	}
	git("init", "-q", "work")
	if err := os.WriteFile(filepath.Join(dir, "work/file"), []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	git("-C", "work", "add", "file")
	git("-C", "work", "commit", "-q", "-m", "first")
	git("clone", "-q", "--bare", "work", "served")
	git("-C", "served", "update-server-info")
	go http.Serve(world.listen(t, 80), http.FileServer(http.Dir(dir)))
	at, _ := world.resolver(t, zone{"git.example": {good4}})
	n := open(t, egress.Options{Resolvers: resolvers(at), Policy: rules(t, "git.example:80")})
	into := filepath.Join(t.TempDir(), "clone")
	out, err := n.command(t, "", "git", "clone", "-q", "http://git.example/served", into)
	if err != nil {
		t.Fatalf("git clone: %v\n%s", err, out)
	}
	if b, _ := os.ReadFile(filepath.Join(into, "file")); string(b) != "content" {
		t.Errorf("the cloned file holds %q", b)
	}
	n.end(t)
	if c := n.all(); len(c) == 0 || c[0].Host != "git.example" || c[0].Rule != "git.example:80" {
		t.Errorf("reported %+v, want git.example by its rule", c)
	}
}

// What a command listens on inside is its own matter.
func TestLoopbackInsideIsItsOwn(t *testing.T) {
	n := open(t, egress.Options{})
	for _, address := range []string{"127.0.0.1:80", "[::1]:8080", "127.0.0.1:5000"} {
		var l net.Listener
		if err := n.do(func() (err error) { l, err = net.Listen("tcp", address); return err }); err != nil {
			t.Fatal(err)
		}
		go serve(l, echo)
		conn, err := n.dial(address)
		if err != nil {
			t.Fatalf("dial %s: %v", address, err)
		}
		fmt.Fprint(conn, "x")
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Errorf("%s: %v", address, err)
		}
		conn.Close()
		l.Close()
	}
	n.end(t)
	if c := n.all(); len(c) > 0 {
		t.Errorf("connections inside were reported: %+v", c)
	}
}

// The kernel finishes IPv6 addresses after it has said that they are there.
func TestFirstConnectionOfANetworkIsNotLost(t *testing.T) {
	world.serve(t, 80, echo)
	for range 30 {
		for _, address := range []string{good4 + ":80", "[" + good6 + "]:80"} {
			n := open(t, egress.Options{})
			start := time.Now()
			conn, err := n.dial(address)
			if err != nil {
				t.Fatal(err)
			}
			if took := time.Since(start); took > 800*time.Millisecond {
				t.Fatalf("the first connection to %s took %s: its first packet was lost", address, took)
			}
			conn.Close()
			n.end(t)
		}
	}
}

// bare is a machine with IPv4 only.
func bare(t *testing.T) *place {
	t.Helper()
	p := &place{}
	made := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			p.ns, err = os.Open("/proc/thread-self/ns/net")
		}
		if err == nil {
			link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: 1, Name: "lo"}}
			err = netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 0, 0, 2), Mask: net.CIDRMask(24, 32)}})
		}
		made <- err
	}()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.ns.Close() })
	return p
}

func TestMachineWithoutIPv6(t *testing.T) {
	go http.Serve(world.listen(t, 80), web("good"))
	at, _ := world.resolver(t, zone{"good.example": {good4, good6}})
	var n *network
	if err := bare(t).do(func() error { n = open(t, egress.Options{Resolvers: resolvers(at)}); return nil }); err != nil {
		t.Fatal(err)
	}
	if out, err := n.command(t, "", "getent", "ahosts", "good.example"); err != nil || strings.Contains(out, ":") || !strings.Contains(out, good4) {
		t.Errorf("addresses are %q, %v; want those of IPv4", out, err)
	}
	if _, err := n.dial("[" + good6 + "]:80"); !errors.Is(err, syscall.ENETUNREACH) && !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("IPv6: %v, want that the network is unreachable at once", err)
	}
	if out, err := n.command(t, "", "curl", "-sS", "http://good.example/"); err != nil || !strings.Contains(out, "good") {
		t.Errorf("IPv4: %q, %v", out, err)
	}
}

func TestNoNamespaceIsAnErrorWithTheNextStep(t *testing.T) {
	const limit = "/proc/sys/user/max_net_namespaces"
	before, err := os.ReadFile(limit)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(limit, []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	defer os.WriteFile(limit, before, 0)
	n, err := egress.Open(t.Context(), egress.Options{})
	if err == nil {
		n.Close()
		t.Fatal("a network was opened beyond the limit of namespaces")
	}
	var h interface{ Hint() string }
	if !errors.As(err, &h) || !strings.Contains(h.Hint(), "user.max_net_namespaces") || !strings.Contains(h.Hint(), "--network=host") {
		t.Errorf("error is %v, want a hint that names the limit and the way without", err)
	}
}

func TestWeakerWaysAreSaid(t *testing.T) {
	for way, want := range map[egress.Ability]string{egress.Held: "", egress.Redirected: "cannot hold", egress.AtPorts: "well-known ports"} {
		n := openBy(t, egress.Options{Policy: rules(t, "*,a.example:4711")}, way)
		n.end(t)
		if got := strings.Join(n.noted(), "\n"); !strings.Contains(got, want) || (want == "") != (got == "") {
			t.Errorf("notes are %q, want one that says %q", got, want)
		}
	}
}

// Where listeners stand on ports themselves, those of the rules are among them.
func TestPortsOfRulesAreCaught(t *testing.T) {
	world.serve(t, 4711, echo)
	n := openBy(t, egress.Options{Policy: rules(t, good4+":4711")}, egress.AtPorts)
	conn, err := n.dial(good4 + ":4711")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "x")
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
}
