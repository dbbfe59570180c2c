package egress_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/cooper-build/cooper/sandbox/egress"
)

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func question(t *testing.T, id uint16, name string) []byte {
	t.Helper()
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: id, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// secureWeb serves HTTPS in the world.
func secureWeb(t *testing.T) {
	t.Helper()
	s := httptest.NewUnstartedServer(web("good"))
	s.Listener.Close()
	s.Listener = world.listen(t, 443)
	s.StartTLS()
	t.Cleanup(s.Close)
}

// hello asks for a name at an address, over TLS.
func hello(n *network, address, name string) error {
	conn, err := n.dial(address)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return tls.Client(conn, &tls.Config{ServerName: name, InsecureSkipVerify: true}).Handshake()
}

func TestTLSNameIsReportedAndTheHandshakeUntouched(t *testing.T) {
	secureWeb(t)
	at, _ := world.resolver(t, zone{"good.example": {good4}})
	n := open(t, egress.Options{Resolvers: resolvers(at), Policy: rules(t, "*.example:443")})
	out, err := n.command(t, "", "curl", "-sSk", "https://good.example/")
	if err != nil || !strings.Contains(out, "good for good.example") {
		t.Fatalf("curl: %q, %v", out, err)
	}
	n.end(t)
	if c := n.all(); len(c) != 1 || c[0].Host != "good.example" || c[0].Source != egress.FromTLS || c[0].Rule != "*.example:443" || c[0].Refused != "" {
		t.Errorf("reported %+v", c)
	}
}

func TestAllowListOfNames(t *testing.T) {
	secureWeb(t)
	go http.Serve(world.listen(t, 80), web("good"))
	names := zone{"good.example": {good4}, "other.example": {"203.0.113.8"}, "evil.example": {evil4}}
	for _, c := range []struct {
		name, allow string
		resolve     string // a name that is asked for first
		do          func(*network) error
		refused     string // empty if it must work
		gain        string
	}{
		{name: "the name", allow: "good.example:443", resolve: "good.example",
			do: func(n *network) error { return hello(n, good4+":443", "good.example") }},
		{name: "no name in the handshake", allow: "good.example:443", resolve: "good.example",
			do: func(n *network) error { return hello(n, good4+":443", "") }},
		{name: "another port", allow: "good.example:443", resolve: "good.example",
			do:      func(n *network) error { return hello(n, good4+":80", "good.example") },
			refused: "allow=good.example:80", gain: "another service of the host"},
		{name: "an address without a name", allow: "good.example:443",
			do:      func(n *network) error { return hello(n, evil4+":443", "good.example") },
			refused: "allow=" + evil4 + ":443", gain: "any server, by claiming a name that is allowed"},
		{name: "claims of a name at the address of another", allow: "good.example:443,other.example:443", resolve: "good.example",
			do:      func(n *network) error { return hello(n, good4+":443", "other.example") },
			refused: "no answer for that name", gain: "a server that passes for another in the log"},
		{name: "another name at the address", allow: "good.example:443", resolve: "good.example",
			do:      func(n *network) error { return hello(n, good4+":443", "evil.example") },
			refused: "allow=evil.example:443", gain: "whatever else a shared server hosts"},
		{name: "another name in HTTP", allow: "good.example", resolve: "good.example",
			do: func(n *network) error { return get(n, good4+":80", "evil.example") }, refused: "allow=evil.example:80",
			gain: "whatever else a shared server hosts"},
		{name: "the name in HTTP", allow: "good.example", resolve: "good.example",
			do: func(n *network) error { return get(n, good4+":80", "good.example") }},
		{name: "a parent is not what is below", allow: "*.good.example:443", resolve: "good.example",
			do:      func(n *network) error { return hello(n, good4+":443", "good.example") },
			refused: "allow=", gain: "a host that no rule names"},
		{name: "a network", allow: "203.0.113.0/24:443",
			do: func(n *network) error { return hello(n, evil4+":443", "whatever.example") }},
		{name: "a network and not beyond", allow: "203.0.113.0/25:443",
			do:      func(n *network) error { return hello(n, "203.0.113.200:443", "") },
			refused: "allow=203.0.113.200:443", gain: "a host that no rule names"},
	} {
		t.Run(c.name, func(t *testing.T) {
			at, _ := world.resolver(t, names)
			n := open(t, egress.Options{Resolvers: resolvers(at), Policy: rules(t, c.allow)})
			if c.resolve != "" {
				lookup(t, n, c.resolve)
			}
			err := c.do(n)
			n.end(t)
			switch {
			case c.refused == "" && err != nil:
				t.Errorf("allow=%s: %v, reported %+v", c.allow, err, n.all())
			case c.refused != "" && err == nil:
				t.Errorf("allow=%s let it out: an attacker gets %s", c.allow, c.gain)
			case c.refused != "":
				var said []string
				for _, e := range n.all() {
					said = append(said, e.Refused)
				}
				if !slices.ContainsFunc(said, func(s string) bool { return strings.Contains(s, c.refused) }) {
					t.Errorf("refusals are %q, want %q named", said, c.refused)
				}
			}
		})
	}
}

func get(n *network, address, host string) error {
	conn, err := n.dial(address)
	if err != nil {
		return err
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nAccept: */*\r\nHost: %s\r\nConnection: close\r\n\r\n", host)
	b, err := io.ReadAll(conn)
	if err == nil && !strings.HasPrefix(string(b), "HTTP/1.1 200") {
		err = fmt.Errorf("reply %q", b)
	}
	return err
}

// lookup asks the network's name server and returns the addresses.
func lookup(t *testing.T, n *network, name string) []string {
	t.Helper()
	var conn net.Conn
	if err := n.do(func() (err error) { conn, err = net.Dial("udp", "127.0.0.11:53"); return err }); err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	conn.Write(question(t, 7, name+"."))
	b := make([]byte, 4096)
	size, err := conn.Read(b)
	if err != nil {
		t.Fatalf("look up %s: %v", name, err)
	}
	var m dnsmessage.Message
	if err := m.Unpack(b[:size]); err != nil || m.ID != 7 {
		t.Fatalf("look up %s: reply %+v, %v", name, m.Header, err)
	}
	var addrs []string
	for _, r := range m.Answers {
		if a, ok := r.Body.(*dnsmessage.AResource); ok {
			addrs = append(addrs, net.IP(a.A[:]).String())
		}
	}
	return addrs
}

// A client that takes its time to say the name it asks for must not get past
// the check by it.
func TestNameThatIsSaidLateIsStillJudged(t *testing.T) {
	secureWeb(t)
	at, _ := world.resolver(t, zone{"good.example": {good4}})
	n := open(t, egress.Options{Resolvers: resolvers(at), Policy: rules(t, "good.example:443")})
	lookup(t, n, "good.example")
	conn, err := n.dial(good4 + ":443")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	err = tls.Client(&dribble{conn}, &tls.Config{ServerName: "evil.example", InsecureSkipVerify: true}).Handshake()
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("a handshake in small pieces ended with %v: an attacker reaches a name that no rule allows", err)
	}
	n.end(t)
	if got := n.refused(t); !strings.Contains(got, "evil.example") {
		t.Errorf("refused as %q", got)
	}
}

func TestNameThatIsNeverSaidIsRefused(t *testing.T) {
	world.serve(t, 443, echo)
	at, _ := world.resolver(t, zone{"good.example": {good4}})
	n := open(t, egress.Options{Resolvers: resolvers(at), Policy: rules(t, "good.example:443")})
	lookup(t, n, "good.example")
	var wg sync.WaitGroup
	for _, start := range []string{"GE", "GET / HTTP/1.1\r\nAccept: */*\r\n", "\x16\x03\x01\x02\x00\x01\x00"} {
		wg.Go(func() {
			conn, err := n.dial(good4 + ":443")
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(20 * time.Second))
			fmt.Fprint(conn, start)
			if b, err := io.ReadAll(conn); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%q came back as %q, %v: an attacker says the name of another host once nobody listens any more", start, b, err)
			}
		})
	}
	wg.Wait()
}

// dribble writes its first bytes in pieces.
type dribble struct{ net.Conn }

func (d *dribble) Write(b []byte) (int, error) {
	for i := range b {
		if i < 100 && i%20 == 0 {
			time.Sleep(100 * time.Millisecond)
		}
		if _, err := d.Conn.Write(b[i : i+1]); err != nil {
			return i, err
		}
	}
	return len(b), nil
}

func TestNamesOfPrivateServicesAreNotResolved(t *testing.T) {
	at, _ := world.resolver(t, zone{
		"loop.example": {good4, "127.0.0.1"}, "link.example": {"169.254.3.3"}, "meta.example": {"169.254.169.254"},
		"self.example": {machine4.String()}, "zero.example": {"0.0.0.0"},
		"metadata.google.internal": {good4}, "company.example": {"10.9.8.7"},
	})
	for name, reason := range map[string]string{
		"loop.example": "loopback", "link.example": "link-local", "meta.example": "metadata", "self.example": "address of the machine",
		"zero.example": "not the address", "metadata.google.internal": "metadata", "METADATA.google.internal": "metadata",
	} {
		n := open(t, egress.Options{Resolvers: resolvers(at)})
		if got := lookup(t, n, name); len(got) > 0 {
			t.Errorf("%s gave %v: whoever owns a name reaches services of the machine through it", name, got)
		}
		n.end(t)
		if got := n.refused(t); !strings.Contains(got, reason) {
			t.Errorf("%s: reason %q, want %q", name, got, reason)
		}
	}
	n := open(t, egress.Options{Resolvers: resolvers(at)})
	if got := lookup(t, n, "company.example"); len(got) != 1 {
		t.Errorf("a private network's name gave %v; company registries live there", got)
	}
	n = open(t, egress.Options{Resolvers: resolvers(at), Policy: rules(t, "meta.example,169.254.169.254:80")})
	if got := lookup(t, n, "meta.example"); len(got) != 1 {
		t.Errorf("what a rule allows by address gave %v", got)
	}
}

// A question is a message to whoever answers for the name.
func TestNamesThatNoRuleAllowsAreNotAskedFor(t *testing.T) {
	at, asked := world.resolver(t, zone{"good.example": {good4}, "secret-key.evil.example": {evil4}})
	n := open(t, egress.Options{Resolvers: resolvers(at), Policy: rules(t, "good.example,10.0.0.0/8")})
	if got := lookup(t, n, "secret-key.evil.example"); len(got) > 0 {
		t.Errorf("a name that no rule allows gave %v", got)
	}
	lookup(t, n, "good.example")
	if got := asked(); !slices.Equal(got, []string{"good.example"}) {
		t.Errorf("asked for %v: an attacker carries a secret out in names", got)
	}
	n.end(t)
	if got := n.refused(t); !strings.Contains(got, "allow=secret-key.evil.example") {
		t.Errorf("refused as %q", got)
	}
}

func TestHostsEntriesCountAsAnswers(t *testing.T) {
	secureWeb(t)
	entry := egress.Host{Name: "Mirror.example"}
	entry.Addr.UnmarshalText([]byte(good4))
	n := open(t, egress.Options{Hosts: []egress.Host{entry}, Policy: rules(t, "mirror.example:443")})
	if err := hello(n, good4+":443", "mirror.example"); err != nil {
		t.Errorf("a name of the hosts file was refused: %v", err)
	}
}

func TestWithoutAResolverNamesFailAtOnce(t *testing.T) {
	n := open(t, egress.Options{})
	start := time.Now()
	if got := lookup(t, n, "good.example"); len(got) > 0 || time.Since(start) > time.Second {
		t.Errorf("got %v after %s", got, time.Since(start))
	}
}

func TestSecondResolverIsAskedWhenTheFirstFails(t *testing.T) {
	at, _ := world.resolver(t, zone{"good.example": {good4}})
	closed, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	first := resolvers(closed.LocalAddr().(*net.UDPAddr).AddrPort())
	closed.Close()
	n := open(t, egress.Options{Resolvers: append(first, at)})
	if got := lookup(t, n, "good.example"); len(got) != 1 {
		t.Errorf("got %v", got)
	}
}
