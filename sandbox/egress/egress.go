// Package egress gives a sandbox a network of its own, out of which only TCP
// connections and DNS lead, and these only through the process that builds.
//
// Open makes a network namespace that has nothing but a loopback interface, on
// which every address in the world is local. A connection to any of them
// arrives at a listener that this process made inside. This process judges the
// destination (Policy), dials it in its own network, and copies bytes between
// the two; it answers DNS the same way, and remembers which name an address
// was the answer for. No device, no helper, no privilege over the machine is
// needed, and TLS stays between its ends: only the name in the client's first
// message is read. Close ends all of it.
//
// What egress knows about sandboxes is nothing: it gives out a namespace to be
// joined and the address of its name server.
package egress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Options say how a Network is to be. The zero value lets out everything but
// what Policy's zero value refuses, and resolves no names.
type Options struct {
	Policy Policy

	// Resolvers are asked in this order, from the machine's network, so they
	// may be on its loopback interface.
	Resolvers []netip.AddrPort

	// Hosts are names with addresses that need not be asked for, as of a hosts
	// file. They count as answers of the resolvers, also where a rule allows a name.
	Hosts []Host

	// Log, if set, is told of each connection when it has ended, and of each
	// connection and lookup that was refused. Calls do not overlap, and none
	// comes after Close.
	Log func(Conn)

	// Note, if set, is told what works less well here than it should, and,
	// once, that something other than TCP was refused.
	Note func(string)
}

// Host is a name and one of its addresses.
type Host struct {
	Name string
	Addr netip.Addr
}

// Conn is a connection that has ended or was refused.
type Conn struct {
	Host     string     // the name of the destination, if it is known
	Source   Source     // where that was read
	Addr     netip.Addr // invalid if it is a name that was refused
	Port     uint16
	Sent     int64  // bytes from the sandbox
	Received int64  // bytes to the sandbox
	Rule     string // that let it out: one of Policy.Allow, or "default"; with a Bound also the one of it
	Refused  string // or why not, as a sentence that names what would allow it
	Err      error  // it was let out and the destination could not be reached
}

const (
	// maxConns may be open at a time. More wait: the command's system asks
	// again for a connection that nobody has answered. The number is smaller
	// where the builder may open few files.
	maxConns = 1024

	dialTimeout = 30 * time.Second

	// handshakeTimeout is for a step that happens within this machine.
	handshakeTimeout = 10 * time.Second

	// drainTimeout is how long Close passes on what was sent to us already.
	drainTimeout = time.Second
)

// commonPorts are caught where the kernel cannot redirect all of them.
var commonPorts = []uint16{21, 22, 80, 443, 853, 873, 3000, 3128, 4873, 5000, 5432, 8000, 8080, 8081, 8443, 8888, 9418, 11371}

// Network is a network namespace and its connections to the world.
type Network struct {
	inside  *inside
	judges  judges
	have    families
	answers answers
	resolve []netip.AddrPort

	logMu sync.Mutex
	log   func(Conn)
	note  func(string)

	cancel context.CancelFunc
	tasks  sync.WaitGroup
	slots  chan struct{}

	mu      sync.Mutex
	waiting map[flow]*waiting
	open    map[*net.TCPConn]bool // true if from the sandbox
	closing bool
	full    sync.Once
}

// waiting is a connection that was asked for and not yet made.
type waiting struct {
	dialed bool
	client chan *net.TCPConn // holds one
}

// Open makes a network. It is called by root of a user namespace. The network
// works until Close is called or ctx ends, and Close must be called.
func Open(ctx context.Context, o Options) (*Network, error) { return open(ctx, o, held) }

func open(ctx context.Context, o Options, want ability) (*Network, error) {
	have, own, err := hostFamilies()
	if err != nil {
		return nil, fmt.Errorf("egress: %w", err)
	}
	in, err := build(have, ports(o.Policy), want)
	if err != nil {
		return nil, fmt.Errorf("egress: %w", err)
	}
	n := &Network{
		inside:  in,
		judges:  newJudges(o.Policy, refusals(own)),
		have:    have,
		resolve: o.Resolvers,
		log:     o.Log,
		note:    o.Note,
		slots:   make(chan struct{}, connLimit()),
		waiting: map[flow]*waiting{},
		open:    map[*net.TCPConn]bool{},
	}
	for _, h := range o.Hosts {
		if name, err := canonical(h.Name); err == nil {
			n.answers.add(name, h.Addr.Unmap())
		}
	}
	ctx, n.cancel = context.WithCancel(ctx)
	n.start(ctx)
	return n, nil
}

// start begins all that Close waits for.
func (n *Network) start(ctx context.Context) {
	n.tasks.Go(func() { n.serveDNSOverUDP(ctx) })
	n.tasks.Go(func() { n.serveDNSOverTCP(ctx) })
	for _, l := range n.inside.listeners {
		n.tasks.Go(func() { n.accept(ctx, l) })
	}
	switch h := n.inside.holder; {
	case h != nil:
		n.tasks.Go(func() {
			packets(h.held, func(b []byte) bool {
				if p, ok := parseFirst(b); ok {
					n.first(ctx, p)
				}
				return true
			})
		})
		n.tasks.Go(func() {
			packets(h.refused, n.noteRefused)
			h.refused.Close()
		})
	case n.inside.redirects:
		n.say("the kernel cannot hold connections (nfnetlink_log), so RUN sees an unreachable server as one that hangs up at once")
	default:
		n.say("the kernel has no nftables, so RUN reaches only well-known ports and those of the rules, and sees an unreachable server as one that hangs up at once")
	}
}

// Enter takes the calling thread into the network. There is no way back: the goroutine has locked it, and ends with it.
func (n *Network) Enter() error {
	if err := unix.Setns(int(n.inside.namespace.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter the private network: %w", err)
	}
	return nil
}

// Nameserver is the address that answers DNS inside any of them, on port 53.
func Nameserver() netip.Addr { return dnsAddr }

// Close ends every connection and waits until nothing of the network is left
// but what processes inside hold. What they had sent before is still passed on,
// for a second at most.
func (n *Network) Close() error {
	n.settle()
	n.mu.Lock()
	n.closing = true
	for conn, fromInside := range n.open {
		n.expire(conn, fromInside)
	}
	n.mu.Unlock()
	n.cancel()
	err := n.inside.Close()
	n.tasks.Wait()
	if err != nil {
		return fmt.Errorf("egress: close: %w", err)
	}
	return nil
}

// settle waits for connections that the client has and we are about to take.
func (n *Network) settle() {
	for end := time.Now().Add(drainTimeout); time.Now().Before(end); time.Sleep(time.Millisecond) {
		n.mu.Lock()
		taken := true
		for _, w := range n.waiting {
			taken = taken && !w.dialed
		}
		n.mu.Unlock()
		if taken {
			return
		}
	}
}

// expire makes pending reads end.
func (n *Network) expire(conn *net.TCPConn, fromInside bool) {
	if fromInside {
		conn.SetReadDeadline(time.Now().Add(drainTimeout))
		return
	}
	conn.SetReadDeadline(time.Now())
	conn.SetWriteDeadline(time.Now().Add(drainTimeout))
}

// deadline sets one for reading, unless the network's end has set another.
func (n *Network) deadline(conn *net.TCPConn, t time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.closing {
		conn.SetReadDeadline(t)
	}
}

// track makes Close end conn.
func (n *Network) track(conn *net.TCPConn, fromInside bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.open[conn] = fromInside
	if n.closing {
		n.expire(conn, fromInside)
	}
}

func (n *Network) untrack(conn *net.TCPConn) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.open, conn)
}

func (n *Network) report(c Conn) {
	n.logMu.Lock()
	defer n.logMu.Unlock()
	if n.log != nil {
		n.log(c)
	}
}

func (n *Network) say(s string) {
	n.logMu.Lock()
	defer n.logMu.Unlock()
	if n.note != nil {
		n.note(s)
	}
}

// noteRefused says that a packet was refused, and stops if that made sense to say.
func (n *Network) noteRefused(packet []byte) (more bool) {
	what := describe(packet)
	if what == "" {
		return true
	}
	n.say("RUN sent " + what + ", which is refused: only TCP and DNS lead out (--network=host has all protocols)")
	return false
}

// describe names the protocol and the target of a packet, unless it is one that
// the kernel sends by itself.
func describe(b []byte) string {
	var number byte
	var target netip.Addr
	var rest []byte
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		number, target, rest = b[9], netip.AddrFrom4([4]byte(b[16:20])), b[min(len(b), int(b[0]&15)*4):]
	case len(b) >= 40 && b[0]>>4 == 6:
		number, target, rest = b[6], netip.AddrFrom16([16]byte(b[24:40])), b[40:]
	default:
		return ""
	}
	switch {
	case target.IsMulticast():
		return ""
	case number == unix.IPPROTO_UDP && len(rest) >= 4:
		return fmt.Sprintf("UDP to %s", netip.AddrPortFrom(target, uint16(rest[2])<<8|uint16(rest[3])))
	case number == unix.IPPROTO_ICMP, number == unix.IPPROTO_ICMPV6:
		return fmt.Sprintf("ICMP to %s", target)
	}
	return fmt.Sprintf("IP protocol %d to %s", number, target)
}

// ports are those to listen on where that is all one can do.
func ports(p Policy) []uint16 {
	const most = 256 // each takes two descriptors
	list := slices.Clone(commonPorts)
	rules := p.Allow
	if p.Bound != nil {
		rules = slices.Concat(rules, p.Bound.Allow)
	}
	for _, r := range rules {
		for port := int(max(r.first, 1)); port <= int(r.last) && int(r.last)-int(r.first) < most; port++ {
			list = append(list, uint16(port))
		}
	}
	slices.Sort(list)
	list = slices.Compact(list)
	return list[:min(len(list), most)]
}

// connLimit leaves most descriptors to the rest of the builder.
func connLimit() int {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return maxConns / 8
	}
	return int(min(maxConns, max(16, files.Cur/8)))
}

var errGone = errors.New("the sandbox gave up")
