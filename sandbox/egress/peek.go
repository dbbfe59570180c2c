package egress

import (
	"bytes"
	"net/netip"
	"strings"
)

// A Source says where the host name of a connection was read.
type Source string

const (
	FromTLS  Source = "tls"  // the server name that the client's first message asks for
	FromHTTP Source = "http" // the Host header of the first request
	FromDNS  Source = "dns"  // the question whose answer was the address
)

// peeked is what the first bytes of a client say.
type peeked struct {
	name   string // empty if they name no host
	source Source
	more   bool // the bytes look like the beginning of something that may name one
}

// peek looks for a host name in the first bytes that a client sends.
func peek(b []byte) peeked {
	if len(b) == 0 {
		return peeked{more: true}
	}
	if b[0] == 22 { // a TLS handshake record
		return peekTLS(b)
	}
	return peekHTTP(b)
}

// peekTLS reads the server name of a ClientHello (RFC 8446, 4.1.2; RFC 6066, 3).
func peekTLS(b []byte) peeked {
	hello, complete := handshake(b)
	r := reader{hello}
	if kind := r.next(1); len(kind) == 1 && kind[0] != 1 {
		return peeked{}
	}
	size := r.number(3)
	body := r.next(size)
	if body == nil {
		return peeked{more: !complete}
	}
	r = reader{body}
	r.next(2 + 32)      // version, random
	r.next(r.number(1)) // session id
	r.next(r.number(2)) // cipher suites
	r.next(r.number(1)) // compression methods
	extensions := reader{r.next(r.number(2))}
	for len(extensions.b) > 0 {
		kind := extensions.number(2)
		data := reader{extensions.next(extensions.number(2))}
		if kind != 0 {
			continue
		}
		names := reader{data.next(data.number(2))}
		for len(names.b) > 0 {
			isHost := names.number(1) == 0
			name := names.next(names.number(2))
			if isHost && len(name) > 0 {
				return hostOf(string(name), FromTLS)
			}
		}
	}
	return peeked{}
}

// handshake joins the handshake records at the beginning of b. complete means
// that what follows is none, so that waiting for more is of no use.
func handshake(b []byte) (message []byte, complete bool) {
	for len(b) >= 5 {
		if b[0] != 22 || b[1] != 3 {
			return message, true
		}
		size := int(b[3])<<8 | int(b[4])
		if size == 0 || size > 1<<14+256 {
			return message, true
		}
		part := b[5:min(len(b), 5+size)]
		message = append(message, part...)
		if len(part) < size {
			return message, false
		}
		b = b[5+size:]
	}
	return message, len(b) > 1 && b[1] != 3
}

// reader reads numbers and parts; past the end it gives zeros and nil.
type reader struct{ b []byte }

func (r *reader) next(n int) []byte {
	if n > len(r.b) {
		r.b = nil
		return nil
	}
	part := r.b[:n]
	r.b = r.b[n:]
	return part
}

func (r *reader) number(size int) int {
	n := 0
	for _, c := range r.next(size) {
		n = n<<8 | int(c)
	}
	return n
}

// peekHTTP reads the Host header of an HTTP/1 request. Requests to a proxy,
// which name another host than the one they are sent to, have none for us.
func peekHTTP(b []byte) peeked {
	line, rest, whole := bytes.Cut(b, []byte("\n"))
	method, target, spaced := bytes.Cut(line, []byte(" "))
	if len(method) == 0 || len(method) > 20 || bytes.ContainsFunc(method, notMethod) {
		return peeked{}
	}
	if !whole {
		return peeked{more: len(line) < maxPeek && (spaced || len(method) == len(line))}
	}
	target, version, _ := bytes.Cut(bytes.TrimSuffix(target, []byte("\r")), []byte(" "))
	if !bytes.HasPrefix(version, []byte("HTTP/1.")) || len(target) == 0 || target[0] != '/' && target[0] != '*' {
		return peeked{}
	}
	for {
		line, rest, whole = bytes.Cut(rest, []byte("\n"))
		if !whole {
			return peeked{more: true}
		}
		line = bytes.TrimSuffix(line, []byte("\r"))
		if len(line) == 0 {
			return peeked{}
		}
		field, value, _ := bytes.Cut(line, []byte(":"))
		if strings.EqualFold(string(bytes.TrimSpace(field)), "host") {
			host, _, err := splitPorts(string(bytes.TrimSpace(value)))
			if err != nil {
				return peeked{}
			}
			return hostOf(host, FromHTTP)
		}
	}
}

func notMethod(c rune) bool { return c < 'A' || c > 'Z' }

// hostOf takes no addresses: these are known, and better.
func hostOf(name string, source Source) peeked {
	if _, err := netip.ParseAddr(strings.Trim(name, "[]")); err == nil {
		return peeked{}
	}
	name, err := canonical(name)
	if err != nil {
		return peeked{}
	}
	return peeked{name: name, source: source}
}
