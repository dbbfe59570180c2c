package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// copyFileAt copies what is no directory, with all it has, from one open directory to another in which the name is free.
func copyFileAt(ctx context.Context, to, from int, name string, st *unix.Stat_t) error {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return copyRegular(ctx, to, from, name, st)
	case unix.S_IFLNK:
		target := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(from, name, target)
		if err != nil {
			return err
		}
		if err := unix.Symlinkat(string(target[:n]), to, name); err != nil {
			return err
		}
	default:
		if err := unix.Mknodat(to, name, st.Mode&unix.S_IFMT|0o600, int(st.Rdev)); err != nil {
			return fmt.Errorf("make device, pipe or socket: %w", err)
		}
	}
	return copyNodeAttributes(to, from, name, st)
}

// copyNodeAttributes is for what is not to be opened.
func copyNodeAttributes(to, from int, name string, st *unix.Stat_t) error {
	src, err := unix.Openat(from, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer closeFD(src)
	dst, err := unix.Openat(to, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer closeFD(dst)
	if err := unix.Fchownat(dst, "", int(st.Uid), int(st.Gid), unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("change owner: %w", err)
	}
	if err := copyXattrs(dst, src); err != nil {
		return err
	}
	if !isLink(st) {
		if err := unix.Chmod(procPath(dst), st.Mode&0o7777); err != nil {
			return fmt.Errorf("change mode: %w", err)
		}
	}
	return setTime(to, name, time.Unix(st.Mtim.Unix()))
}

func copyRegular(ctx context.Context, to, from int, name string, st *unix.Stat_t) (err error) {
	src, err := openFileAt(from, name)
	if err != nil {
		return err
	}
	defer src.Close()
	fd, err := unix.Openat(to, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	dst := os.NewFile(uintptr(fd), name)
	defer func() { err = errors.Join(err, dst.Close()) }()
	if err := copyContent(ctx, dst, src, st.Size); err != nil {
		return fmt.Errorf("copy content: %w", err)
	}
	a := attributes{mode: st.Mode & 0o7777, from: int(src.Fd())}
	if err := a.apply(fd); err != nil {
		return err
	}
	return setTime(to, name, time.Unix(st.Mtim.Unix()))
}

// copyContent shares the blocks where the file system can, and leaves holes as they are.
func copyContent(ctx context.Context, dst, src *os.File, size int64) error {
	if size == 0 || unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil {
		return nil
	}
	if err := dst.Truncate(size); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		begin, err := unix.Seek(int(src.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return nil // a hole to the end
		}
		end := size
		if err == nil {
			end, err = unix.Seek(int(src.Fd()), begin, unix.SEEK_HOLE)
		}
		if err != nil { // a file system without holes
			begin, end = at, size
		}
		if err := copyRange(ctx, dst, src, begin, min(end, size)); err != nil {
			return err
		}
		at = end
	}
	return nil
}

// copyRange copies in pieces, so that it can be called off.
func copyRange(ctx context.Context, dst, src *os.File, at, end int64) error {
	const piece = 16 << 20
	for at < end {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		in, out := at, at
		n, err := unix.CopyFileRange(int(src.Fd()), &in, int(dst.Fd()), &out, int(min(piece, end-at)), 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 { // another file system, an old kernel, a filter
			return copyBytes(ctx, dst, src, at, end)
		}
		at += int64(n)
	}
	return nil
}

func copyBytes(ctx context.Context, dst, src *os.File, at, end int64) error {
	n, err := io.CopyBuffer(writer{ctx, io.NewOffsetWriter(dst, at)}, reader{io.NewSectionReader(src, at, end-at)}, make([]byte, 256<<10))
	if err == nil && n < end-at {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// The wrappers hide ReadFrom and WriteTo, which know no context and no buffer of ours.
type reader struct{ io.Reader }

type writer struct {
	ctx context.Context // of the one copy this writer lives for
	io.Writer
}

func (w writer) Write(b []byte) (int, error) {
	if w.ctx.Err() != nil {
		return 0, context.Cause(w.ctx)
	}
	return w.Writer.Write(b)
}

// copyDirectoryAttributes gives the directory to what from has, times last. Attributes that only to has stay.
func copyDirectoryAttributes(to, from int) error {
	a, err := attributesOf(from)
	if err != nil {
		return err
	}
	if err := a.apply(to); err != nil {
		return err
	}
	return setTime(to, "", a.mtime)
}
