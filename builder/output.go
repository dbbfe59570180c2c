package builder

import (
	"bytes"
	"fmt"
	"io"
	"sync"

	"github.com/docker/go-units"
)

// logs returns writers that turn output into events, whole lines at a time and without any secret.
func (b *build) logs(w *watch) (out, errOut *lineWriter) {
	mask, longest := b.masker()
	return &lineWriter{w: w, mask: mask, longest: longest}, &lineWriter{w: w, mask: mask, longest: longest, stderr: true}
}

// masker replaces the values of secrets; a value of several lines is replaced line by line. longest is the length of
// the longest that it looks for.
func (b *build) masker() (mask func([]byte) []byte, longest int) {
	const shortest = 4 // a shorter line, such as "}", would mask half of the output
	var values [][]byte
	for _, s := range b.Secrets {
		for line := range bytes.Lines(s.Value) {
			if line = bytes.TrimSpace(line); len(line) >= shortest {
				values = append(values, line)
				longest = max(longest, len(line))
			}
		}
	}
	return func(p []byte) []byte {
		for _, v := range values {
			p = bytes.ReplaceAll(p, v, []byte("***"))
		}
		return p
	}, longest
}

// A lineWriter sends what is written to it as Log events.
type lineWriter struct {
	w       *watch
	mask    func([]byte) []byte
	longest int // of what mask looks for
	stderr  bool

	mu    sync.Mutex
	rest  []byte
	shown int    // bytes that were sent
	last  []byte // of what was not sent, since shown came to its limit
	left  int    // bytes that were dropped before last
}

// A command can print without end. As in BuildKit, each of its streams is shown up to clipAfter, and the last that
// it printed, up to keepLast, when it has ended.
const (
	clipAfter = 2 << 20
	keepLast  = 256 << 10
)

// longestLine bounds what is kept of a line that does not end.
const longestLine = 64 << 10

var _ io.Writer = (*lineWriter)(nil)

func (l *lineWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rest = append(l.rest, p...)
	end := bytes.LastIndexByte(l.rest, '\n') + 1
	if end == 0 && len(l.rest) > longestLine+l.longest {
		// A secret may go on in the next write: what may be its beginning waits for the rest.
		l.rest = l.mask(l.rest)
		end = max(0, len(l.rest)-l.longest)
	}
	l.emit(end)
	return len(p), nil
}

func (l *lineWriter) flush() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.emit(len(l.rest))
	l.trim(keepLast)
	if l.left > 0 {
		if i := bytes.IndexByte(l.last, '\n'); i >= 0 {
			l.trim(len(l.last) - i - 1) // the rest of a line
		}
		l.send(fmt.Appendf(nil, "[%s of output left out]\n", units.BytesSize(float64(l.left))))
	}
	l.send(l.last)
	l.last, l.left = nil, 0
}

// emit takes n bytes of rest.
func (l *lineWriter) emit(n int) {
	if n == 0 {
		return
	}
	data := l.mask(l.rest[:n])
	if l.shown+len(data) <= clipAfter {
		l.send(bytes.Clone(data))
	} else {
		l.clip(data)
	}
	l.shown += len(data)
	l.rest = append(l.rest[:0], l.rest[n:]...)
}

// clip sends what may still be shown, and keeps the end of the rest.
func (l *lineWriter) clip(data []byte) {
	if room := clipAfter - l.shown; room >= 0 {
		show, end := bytes.LastIndexByte(data[:room], '\n')+1, ""
		if show == 0 { // a line without end
			show, end = room, "\n"
		}
		l.send(append(bytes.Clone(data[:show]), end+"[output clipped, log limit 2MiB reached]\n"...))
		data = data[show:]
		l.shown = clipAfter + 1
	}
	l.last = append(l.last, data...)
	if len(l.last) > 2*keepLast { // not with every line
		l.trim(keepLast)
	}
}

// trim keeps the end of last.
func (l *lineWriter) trim(size int) {
	if drop := len(l.last) - size; drop > 0 {
		l.last = append(l.last[:0], l.last[drop:]...)
		l.left += drop
	}
}

func (l *lineWriter) send(data []byte) {
	if len(data) > 0 {
		l.w.send(Event{Kind: Log, Stderr: l.stderr, Data: data})
	}
}
