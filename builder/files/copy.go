package files

import (
	"context"
	"errors"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/clone"
	"github.com/cooper-build/cooper/owner"
)

// dirMode is what directories above a destination get.
const dirMode = 0o755

func (a *applier) copy(ctx context.Context, c plan.Copy) error {
	var t Tree
	if c.From != plan.Scratch {
		var err error
		if t, err = a.tree(c.From); err != nil {
			return err
		}
	}
	src, err := openSource(t)
	if err != nil {
		return err
	}
	defer src.close()
	sel, err := newSelection(src, c)
	if err != nil {
		return err
	}
	own, err := a.owner(c.Owner)
	if err != nil {
		return err
	}
	to := &destination{target: a.to, again: a.again, copy: c, own: own}
	if !c.CreateDestPath {
		if err := to.mustExist(); err != nil {
			return err
		}
	}
	err = sel.starts(func(s start) error {
		if c.Unpack && s.kind() == unix.S_IFREG {
			done, err := to.unpack(ctx, s)
			if err != nil || done {
				return err
			}
		}
		return to.put(ctx, sel, s)
	})
	if err != nil {
		return err
	}
	return a.to.restamp(to.made, a.to.stamp(c.Timestamp, nil))
}

// destination is where a copy goes.
type destination struct {
	*target
	again *again
	copy  plan.Copy
	own   *ids
	made  []string // the directories that were made above it
}

// mustExist refuses a destination whose directory is not there.
func (d *destination) mustExist() error {
	p, err := d.resolve(path.Join("/", d.copy.Dst), true)
	if err != nil {
		return err
	}
	_, err = lstatBeneath(d.dir, parent(p))
	return failed("copy to", d.copy.Dst, err)
}

// mkdirs makes the directories above a destination, which get the owner and the octal mode of the copy: that is what
// BuildKit does, although COPY --chmod=600 then makes directories that cannot be entered.
func (d *destination) mkdirs(p string, mode os.FileMode) error {
	made, err := d.mkdirAll(p, look{mode: mode, own: d.own, mtime: d.stamp(d.copy.Timestamp, nil)})
	d.made = append(d.made, made...)
	return err
}

func (d *destination) parentMode() os.FileMode {
	if m := d.copy.Mode; m != nil && m.Symbolic == "" {
		return os.FileMode(m.Bits) & os.ModePerm
	}
	return dirMode
}

// place finds where a start goes, and makes the directories above that. The rules are those of fsutil's Copy:
// something goes into an existing directory under its own name, unless it is a directory whose contents are copied,
// which goes over it.
func (d *destination) place(s start) (string, error) {
	dst := cleanPath(d.copy.Dst)
	above := dst
	if dir, last := filepath.Split(dst); last != "" && last != "." {
		above = dir
	}
	p, err := d.resolve(above, true)
	if err != nil {
		return "", err
	}
	if err := d.mkdirs(p, d.parentMode()); err != nil {
		return "", err
	}
	if p, err = d.resolve(dst, true); err != nil {
		return "", err
	}
	st, err := lstatBeneath(d.dir, p)
	exists := err == nil
	if err != nil && !isNotExist(err) {
		return "", failed("copy to", p, err)
	}
	contents := d.copy.ContentsOnly && s.isDir()
	isDir := exists && st.Mode&unix.S_IFMT == unix.S_IFDIR
	if exists && s.isDir() && !contents || isDir && !s.isDir() {
		p = strings.TrimPrefix(path.Join(p, s.base()), "/")
	}
	above = parent(p)
	if contents && !exists {
		above = p
	}
	return p, d.mkdirs(above, d.parentMode())
}

// put copies one start.
func (d *destination) put(ctx context.Context, sel *selection, s start) error {
	p, err := d.place(s)
	if err != nil {
		return err
	}
	above, err := d.openDir(parent(p))
	if err != nil {
		return err
	}
	c := &copier{destination: d, ctx: ctx, layers: &sel.src.layers, path: p, dirs: []*copiedDir{{fd: above, earlier: -1}}, batches: newBatches()}
	// What place has just made is empty, and only the directory itself was looked up in the overlay.
	c.empty = s.isDir() && slices.Contains(d.made, p)
	defer c.close()
	err = sel.walk(ctx, s, c)
	if earlier := c.batches.wait(); earlier != nil {
		return earlier
	}
	return err
}

// copier makes the entries of one walk.
type copier struct {
	*destination
	ctx    context.Context
	layers *layers // of the source
	path   string  // what entry.rel is relative to
	// dirs are the open directories on the way down; the first is the one above path.
	dirs    []*copiedDir
	batches *batches
	// empty says that path is a directory in which nothing is but what this copy makes.
	empty bool
}

type copiedDir struct {
	fd      int
	times   bool // whether it gets the source's modification time when it is complete
	direct  bool // whether fd is in the upper directory
	alone   bool // whether nothing is in it but what this copy makes
	earlier int  // the same directory of the earlier result, or -1

	batch   *batch         // of files to be copied into it, nil if there are none
	copying sync.WaitGroup // other batches
}

func (d *copiedDir) close() {
	unix.Close(d.fd)
	if d.earlier >= 0 {
		unix.Close(d.earlier)
	}
}

// close is for after a wait.
func (c *copier) close() {
	for _, d := range c.dirs {
		if d.batch != nil {
			unix.Close(d.batch.from)
		}
		d.close()
	}
}

// into is the directory that the next entry is made in.
func (c *copier) into() *copiedDir { return c.dirs[len(c.dirs)-1] }

// at is its descriptor.
func (c *copier) at() int { return c.into().fd }

// direct tells whether that is in the upper directory.
func (c *copier) direct() bool { return c.into().direct }

func (c *copier) to(e *entry) string { return path.Join(c.path, e.rel) }

// name is the last component of where an entry goes; the root of the target has none.
func (c *copier) name(e *entry) string {
	if p := c.to(e); p != "" {
		return path.Base(p)
	}
	return "."
}

func (c *copier) enter(e *entry) error {
	if err := c.batches.failed(); err != nil {
		return err
	}
	if e.isDir() {
		return c.enterDir(e)
	}
	if e.twin != "" {
		if err := c.settle(); err != nil {
			return err
		}
	} else if c.into().alone && e.kind() == unix.S_IFREG {
		return c.later(e, c.into())
	}
	return c.create(e, c.into())
}

// create makes an entry that is no directory, in the place of what is there.
func (c *copier) create(e *entry, into *copiedDir) error {
	err := c.make(e, into)
	if errors.Is(err, unix.EEXIST) {
		if err = makeRoom(into.fd, c.name(e), c.copy.ReplaceExisting); err == nil {
			err = c.make(e, into)
		}
	}
	if errors.Is(err, unix.EISDIR) {
		err = errors.New("a directory is there and cannot be replaced with a file")
	}
	return failed("copy to", c.to(e), err)
}

// make makes an entry that is no directory. EEXIST says that something is there.
func (c *copier) make(e *entry, into *copiedDir) error {
	switch e.kind() {
	case unix.S_IFREG:
		if e.twin != "" {
			return c.hardLink(e, into)
		}
		return c.makeFile(e, into)
	case unix.S_IFLNK:
		to, err := e.link()
		if err != nil {
			return err
		}
		l, err := c.look(e)
		if err != nil {
			return err
		}
		return c.symlinkAt(to, into.fd, c.name(e), l)
	case unix.S_IFIFO:
		return c.makeNode(e, into, unix.S_IFIFO)
	case unix.S_IFSOCK:
		// A socket is nothing without its listener; BuildKit leaves an empty file in its place.
		return c.makeNode(e, into, unix.S_IFREG)
	}
	return errors.New("it is a device, which a build without root cannot make")
}

// look is what an entry gets besides its content.
func (c *copier) look(e *entry) (look, error) {
	xattrs, recorded, err := c.again.xattrs(e)
	if err != nil {
		return look{}, err
	}
	own := c.own
	if own == nil {
		own = &ids{uid: int(e.st.Uid), gid: int(e.st.Gid)}
		if c.o.Single && recorded != (owner.IDs{}) {
			own = &ids{uid: int(recorded.UID), gid: int(recorded.GID)}
		}
	}
	return look{mode: e.mode, own: own, xattrs: xattrs, mtime: c.stamp(c.copy.Timestamp, &e.st.Mtim)}, nil
}

func (c *copier) makeFile(e *entry, into *copiedDir) error {
	l, err := c.look(e)
	if err != nil {
		return err
	}
	repeats := into.direct && c.again.can(e, l, c.o.Single)
	if repeats && c.link(e, l, into) {
		return nil
	}
	from := c.layers.open(e)
	if from == nil {
		if from, err = e.open(); err != nil {
			return err
		}
	}
	defer from.Close()
	to, err := createAt(into.fd, c.name(e))
	if err != nil {
		return err
	}
	err = c.content(e, into, to, from)
	if err == nil {
		err = c.dress(to, l)
	}
	if err == nil && repeats {
		err = c.note(e, int(from.Fd()))
	}
	return errors.Join(err, to.Close())
}

// content copies the bytes of from to an empty file that was just made.
func (c *copier) content(e *entry, into *copiedDir, to, from *os.File) error {
	if c.upper < 0 || into.direct || e.st.Size < worthReopening {
		return bare(clone.File(c.ctx, to, from))
	}
	fd, err := openBeneath(c.upper, c.to(e), unix.O_WRONLY|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	below := os.NewFile(uintptr(fd), "")
	return errors.Join(bare(clone.File(c.ctx, below, from)), below.Close())
}

// worthReopening is the size from which a file in an overlay is opened once more in the upper directory for its content.
const worthReopening = 64 << 10

func (c *copier) makeNode(e *entry, into *copiedDir, kind uint32) error {
	l, err := c.look(e)
	if err != nil {
		return err
	}
	if err := unix.Mknodat(into.fd, c.name(e), kind|0o600, 0); err != nil {
		return err
	}
	return c.dressAt(into.fd, c.name(e), l)
}

func (c *copier) hardLink(e *entry, into *copiedDir) error {
	first := path.Join(c.path, e.twin)
	root := c.dir
	if into.direct { // the first one was made by this copy, so it is there, too
		root = c.upper
	}
	dir, err := openBeneath(root, parent(first), unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	return unix.Linkat(dir, path.Base(first), into.fd, c.name(e), 0)
}

// enterDir makes a directory or goes into the one that is there. That of the start keeps its look, one below gets the
// look of the source, and one that is only implied gets no more than its permissions.
func (c *copier) enterDir(e *entry) error {
	l, err := c.look(e)
	if err != nil {
		return err
	}
	exists, err := c.dirExists(e)
	if err != nil {
		return failed("copy to", c.to(e), err)
	}
	if !exists {
		fd, err := c.mkdirAt(c.at(), c.name(e), l)
		if err != nil {
			return failed("copy to", c.to(e), err)
		}
		return failed("copy to", c.to(e), c.goInto(e, &copiedDir{fd: fd, times: true, direct: c.direct()}, true))
	}
	fd, err := openDirAt(c.at(), c.name(e))
	if err != nil {
		return failed("copy to", c.to(e), err)
	}
	into := &copiedDir{fd: fd, times: !e.implied, direct: c.direct()}
	if err := c.goInto(e, into, e.rel == "" && c.empty); err != nil {
		return failed("copy to", c.to(e), err)
	}
	fd = c.at()
	switch {
	case e.rel == "":
		return nil
	case e.implied:
		l = look{mode: statMode(&e.st)}
	}
	return failed("copy to", c.to(e), c.dressFD(fd, l))
}

// goInto makes dir the one that entries are made in. One in which nothing is, and below which overlay has nothing to show
// and has looked up no name, is filled in the upper directory: nobody sees the difference, and the kernel copies there.
func (c *copier) goInto(e *entry, dir *copiedDir, empty bool) error {
	if empty && c.upper >= 0 && !dir.direct {
		fd, err := openBeneath(c.upper, c.to(e), unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			unix.Close(dir.fd)
			return err
		}
		unix.Close(dir.fd)
		dir.fd, dir.direct = fd, true
	}
	dir.alone, dir.earlier = empty, -1
	if dir.direct {
		dir.earlier = c.again.dir(c.to(e))
	}
	c.dirs = append(c.dirs, dir)
	return nil
}

// dirExists tells whether the directory is there already. Something else in its place is an error or goes.
func (c *copier) dirExists(e *entry) (bool, error) {
	st, err := lstatAt(c.at(), c.name(e))
	if isNotExist(err) {
		return false, nil
	}
	if err != nil || st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return true, err
	}
	if !c.copy.ReplaceExisting {
		return false, errors.New("what is there is no directory and cannot become one")
	}
	return false, removeAll(c.at(), c.name(e))
}

func (c *copier) leave(e *entry) error {
	d := c.into()
	c.dirs = c.dirs[:len(c.dirs)-1]
	setTime := func() error {
		if !d.times {
			return nil
		}
		mtime := c.stamp(c.copy.Timestamp, &e.st.Mtim)
		return failed("set the time of", c.to(e), c.dressFD(d.fd, look{keepMode: true, mtime: mtime}))
	}
	if d.alone {
		c.end(d, setTime)
		return nil
	}
	defer d.close()
	return setTime()
}
