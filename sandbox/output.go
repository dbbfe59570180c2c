package sandbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// drain is how long output may still come after the last process is gone. It
// only passes if somebody outside the sandbox holds the pipe open.
const drain = time.Second

// output copies what the process prints.
type output struct{ stdout, stderr *stream }

// stream is one pipe and the goroutine that empties it.
type stream struct {
	read, write *os.File
	done        chan error
}

// newOutput opens the pipes and starts to copy. Equal writers share a pipe, so
// that the order of their lines is kept and no two goroutines write at once.
func newOutput(stdout, stderr io.Writer) (*output, error) {
	out, err := newStream(stdout)
	if err != nil {
		return nil, err
	}
	if sameWriter(stdout, stderr) {
		return &output{out, out}, nil
	}
	errs, err := newStream(stderr)
	if err != nil {
		out.write.Close()
		<-out.done
		return nil, err
	}
	return &output{out, errs}, nil
}

func sameWriter(a, b io.Writer) (same bool) {
	defer func() {
		if recover() != nil { // types that cannot be compared
			same = false
		}
	}()
	return a == b
}

func newStream(w io.Writer) (*stream, error) {
	if w == nil {
		w = io.Discard
	}
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	s := &stream{read: read, write: write, done: make(chan error, 1)}
	go func() {
		defer read.Close()
		s.done <- copyOutput(w, read)
	}()
	return s, nil
}

// copyOutput reads to the end even when nobody wants the bytes any more:
// otherwise the process would wait for room in the pipe forever.
func copyOutput(w io.Writer, read *os.File) error {
	var writeErr error
	buffer := make([]byte, 32<<10)
	for {
		n, err := read.Read(buffer)
		if n > 0 && writeErr == nil {
			_, writeErr = w.Write(buffer[:n])
		}
		switch {
		case errors.Is(err, io.EOF):
			return writeErr
		case errors.Is(err, os.ErrDeadlineExceeded):
			if pending(read) == 0 {
				return writeErr
			}
			read.SetReadDeadline(time.Now().Add(drain))
		case err != nil:
			return errors.Join(writeErr, err)
		}
	}
}

// pending returns how many bytes are in the pipe.
func pending(read *os.File) int {
	conn, err := read.SyscallConn()
	if err != nil {
		return 0
	}
	var n int
	if err := conn.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }); err != nil {
		return 0
	}
	return n
}

func (o *output) streams() []*stream {
	if o.stdout == o.stderr {
		return []*stream{o.stdout}
	}
	return []*stream{o.stdout, o.stderr}
}

// giveTo makes the pipes a user's, who could not open them by name otherwise, as in > /dev/stdout.
func (o *output) giveTo(uid uint32) error {
	for _, s := range o.streams() {
		if err := s.write.Chown(int(uid), -1); err != nil {
			return err
		}
	}
	return nil
}

// started closes our copy of the writing ends, once the process has its own.
func (o *output) started() {
	for _, s := range o.streams() {
		s.write.Close()
	}
}

// finish returns when everything printed has been copied, at the latest a
// moment after the pipes fell silent.
func (o *output) finish() error {
	var errs []error
	for _, s := range o.streams() {
		s.read.SetReadDeadline(time.Now().Add(drain))
		if err := <-s.done; err != nil {
			errs = append(errs, fmt.Errorf("sandbox: copy output: %w", err))
		}
	}
	return join(errs...)
}

// join is errors.Join for the usual case that at most one of errs is not nil:
// that one is then returned as it is.
func join(errs ...error) error {
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) == 1 {
		return errs[0]
	}
	return errors.Join(errs...)
}
