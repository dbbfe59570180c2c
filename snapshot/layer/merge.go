package layer

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"
)

// Merge makes the empty directory dir show what layers, given topmost first, show together, as an overlay of them would. All
// of it is copied: what is written to dir reaches no layer. Names of one file in a layer are names of one file in dir.
func Merge(ctx context.Context, dir string, layers []string) error {
	to, err := unix.Open(dir, openDirectory, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dir, err)
	}
	defer closeFD(to)
	s, err := openStack(layers)
	defer s.close()
	if err != nil {
		return err
	}
	m := merger{root: to, links: map[inode]string{}}
	if err := m.merge(ctx, directory{fd: to}, s); err != nil {
		return fmt.Errorf("merge layers: %w", err)
	}
	return nil
}

// openStack opens the roots of layers. What it returns is to be closed in any case.
func openStack(layers []string) (stack, error) {
	var s stack
	for _, dir := range layers {
		fd, err := unix.Open(dir, openDirectory, 0)
		if err != nil {
			return s, fmt.Errorf("open lower layer: %w", err)
		}
		s = append(s, fd)
	}
	return s, nil
}

// inode names a file of one file system: all layers lie on one.
type inode uint64

type merger struct {
	root  int
	links map[inode]string // where a file of several names has its first one
}

func (m *merger) merge(ctx context.Context, d directory, from stack) error {
	names, err := from.names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		at, st, found, err := from.find(name)
		switch {
		case err != nil || !found:
		case isDir(&st):
			err = m.directory(ctx, d, name, from)
		case st.Nlink > 1:
			err = m.link(ctx, d, at, name, &st)
		default:
			err = copyFileAt(ctx, d.fd, at, name, &st)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", shown(d.join(name)), err)
		}
	}
	if len(from) == 0 {
		return nil
	}
	return copyDirectoryAttributes(d.fd, from[0])
}

func (m *merger) directory(ctx context.Context, d directory, name string, from stack) error {
	if err := unix.Mkdirat(d.fd, name, 0o700); err != nil {
		return err
	}
	fd, err := unix.Openat(d.fd, name, openDirectory, 0)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	inner := from.into(name)
	defer inner.close()
	return m.merge(ctx, directory{fd: fd, path: d.join(name)}, inner)
}

// link makes one more name of a file that was copied before, or copies it.
func (m *merger) link(ctx context.Context, d directory, from int, name string, st *unix.Stat_t) error {
	first, known := m.links[inode(st.Ino)]
	if !known {
		m.links[inode(st.Ino)] = d.join(name)
		return copyFileAt(ctx, d.fd, from, name, st)
	}
	return linkBeneath(m.root, first, d.fd, name)
}

// linkBeneath makes base in an open directory another name of the file at the path name.
func linkBeneath(root int, name string, dir int, base string) error {
	at, err := openBeneath(root, above(name), openDirectory)
	if err != nil {
		return err
	}
	defer closeFD(at)
	return unix.Linkat(at, baseOf(name), dir, base, 0)
}
