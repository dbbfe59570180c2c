package layer

import (
	"context"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Equal reports whether two change sets over the same layers say the same: the same names, of which the same are one file, with the same
// types, contents, link targets, device numbers, owners, modes and extended attributes.
//
// Of times it is enough that both are from after their change set was begun: whatever is written twice has two of these. With an epoch
// they must be equal once those after it are taken for it, so that equal change sets are equal layers to the byte.
//
// It stops at the first difference, and reads no file before all the names, sizes and modes were found to be equal.
func Equal(ctx context.Context, a, b string, epoch *time.Time) (bool, error) {
	one, err := unix.Open(a, openDirectory, 0)
	if err != nil {
		return false, fmt.Errorf("open %s: %w", a, err)
	}
	defer closeFD(one)
	other, err := unix.Open(b, openDirectory, 0)
	if err != nil {
		return false, fmt.Errorf("open %s: %w", b, err)
	}
	defer closeFD(other)

	looks := comparison{ctx: ctx, epoch: epoch, nodes: equalLooks, inodes: map[uint64]uint64{}, others: map[uint64]bool{}}
	if looks.begun[0], err = birth(one); err != nil {
		return false, err
	}
	if looks.begun[1], err = birth(other); err != nil {
		return false, err
	}
	same, err := looks.roots(one, other)
	if err != nil || !same {
		return false, err
	}
	reads := comparison{ctx: ctx, nodes: equalInside}
	return reads.directories(one, other)
}

// A comparison is one walk through two directories.
type comparison struct {
	ctx   context.Context
	epoch *time.Time
	begun [2]time.Time // when each change set was; zero: not known

	// nodes compares two files of one name, or a file and something else, in two directories.
	nodes func(c *comparison, a, b int, name string, one, other *unix.Stat_t) (bool, error)

	inodes map[uint64]uint64 // of files with several names: which file of the other it is
	others map[uint64]bool   // those of the other
}

func (c *comparison) roots(a, b int) (bool, error) {
	var one, other unix.Stat_t
	if err := unix.Fstat(a, &one); err != nil {
		return false, err
	}
	if err := unix.Fstat(b, &other); err != nil {
		return false, err
	}
	if !c.alike(&one, &other) {
		return false, nil
	}
	return c.directories(a, b)
}

func (c *comparison) directories(a, b int) (bool, error) {
	if c.ctx.Err() != nil {
		return false, context.Cause(c.ctx)
	}
	if isOpaque(a) != isOpaque(b) {
		return false, nil
	}
	if same, err := equalAttributes(a, b); err != nil || !same {
		return false, err
	}
	names, err := readNames(a)
	if err != nil {
		return false, err
	}
	others, err := readNames(b)
	if err != nil || len(names) != len(others) {
		return false, err
	}
	slices.Sort(names)
	slices.Sort(others)
	if !slices.Equal(names, others) {
		return false, nil
	}
	for _, name := range names {
		if same, err := c.names(a, b, name); err != nil || !same {
			return false, err
		}
	}
	return true, nil
}

func (c *comparison) names(a, b int, name string) (bool, error) {
	one, _, err := lstatAt(a, name)
	if err != nil {
		return false, err
	}
	other, _, err := lstatAt(b, name)
	if err != nil {
		return false, err
	}
	if same, err := c.nodes(c, a, b, name, &one, &other); err != nil || !same || !isDir(&one) {
		return same, err
	}
	inA, err := unix.Openat(a, name, openDirectory, 0)
	if err != nil {
		return false, err
	}
	defer closeFD(inA)
	inB, err := unix.Openat(b, name, openDirectory, 0)
	if err != nil {
		return false, err
	}
	defer closeFD(inB)
	return c.directories(inA, inB)
}

// equalLooks compares what there is to know of two nodes without opening them.
func equalLooks(c *comparison, _, _ int, _ string, one, other *unix.Stat_t) (bool, error) {
	if isWhiteout(one) || isWhiteout(other) {
		return isWhiteout(one) && isWhiteout(other), nil
	}
	if !c.alike(one, other) || !isDir(one) && one.Size != other.Size {
		return false, nil
	}
	if isDir(one) || one.Nlink == 1 && other.Nlink == 1 {
		return true, nil
	}
	was, known := c.inodes[one.Ino]
	if known || c.others[other.Ino] {
		return was == other.Ino, nil
	}
	c.inodes[one.Ino], c.others[other.Ino] = other.Ino, true
	return true, nil
}

// alike compares types, owners, modes, device numbers and times.
func (c *comparison) alike(one, other *unix.Stat_t) bool {
	if one.Mode != other.Mode || one.Uid != other.Uid || one.Gid != other.Gid || one.Rdev != other.Rdev {
		return false
	}
	if modTime(one, c.epoch).Equal(modTime(other, c.epoch)) {
		return true
	}
	return c.epoch == nil && c.isNew(0, one) && c.isNew(1, other)
}

// isNew reports whether a file has a time from after its change set was begun.
func (c *comparison) isNew(side int, st *unix.Stat_t) bool {
	return !c.begun[side].IsZero() && !time.Unix(st.Mtim.Unix()).Before(c.begun[side])
}

// birth is when an open directory was made, zero where the file system does not say.
func birth(fd int) (time.Time, error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BTIME, &st); err != nil {
		return time.Time{}, fmt.Errorf("when a change set was begun: %w", err)
	}
	if st.Mask&unix.STATX_BTIME == 0 {
		return time.Time{}, nil
	}
	return time.Unix(st.Btime.Sec, int64(st.Btime.Nsec)), nil
}

// equalInside compares the rest of two nodes that look equal.
func equalInside(_ *comparison, a, b int, name string, one, other *unix.Stat_t) (bool, error) {
	switch one.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return true, nil // it is entered
	case unix.S_IFREG:
		if one.Dev == other.Dev && one.Ino == other.Ino {
			return true, nil
		}
		return equalFiles(a, b, name)
	case unix.S_IFLNK:
		return equalLinks(a, b, name)
	}
	if isWhiteout(one) {
		return true, nil
	}
	return equalLinkAttributes(a, b, name)
}
