package builder

import "io"

// readAhead is a stage of a pipeline: it reads r in a goroutine of its own, up to four buffers ahead of its reader.
type readAhead struct {
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
	aheadBuffers = 4
	aheadSize    = 256 << 10
)

// newReadAhead starts the goroutine. It ends with r's error or with Close, which waits for it: who closes early must have
// made a read that hangs end before.
func newReadAhead(r io.Reader) *readAhead {
	a := &readAhead{full: make(chan chunk, aheadBuffers), free: make(chan []byte, aheadBuffers), stop: make(chan struct{})}
	for range aheadBuffers {
		a.free <- make([]byte, aheadSize)
	}
	go a.run(r)
	return a
}

func (a *readAhead) run(r io.Reader) {
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

func (a *readAhead) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.now.err != nil {
			return 0, a.now.err
		}
		if a.now.buf != nil {
			a.free <- a.now.buf
			a.now.buf = nil
		}
		next, ok := <-a.full
		if !ok {
			return 0, io.ErrClosedPipe
		}
		a.now, a.rest = next, next.data
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// Close ends the goroutine. After it nobody reads r any more.
func (a *readAhead) Close() error {
	close(a.stop)
	for range a.full {
	}
	return nil
}
