package egress

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// first is told of each packet that asks for a connection and is held.
func (n *Network) first(ctx context.Context, p firstPacket) {
	n.mu.Lock()
	if w := n.waiting[p.flow]; w != nil {
		again := w.dialed // and it did not hear that
		n.mu.Unlock()
		if again {
			n.inside.holder.accept(p)
		}
		return
	}
	select {
	case n.slots <- struct{}{}:
	default:
		n.mu.Unlock()
		n.sayFull()
		return // it will ask again
	}
	w := &waiting{client: make(chan *net.TCPConn, 1)}
	n.waiting[p.flow] = w
	n.mu.Unlock()
	n.tasks.Go(func() {
		defer func() { <-n.slots }()
		n.meet(ctx, p, w)
	})
}

// meet brings client and destination together, if policy and destination agree.
func (n *Network) meet(ctx context.Context, p firstPacket, w *waiting) {
	c, v, server := n.dial(ctx, p.server)
	if server == nil {
		n.forget(p.flow, w)
		if ctx.Err() == nil {
			n.inside.holder.refuse(p)
		}
		n.report(c)
		return
	}
	defer server.Close()
	n.mu.Lock()
	w.dialed = true
	n.mu.Unlock()
	err := n.inside.holder.accept(p)
	var client *net.TCPConn
	if err == nil {
		select {
		case client = <-w.client:
		case <-time.After(handshakeTimeout):
			err = errGone
		case <-ctx.Done():
			err = errGone
		}
	}
	if late := n.forget(p.flow, w); client == nil {
		client = late
	}
	if client == nil {
		c.Err = err
		n.report(c)
		return
	}
	n.relay(client, server, c, v)
}

// forget ends the waiting for a client and returns the one that came nonetheless.
func (n *Network) forget(f flow, w *waiting) *net.TCPConn {
	n.mu.Lock()
	delete(n.waiting, f)
	n.mu.Unlock()
	select {
	case client := <-w.client:
		return client
	default:
		return nil
	}
}

// accept takes the connections that arrive at a listener inside.
func (n *Network) accept(ctx context.Context, l *net.TCPListener) {
	for {
		client, err := l.AcceptTCP()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(10 * time.Millisecond) // no descriptors left, most likely
			continue
		}
		if n.inside.holder != nil { // it was held, and has a slot already
			n.arrived(client)
		} else if !n.admit(ctx, client) {
			return
		}
	}
}

// arrived hands a client to who waits for it.
func (n *Network) arrived(client *net.TCPConn) {
	f := flow{client: addrPort(client.RemoteAddr()), server: n.destination(client)}
	n.mu.Lock()
	defer n.mu.Unlock()
	if w := n.waiting[f]; w != nil && len(w.client) == 0 {
		w.client <- client
		return
	}
	reset(client) // it came straight to our listener
}

// admit serves a client whose connection nobody has judged. Until there is a
// slot for it, the caller accepts no further ones. It returns false at the end of ctx.
func (n *Network) admit(ctx context.Context, client *net.TCPConn) bool {
	select {
	case n.slots <- struct{}{}:
	default:
		n.sayFull()
		select {
		case n.slots <- struct{}{}:
		case <-ctx.Done():
			reset(client)
			return false
		}
	}
	n.tasks.Go(func() {
		defer func() { <-n.slots }()
		c, v, server := n.dial(ctx, n.destination(client))
		if server == nil {
			reset(client)
			n.report(c)
			return
		}
		n.relay(client, server, c, v)
	})
	return true
}

// destination returns where a connection was to go.
func (n *Network) destination(client *net.TCPConn) netip.AddrPort {
	local := addrPort(client.LocalAddr())
	if !n.inside.redirects {
		return local
	}
	raw, err := client.SyscallConn()
	if err != nil {
		return local
	}
	original := local
	// Both answers are a socket address, which the type that x/sys has for the
	// call is large enough for.
	err = raw.Control(func(fd uintptr) {
		if local.Addr().Is4() {
			if a, err := unix.GetsockoptIPv6Mreq(int(fd), unix.IPPROTO_IP, unix.SO_ORIGINAL_DST); err == nil {
				original = netip.AddrPortFrom(netip.AddrFrom4([4]byte(a.Multiaddr[4:8])), binary.BigEndian.Uint16(a.Multiaddr[2:]))
			}
		} else if a, err := unix.GetsockoptIPv6MTUInfo(int(fd), unix.IPPROTO_IPV6, unix.SO_ORIGINAL_DST); err == nil {
			port := binary.NativeEndian.AppendUint16(nil, a.Addr.Port)
			original = netip.AddrPortFrom(netip.AddrFrom16(a.Addr.Addr), binary.BigEndian.Uint16(port))
		}
	})
	if err != nil {
		return local
	}
	return original
}

func addrPort(a net.Addr) netip.AddrPort {
	p := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

// dial judges a destination and connects to it, from the machine's network. A
// nil connection goes with the reason in c.
func (n *Network) dial(ctx context.Context, dst netip.AddrPort) (c Conn, v verdict, server *net.TCPConn) {
	c = Conn{Addr: dst.Addr(), Port: dst.Port()}
	names := n.answers.names(dst.Addr())
	if len(names) > 0 {
		c.Host, c.Source = names[len(names)-1], FromDNS
	}
	v = n.judges.address(dst, names)
	c.Rule, c.Refused = v.rule, v.refused
	if v.refused != "" {
		return c, v, nil
	}
	dialer := net.Dialer{Timeout: dialTimeout}
	conn, err := dialer.DialContext(ctx, "tcp", dst.String())
	if err != nil {
		c.Err = err
		return c, v, nil
	}
	return c, v, conn.(*net.TCPConn)
}

// reset ends a connection as if nobody were there.
func reset(conn *net.TCPConn) {
	conn.SetLinger(0)
	conn.Close()
}

// relay passes bytes between the two until both have ended, and reports.
func (n *Network) relay(client, server *net.TCPConn, c Conn, v verdict) {
	n.track(client, true)
	n.track(server, false)
	defer func() {
		n.untrack(client)
		n.untrack(server)
		client.Close()
		server.Close()
		n.report(c)
	}()
	var down sync.WaitGroup
	var received int64
	down.Go(func() { received = transfer(client, server) })
	sent, p, refused := n.greet(client, server, c, v)
	if p.name != "" && (n.answers.is(p.name, c.Addr) || c.Host == "") {
		c.Host, c.Source = p.name, p.source
	}
	if refused != "" {
		c.Refused = refused
		reset(client)
		reset(server)
	} else {
		sent += transfer(server, client)
	}
	down.Wait()
	c.Sent, c.Received = sent, received
}

const (
	// maxPeek is enough for a ClientHello with post-quantum keys, or the header of a request.
	maxPeek = 16 << 10

	// patience is for the rest of a beginning that may name a host, if all
	// that depends on it is what is reported.
	patience = 300 * time.Millisecond

	// strictPatience is the same where a rule allows only a name.
	strictPatience = 5 * time.Second
)

// greet reads the client's first bytes, judges the name they ask for, and
// passes them on. The server may speak first: that direction runs already.
func (n *Network) greet(client, server *net.TCPConn, c Conn, v verdict) (sent int64, p peeked, refused string) {
	limit := patience
	if len(v.byName) > 0 {
		limit = strictPatience
	}
	b := make([]byte, 0, maxPeek)
	for {
		m, err := client.Read(b[len(b):cap(b)])
		b = b[:len(b)+m]
		p = peek(b)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			break // the next read says so again
		}
		if !p.more || err != nil || len(b) == cap(b) {
			break
		}
		if len(b) == m { // these were the first
			n.deadline(client, time.Now().Add(limit))
		}
	}
	n.deadline(client, time.Time{})
	if len(v.byName) > 0 {
		if p.more && len(b) > 0 {
			return 0, p, fmt.Sprintf("it was let out for a name (%s) and did not say within %s which one it asks for", v.rule, limit)
		}
		if p.name != "" {
			if said := v.said(p.name, c.Port, n.answers.is(p.name, c.Addr)); said.refused != "" {
				return 0, p, said.refused
			}
		}
	}
	m, _ := server.Write(b)
	return int64(m), p, ""
}

// transfer copies until src ends, and tells dst how. A write that fails only
// ends this direction: there may be more to read from who no longer listens.
func transfer(dst, src *net.TCPConn) (written int64) {
	b := make([]byte, 32<<10)
	for {
		m, err := src.Read(b)
		if m > 0 {
			w, err := dst.Write(b[:m])
			written += int64(w)
			if err != nil {
				src.CloseRead()
				return written
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			dst.CloseWrite()
			return written
		case errors.Is(err, os.ErrDeadlineExceeded): // the end of the network
			dst.CloseWrite()
			return written
		case err != nil:
			reset(dst)
			return written
		}
	}
}

func (n *Network) sayFull() {
	n.full.Do(func() {
		n.say(fmt.Sprintf("RUN has %d connections open, which is the most; further ones wait", cap(n.slots)))
	})
}
