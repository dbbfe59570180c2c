package policy

import (
	"context"
	"errors"
	"io"
)

// windowStep is how much is read and searched at a time.
const windowStep = 256 << 10

// window passes a stream on to its reader and searches it on the way. It keeps as much of what it has passed as
// the longest pattern may reach back, so a match across two reads is found like any other.
type window struct {
	ctx     context.Context
	src     io.Reader
	m       *matcher
	buf     []byte
	start   int64 // offset of buf[0] in the stream
	filled  int   // bytes of buf in use
	passed  int   // bytes of buf that the reader has got
	next    int   // where in buf the search goes on
	err     error // of src, io.EOF at its end
	decided int64 // no match that starts before this offset will be found any more
	matches []streamMatch
}

// streamMatch is a match in the stream.
type streamMatch struct {
	pattern *pattern
	key     string // kind of private key
	offset  int64
}

func newWindow(ctx context.Context, src io.Reader, m *matcher) *window {
	return &window{ctx: ctx, src: src, m: m, buf: make([]byte, windowStep+2*(m.before+m.after))}
}

// Read implements io.Reader.
func (w *window) Read(p []byte) (int, error) {
	if w.passed == w.filled {
		if w.err != nil {
			return 0, w.err
		}
		if err := w.fill(); err != nil {
			return 0, err
		}
		if w.passed == w.filled {
			return 0, w.err
		}
	}
	n := copy(p, w.buf[w.passed:w.filled])
	w.passed += n
	return n, nil
}

// offset is how far the reader has got.
func (w *window) offset() int64 { return w.start + int64(w.passed) }

// finished says that the whole stream was read and searched.
func (w *window) finished() bool { return w.err != nil && w.passed == w.filled }

func (w *window) fill() error {
	if err := w.ctx.Err(); err != nil {
		return context.Cause(w.ctx)
	}
	drop := max(0, w.next-w.m.before)
	copy(w.buf, w.buf[drop:w.filled])
	w.start += int64(drop)
	w.next -= drop
	w.filled -= drop
	w.passed -= drop
	for w.filled < len(w.buf) && w.err == nil {
		var n int
		n, w.err = w.src.Read(w.buf[w.filled:])
		w.filled += n
	}
	if w.err != nil && !errors.Is(w.err, io.EOF) {
		return w.err
	}
	w.search()
	return nil
}

func (w *window) search() {
	limit := w.filled
	if w.err == nil {
		// Anchors nearer to the end wait until the bytes after them are here.
		limit = max(w.next, w.filled-w.m.after)
	}
	w.m.scan(w.buf[:w.filled], w.next, limit, w.found)
	w.next = limit
	w.decided = w.start + int64(max(0, limit-w.m.before))
	if w.err != nil {
		w.decided = w.start + int64(w.filled)
	}
}

func (w *window) found(h match) {
	s := streamMatch{pattern: h.pattern, offset: w.start + int64(h.start)}
	if h.pattern.secret < 0 {
		look := privateKey
		if h.pattern.form == "base64" {
			look = encodedKey
		}
		kind, ok := look(w.buf[h.start:w.filled])
		if !ok {
			return
		}
		s.key = kind
	}
	w.matches = append(w.matches, s)
}
