// Package ahead lets the stages of a pipeline work at the same time.
package ahead

import "io"

// A Reader is a stage: it reads another reader in a goroutine of its own, up to four buffers ahead of who reads it.
type Reader struct {
	full chan chunk  // read, in order; closed after the last
	free chan []byte // to be read into
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

// New begins to read r. That ends with r's error or with Close, which waits for it: who closes early must have
// made a read that hangs end before.
func New(r io.Reader) *Reader {
	a := &Reader{full: make(chan chunk, buffers), free: make(chan []byte, buffers), stop: make(chan struct{})}
	for range buffers {
		a.free <- make([]byte, bufferSize)
	}
	go a.run(r)
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
		a.full <- chunk{data: buf[:n], buf: buf, err: err} // never waits: there are as many places as buffers
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

// Close ends the goroutine. After it nobody reads r any more.
func (a *Reader) Close() error {
	close(a.stop)
	for range a.full {
	}
	return nil
}
