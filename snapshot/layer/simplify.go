package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Simplify makes the overlay upper directory dir say what changed and no more, without changing what it shows over the
// layers below, which are given topmost first.
//
// It removes what says nothing: files and links that are equal in content, attributes and time to what is shown in their
// place, and directories of which that is true and that hold nothing else. Overlay copies a file up when it is opened for
// writing and a directory as soon as something is made in it, and leaves the copy when nothing comes of it; a COPY writes
// again what is there.
//
// It removes sockets, which no layer can hold and which are nothing without who listened: what stays of a step is what an
// image of it brings.
//
// It marks each name that a directory hides, where overlay marked the directory as opaque: the image specification wants
// layers with explicit whiteouts.
func Simplify(ctx context.Context, dir string, lowers []string) error {
	root, err := unix.Open(dir, openDirectory, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dir, err)
	}
	defer closeFD(root)
	below, err := openStack(lowers)
	defer below.close()
	if err != nil {
		return err
	}
	return simplify(ctx, directory{fd: root}, below)
}

// stack is one directory in each layer that has it, topmost first; the first is the one whose attributes are shown.
type stack []int

func (s stack) close() {
	for _, fd := range s {
		closeFD(fd)
	}
}

// into is the stack of a directory in s. It ends where something else hides what is further down.
func (s stack) into(name string) stack {
	var inner stack
	for _, fd := range s {
		next, err := unix.Openat(fd, name, openDirectory, 0)
		if err == unix.ENOENT {
			continue
		}
		if err != nil {
			break // a file, a link or a whiteout
		}
		inner = append(inner, next)
		if isOpaque(next) {
			break
		}
	}
	return inner
}

// at is the stack of a directory further down. What it returns is to be closed in any case.
func (s stack) at(path string) (stack, error) {
	var here stack
	for _, fd := range s {
		copied, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return here, err
		}
		here = append(here, copied)
	}
	for part := range strings.SplitSeq(path, "/") {
		if part == "" {
			continue
		}
		inner := here.into(part)
		here.close()
		here = inner
	}
	return here, nil
}

// find is the layer in which what s shows under a name is, if that is something.
func (s stack) find(name string) (dir int, st unix.Stat_t, found bool, err error) {
	for _, fd := range s {
		st, ok, err := lstatAt(fd, name)
		if err != nil || ok {
			return fd, st, ok && !isWhiteout(&st), err
		}
	}
	return -1, st, false, nil
}

// names are all the names in the layers of s, each once, sorted.
func (s stack) names() ([]string, error) {
	var all []string
	for _, fd := range s {
		names, err := readNames(fd)
		if err != nil {
			return nil, err
		}
		all = append(all, names...)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

func simplify(ctx context.Context, d directory, below stack) error {
	names, err := readNames(d.fd)
	if err != nil {
		return err
	}
	a, err := attributesOf(d.fd)
	if err != nil {
		return err
	}
	var dropped bool
	for _, name := range names {
		st, _, err := lstatAt(d.fd, name)
		if err != nil {
			return err
		}
		var gone bool
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			gone, err = simplifyBelow(ctx, d, name, below)
		case unix.S_IFSOCK:
			gone, err = true, dropSocket(d, name, below)
		default:
			gone, err = dropUntouchedFile(ctx, d, name, &st, below)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", d.join(name), err)
		}
		dropped = dropped || gone
	}
	if !dropped {
		return nil
	}
	return setTime(d.fd, "", a.mtime)
}

// simplifyBelow tells whether it removed the directory.
func simplifyBelow(ctx context.Context, d directory, name string, below stack) (bool, error) {
	fd, err := unix.Openat(d.fd, name, openDirectory, 0)
	if err != nil {
		return false, err
	}
	defer closeFD(fd)
	inner := below.into(name)
	defer inner.close()
	if isOpaque(fd) {
		if err := hideEach(fd, inner); err != nil {
			return false, err
		}
		if err := unix.Fremovexattr(fd, xattrOpaque); err != nil {
			return false, fmt.Errorf("remove the opaque mark: %w", err)
		}
	}
	if len(inner) == 0 {
		return false, dropSockets(fd)
	}
	if err := simplify(ctx, directory{fd: fd, path: d.join(name)}, inner); err != nil {
		return false, err
	}
	left, err := readNames(fd)
	if err != nil || len(left) > 0 {
		return false, err
	}
	same, err := equalDirectories(fd, inner[0])
	if err != nil || !same {
		return false, err
	}
	return true, unix.Unlinkat(d.fd, name, unix.AT_REMOVEDIR)
}

// dropSocket leaves a whiteout where the socket was over something.
func dropSocket(d directory, name string, below stack) error {
	_, _, hides, err := below.find(name)
	if err == nil {
		err = unix.Unlinkat(d.fd, name, 0)
	}
	if err != nil || !hides {
		return err
	}
	return whiteOut(d.fd, name)
}

// dropSockets does so in a directory that hides nothing, and in all that are in it.
func dropSockets(dir int) error {
	a, err := attributesOf(dir)
	if err != nil {
		return err
	}
	names, err := readNames(dir)
	if err != nil {
		return err
	}
	var dropped bool
	for _, name := range names {
		st, _, err := lstatAt(dir, name)
		if err != nil {
			return err
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			err = dropSocketsBelow(dir, name)
		case unix.S_IFSOCK:
			dropped, err = true, unix.Unlinkat(dir, name, 0)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if !dropped {
		return nil
	}
	return setTime(dir, "", a.mtime)
}

func dropSocketsBelow(dir int, name string) error {
	fd, err := unix.Openat(dir, name, openDirectory, 0)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	return dropSockets(fd)
}

func whiteOut(dir int, name string) error {
	if err := unix.Mknodat(dir, name, unix.S_IFCHR, 0); err != nil {
		return fmt.Errorf("create whiteout: %w", err)
	}
	return setTime(dir, name, time.Unix(0, 0))
}

// hideEach makes a whiteout for all that below shows and dir does not have, at every depth.
func hideEach(dir int, below stack) error {
	a, err := attributesOf(dir)
	if err != nil {
		return err
	}
	names, err := below.names()
	if err != nil {
		return err
	}
	for _, name := range names {
		_, was, shown, err := below.find(name)
		if err != nil {
			return err
		}
		st, exists, err := lstatAt(dir, name)
		if err != nil {
			return err
		}
		switch {
		case shown && !exists:
			err = whiteOut(dir, name)
		case shown && isDir(&was) && isDir(&st):
			err = hideEachBelow(dir, name, below)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return setTime(dir, "", a.mtime)
}

func hideEachBelow(dir int, name string, below stack) error {
	fd, err := unix.Openat(dir, name, openDirectory, 0)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	inner := below.into(name)
	defer inner.close()
	return hideEach(fd, inner)
}

// equalDirectories compares attributes and times.
func equalDirectories(a, b int) (bool, error) {
	same, err := equalAttributes(a, b)
	if err != nil || !same {
		return false, err
	}
	one, err := attributesOf(a)
	if err != nil {
		return false, err
	}
	other, err := attributesOf(b)
	return err == nil && one.mtime.Equal(other.mtime), err
}

func equalAttributes(a, b int) (bool, error) {
	one, err := attributesText(a)
	if err != nil {
		return false, err
	}
	other, err := attributesText(b)
	return one == other, err
}

// dropUntouchedFile keeps what has several names: which of them are one file is a statement, too.
func dropUntouchedFile(ctx context.Context, d directory, name string, st *unix.Stat_t, below stack) (bool, error) {
	if st.Nlink > 1 {
		return false, nil
	}
	lower, was, found, err := below.find(name)
	if err != nil || !found {
		return false, err
	}
	if was.Nlink > 1 {
		return false, nil
	}
	same, err := equalNodes(ctx, d.fd, lower, name, st, &was)
	if err != nil || !same {
		return false, err
	}
	return true, unix.Unlinkat(d.fd, name, 0)
}

// equalNodes compares two files of one name, of which st and was are known. Pipes, sockets and devices count as different.
func equalNodes(ctx context.Context, dir, lower int, name string, st, was *unix.Stat_t) (bool, error) {
	if was.Mode != st.Mode || was.Uid != st.Uid || was.Gid != st.Gid || was.Size != st.Size || was.Mtim != st.Mtim {
		return false, nil
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return equalFiles(ctx, dir, lower, name)
	case unix.S_IFLNK:
		return equalLinks(dir, lower, name)
	}
	return false, nil
}

func equalLinks(a, b int, name string) (bool, error) {
	var one, other [unix.PathMax]byte
	n, err := unix.Readlinkat(a, name, one[:])
	if err != nil {
		return false, err
	}
	m, err := unix.Readlinkat(b, name, other[:])
	if err != nil || !bytes.Equal(one[:n], other[:m]) {
		return false, err
	}
	return equalLinkAttributes(a, b, name) // one of them may be the record of an owner
}

func equalLinkAttributes(a, b int, name string) (bool, error) {
	const openLink = unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC
	one, err := unix.Openat(a, name, openLink, 0)
	if err != nil {
		return false, err
	}
	defer closeFD(one)
	other, err := unix.Openat(b, name, openLink, 0)
	if err != nil {
		return false, err
	}
	defer closeFD(other)
	return equalAttributes(one, other)
}

func equalFiles(ctx context.Context, a, b int, name string) (bool, error) {
	one, err := openFileAt(a, name)
	if err != nil {
		return false, err
	}
	defer one.Close()
	other, err := openFileAt(b, name)
	if err != nil {
		return false, err
	}
	defer other.Close()
	same, err := equalAttributes(int(one.Fd()), int(other.Fd()))
	if err != nil || !same {
		return false, err
	}
	return equalContents(ctx, one, other)
}

func openFileAt(dir int, name string) (*os.File, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

func equalContents(ctx context.Context, a, b io.Reader) (bool, error) {
	one, other := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		n, errA := io.ReadFull(a, one)
		m, errB := io.ReadFull(b, other)
		if !bytes.Equal(one[:n], other[:m]) {
			return false, nil
		}
		for _, err := range []error{errA, errB} {
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				return false, err
			}
		}
		if errA != nil || errB != nil {
			return true, nil
		}
	}
}
