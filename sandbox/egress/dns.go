package egress

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	// maxQueries are answered at a time; further datagrams are lost, as
	// datagrams may be, and clients ask again.
	maxQueries = 64
	// maxDNSConns may ask over TCP at a time; further ones wait.
	maxDNSConns = 16

	resolverTimeout = 4 * time.Second // less than clients wait: the next resolver gets its turn
	dnsIdleTimeout  = 10 * time.Second

	maxAnswers     = 4096 // addresses whose names are remembered
	maxAnswerNames = 16   // of each
)

// answers remembers which addresses names resolved to, the newest of them.
type answers struct {
	mu     sync.Mutex
	byAddr map[netip.Addr][]string // the newest last
	order  []netip.Addr
}

func (a *answers) add(name string, addr netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.byAddr == nil {
		a.byAddr = map[netip.Addr][]string{}
	}
	names, known := a.byAddr[addr]
	if !known {
		if len(a.order) == maxAnswers {
			delete(a.byAddr, a.order[0])
			a.order = a.order[1:]
		}
		a.order = append(a.order, addr)
	}
	names = slices.DeleteFunc(names, func(old string) bool { return old == name })
	if len(names) == maxAnswerNames {
		names = slices.Delete(names, 0, 1)
	}
	a.byAddr[addr] = append(names, name)
}

// names returns the names that resolved to addr.
func (a *answers) names(addr netip.Addr) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.byAddr[addr])
}

// is reports whether name resolved to addr.
func (a *answers) is(name string, addr netip.Addr) bool {
	return slices.Contains(a.names(addr), name)
}

func (n *Network) serveDNSOverUDP(ctx context.Context) {
	conn := n.inside.dnsUDP
	slots := make(chan struct{}, maxQueries)
	b := make([]byte, 64<<10)
	for {
		m, from, err := conn.ReadFromUDPAddrPort(b)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			continue // a client that has gone
		}
		select {
		case slots <- struct{}{}:
		default:
			continue
		}
		query := bytes.Clone(b[:m])
		n.tasks.Go(func() {
			defer func() { <-slots }()
			if reply := n.answer(ctx, query, "udp"); reply != nil {
				conn.WriteToUDPAddrPort(reply, from)
			}
		})
	}
}

func (n *Network) serveDNSOverTCP(ctx context.Context) {
	slots := make(chan struct{}, maxDNSConns)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		conn, err := n.inside.dnsTCP.AcceptTCP()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(10 * time.Millisecond)
			<-slots
			continue
		}
		n.tasks.Go(func() {
			defer func() { <-slots }()
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			n.answerStream(ctx, conn)
		})
	}
}

func (n *Network) answerStream(ctx context.Context, conn *net.TCPConn) {
	for {
		conn.SetDeadline(time.Now().Add(dnsIdleTimeout))
		query, err := readMessage(conn)
		if err != nil {
			return
		}
		reply := n.answer(ctx, query, "tcp")
		if reply == nil || writeMessage(conn, reply) != nil {
			return
		}
	}
}

func readMessage(r io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(r, b)
	return b, err
}

func writeMessage(w io.Writer, message []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...))
	return err
}

// answer returns the reply to a query, or nil if it is none.
func (n *Network) answer(ctx context.Context, query []byte, network string) []byte {
	var p dnsmessage.Parser
	header, err := p.Start(query)
	if err != nil || header.Response {
		return nil
	}
	questions, err := p.AllQuestions()
	if err != nil || len(questions) != 1 || header.OpCode != 0 {
		return reply(header, nil, dnsmessage.RCodeFormatError)
	}
	q := questions[0]
	name := strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))
	if v := n.judges.lookup(name); v.refused != "" {
		n.reportName(name, v.refused)
		return reply(header, &q, dnsmessage.RCodeNameError)
	}
	switch {
	case q.Type == dnsmessage.TypeA && !n.have.v4, q.Type == dnsmessage.TypeAAAA && !n.have.v6:
		return reply(header, &q, dnsmessage.RCodeSuccess)
	case q.Type == typeSVCB, q.Type == typeHTTPS:
		// These bring addresses past us, and keys to hide the name that is asked for.
		return reply(header, &q, dnsmessage.RCodeSuccess)
	}
	message := n.forward(ctx, query, q, network)
	if message == nil {
		return reply(header, &q, dnsmessage.RCodeServerFailure)
	}
	addrs, err := addresses(message)
	if err != nil {
		return reply(header, &q, dnsmessage.RCodeServerFailure)
	}
	for _, a := range addrs {
		if v := n.judges.answer(name, a); v.refused != "" {
			n.reportName(name, v.refused)
			return reply(header, &q, dnsmessage.RCodeNameError)
		}
	}
	if _, err := canonical(name); err == nil {
		for _, a := range addrs {
			n.answers.add(name, a.Unmap())
		}
	}
	binary.BigEndian.PutUint16(message, header.ID)
	return message
}

const (
	typeSVCB  dnsmessage.Type = 64
	typeHTTPS dnsmessage.Type = 65
)

// reportName reports a name that was not resolved. Questions for the names of
// addresses come from programs that only want to print them.
func (n *Network) reportName(name, refused string) {
	if strings.HasSuffix(name, ".in-addr.arpa") || strings.HasSuffix(name, ".ip6.arpa") {
		return
	}
	if _, err := canonical(name); err != nil {
		name = strconv.Quote(name)
	}
	n.report(Conn{Host: name, Source: FromDNS, Refused: refused})
}

// reply makes one without answers.
func reply(query dnsmessage.Header, q *dnsmessage.Question, code dnsmessage.RCode) []byte {
	message := dnsmessage.Message{Header: dnsmessage.Header{
		ID: query.ID, Response: true, OpCode: query.OpCode,
		RecursionDesired: query.RecursionDesired, RecursionAvailable: true, RCode: code,
	}}
	if q != nil {
		message.Questions = []dnsmessage.Question{*q}
	}
	b, err := message.Pack()
	if err != nil {
		return nil
	}
	return b
}

// forward asks the machine's resolvers, one after the other, and returns the
// first useful reply, else the last, else nil.
func (n *Network) forward(ctx context.Context, query []byte, q dnsmessage.Question, network string) []byte {
	var last []byte
	for _, resolver := range n.resolve {
		message, err := ask(ctx, resolver, query, q, network)
		if err != nil {
			continue
		}
		last = message
		switch code := dnsmessage.RCode(message[3] & 15); code {
		case dnsmessage.RCodeServerFailure, dnsmessage.RCodeRefused, dnsmessage.RCodeNotImplemented:
		default:
			return message
		}
	}
	return last
}

// ask sends a query to a resolver, with an id that the sandbox does not know.
func ask(ctx context.Context, resolver netip.AddrPort, query []byte, q dnsmessage.Question, network string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, resolverTimeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, network, resolver.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	query = bytes.Clone(query)
	rand.Read(query[:2])
	if network == "tcp" {
		if err := writeMessage(conn, query); err != nil {
			return nil, err
		}
		message, err := readMessage(conn)
		if err == nil && !answersQuery(message, query, q) {
			err = errors.New("not the answer")
		}
		return message, err
	}
	if _, err := conn.Write(query); err != nil {
		return nil, err
	}
	b := make([]byte, 64<<10)
	for {
		m, err := conn.Read(b)
		if err != nil {
			return nil, err
		}
		if answersQuery(b[:m], query, q) {
			return b[:m], nil
		}
	}
}

func answersQuery(message, query []byte, q dnsmessage.Question) bool {
	var p dnsmessage.Parser
	header, err := p.Start(message)
	if err != nil || !header.Response || header.ID != binary.BigEndian.Uint16(query) {
		return false
	}
	got, err := p.Question()
	return err == nil && got.Type == q.Type && got.Class == q.Class && strings.EqualFold(got.Name.String(), q.Name.String())
}

// addresses returns all in the answer section.
func addresses(message []byte) ([]netip.Addr, error) {
	var p dnsmessage.Parser
	if _, err := p.Start(message); err != nil {
		return nil, err
	}
	if err := p.SkipAllQuestions(); err != nil {
		return nil, err
	}
	var addrs []netip.Addr
	for {
		header, err := p.AnswerHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return addrs, nil
		}
		if err != nil {
			return nil, err
		}
		switch header.Type {
		case dnsmessage.TypeA:
			r, err := p.AResource()
			if err != nil {
				return nil, err
			}
			addrs = append(addrs, netip.AddrFrom4(r.A))
		case dnsmessage.TypeAAAA:
			r, err := p.AAAAResource()
			if err != nil {
				return nil, err
			}
			addrs = append(addrs, netip.AddrFrom16(r.AAAA))
		default:
			if err := p.SkipAnswer(); err != nil {
				return nil, err
			}
		}
	}
}
