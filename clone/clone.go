// Package clone copies the content of a file as cheaply as the file system can: by sharing its blocks (reflink, btrfs and
// xfs), else inside the kernel, else through a buffer. Holes stay holes.
//
// The kernel does the first two only within one file system, and an overlay is one of its own: whoever copies into an
// overlay names the file in its upper directory, and whoever copies out of one, that in its layer.
//
// The package knows nothing of owners, modes or times.
package clone

import (
	"context"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// worth is the size from which sharing blocks is tried: a shorter file is copied as fast.
	worth = 64 << 10
	// piece is how much is copied between two looks at whether the work still goes on.
	piece = 64 << 20
	// buffer is how much goes through this process at once where the kernel cannot copy.
	buffer = 256 << 10
)

// File copies the content of from, a regular file, to the new, empty file to. A nil error means that to has all that
// from had when the copy began, if nobody wrote to it meanwhile. Both are left at any position.
func File(ctx context.Context, to, from *os.File) error {
	var st unix.Stat_t
	in, out := int(from.Fd()), int(to.Fd())
	if err := unix.Fstat(in, &st); err != nil {
		return err
	}
	if st.Size >= worth && unix.IoctlFileClone(out, in) == nil {
		return nil
	}
	c := copier{ctx: ctx, in: in, out: out}
	if st.Size == 0 {
		// Some file systems, such as /proc, give files without a size that have content.
		return c.toEnd()
	}
	if st.Blocks*512 >= st.Size || st.Size < worth {
		return c.data(0, st.Size)
	}
	return c.sparse(st.Size)
}

type copier struct {
	ctx     context.Context // of the one copy
	in, out int
	// outside says that the kernel refused to copy between these two.
	outside bool
	buf     []byte
}

// sparse copies what lies between the holes.
func (c *copier) sparse(size int64) error {
	for at := int64(0); at < size; {
		begin, err := unix.Seek(c.in, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // nothing but a hole is left
		}
		if err != nil {
			return c.data(at, size) // this file system knows no holes
		}
		end, err := unix.Seek(c.in, begin, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		end = min(end, size)
		if err := c.data(begin, end); err != nil {
			return err
		}
		at = max(end, begin+1)
	}
	return unix.Ftruncate(c.out, size)
}

// data copies the bytes from begin to end, or to the end of the file if that comes first.
func (c *copier) data(begin, end int64) error {
	for at := begin; at < end; {
		if c.ctx.Err() != nil {
			return context.Cause(c.ctx)
		}
		n, err := c.some(at, min(end-at, piece))
		if err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		at += int64(n)
	}
	return nil
}

func (c *copier) some(at, length int64) (int, error) {
	if c.outside {
		return c.throughBuffer(at, length)
	}
	for {
		from, to := at, at
		n, err := unix.CopyFileRange(c.in, &from, c.out, &to, int(length), 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil && n > 0:
			return n, nil
		case err == nil || cannot(err):
			// Nothing was copied: some file systems say so although there is something to copy.
			c.outside = true
			return c.throughBuffer(at, length)
		}
		return 0, err
	}
}

// cannot reports an error of copy_file_range that says nothing about the files themselves.
func cannot(err error) bool {
	for _, e := range []error{unix.EXDEV, unix.ENOSYS, unix.EOPNOTSUPP, unix.EINVAL, unix.EPERM, unix.EIO} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (c *copier) throughBuffer(at, length int64) (int, error) {
	if c.buf == nil {
		c.buf = make([]byte, min(length, buffer))
	}
	n, err := again(func() (int, error) { return unix.Pread(c.in, c.buf[:min(length, int64(len(c.buf)))], at) })
	if err != nil {
		return 0, err
	}
	for done := 0; done < n; {
		w, err := again(func() (int, error) { return unix.Pwrite(c.out, c.buf[done:n], at+int64(done)) })
		if err != nil {
			return done, err
		}
		if w == 0 {
			return done, io.ErrShortWrite
		}
		done += w
	}
	return n, nil
}

func (c *copier) toEnd() error {
	c.outside, c.buf = true, make([]byte, 4<<10)
	for at := int64(0); ; {
		if c.ctx.Err() != nil {
			return context.Cause(c.ctx)
		}
		n, err := c.some(at, buffer)
		if err != nil || n == 0 {
			return err
		}
		at += int64(n)
	}
}

func again(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
