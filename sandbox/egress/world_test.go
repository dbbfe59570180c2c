package egress_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/nstest"
	"github.com/cooper-build/cooper/sandbox/egress"
	"github.com/cooper-build/cooper/sandbox/userns"
)

// The tests run as a builder on a machine of their own: a network namespace
// whose only link leads to a second one, the world, where every address
// answers. So public, private and metadata addresses are real, and nothing
// leaves the machine.
const outerEnv = "COOPER_TEST_EGRESS_OUTER"

var (
	machine4 = netip.MustParseAddr("198.51.100.200")
	machine6 = netip.MustParseAddr("2001:db8::200")
)

var world *place

func TestMain(m *testing.M) {
	if len(os.Args) > 3 && os.Args[1] == "with-resolv-conf" {
		withResolvConf(os.Args[2], os.Args[3:])
	}
	if _, ok := userns.Inside(); ok {
		enterMachine()
	}
	if os.Getenv(outerEnv) == "" {
		nstest.Main(m)
	}
	fmt.Fprintln(os.Stderr, "nstest:", os.Getenv(outerEnv))
	if slices.Contains(os.Args, "-test.fuzzworker") { // of a process that has a world, and needs none
		os.Exit(m.Run())
	}
	var err error
	if world, err = makeWorld(); err != nil {
		fmt.Fprintln(os.Stderr, "make a world:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// enterMachine goes on as the same program in a new network namespace.
func enterMachine() {
	ids, _ := userns.Inside()
	err := unix.Unshare(unix.CLONE_NEWNET)
	if err == nil {
		err = syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), outerEnv+"=id map "+ids.String()+" "+ids.Why))
	}
	fmt.Fprintln(os.Stderr, "enter a network namespace:", err)
	os.Exit(1)
}

// place is a network namespace.
type place struct{ ns *os.File }

// do calls f in the place. What f opens stays there.
func (p *place) do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(int(p.ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

func makeWorld() (*place, error) {
	made := make(chan error, 1)
	w := &place{}
	go func() {
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			w.ns, err = os.Open("/proc/thread-self/ns/net")
		}
		made <- err
	}()
	if err := <-made; err != nil {
		return nil, err
	}
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "machine"}, PeerName: "world", PeerNamespace: netlink.NsFd(int(w.ns.Fd()))}
	if err := netlink.LinkAdd(link); err != nil {
		return nil, fmt.Errorf("veth: %w", err)
	}
	if err := w.do(func() error { return connect("world", "198.51.100.1/24", "2001:db8::1/64", "", "") }); err != nil {
		return nil, err
	}
	return w, connect("machine", machine4.String()+"/24", machine6.String()+"/64", "198.51.100.1", "2001:db8::1")
}

// connect sets up a namespace's link and where everything else is: behind a
// gateway or, without one, here.
func connect(name, addr4, addr6, gateway4, gateway6 string) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	errs := []error{netlink.LinkSetUp(lo), netlink.LinkSetUp(link)}
	for _, a := range []struct{ addr, gateway, all string }{{addr4, gateway4, "0.0.0.0/0"}, {addr6, gateway6, "::/0"}} {
		addr, err := netlink.ParseAddr(a.addr)
		if err != nil {
			return err
		}
		addr.Flags = unix.IFA_F_NODAD
		_, all, _ := net.ParseCIDR(a.all)
		route := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: all, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_MAIN}
		if addr.IP.To4() != nil {
			route.Scope = unix.RT_SCOPE_HOST
		}
		if a.gateway != "" {
			route = &netlink.Route{LinkIndex: link.Attrs().Index, Dst: all, Gw: net.ParseIP(a.gateway)}
		}
		errs = append(errs, netlink.AddrAdd(link, addr), netlink.RouteAdd(route))
	}
	return errors.Join(errs...)
}

// listen listens in the world, on every address.
func (p *place) listen(t testing.TB, port int) net.Listener {
	t.Helper()
	var l net.Listener
	err := p.do(func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprintf("[::]:%d", port))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// serve handles each connection to a port of the world.
func (p *place) serve(t testing.TB, port int, handle func(*net.TCPConn)) {
	t.Helper()
	l := p.listen(t, port)
	go serve(l, handle)
}

func serve(l net.Listener, handle func(*net.TCPConn)) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			handle(conn.(*net.TCPConn))
		}()
	}
}

func echo(conn *net.TCPConn) { io.Copy(conn, conn) }

// zone is what the world's name server knows.
type zone map[string][]string

// resolver serves z in the world and counts the questions.
func (p *place) resolver(t testing.TB, z zone) (at netip.AddrPort, asked func() []string) {
	t.Helper()
	var conn net.PacketConn
	var l net.Listener
	err := p.do(func() (err error) {
		if conn, err = net.ListenPacket("udp4", "198.51.100.1:0"); err == nil {
			at = netip.MustParseAddrPort(conn.LocalAddr().String())
			l, err = net.Listen("tcp4", at.String())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); l.Close() })
	var mu sync.Mutex
	var questions []string
	answer := func(query []byte, udp bool) []byte {
		var m dnsmessage.Message
		if m.Unpack(query) != nil || len(m.Questions) != 1 {
			return nil
		}
		name := strings.TrimSuffix(m.Questions[0].Name.String(), ".")
		mu.Lock()
		questions = append(questions, name)
		mu.Unlock()
		z.answer(&m, name, udp)
		b, _ := m.Pack()
		return b
	}
	go func() {
		b := make([]byte, 4096)
		for {
			n, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			conn.WriteTo(answer(b[:n], true), from)
		}
	}()
	go serve(l, func(c *net.TCPConn) {
		for {
			var size [2]byte
			if _, err := io.ReadFull(c, size[:]); err != nil {
				return
			}
			b := make([]byte, int(size[0])<<8|int(size[1]))
			io.ReadFull(c, b)
			reply := answer(b, false)
			c.Write(append([]byte{byte(len(reply) >> 8), byte(len(reply))}, reply...))
		}
	})
	return at, func() []string { mu.Lock(); defer mu.Unlock(); return append([]string(nil), questions...) }
}

// answer answers from the zone; names that begin with "long" only over TCP.
func (z zone) answer(m *dnsmessage.Message, name string, udp bool) {
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	addrs, known := z[strings.ToLower(name)]
	if !known {
		m.RCode = dnsmessage.RCodeNameError
		return
	}
	if udp && strings.HasPrefix(name, "long") {
		m.Truncated = true
		return
	}
	for _, a := range addrs {
		addr := netip.MustParseAddr(a)
		header := dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Class: dnsmessage.ClassINET, TTL: 60}
		switch {
		case addr.Is4() && m.Questions[0].Type == dnsmessage.TypeA:
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: header, Body: &dnsmessage.AResource{A: addr.As4()}})
		case addr.Is6() && m.Questions[0].Type == dnsmessage.TypeAAAA:
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: header, Body: &dnsmessage.AAAAResource{AAAA: addr.As16()}})
		}
	}
}

// events collects what a network reports.
type events struct {
	mu    sync.Mutex
	conns []egress.Conn
	notes []string
}

func (e *events) log(c egress.Conn) { e.mu.Lock(); defer e.mu.Unlock(); e.conns = append(e.conns, c) }
func (e *events) note(s string)     { e.mu.Lock(); defer e.mu.Unlock(); e.notes = append(e.notes, s) }

func (e *events) all() []egress.Conn {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]egress.Conn(nil), e.conns...)
}

func (e *events) noted() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]string(nil), e.notes...)
}

// refused returns the only refusal.
func (e *events) refused(t *testing.T) string {
	t.Helper()
	var found []string
	for _, c := range e.all() {
		if c.Refused != "" {
			found = append(found, c.Refused)
		}
	}
	if len(found) != 1 {
		t.Errorf("%d refusals were reported, want one: %q", len(found), found)
		return ""
	}
	return found[0]
}

// network is an open one under test.
type network struct {
	*egress.Network
	*events
	place
	closeOnce func() error
}

func open(t testing.TB, o egress.Options) *network { return openBy(t, o, egress.Held) }

func openBy(t testing.TB, o egress.Options, a egress.Ability) *network {
	t.Helper()
	e := &events{}
	o.Log, o.Note = e.log, e.note
	n, err := egress.OpenBy(context.Background(), o, a)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	ns, err := os.Open(n.Path())
	if err != nil {
		t.Fatalf("the namespace: %v", err)
	}
	close := sync.OnceValue(func() error { return errors.Join(ns.Close(), n.Close()) })
	t.Cleanup(func() {
		if err := close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return &network{Network: n, events: e, place: place{ns}, closeOnce: close}
}

// end closes the network, so that every connection has been reported.
func (n *network) end(t *testing.T) {
	t.Helper()
	if err := n.closeOnce(); err != nil {
		t.Errorf("close: %v", err)
	}
}

// dial dials from inside; the address is a literal.
func (n *network) dial(address string) (conn *net.TCPConn, err error) {
	err = n.do(func() error {
		c, err := net.Dial("tcp", address)
		if err == nil {
			conn = c.(*net.TCPConn)
		}
		return err
	})
	return conn, err
}

// command runs a program of this machine inside, with the network's resolver.
func (n *network) command(t testing.TB, search string, args ...string) (string, error) {
	t.Helper()
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(conf, []byte(search+"nameserver "+egress.Nameserver().String()+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		t.Fatalf("this test needs %s: %v", args[0], err)
	}
	cmd := exec.Command("/proc/self/exe", append([]string{"with-resolv-conf", conf, path}, args[1:]...)...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "LANG=C.UTF-8"}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := n.do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	err = cmd.Wait()
	return out.String(), err
}

// withResolvConf becomes a program that sees another /etc/resolv.conf.
func withResolvConf(conf string, args []string) {
	err := unix.Unshare(unix.CLONE_NEWNS)
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err == nil {
		err = unix.Mount(conf, "/etc/resolv.conf", "", unix.MS_BIND, "")
	}
	if err == nil {
		err = syscall.Exec(args[0], args, os.Environ())
	}
	fmt.Fprintln(os.Stderr, "with-resolv-conf:", err)
	os.Exit(1)
}

func rules(t testing.TB, s string) egress.Policy {
	t.Helper()
	r, err := egress.ParseRules(s)
	if err != nil {
		t.Fatal(err)
	}
	return egress.Policy{Allow: r}
}

// web answers GET / with what it is called and the name it was asked for.
func web(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "%s for %s\n", name, r.Host) })
}
