package remote

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode"
)

// Packets of git's protocol: four hexadecimal digits of length, then the data. Short lengths are marks.
type mark int

const (
	data  mark = iota // a packet with data
	flush             // 0000: end of a message
	delim             // 0001: end of a section
	end               // 0002: end of a response
)

const maxPacket = 65520

// packets reads packets. The data of one is valid until the next is read.
type packets struct {
	r   io.Reader
	buf [maxPacket]byte
}

// remoteError is what the server says is wrong.
type remoteError string

func (e remoteError) Error() string { return "the server says: " + string(e) }

// serverSays makes a server's words fit for a terminal.
func serverSays(words []byte) error {
	s := strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(string(words[:min(len(words), 1000)]), "?"))
	return remoteError(strings.TrimSpace(s))
}

var errPacket = errors.New("the server does not speak git's protocol")

func (p *packets) next() ([]byte, mark, error) {
	if _, err := io.ReadFull(p.r, p.buf[:4]); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, data, err
	}
	n, err := strconv.ParseUint(string(p.buf[:4]), 16, 16)
	if err != nil || n == 3 || n > maxPacket {
		return nil, data, errPacket
	}
	if n < 4 {
		return nil, flush + mark(n), nil
	}
	b := p.buf[:n-4]
	if _, err := io.ReadFull(p.r, b); err != nil {
		return nil, data, fmt.Errorf("packet: %w", io.ErrUnexpectedEOF)
	}
	if words, ok := bytes.CutPrefix(b, []byte("ERR ")); ok {
		return nil, data, serverSays(words)
	}
	return b, data, nil
}

// line is next for packets of text.
func (p *packets) line() (string, mark, error) {
	b, m, err := p.next()
	return strings.TrimSuffix(string(b), "\n"), m, err
}

func packet(format string, args ...any) string {
	s := fmt.Sprintf(format, args...)
	return fmt.Sprintf("%04x%s", len(s)+4, s)
}

// sideband is the pack within the packets of a fetch: band 1 is the pack, 2 is progress, 3 is an error.
type sideband struct {
	p    *packets
	rest []byte
}

func (s *sideband) Read(b []byte) (int, error) {
	for len(s.rest) == 0 {
		pkt, m, err := s.p.next()
		switch {
		case err != nil:
			return 0, err
		case m != data:
			return 0, io.EOF
		case len(pkt) == 0:
			return 0, errPacket
		case pkt[0] == 1:
			s.rest = pkt[1:]
		case pkt[0] == 3:
			return 0, serverSays(pkt[1:])
		case pkt[0] != 2:
			return 0, errPacket
		}
	}
	n := copy(b, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}
