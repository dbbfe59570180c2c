package files

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/patternmatcher"
	mode "github.com/tonistiigi/dchapes-mode"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/owner"
)

// selection is what a copy reads of a source. It is walked, never listed: a context may have a million files.
type selection struct {
	src              *source
	copy             plan.Copy
	include, exclude *patternmatcher.PatternMatcher
	mode             func(os.FileMode) os.FileMode
	required         map[string]bool // found yet?
}

// entry is one thing that a copy makes.
type entry struct {
	node
	// rel is the path below the copied thing, "" for that thing itself.
	rel string
	// local says that the entry comes from a context, where everything is owned by 0:0.
	local bool
	// mode is what the copy gets, where st has what the source has.
	mode os.FileMode
	// implied says that a directory is copied only because something in it is.
	implied bool
	// twin is the rel of an earlier entry of the same inode: a hard link.
	twin string
	// listed is what is in it, if that is being found out.
	listed *listedAhead
}

// visitor gets the entries of a walk, a directory before what is in it.
type visitor interface {
	enter(e *entry) error
	// leave is called for every directory that was entered, after what is in it.
	leave(e *entry) error
}

func newSelection(src *source, c plan.Copy) (*selection, error) {
	s := &selection{src: src, copy: c, mode: keepMode, required: map[string]bool{}}
	var err error
	if s.include, err = matcher(c.Include); err != nil {
		return nil, err
	}
	if s.exclude, err = matcher(c.Exclude); err != nil {
		return nil, err
	}
	if c.Mode != nil {
		if s.mode, err = modeChange(*c.Mode); err != nil {
			return nil, err
		}
	}
	for _, p := range c.Required {
		s.required[path.Clean("/"+p)] = false
	}
	return s, nil
}

func keepMode(m os.FileMode) os.FileMode { return m }

// modeChange is what --chmod does to a mode.
func modeChange(m plan.Mode) (func(os.FileMode) os.FileMode, error) {
	if m.Symbolic == "" {
		want := fileMode(m.Bits)
		return func(os.FileMode) os.FileMode { return want }, nil
	}
	set, err := mode.ParseWithUmask(m.Symbolic, 0)
	if err != nil {
		return nil, fmt.Errorf("mode %q: %w", m.Symbolic, err)
	}
	return set.Apply, nil
}

// fileMode converts the twelve permission bits of Unix.
func fileMode(bits uint32) os.FileMode {
	m := os.FileMode(bits & 0o777)
	if bits&unix.S_ISUID != 0 {
		m |= os.ModeSetuid
	}
	if bits&unix.S_ISGID != 0 {
		m |= os.ModeSetgid
	}
	if bits&unix.S_ISVTX != 0 {
		m |= os.ModeSticky
	}
	return m
}

// modeBits is the inverse of fileMode.
func modeBits(m os.FileMode) uint32 {
	bits := uint32(m.Perm())
	if m&os.ModeSetuid != 0 {
		bits |= unix.S_ISUID
	}
	if m&os.ModeSetgid != 0 {
		bits |= unix.S_ISGID
	}
	if m&os.ModeSticky != 0 {
		bits |= unix.S_ISVTX
	}
	return bits
}

// start is one source of a copy: Src, or one of the things that it matches.
type start struct {
	// src is the path as written; its last component names the copy in a directory.
	src string
	node
}

// starts calls f with everything that the copy begins at, sorted.
func (s *selection) starts(f func(start) error) error {
	src := cleanPath(s.copy.Src)
	paths := []string{src}
	if s.copy.Wildcard {
		var err error
		if paths, err = s.src.glob(src, s.copy.FollowSymlink); err != nil {
			return err
		}
		if len(paths) == 0 {
			if s.copy.AllowEmptyWildcard {
				return nil
			}
			return s.src.missing(src)
		}
	}
	for _, p := range paths {
		n, err := s.src.find(p, s.copy.FollowSymlink)
		if err != nil {
			return err
		}
		err = f(start{src: p, node: n})
		n.close()
		if err != nil {
			return err
		}
	}
	return s.checkRequired()
}

func (s *selection) checkRequired() error {
	for _, p := range s.copy.Required {
		if !s.required[path.Clean("/"+p)] {
			return s.src.missing(p)
		}
	}
	return nil
}

// cleanPath makes a path absolute and clean but keeps a slash, or a slash and a dot, at its end.
func cleanPath(p string) string {
	clean := path.Join("/", p)
	switch {
	case clean == "/" && strings.HasSuffix(p, "/."):
		return "/."
	case clean == "/":
		return clean
	case strings.HasSuffix(p, "/."):
		return clean + "/."
	case strings.HasSuffix(p, "/"):
		return clean + "/"
	}
	return clean
}

// walk shows v what is copied of one start, in a fixed order.
func (s *selection) walk(ctx context.Context, from start, v visitor) error {
	w := walker{ctx: ctx, s: s, from: from, v: v, twins: map[inode]string{}}
	return w.walk(&entry{node: from.node}, patternmatcher.MatchInfo{}, patternmatcher.MatchInfo{})
}

type inode struct{ dev, ino uint64 }

type walker struct {
	ctx   context.Context
	s     *selection
	from  start
	v     visitor
	dirs  []*entered // the directories above, outermost first
	twins map[inode]string
}

type entered struct {
	*entry
	yet bool
}

func (w *walker) walk(e *entry, parentIn, parentOut patternmatcher.MatchInfo) error {
	if w.ctx.Err() != nil {
		return context.Cause(w.ctx)
	}
	selected, below := true, true
	var in, out patternmatcher.MatchInfo
	if e.rel != "" {
		var included, excluded bool
		var err error
		if included, in, err = match(w.s.include, e.rel, parentIn, true); err != nil {
			return err
		}
		if excluded, out, err = match(w.s.exclude, e.rel, parentOut, false); err != nil {
			return err
		}
		selected = included && !excluded
		below = (included || mayMatchBelow(w.s.include, false, e.rel)) && (!excluded || mayMatchBelow(w.s.exclude, true, e.rel))
	}
	if !e.isDir() {
		if !selected {
			return nil
		}
		return w.enter(e)
	}
	if !selected && !below {
		return nil
	}
	return w.walkDir(e, selected, in, out)
}

func (w *walker) walkDir(e *entry, selected bool, in, out patternmatcher.MatchInfo) error {
	d := &entered{entry: e}
	if selected {
		if err := w.enter(e); err != nil {
			return err
		}
		d.yet = true
	}
	w.dirs = append(w.dirs, d)
	if err := w.walkChildren(e, in, out); err != nil {
		return err
	}
	w.dirs = w.dirs[:len(w.dirs)-1]
	if !d.yet {
		return nil
	}
	return w.v.leave(e)
}

func (w *walker) walkChildren(e *entry, in, out patternmatcher.MatchInfo) error {
	if e.dir < 0 {
		return nil
	}
	l := e.listed.take()
	if l == nil {
		l = w.s.src.read(e.node)
	}
	defer l.close()
	if l.err != nil {
		return l.err
	}
	var next *listedAhead
	defer func() { next.discard() }()
	for i, c := range l.children {
		child := &entry{node: c, rel: path.Join(e.rel, c.name)}
		if c.isDir() {
			child.listed, next = next, w.listAhead(l.children[i+1:])
		}
		err := w.walk(child, in, out)
		child.listed.discard()
		if err != nil {
			return err
		}
	}
	return nil
}

// maxAhead is the size of a directory, of some ten thousand files, beyond which it is not held in memory beside the one before.
const maxAhead = 1 << 20

// listAhead begins to list the first directory among nodes, so that its files are looked at while those before it are visited. It
// returns nil where there is none, or the walk may pass it by.
func (w *walker) listAhead(nodes []node) *listedAhead {
	i := slices.IndexFunc(nodes, func(n node) bool { return n.isDir() })
	if i < 0 || nodes[i].st.Size > maxAhead || w.s.include != nil || w.s.exclude != nil {
		return nil
	}
	a := &listedAhead{result: make(chan *listing, 1)}
	go func() { a.result <- w.s.src.read(nodes[i]) }()
	return a
}

// listedAhead is a directory that is listed before the walk comes to it. It is taken or discarded, in the end both. A nil one is
// none.
type listedAhead struct {
	result chan *listing
	taken  bool
}

func (a *listedAhead) take() *listing {
	if a == nil || a.taken {
		return nil
	}
	a.taken = true
	return <-a.result
}

func (a *listedAhead) discard() {
	if l := a.take(); l != nil {
		l.close()
	}
}

// enter shows the visitor e, and before it the directories above that it implies.
func (w *walker) enter(e *entry) error {
	for _, d := range w.dirs {
		if d.yet {
			continue
		}
		d.implied = true
		if err := w.show(d.entry); err != nil {
			return err
		}
		d.yet = true
	}
	return w.show(e)
}

func (w *walker) show(e *entry) error {
	w.noteRequired(e)
	if e.local = w.s.src.local; e.local {
		e.st.Uid, e.st.Gid = 0, 0
	}
	e.mode = w.s.mode(statMode(&e.st))
	if e.kind() == unix.S_IFREG && e.st.Nlink > 1 {
		id := inode{e.st.Dev, e.st.Ino}
		if first, ok := w.twins[id]; ok {
			e.twin = first
		} else {
			w.twins[id] = e.rel
		}
	}
	return w.v.enter(e)
}

func (w *walker) noteRequired(e *entry) {
	if len(w.s.required) == 0 {
		return
	}
	p := path.Join("/", w.from.src, e.rel)
	for want := range w.s.required {
		if p == want || strings.HasPrefix(p, strings.TrimSuffix(want, "/")+"/") {
			w.s.required[want] = true
		}
	}
}

// statMode is the mode of st as os has it.
func statMode(st *unix.Stat_t) os.FileMode {
	m := fileMode(st.Mode)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		m |= fs.ModeDir
	case unix.S_IFLNK:
		m |= fs.ModeSymlink
	case unix.S_IFREG:
	default:
		m |= fs.ModeIrregular
	}
	return m
}

// open opens the content of a regular file that is still the one that the walk met.
func (e *entry) open() (*os.File, error) {
	f, err := openRegular(e.dir, e.name)
	if err != nil {
		return nil, failed("read", e.path, err)
	}
	return f, nil
}

// xattrs gives the attributes that go with the content, and apart from them the owner that layer.SetOwner recorded.
// What a context says about owners counts for nothing.
func (e *entry) xattrs() (all []xattr, own owner.IDs, err error) {
	if e.dir < 0 {
		return nil, own, nil
	}
	all, own, err = xattrsAt(e.dir, e.name, e.kind())
	if e.local {
		own = owner.IDs{}
	}
	return all, own, failed("read attributes of", e.path, err)
}

func (e *entry) link() (string, error) {
	to, err := readlinkAt(e.dir, e.name)
	return to, failed("read link", e.path, err)
}

// base is the name that a start gets in a directory.
func (s start) base() string { return filepath.Base(s.src) }
