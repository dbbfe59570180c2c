package layer

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Changes makes the directory upper and writes to it, in the form of an overlay's upper directory, what is different in a tree
// since its table was read. The tree showed then what the layers below show, topmost first, and does not change now.
//
// The cost is one walk and what has changed. It returns the table of the tree as it is now. It reports false when the tree shows
// something else than upper on the layers below does, apart from what nobody can tell from the outside; that happens with names
// of one file of which only some changed, as the overlay knows no such thing.
func Changes(ctx context.Context, tree string, was Table, upper string, below []string) (now Table, exact bool, err error) {
	if now, err = Walk(ctx, tree); err != nil {
		return nil, false, err
	}
	c := changes{was: was, now: now, exact: true, emit: map[string]string{}}
	if c.tree, err = unix.Open(tree, openDirectory, 0); err != nil {
		return nil, false, fmt.Errorf("open %s: %w", tree, err)
	}
	defer closeFD(c.tree)
	if c.below, err = openStack(below); err != nil {
		c.below.close()
		return nil, false, err
	}
	defer c.below.close()
	if err := os.Mkdir(upper, 0o700); err != nil {
		return nil, false, err
	}
	if c.upper, err = unix.Open(upper, openDirectory, 0); err != nil {
		return nil, false, fmt.Errorf("open %s: %w", upper, err)
	}
	defer closeFD(c.upper)
	if err := c.find(ctx); err != nil {
		return nil, false, fmt.Errorf("find changes: %w", err)
	}
	if err := c.write(ctx); err != nil {
		return nil, false, fmt.Errorf("copy changes: %w", err)
	}
	return now, c.exact, nil
}

type changes struct {
	was, now Table
	tree     int
	upper    int
	below    stack
	exact    bool
	// emit are the names to write. A file may be one more name of another: that one is the value then, and else the value is
	// the name itself.
	emit map[string]string
}

// find fills emit.
func (c *changes) find(ctx context.Context) error {
	for name, f := range c.now {
		if f.isSocket() { // no layer holds it
			c.exact = false
		}
		if f.isWhiteout() { // no overlay would show it
			delete(c.now, name)
			c.exact = false
		}
	}
	c.emit[""] = ""
	links, before := c.now.linked(), c.was.linked()
	for name, f := range c.now {
		old, known := c.was[name]
		switch {
		case known && old == f:
		case !f.isDir() && f.Links > 1: // below
		case !f.isDir() && known && old.sameFile(f) && old.Links > 1:
			// Its other names are gone. It may have changed or not.
			if err := c.emitIfChanged(ctx, name); err != nil {
				return err
			}
		default:
			c.emitName(name, name)
		}
	}
	for inode, names := range links {
		if err := c.findLinks(ctx, names, before[inode]); err != nil {
			return err
		}
	}
	for name := range c.was {
		if _, there := c.now[name]; !there && c.now.parentIsDir(name) {
			c.emitName(name, name)
		}
	}
	return nil
}

// emitName writes a name and the directories it is in.
func (c *changes) emitName(name, linkTo string) {
	c.emit[name] = linkTo
	for name != "" {
		name = above(name)
		if _, known := c.emit[name]; known {
			return
		}
		c.emit[name] = name
	}
}

// findLinks decides about a file of several names. Overlay copies each name of a lower file up for itself, and keeps together
// what was linked above.
func (c *changes) findLinks(ctx context.Context, names, before []string) error {
	var old, added []string
	unchanged := true
	for _, name := range names {
		was, known := c.was[name]
		unchanged = unchanged && known && was == c.now[name]
		if known && was.sameFile(c.now[name]) {
			old = append(old, name)
		} else {
			added = append(added, name)
		}
	}
	if unchanged {
		return nil
	}
	together := added
	switch {
	case len(added) == 0 || len(old) == 0:
	case len(before) == 0:
		// It had one name: the others were linked to that.
		together, old = append(old, added...), nil
	case len(added) <= len(before)-len(old):
		c.exact = false // renamed: a copy
	default:
		c.exact = false // linked to one of them, nobody knows which
		together, old = append(old[:1:1], added...), old[1:]
	}
	slices.Sort(together)
	for _, name := range together {
		c.emitName(name, together[0])
	}
	for _, name := range old {
		if err := c.emitIfChanged(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// emitIfChanged is for names of files that have or had several: that a name was made or removed says nothing about the others.
func (c *changes) emitIfChanged(ctx context.Context, name string) error {
	same, err := c.asBelow(ctx, name)
	if err != nil || same {
		return err
	}
	c.emitName(name, name)
	if c.now[name].Links > 1 {
		c.exact = false
	}
	return nil
}

// asBelow reports whether a file of the tree is what the layers below show under its name.
func (c *changes) asBelow(ctx context.Context, name string) (bool, error) {
	dir, err := openBeneath(c.tree, above(name), openDirectory)
	if err != nil {
		return false, err
	}
	defer closeFD(dir)
	st, _, err := lstatAt(dir, baseOf(name))
	if err != nil {
		return false, err
	}
	there, err := c.below.at(above(name))
	defer there.close()
	if err != nil {
		return false, err
	}
	lower, was, found, err := there.find(baseOf(name))
	if err != nil || !found {
		return false, err
	}
	return equalNodes(ctx, dir, lower, baseOf(name), &st, &was)
}

// write makes what find found.
func (c *changes) write(ctx context.Context) error {
	names := slices.Sorted(maps.Keys(c.emit)) // what a directory holds comes after it
	for _, name := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if name == "" {
			continue
		}
		if err := c.writeName(ctx, name); err != nil {
			return fmt.Errorf("%s: %w", shown(name), err)
		}
	}
	for _, name := range slices.Backward(names) {
		if !c.now[name].isDir() {
			continue
		}
		if err := c.finish(name); err != nil {
			return fmt.Errorf("%s: %w", shown(name), err)
		}
	}
	return nil
}

func (c *changes) writeName(ctx context.Context, name string) error {
	to, err := openBeneath(c.upper, above(name), openDirectory)
	if err != nil {
		return err
	}
	defer closeFD(to)
	base := baseOf(name)
	f, there := c.now[name]
	switch {
	case !there:
		if err := unix.Mknodat(to, base, unix.S_IFCHR, 0); err != nil {
			return fmt.Errorf("create whiteout: %w", err)
		}
		return setTime(to, base, time.Unix(0, 0))
	case f.isDir():
		return unix.Mkdirat(to, base, 0o700)
	case c.emit[name] != name:
		return linkBeneath(c.upper, c.emit[name], to, base)
	}
	from, err := openBeneath(c.tree, above(name), openDirectory)
	if err != nil {
		return err
	}
	defer closeFD(from)
	st, _, err := lstatAt(from, base)
	if err != nil {
		return err
	}
	return copyFileAt(ctx, to, from, base, &st)
}

// finish gives a directory that is full what it has in the tree.
func (c *changes) finish(name string) error {
	to, err := openBeneath(c.upper, name, openDirectory)
	if err != nil {
		return err
	}
	defer closeFD(to)
	from, err := openBeneath(c.tree, name, openDirectory)
	if err != nil {
		return err
	}
	defer closeFD(from)
	return copyDirectoryAttributes(to, from)
}
