package egress

import (
	"crypto/tls"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestParseRules(t *testing.T) {
	good := "example.com, *.Example.com.:443,*:443,198.51.100.7:8000-8080,10.0.0.0/8,[2001:db8::/32]:443,2001:db8::1,[::ffff:198.51.100.9]:1,registry:5000"
	got, err := ParseRules(good)
	if err != nil || len(got) != 9 {
		t.Fatalf("%d rules, %v", len(got), err)
	}
	for _, c := range []struct{ rule, err string }{
		{"", "a host is missing"},
		{"a.example,", "a host is missing"},
		{":443", "a host is missing"},
		{"a.example:", "a port is missing"},
		{"a.example:http", "is not a port"},
		{"a.example:0", "is not a port"},
		{"a.example:65536", "is not a port"},
		{"a.example:90-80", "is not a port"},
		{"a.*.example", "a star stands only at the beginning"},
		{"*a.example", "a star stands only at the beginning"},
		{"https://a.example", "is not a port"},
		{"a..example", "is not a host name"},
		{"bücher.example", "xn--"},
		{"1.2.3", "looks like an address"},
		{"1.2.3.456:80", "looks like an address"},
		{"10.0.0.0/33", "neither an address nor a network"},
		{"a.example/24", "neither an address nor a network"},
		{"[2001:db8::1", "closing bracket"},
		{"[2001:db8::1]443", "after the bracket"},
		{"[2001:db8::1]:", "after the bracket"},
		{"fe80::1%eth0", "neither an address"},
		{"127.0.0.1:5000", "RUN's own loopback"},
		{"[::1]:5000", "RUN's own loopback"},
	} {
		if r, err := ParseRules(c.rule); err == nil || !strings.Contains(err.Error(), c.err) || !strings.Contains(err.Error(), "rule ") {
			t.Errorf("%q gave %v, %v; want an error that says %q", c.rule, r, err, c.err)
		}
	}
}

func TestRulesCover(t *testing.T) {
	for _, c := range []struct {
		rule, host string
		port       uint16
		want       bool
	}{
		{"a.example", "a.example", 1, true},
		{"a.example", "b.a.example", 1, false},
		{"a.example", "evila.example", 1, false},
		{"*.a.example", "b.a.example", 1, true},
		{"*.a.example", "c.b.a.example", 1, true},
		{"*.a.example", "a.example", 1, false},
		{"*.a.example", "evila.example", 1, false},
		{"*", "a.example", 1, true},
		{"a.example:443", "a.example", 444, false},
		{"a.example:80-443", "a.example", 100, true},
		{"198.51.100.7", "198.51.100.7", 1, true},
		{"198.51.100.7", "198.51.100.8", 1, false},
		{"198.51.100.7:443", "::ffff:198.51.100.7", 443, true},
		{"10.0.0.0/8", "10.1.2.3", 22, true},
		{"0.0.0.0/0", "8.8.8.8", 22, true},
		{"*", "8.8.8.8", 22, true},
		{"*", "169.254.169.254", 80, false},
		{"169.254.169.254", "169.254.169.254", 80, true},
		{"169.254.0.0/16", "169.254.1.1", 80, true},
		{"169.254.0.0/16", "169.254.169.254", 80, false},
		{"0.0.0.0/0", "169.254.1.1", 80, false},
		{"::/0", "fe80::1", 80, false},
		{"64:ff9b::/96", "64:ff9b::a9fe:a9fe", 80, false},
	} {
		rules, err := ParseRules(c.rule)
		if err != nil {
			t.Fatal(err)
		}
		j := newJudges(Policy{Allow: rules}, refusals(nil))[0]
		var v verdict
		if a, err := netip.ParseAddr(c.host); err == nil {
			v = j.address(netip.AddrPortFrom(a, c.port), nil)
		} else {
			v = j.nameAndPort(c.host, c.port)
		}
		if (v.refused == "") != c.want {
			t.Errorf("allow=%s for %s port %d: %+v, want it let out: %v", c.rule, c.host, c.port, v, c.want)
		}
	}
}

// A bound lets out less than the rules it bounds, and never more: it may have come with what is built.
func TestABoundOnlyEverRefuses(t *testing.T) {
	own := refusals([]netip.Addr{netip.MustParseAddr("192.0.2.1")})
	for _, c := range []struct {
		allow, bound string // "" is no list for allow, and an empty one for bound
		host         string // resolved to an address of its own if it is a name
		refused      string // "" if it must be let out
	}{
		{"", "", "8.8.8.8", "policy p.yaml has no egress rule for 8.8.8.8:443"},
		{"*", "", "a.example", "policy p.yaml has no egress rule for the name a.example"},
		{"", "a.example", "a.example", ""},
		{"", "a.example", "b.example", "add b.example there"},
		{"", "a.example:80", "a.example", "add a.example:443 there"},
		{"*", "a.example:443", "a.example", ""},
		{"*", "a.example:443", "b.example", "policy p.yaml"},
		{"a.example", "*", "b.example", "--egress allow=b.example"},
		{"a.example", "*.example", "a.example", ""},
		{"a.example", "b.example", "a.example", "policy p.yaml"},
		{"a.example", "b.example", "c.example", "--egress allow=c.example; and policy p.yaml"},
		{"203.0.113.0/24", "a.example", "a.example", "no rule allows"}, // the name is not asked for
		{"a.example", "203.0.113.0/24", "203.0.113.9", "--egress allow=203.0.113.9:443"},
		{"", "192.0.2.1:443", "192.0.2.1", "an address of the machine"},
		{"192.0.2.1:443", "192.0.2.1:443", "192.0.2.1", ""},
		{"192.0.2.1:443", "192.0.2.0/24", "192.0.2.1", "policy p.yaml has no egress rule for 192.0.2.1"},
		{"", "169.254.169.254", "169.254.169.254", "a cloud metadata service"},
		{"", "metadata.google.internal", "metadata.google.internal", "a cloud metadata service"},
	} {
		p := Policy{Bound: &Bound{Name: "policy p.yaml"}}
		var err error
		if c.allow != "" {
			p.Allow, err = ParseRules(c.allow)
		}
		if c.bound != "" && err == nil {
			p.Bound.Allow, err = ParseRules(c.bound)
		}
		if err != nil {
			t.Fatal(err)
		}
		all := newJudges(p, own)
		var v verdict
		if a, err := netip.ParseAddr(c.host); err == nil {
			v = all.address(netip.AddrPortFrom(a, 443), nil)
		} else if v = all.lookup(c.host); v.refused == "" {
			v = all.address(netip.MustParseAddrPort("203.0.113.9:443"), []string{c.host})
		}
		if (v.refused == "") != (c.refused == "") || !strings.Contains(v.refused, c.refused) {
			t.Errorf("allow=%s bound by %q for %s: %+v, want it refused with %q; a command gets out by what the policy closes", c.allow, c.bound, c.host, v, c.refused)
		}
	}
}

// Where one list allows the address and the other the name, what the connection says of itself is judged by the latter alone.
func TestOnlyListsThatAllowByNameJudgeTheName(t *testing.T) {
	p := Policy{Bound: &Bound{Name: "policy p.yaml"}}
	var err error
	if p.Allow, err = ParseRules("203.0.113.0/24,a.example"); err != nil {
		t.Fatal(err)
	}
	if p.Bound.Allow, err = ParseRules("a.example"); err != nil {
		t.Fatal(err)
	}
	v := newJudges(p, refusals(nil)).address(netip.MustParseAddrPort("203.0.113.9:443"), []string{"a.example"})
	if v.refused != "" || v.rule != "203.0.113.0/24 and a.example" {
		t.Fatalf("%+v", v)
	}
	if said := v.said("a.example", 443, true); said.refused != "" {
		t.Errorf("its own name is refused: %s", said.refused)
	}
	if said := v.said("b.example", 443, true); !strings.Contains(said.refused, "policy p.yaml") {
		t.Errorf("another name at the address: %+v; a command reaches whatever else a shared server hosts", said)
	}
	if said := v.said("a.example", 443, false); !strings.Contains(said.refused, "no answer") {
		t.Errorf("an address that was no answer for the name: %+v", said)
	}
}

// clientHello returns what a client sends first.
func clientHello(t testing.TB, name string) []byte {
	t.Helper()
	client, server := net.Pipe()
	defer server.Close()
	go tls.Client(client, &tls.Config{ServerName: name, InsecureSkipVerify: true}).Handshake()
	b := make([]byte, 16<<10)
	n, err := server.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

// fragmented puts each byte of a record's message into a record of its own.
func fragmented(record []byte) []byte {
	var b []byte
	for _, c := range record[5:] {
		b = append(b, 22, 3, 1, 0, 1, c)
	}
	return b
}

func TestPeek(t *testing.T) {
	tls := clientHello(t, "Good.example")
	for _, c := range []struct {
		name  string
		bytes string
		want  peeked
	}{
		{"TLS", string(tls), peeked{name: "good.example", source: FromTLS}},
		{"TLS in fragments", string(fragmented(tls)), peeked{name: "good.example", source: FromTLS}},
		{"TLS without a name", string(clientHello(t, "")), peeked{}},
		{"half a hello", string(tls[:100]), peeked{more: true}},
		{"no TLS", "\x16\x01\x00", peeked{}},
		{"TLS of something else", "\x16\x03\x01\x00\x04\x02\x00\x00\x00", peeked{}},
		{"HTTP", "GET / HTTP/1.1\r\nAccept: */*\r\nhost : Good.Example:8080\r\n\r\n", peeked{name: "good.example", source: FromHTTP}},
		{"HTTP with bare newlines", "GET / HTTP/1.0\nHost: good.example\n\n", peeked{name: "good.example", source: FromHTTP}},
		{"HTTP to an address", "GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n", peeked{}},
		{"HTTP without a host", "GET / HTTP/1.0\r\n\r\nHost: a.example\r\n", peeked{}},
		{"half a request", "GET / HTTP/1.1\r\nHost: good.exa", peeked{more: true}},
		{"half a method", "GE", peeked{more: true}},
		{"a proxy's request", "GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", peeked{}},
		{"a proxy's tunnel", "CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n", peeked{}},
		{"SSH", "SSH-2.0-OpenSSH\r\n", peeked{}},
		{"SMTP", "EHLO me\r\n", peeked{}},
		{"git", "0032git-upload-pack /x\x00host=a.example\x00", peeked{}},
		{"HTTP/2 without TLS", "PRI * HTTP/2.0\r\n\r\n", peeked{}},
		{"nonsense", "\x00\x01\x02", peeked{}},
	} {
		if got := peek([]byte(c.bytes)); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
	for i := range tls {
		if got := peek(tls[:i]); got.name != "" || !got.more {
			t.Fatalf("the first %d bytes of a hello give %+v: the rest would not be waited for", i, got)
		}
	}
}

func FuzzPeek(f *testing.F) {
	f.Add(clientHello(f, "good.example"))
	f.Add(fragmented(clientHello(f, "good.example")))
	f.Add([]byte("GET / HTTP/1.1\r\nHost: good.example\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p := peek(b)
		if p.name != "" {
			if name, err := canonical(p.name); err != nil || name != p.name || p.more {
				t.Errorf("%q gives %+v, which is no canonical name", b, p)
			}
		}
	})
}

func FuzzFirstPacket(f *testing.F) {
	f.Add([]byte("\x45\x00\x00\x28\x00\x00\x40\x00\x40\x06\x00\x00\xc0\x00\x00\x08\xcb\x00\x71\x07\x80\x00\x01\xbb\x00\x00\x00\x01\x00\x00\x00\x00\x50\x02\xff\xff\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		describe(b)
		p, ok := parseFirst(b)
		if !ok {
			return
		}
		if reset, ok := parseFirst(refusalOf(p)); ok {
			t.Errorf("the answer to %x asks for a connection: %+v", b, reset)
		}
		if again, ok := parseFirst(checksummed(p.packet, p.tcp)); !ok || again.flow != p.flow {
			t.Errorf("%x is another packet when it is sent again: %+v", b, again)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte("\x00\x07\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04good\x07example\x00\x00\x01\x00\x01"))
	rules, err := ParseRules("good.example")
	if err != nil {
		f.Fatal(err)
	}
	n := &Network{judges: newJudges(Policy{Allow: rules}, refusals(nil)), have: families{true, true}}
	f.Fuzz(func(t *testing.T, b []byte) {
		n.answer(t.Context(), b, "udp")
		addresses(b)
	})
}

func TestRememberedAnswersAreBounded(t *testing.T) {
	var a answers
	addr := netip.MustParseAddr("2001:db8::")
	for range 3 * maxAnswers {
		a.add("n.example", addr)
		addr = addr.Next()
	}
	if len(a.byAddr) > maxAnswers || len(a.order) > maxAnswers {
		t.Errorf("%d addresses are remembered: a command can exhaust the builder's memory", len(a.byAddr))
	}
	for i := range 100 {
		a.add(strings.Repeat("n", i+1)+".example", addr)
	}
	if names := a.names(addr); len(names) != maxAnswerNames || !slices.Contains(names, strings.Repeat("n", 100)+".example") {
		t.Errorf("%d names of an address are remembered, or not the newest", len(names))
	}
}
