package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// wire carries messages to one git-upload-pack and back.
type wire interface {
	// advertisement is what the server says first.
	advertisement(ctx context.Context) (*packets, error)
	// send sends one message. The answer ends with Close, after which the next may be sent.
	send(ctx context.Context, message string) (*packets, io.Closer, error)
	Close() error
}

// server is a git-upload-pack that has said what it can do.
type server struct {
	wire
	client *Client
	at     location
	v2     bool
	can    map[string]string // its capabilities
	known  []ref             // version 0: what it advertised
	size   int               // of an oid
}

// ref is a name on the server.
type ref struct {
	name   string
	id     oid
	peeled oid    // what an annotated tag is a tag of
	target string // of a symbolic ref
}

// connect opens a conversation; the caller closes it.
func (c *Client) connect(ctx context.Context, g Git, at location) (_ *server, err error) {
	s := &server{client: c, at: at, can: map[string]string{}, size: 20}
	switch at.scheme {
	case "http", "https":
		s.wire, err = c.httpWire(g, at)
	case "ssh":
		s.wire, err = c.sshWire(ctx, g, at)
	default:
		s.wire, err = c.tcpWire(ctx, at)
	}
	if err != nil {
		return nil, err
	}
	p, err := s.advertisement(ctx)
	if err == nil {
		err = s.greet(p)
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *server) greet(p *packets) error {
	line, m, err := p.line()
	if err == nil && strings.HasPrefix(line, "# service=") {
		if _, m, err = p.next(); err == nil && m != flush {
			err = errPacket
		}
		if err == nil {
			line, m, err = p.line()
		}
	}
	if err == nil && line == "version 1" {
		line, m, err = p.line()
	}
	if err != nil {
		return err
	}
	if line == "version 2" {
		s.v2 = true
		for {
			line, m, err = p.line()
			if err != nil || m != data {
				break
			}
			s.capability(line)
		}
	} else {
		err = s.greetOld(line, m, p)
	}
	if err != nil {
		return err
	}
	switch format := s.can["object-format"]; format {
	case "", "sha1":
	case "sha256":
		s.size = 32
	default:
		return fmt.Errorf("the repository's objects are named by %q", format)
	}
	for _, r := range s.known {
		if len(r.id) != s.size {
			return errPacket
		}
	}
	return nil
}

func (s *server) capability(word string) {
	name, value, _ := strings.Cut(word, "=")
	if name == "symref" { // several
		value = strings.TrimPrefix(s.can[name]+" "+value, " ")
	}
	s.can[name] = value
}

// greetOld reads the refs that a server of version 0 begins with.
func (s *server) greetOld(line string, m mark, p *packets) error {
	for first := true; m == data; first = false {
		if first {
			var words string
			line, words, _ = strings.Cut(line, "\x00")
			for _, word := range strings.Fields(words) {
				s.capability(word)
			}
		}
		if err := s.learn(line); err != nil {
			return err
		}
		var err error
		if line, m, err = p.line(); err != nil {
			return err
		}
	}
	for _, link := range strings.Fields(s.can["symref"]) {
		from, to, _ := strings.Cut(link, ":")
		for i := range s.known {
			if s.known[i].name == from {
				s.known[i].target = to
			}
		}
	}
	return nil
}

func (s *server) learn(line string) error {
	hex, name, ok := strings.Cut(line, " ")
	if hex == "shallow" {
		return nil
	}
	id, err := parseOID(hex)
	if !ok || err != nil {
		return errPacket
	}
	if name == "capabilities^{}" { // an empty repository
		return nil
	}
	if tag, ok := strings.CutSuffix(name, "^{}"); ok {
		if n := len(s.known); n > 0 && s.known[n-1].name == tag {
			s.known[n-1].peeled = id
		}
		return nil
	}
	if len(s.known) >= s.client.Limits.Refs {
		return fmt.Errorf("the server has more than %d refs", s.client.Limits.Refs)
	}
	s.known = append(s.known, ref{name: name, id: id})
	return nil
}

// refs are the server's refs that begin with one of the prefixes. A server of version 0 has sent all.
func (s *server) refs(ctx context.Context, prefixes ...string) (_ []ref, err error) {
	if !s.v2 {
		return s.known, nil
	}
	message := s.command("ls-refs") + packet("peel\n") + packet("symrefs\n")
	for _, p := range prefixes {
		message += packet("ref-prefix %s\n", p)
	}
	p, answer, err := s.send(ctx, message+"0000")
	if err != nil {
		return nil, err
	}
	defer closing(answer, &err)
	s.known = nil
	for {
		line, m, err := p.line()
		if err != nil {
			return nil, err
		}
		if m != data {
			return s.known, nil
		}
		words := strings.Split(line, " ")
		if words[0] == "unborn" {
			continue
		}
		if len(words) < 2 {
			return nil, errPacket
		}
		if err := s.learn(words[0] + " " + words[1]); err != nil {
			return nil, err
		}
		r := &s.known[len(s.known)-1]
		for _, w := range words[2:] {
			if target, ok := strings.CutPrefix(w, "symref-target:"); ok {
				r.target = target
			} else if hex, ok := strings.CutPrefix(w, "peeled:"); ok {
				if r.peeled, err = parseOID(hex); err != nil {
					return nil, errPacket
				}
			}
		}
	}
}

func (s *server) command(name string) string {
	m := packet("command=%s\n", name)
	if _, ok := s.can["agent"]; ok {
		m += packet("agent=%s\n", s.agent())
	}
	if f, ok := s.can["object-format"]; ok {
		m += packet("object-format=%s\n", f)
	}
	return m + "0001"
}

func (s *server) agent() string {
	return strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return '-'
		}
		return r
	}, s.client.UserAgent)
}

// request is what a fetch asks for.
type request struct {
	want    []oid
	shallow bool // the wanted commits without their history
	bare    bool // without trees and files, where the server can leave them out
}

// fetch receives a pack with what is asked for into f.
func (s *server) fetch(ctx context.Context, r request, f *os.File) (_ *pack, err error) {
	message, err := s.fetchMessage(r)
	if err != nil {
		return nil, err
	}
	p, answer, err := s.send(ctx, message)
	if err != nil {
		return nil, err
	}
	defer closing(answer, &err)
	if err := s.skipToPack(p); err != nil {
		return nil, err
	}
	band := &sideband{p: p}
	got, err := receive(ctx, band, f, s.size, s.client.Limits)
	if err != nil {
		return nil, err
	}
	if n, err := io.Copy(io.Discard, band); err != nil || n > 0 {
		return nil, errors.Join(errPack, err)
	}
	return got, nil
}

func (s *server) fetchMessage(r request) (string, error) {
	words := s.can
	if s.v2 {
		words = map[string]string{}
		for _, w := range strings.Fields(s.can["fetch"]) {
			words[w] = ""
		}
	} else if _, ok := words["side-band-64k"]; !ok {
		return "", errors.New("the server is too old: it has no side-band-64k")
	}
	has := func(w string) bool { _, ok := words[w]; return ok }
	var options string
	if r.shallow && has("shallow") {
		options += packet("deepen 1\n")
	}
	if r.bare && has("filter") {
		options += packet("filter tree:0\n")
	}
	if s.v2 {
		m := s.command("fetch") + packet("no-progress\n") + packet("ofs-delta\n")
		for _, id := range r.want {
			m += packet("want %v\n", id)
		}
		return m + options + packet("done\n") + "0000", nil
	}
	use := []string{"side-band-64k", "ofs-delta", "agent=" + s.agent()}
	for _, w := range []string{"no-progress", "filter", "multi_ack_detailed"} { // Azure insists on the last
		if has(w) {
			use = append(use, w)
		}
	}
	if s.size == 32 {
		use = append(use, "object-format=sha256")
	}
	var m string
	for i, id := range r.want {
		if i == 0 {
			m += packet("want %v %s\n", id, strings.Join(use, " "))
		} else {
			m += packet("want %v\n", id)
		}
	}
	return m + options + "0000" + packet("done\n"), nil
}

// skipToPack reads what comes before the pack: which commits are cut off, and that we have nothing in common.
func (s *server) skipToPack(p *packets) error {
	for {
		line, m, err := p.line()
		if err != nil {
			return err
		}
		switch {
		case s.v2 && m == data && line == "packfile", !s.v2 && line == "NAK":
			return nil
		case m == delim && s.v2, m == flush && !s.v2:
		case m != data:
			return errPacket
		case line == "shallow-info", strings.HasPrefix(line, "shallow "), strings.HasPrefix(line, "unshallow "):
		default:
			return errPacket
		}
	}
}

// refuses says whether a server may have an object and not give it away, because no ref leads to it in one step.
func refuses(err error) bool {
	var said remoteError
	if !errors.As(err, &said) {
		return false
	}
	return slices.ContainsFunc([]string{"not our ref", "unadvertised", "not allowed", "shallow"}, func(s string) bool {
		return strings.Contains(strings.ToLower(string(said)), s)
	})
}

func closing(c io.Closer, err *error) {
	if e := c.Close(); *err == nil {
		*err = e
	}
}
