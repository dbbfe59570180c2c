package files

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/moby/patternmatcher"
	"golang.org/x/sys/unix"
)

// source is an open Tree: what of it is there for the build.
type source struct {
	dir              int // -1 for the empty tree
	layers           layers
	local            bool
	include, exclude *patternmatcher.PatternMatcher
	excludes         []string
	inhabited        sync.Map   // answers of hasInside, by path
	patterns         sync.Mutex // which are compiled when they are used
}

// node is something that is there in a source.
type node struct {
	// path is relative to the source and free of links; the root is "".
	path string
	// dir and name are where it lies. The descriptor is open as long as the node is used.
	dir  int
	name string
	st   unix.Stat_t
	// included and excluded remember which of the source's patterns matched, for what is inside.
	included, excluded patternmatcher.MatchInfo
}

func (n *node) kind() uint32 { return n.st.Mode & unix.S_IFMT }
func (n *node) isDir() bool  { return n.kind() == unix.S_IFDIR }

func openSource(t Tree) (*source, error) {
	s := &source{dir: -1, layers: layers{dirs: t.Layers}, local: t.Local, excludes: t.Exclude}
	var err error
	if s.include, err = matcher(t.Include); err != nil {
		return nil, err
	}
	if s.exclude, err = matcher(t.Exclude); err != nil {
		return nil, err
	}
	if t.Dir == "" {
		return s, nil
	}
	s.dir, err = unix.Open(t.Dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", s, err)
	}
	return s, nil
}

func (s *source) close() {
	if s.dir >= 0 {
		unix.Close(s.dir)
	}
	s.layers.close()
}

// String names the source in errors.
func (s *source) String() string {
	if s.local {
		return "the context"
	}
	return "the stage or image it is copied from"
}

// matcher is nil for no patterns.
func matcher(patterns []string) (*patternmatcher.PatternMatcher, error) {
	if len(patterns) == 0 {
		return nil, nil
	}
	m, err := patternmatcher.New(patterns)
	if err == nil {
		// The patterns are compiled at their first use; a bad one must be found before it decides anything.
		_, err = m.MatchesOrParentMatches("a")
	}
	if err != nil {
		return nil, fmt.Errorf("patterns %q: %w", patterns, err)
	}
	return m, nil
}

// match is MatchesUsingParentResults, where no patterns give otherwise.
func match(m *patternmatcher.PatternMatcher, p string, parent patternmatcher.MatchInfo, otherwise bool) (bool, patternmatcher.MatchInfo, error) {
	if m == nil {
		return otherwise, patternmatcher.MatchInfo{}, nil
	}
	return m.MatchesUsingParentResults(p, parent)
}

// admit applies the source's patterns to a path below parent, and leaves what matched in n. there tells whether n is
// there by itself; below, whether something in it might be. The latter spares reading directories like node_modules.
func (s *source) admit(n *node, parent node) (there, below bool, err error) {
	s.patterns.Lock()
	defer s.patterns.Unlock()
	var in, out bool
	if in, n.included, err = match(s.include, n.path, parent.included, true); err != nil {
		return false, false, err
	}
	if out, n.excluded, err = match(s.exclude, n.path, parent.excluded, false); err != nil {
		return false, false, err
	}
	below = (in || mayMatchBelow(s.include, false, n.path)) && (!out || mayMatchBelow(s.exclude, true, n.path))
	return in && !out, below, nil
}

// admitPath is admit for a node that was not reached by walking. It asks about every directory above in turn, because
// patternmatcher answers differently when it is asked about the whole path at once ("a/b" after "!a").
func (s *source) admitPath(n *node) (there, below bool, err error) {
	var above node
	for i, c := range n.path {
		if c != '/' {
			continue
		}
		dir := node{path: n.path[:i]}
		if _, _, err := s.admit(&dir, above); err != nil {
			return false, false, err
		}
		above = dir
	}
	return s.admit(n, above)
}

// mayMatchBelow tells whether a pattern that is (or is not) negated might match something below p.
func mayMatchBelow(m *patternmatcher.PatternMatcher, negated bool, p string) bool {
	for _, pattern := range m.Patterns() {
		if pattern.Exclusion() != negated {
			continue
		}
		s := pattern.String()
		if strings.ContainsAny(s, `*?[]\^`) || strings.HasPrefix(s, p+"/") {
			return true
		}
	}
	return false
}

// A listing is an open directory and what is there in it.
type listing struct {
	fd       int
	children []node
	err      error
}

func (l *listing) close() {
	if l.fd >= 0 {
		unix.Close(l.fd)
	}
}

// read opens and lists a directory.
func (s *source) read(n node) *listing {
	fd, err := openDirAt(n.dir, n.name)
	if err != nil {
		return &listing{fd: -1, err: failed("read", n.path, err)}
	}
	children, err := s.list(n, fd)
	return &listing{fd, children, err}
}

// list gives what is there in a directory, sorted by name. open is a descriptor of the directory.
func (s *source) list(n node, open int) ([]node, error) {
	names, err := readNames(open)
	if err != nil {
		return nil, failed("read", n.path, err)
	}
	children := make([]node, 0, len(names))
	for _, name := range names {
		c := node{path: path.Join(n.path, name), dir: open, name: name}
		there, below, err := s.admit(&c, n)
		if err != nil {
			return nil, err
		}
		if !there && !below {
			continue
		}
		c.st, err = lstatAt(open, name)
		if isNotExist(err) {
			continue // an editor or a compiler that works in the context has just removed it
		}
		if err != nil {
			return nil, failed("read", c.path, err)
		}
		if !there {
			if there, err = s.hasInside(c); err != nil {
				return nil, err
			}
		}
		if there {
			children = append(children, c)
		}
	}
	return children, nil
}

func readNames(dir int) ([]string, error) {
	// A descriptor of its own, because reading moves the position that all duplicates share.
	fd, err := unix.Openat(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "")
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	return names, nil
}

// hasInside tells whether a directory that the patterns do not admit holds something that they do.
func (s *source) hasInside(n node) (bool, error) {
	if !n.isDir() {
		return false, nil
	}
	if has, known := s.inhabited.Load(n.path); known {
		return has.(bool), nil
	}
	fd, err := openDirAt(n.dir, n.name)
	if err != nil {
		// What is ignored need not be readable.
		return false, nil
	}
	defer unix.Close(fd)
	children, err := s.list(n, fd)
	s.inhabited.Store(n.path, len(children) > 0)
	return len(children) > 0, err
}

func openDirAt(dir int, name string) (int, error) {
	return unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// find gives what lies at p, a path from the root of the source, with the links in it followed; a final link only if
// follow is set. It is a *missing if nothing is there for the build. The node has to be closed.
func (s *source) find(p string, follow bool) (n node, err error) {
	if s.dir < 0 {
		if len(components(p)) > 0 {
			return node{}, s.missing(p)
		}
		return node{dir: -1, name: ".", st: unix.Stat_t{Mode: unix.S_IFDIR | 0o755}}, nil
	}
	real, err := resolve(s.dir, p, follow, func(link string) error {
		there, _, err := s.admitPath(&node{path: link})
		if err == nil && !there {
			err = s.missing(p)
		}
		return err
	})
	if err != nil {
		return node{}, s.notThere(p, err)
	}
	n = node{path: real, name: path.Base(real)}
	if n.dir, err = openBeneath(s.dir, parent(real), unix.O_RDONLY|unix.O_DIRECTORY); err != nil {
		return node{}, s.notThere(p, err)
	}
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	if real == "" {
		n.name = "."
	}
	if n.st, err = lstatAt(n.dir, n.name); err != nil {
		return node{}, s.notThere(p, err)
	}
	if follow && n.kind() == unix.S_IFLNK {
		return node{}, failed("read", p, errors.New("it changed meanwhile"))
	}
	if real == "" {
		return n, nil
	}
	there, below, err := s.admitPath(&n)
	if err == nil && !there && below {
		there, err = s.hasInside(n)
	}
	if err == nil && !there {
		err = s.missing(p)
	}
	return n, err
}

func (n *node) close() {
	if n.dir >= 0 {
		unix.Close(n.dir)
	}
}

// notThere makes a *missing of errors that mean it.
func (s *source) notThere(p string, err error) error {
	if isNotExist(err) || errors.Is(err, unix.ENOTDIR) {
		return s.missing(p)
	}
	var m *missing
	if errors.As(err, &m) {
		return err
	}
	return failed("read", p, err)
}

// missing says that the build has no such file.
type missing struct{ path, source string }

func (m *missing) Error() string { return fmt.Sprintf("%q not found in %s", m.path, m.source) }

// hidden says that the build has no such file because of a pattern.
type hidden struct {
	*missing
	pattern string
}

func (h *hidden) Unwrap() error { return h.missing }

// Hint names the pattern that hides the file.
func (h *hidden) Hint() string {
	return fmt.Sprintf("the pattern %q in .dockerignore excludes it", h.pattern)
}

// missing gives the error for a path that is not there for the build.
func (s *source) missing(p string) error {
	p = path.Clean(shown(p))
	if !s.local {
		return &missing{p, s.String()}
	}
	p = strings.TrimPrefix(p, "/")
	if pattern := s.hiding(p); pattern != "" {
		return &hidden{&missing{p, s.String()}, pattern}
	}
	return &missing{p, s.String()}
}

// hiding gives the pattern that excludes a path which exists, or nothing.
func (s *source) hiding(p string) string {
	if _, err := lstatBeneath(s.dir, p); err != nil {
		return ""
	}
	var by string
	var hidden bool
	for i, pattern := range s.excludes {
		m, err := patternmatcher.New(s.excludes[:i+1])
		if err != nil {
			return ""
		}
		now, err := m.MatchesOrParentMatches(p)
		if err != nil {
			return ""
		}
		if now && !hidden {
			by = pattern
		}
		hidden = now
	}
	if !hidden {
		return ""
	}
	return by
}

// glob gives the paths, from the root of the source, that a pattern with wildcards matches, sorted. The part before
// the first wildcard may have links in it, which are followed.
func (s *source) glob(pattern string, follow bool) ([]string, error) {
	fixed, wild := splitWildcards(pattern)
	if wild == "" {
		return []string{fixed}, nil
	}
	if _, err := filepath.Match(wild, ""); err != nil {
		return nil, fmt.Errorf("%q is no valid pattern", strings.TrimPrefix(pattern, "/"))
	}
	n, err := s.find(fixed, follow)
	if err != nil {
		var m *missing
		if errors.As(err, &m) {
			return nil, nil
		}
		return nil, err
	}
	defer n.close()
	// A star matches no slash, but a class such as [^a] does.
	depth := strings.Count(wild, "/") + strings.Count(wild, "[") + 1
	var found []string
	err = s.globIn(n, "", wild, depth, &found)
	return found, err
}

func (s *source) globIn(n node, rel, pattern string, depth int, found *[]string) error {
	if !n.isDir() || n.dir < 0 || depth == 0 {
		return nil
	}
	fd, err := openDirAt(n.dir, n.name)
	if err != nil {
		return failed("read", n.path, err)
	}
	defer unix.Close(fd)
	children, err := s.list(n, fd)
	if err != nil {
		return err
	}
	for _, c := range children {
		crel := path.Join(rel, c.name)
		if ok, _ := filepath.Match(pattern, crel); ok {
			*found = append(*found, "/"+c.path)
			continue
		}
		if err := s.globIn(c, crel, pattern, depth-1, found); err != nil {
			return err
		}
	}
	return nil
}

// splitWildcards cuts a path before the first component with a wildcard.
func splitWildcards(p string) (fixed, wild string) {
	parts := strings.Split(path.Clean(p), "/")
	for i, part := range parts {
		if hasWildcard(part) {
			return "/" + path.Join(parts[:i]...), path.Join(parts[i:]...)
		}
	}
	return p, ""
}

func hasWildcard(s string) bool {
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case '*', '?', '[':
			return true
		}
	}
	return false
}
