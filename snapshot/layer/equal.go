package layer

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Written is a change set and the time in which it was made.
type Written struct {
	Dir          string
	Begun, Ended time.Time // zero: not known
}

// Equal reports whether two change sets over the same layers say the same: the same names, of which the same are one file, with the same
// types, contents, link targets, device numbers, owners, modes and extended attributes.
//
// Of times it is enough that each is from while its change set was made: whatever is written twice has two of these. With an epoch
// they must be equal once those after it are taken for it, so that equal change sets are equal layers to the byte. In any case what is
// older in one must not be younger in the other, as make goes by that.
//
// It stops at the first difference, and reads no file before all the names, sizes and modes were found to be equal.
func Equal(ctx context.Context, a, b Written, epoch *time.Time) (bool, error) {
	one, err := unix.Open(a.Dir, openDirectory, 0)
	if err != nil {
		return false, fmt.Errorf("open %s: %w", a.Dir, err)
	}
	defer closeFD(one)
	other, err := unix.Open(b.Dir, openDirectory, 0)
	if err != nil {
		return false, fmt.Errorf("open %s: %w", b.Dir, err)
	}
	defer closeFD(other)

	looks := comparison{ctx: ctx, epoch: epoch, a: a, b: b, nodes: equalLooks, inodes: map[uint64]uint64{}, others: map[uint64]bool{}}
	same, err := looks.roots(one, other)
	if err != nil || !same || !inOrder(looks.times) {
		return false, err
	}
	reads := comparison{ctx: ctx, nodes: equalInside}
	return reads.directories(one, other)
}

// A comparison is one walk through two directories.
type comparison struct {
	ctx   context.Context
	epoch *time.Time
	a, b  Written

	// nodes compares two files of one name, or a file and something else, in two directories.
	nodes func(c *comparison, a, b int, name string, one, other *unix.Stat_t) (bool, error)

	inodes map[uint64]uint64 // of files with several names: which file of the other it is
	others map[uint64]bool   // those of the other
	times  []pair
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
	if isSparse(one) || isSparse(other) {
		return false, nil // to read it may take for ever
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

// isSparse reports a large file that is mostly holes.
func isSparse(st *unix.Stat_t) bool {
	const large, block = 16 << 20, 512
	return st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size >= large && st.Blocks*block < st.Size/2
}

// alike compares types, owners, modes, device numbers and times.
func (c *comparison) alike(one, other *unix.Stat_t) bool {
	if one.Mode != other.Mode || one.Uid != other.Uid || one.Gid != other.Gid || one.Rdev != other.Rdev {
		return false
	}
	times := pair{time.Unix(one.Mtim.Unix()), time.Unix(other.Mtim.Unix())}
	c.times = append(c.times, times)
	if modTime(one, c.epoch).Equal(modTime(other, c.epoch)) {
		return true
	}
	return c.epoch == nil && c.a.within(times.a) && c.b.within(times.b)
}

func (w Written) within(t time.Time) bool {
	return !w.Begun.IsZero() && !t.Before(w.Begun) && !t.After(w.Ended)
}

// A pair is the two times of one name.
type pair struct{ a, b time.Time }

// tie is the longest time that a clock may not have noticed, or a machine may have been busy with something else.
const tie = time.Second

// inOrder reports whether no file is older than another on one side and younger on the other, nor clearly older where they are as old.
func inOrder(times []pair) bool {
	slices.SortFunc(times, func(x, y pair) int { return cmp.Or(x.a.Compare(y.a), x.b.Compare(y.b)) })
	var last, firstA, firstB pair // of all, of those with the same time in a, in b
	for i, t := range times {
		if i == 0 || !t.a.Equal(firstA.a) {
			firstA = t
		}
		if i == 0 || !t.b.Equal(firstB.b) {
			firstB = t
		}
		if i > 0 && t.b.Before(last.b) || t.b.Sub(firstA.b) >= tie || t.a.Sub(firstB.a) >= tie {
			return false
		}
		last = t
	}
	return true
}

// equalInside compares the rest of two nodes that look equal.
func equalInside(c *comparison, a, b int, name string, one, other *unix.Stat_t) (bool, error) {
	switch one.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return true, nil // it is entered
	case unix.S_IFREG:
		if one.Dev == other.Dev && one.Ino == other.Ino {
			return true, nil
		}
		return equalFiles(c.ctx, a, b, name)
	case unix.S_IFLNK:
		return equalLinks(a, b, name)
	}
	if isWhiteout(one) {
		return true, nil
	}
	return equalLinkAttributes(a, b, name)
}
