// Package ahead lets the stages of a pipeline work at the same time.
package ahead

import "io"

// A Reader is the end of a stage: what comes before it works up to four buffers ahead.
type Reader struct {
	full chan chunk  // to be read, in order; closed after the last
	free chan []byte // to be filled
	stop chan struct{}
	now  chunk // what the reader is in
	rest []byte
}

type chunk struct {
	data []byte
	buf  []byte
	err  error // after data
}

const (
	buffers    = 4
	bufferSize = 256 << 10
)

// New begins to read r in a goroutine of its own. That ends with r's error or with Close, which waits for it: who closes early
// must have made a read that hangs end before.
func New(r io.Reader) *Reader {
	a := newReader()
	go a.run(r)
	return a
}

func newReader() *Reader {
	a := &Reader{full: make(chan chunk, buffers+1), free: make(chan []byte, buffers), stop: make(chan struct{})}
	for range buffers {
		a.free <- make([]byte, bufferSize)
	}
	return a
}

func (a *Reader) run(r io.Reader) {
	defer close(a.full)
	for {
		var buf []byte
		select {
		case buf = <-a.free:
		case <-a.stop:
			return
		}
		n, err := fill(r, buf, a.stop)
		a.full <- chunk{data: buf[:n], buf: buf, err: err} // never waits: there are more places than buffers
		if err != nil {
			return
		}
	}
}

// fill is io.ReadFull that ends early when it is told to, and keeps the reader's error.
func fill(r io.Reader, buf []byte, stop <-chan struct{}) (n int, err error) {
	for n < len(buf) && err == nil {
		select {
		case <-stop:
			return n, io.ErrClosedPipe
		default:
		}
		var k int
		k, err = r.Read(buf[n:])
		n += k
	}
	return n, err
}

func (a *Reader) Read(p []byte) (int, error) {
	if err := a.next(); err != nil {
		return 0, err
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// WriteTo is for io.Copy: the buffers are written as they are.
func (a *Reader) WriteTo(w io.Writer) (int64, error) {
	var written int64
	for {
		if err := a.next(); err == io.EOF {
			return written, nil
		} else if err != nil {
			return written, err
		}
		n, err := w.Write(a.rest)
		written += int64(n)
		a.rest = a.rest[n:]
		if err != nil {
			return written, err
		}
	}
}

// next makes sure that there is something to read.
func (a *Reader) next() error {
	for len(a.rest) == 0 {
		if a.now.err != nil {
			return a.now.err
		}
		if a.now.buf != nil {
			a.free <- a.now.buf
			a.now.buf = nil
		}
		next, ok := <-a.full
		if !ok {
			return io.ErrClosedPipe
		}
		a.now, a.rest = next, next.data
	}
	return nil
}

// Close ends what works ahead, and waits for its end: of the goroutine that New began, or until the Writer is closed, too.
func (a *Reader) Close() error {
	close(a.stop)
	for range a.full {
	}
	return nil
}

// A Writer gives a Reader what it reads, whole buffers at a time.
type Writer struct {
	to  *Reader
	buf []byte // nil: none at hand
	n   int    // bytes in buf
}

// Pipe returns two ends for two goroutines. Both must be closed.
func Pipe() (*Reader, *Writer) {
	r := newReader()
	return r, &Writer{to: r}
}

// Write waits while all buffers are full. It returns [io.ErrClosedPipe] once the Reader is closed.
func (w *Writer) Write(p []byte) (n int, err error) {
	for n < len(p) {
		if w.buf == nil {
			select {
			case w.buf = <-w.to.free:
			case <-w.to.stop:
				return n, io.ErrClosedPipe
			}
		}
		k := copy(w.buf[w.n:], p[n:])
		n, w.n = n+k, w.n+k
		if w.n == len(w.buf) {
			w.pass(nil)
		}
	}
	select {
	case <-w.to.stop:
		return n, io.ErrClosedPipe
	default:
		return n, nil
	}
}

func (w *Writer) pass(err error) {
	w.to.full <- chunk{data: w.buf[:w.n], buf: w.buf, err: err} // never waits: there are more places than buffers
	w.buf, w.n = nil, 0
}

// CloseWithError ends what is read, with io.EOF for nil.
func (w *Writer) CloseWithError(err error) {
	if err == nil {
		err = io.EOF
	}
	w.pass(err)
	close(w.to.full)
}
