package policy

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/pbkdf2"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// maxFactText bounds what a hostile layer can make us remember, in bytes of paths. It is an error to pass it, not
// a reason to forget: what comes after a thousand allowed paths may be the one that is not.
const maxFactText = 16 << 20

// maxHoles is how much longer than its bytes in the archive a file may be when all of it has to be read. A sparse
// entry of one block can claim to be an exabyte of zeros.
const maxHoles = 1 << 30

// ScanOptions say what to look for.
type ScanOptions struct {
	Secrets []Secret
	Light   bool // a base layer: only privileged files
}

// Key is equal for scans that look for the same things; whoever remembers facts puts it into the key. It is made
// slowly on purpose, once a build, so that whoever reads it cannot try passwords against it quickly.
func (o ScanOptions) Key() (string, error) {
	if o.Light {
		return "scan " + ScannerVersion + " light", nil
	}
	secrets := slices.Clone(o.Secrets)
	slices.SortFunc(secrets, func(a, b Secret) int { return strings.Compare(a.ID, b.ID) })
	var text bytes.Buffer
	for _, s := range secrets {
		fmt.Fprintf(&text, "%d:%s%d:%s", len(s.ID), s.ID, len(s.Value), s.Value)
	}
	if text.Len() == 0 {
		return "scan " + ScannerVersion, nil
	}
	const rounds = 200_000
	sum, err := pbkdf2.Key(sha256.New, text.String(), []byte("cooper scan key"), rounds, sha256.Size)
	if err != nil {
		return "", fmt.Errorf("scan key: %w", err)
	}
	return "scan " + ScannerVersion + " " + hex.EncodeToString(sum), nil
}

// FindsSecret reports whether the value of one of the secrets is in a text, in any of the forms that are looked for.
func (o ScanOptions) FindsSecret(text []byte) bool {
	m, _ := newMatcher(o.Secrets, false)
	return len(m.find(text)) > 0
}

// ScanLayer reads an uncompressed layer to the end and returns what is in it. Every byte is searched for secrets
// and private keys, also names, attributes, padding and what follows the last entry. Memory is bounded whatever
// the layer holds. An archive that is malformed or cut inside an entry is an error, never an empty result; one that
// lacks its end marker is read as tar does, so the caller's digest check decides whether it was whole.
func ScanLayer(ctx context.Context, r io.Reader, o ScanOptions) (LayerFacts, error) {
	s := newScan(ctx, r, o)
	if err := s.run(); err != nil {
		return LayerFacts{}, fmt.Errorf("scan layer: %w", err)
	}
	return s.facts, nil
}

// scan is the state of one ScanLayer. The window runs ahead of the tar reader and finds matches by offset; the
// scan knows where each entry ends and gives the matches their paths.
type scan struct {
	facts      LayerFacts
	light      bool
	matcher    *matcher
	win        *window
	kinds      []credentialKind
	privileged map[string]PrivilegedFile // of this layer, by path, for hard links
	open       []extent                  // entries that matches may still fall into, in order
	known      map[any]bool              // facts that are recorded
	text       int                       // bytes of paths in them
	skipped    bool                      // the content of the last entry was not read
	buf        []byte
}

// extent is where the bytes of an entry, its header included, end.
type extent struct {
	path string
	end  int64
}

func newScan(ctx context.Context, r io.Reader, o ScanOptions) *scan {
	s := &scan{light: o.Light, privileged: make(map[string]PrivilegedFile), known: make(map[any]bool), buf: make([]byte, 64<<10)}
	s.facts.Light = o.Light
	if o.Light {
		s.matcher = &matcher{}
	} else {
		s.matcher, s.facts.Unsearched = newMatcher(o.Secrets, true)
		s.kinds = credentialTable()
	}
	s.win = newWindow(ctx, r, s.matcher)
	return s
}

func (s *scan) run() error {
	tr := tar.NewReader(s.win)
	for {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			s.endSkipped()
			break
		}
		if err != nil {
			return err
		}
		s.facts.Entries++
		s.endSkipped()
		name := clean(hdr.Name)
		s.open = append(s.open, extent{name, s.win.offset()})
		if err := s.entry(tr, hdr, name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if err := s.drain(s.win, nil, func() {}); err != nil {
		return err
	}
	if err := s.settle(); err != nil {
		return err
	}
	s.sort()
	return nil
}

// drain reads r to its end into w, which may be nil.
func (s *scan) drain(r io.Reader, w io.Writer, progress func()) error {
	start, read := s.win.offset(), int64(0)
	for {
		n, err := r.Read(s.buf)
		if read += int64(n); read-(s.win.offset()-start) > maxHoles {
			return fmt.Errorf("a sparse file with more than %d MiB of holes", maxHoles>>20)
		}
		if n > 0 && w != nil {
			if _, err := w.Write(s.buf[:n]); err != nil {
				return err
			}
		}
		progress()
		if errors.Is(err, io.EOF) {
			return s.settle()
		}
		if err != nil {
			return err
		}
		if err := s.settle(); err != nil {
			return err
		}
	}
}

// clean makes a name relative to the root, as it is after unpacking.
func clean(name string) string {
	return strings.TrimPrefix(path.Clean("/"+name), "/")
}

// entry reads one entry to its end.
func (s *scan) entry(tr *tar.Reader, hdr *tar.Header, name string) error {
	var sinks []io.Writer
	var kept bytes.Buffer
	kinds := s.credentialKinds(hdr, name)
	if len(kinds) > 0 {
		sinks = append(sinks, &limitedWriter{w: &kept, left: maxCredential})
	}
	file, privileged, err := s.privilege(hdr, name)
	if err != nil {
		return err
	}
	sum := sha256.New()
	if privileged && file.Link == "" {
		sinks = append(sinks, sum)
	}
	if err := s.content(tr, hdr, sinks); err != nil {
		return err
	}
	if privileged {
		if file.Link == "" {
			file.Digest = digest.NewDigest(digest.SHA256, sum).String()
		}
		s.privileged[name] = file
		if err := s.remember(file, len(name)+len(file.Link), func() { s.facts.Privileged = append(s.facts.Privileged, file) }); err != nil {
			return err
		}
	}
	for _, k := range kinds {
		if !k.match(kept.Bytes()) {
			continue
		}
		c := Credential{Path: name, Kind: k.kind}
		if err := s.remember(c, len(name), func() { s.facts.Credentials = append(s.facts.Credentials, c) }); err != nil {
			return err
		}
	}
	return s.headerText(hdr, name)
}

// content reads the entry's content into the sinks. What nobody needs of a sparse file is skipped, not expanded.
func (s *scan) content(tr *tar.Reader, hdr *tar.Header, sinks []io.Writer) error {
	if len(sinks) == 0 {
		if isSparse(hdr) {
			s.skipped = true
			return nil
		}
		return s.drain(tr, nil, s.extend)
	}
	return s.drain(tr, io.MultiWriter(sinks...), s.extend)
}

func isSparse(hdr *tar.Header) bool {
	for k := range hdr.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return hdr.Typeflag == tar.TypeGNUSparse
}

// extend moves the end of the last entry to what is read.
func (s *scan) extend() { s.open[len(s.open)-1].end = s.win.offset() }

// endSkipped is called with the reader behind the next header, the first offset known after skipped content.
func (s *scan) endSkipped() {
	const header = 512
	if s.skipped {
		s.open[len(s.open)-1].end = s.win.offset() - header
		s.skipped = false
	}
}

// remember adds a fact unless it is known.
func (s *scan) remember(fact any, size int, add func()) error {
	if s.known[fact] {
		return nil
	}
	const overhead = 64
	s.text += size + overhead
	if s.text > maxFactText {
		return fmt.Errorf("a layer with more findings than fit into %d MiB", maxFactText>>20)
	}
	s.known[fact] = true
	add()
	return nil
}

// privilege says whether the entry gives privilege to whoever executes it. Setgid on a directory only passes the
// group on, and other types cannot be executed.
func (s *scan) privilege(hdr *tar.Header, name string) (PrivilegedFile, bool, error) {
	switch hdr.Typeflag {
	case tar.TypeLink:
		target := clean(hdr.Linkname)
		f, ok := s.privileged[target]
		f.Path, f.Link = name, target
		return f, ok, nil
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
	default:
		return PrivilegedFile{}, false, nil
	}
	caps, err := fileCaps(hdr.PAXRecords["SCHILY.xattr.security.capability"])
	if err != nil {
		return PrivilegedFile{}, false, err
	}
	const setid = 0o6000
	if hdr.Mode&setid == 0 && caps == "" {
		return PrivilegedFile{}, false, nil
	}
	return PrivilegedFile{Path: name, Mode: uint32(hdr.Mode & 0o7777), UID: hdr.Uid, GID: hdr.Gid, Caps: caps}, true, nil
}

// fileCaps returns the capability sets of a security.capability attribute as hex, empty when it grants nothing.
// The same capabilities read inside and outside a user namespace differ in version and root id; those of the
// initial namespace's root are made equal.
func fileCaps(attr string) (string, error) {
	if attr == "" {
		return "", nil
	}
	const v2, v3 = 20, 24 // lengths of the versions in use
	if len(attr) != v2 && len(attr) != v3 {
		return "", fmt.Errorf("security.capability has %d bytes, not %d or %d", len(attr), v2, v3)
	}
	sets := attr[4:v2]
	if strings.Trim(sets, "\x00") == "" {
		return "", nil
	}
	text := fmt.Sprintf("%02x%x", attr[0]&1, sets) // the effective flag, then permitted and inheritable
	if root := attr[v2:]; strings.Trim(root, "\x00") != "" {
		text += fmt.Sprintf("@%x", root)
	}
	return text, nil
}

func (s *scan) credentialKinds(hdr *tar.Header, name string) []credentialKind {
	if hdr.Typeflag != tar.TypeReg {
		return nil
	}
	var kinds []credentialKind
	for _, k := range s.kinds {
		if k.name(name) {
			kinds = append(kinds, k)
		}
	}
	return kinds
}

// headerText looks at names as a whole: a long one is stored in two pieces.
func (s *scan) headerText(hdr *tar.Header, name string) error {
	for _, text := range []string{hdr.Name, hdr.Linkname} {
		for _, h := range s.matcher.find([]byte(text)) {
			if err := s.secret(name, h.pattern); err != nil {
				return err
			}
		}
	}
	return nil
}

// settle gives matches their paths: all that lie before the end of the last entry, or all at the end of the stream.
func (s *scan) settle() error {
	later := s.win.matches[:0]
	for _, h := range s.win.matches {
		i, _ := slices.BinarySearchFunc(s.open, h.offset+1, func(e extent, o int64) int { return cmp.Compare(e.end, o) })
		path := ""
		switch {
		case i < len(s.open):
			path = s.open[i].path
		case !s.win.finished():
			later = append(later, h)
			continue
		}
		if err := s.hit(path, h); err != nil {
			return err
		}
	}
	s.win.matches = later
	// The last entry stays open: it may still grow.
	for len(s.open) > 1 && s.open[0].end <= s.win.decided {
		s.open = s.open[1:]
	}
	return nil
}

func (s *scan) hit(path string, h streamMatch) error {
	if h.pattern.secret >= 0 {
		return s.secret(path, h.pattern)
	}
	k := KeyHit{Path: path, Kind: h.key}
	return s.remember(k, len(path), func() { s.facts.Keys = append(s.facts.Keys, k) })
}

// secret records a secret in a file once, in the form that was found first.
func (s *scan) secret(path string, p *pattern) error {
	id := s.matcher.ids[p.secret]
	return s.remember([2]string{path, id}, len(path), func() {
		s.facts.Secrets = append(s.facts.Secrets, SecretHit{Path: path, Secret: id, Form: p.form})
	})
}

func (s *scan) sort() {
	f := &s.facts
	slices.SortStableFunc(f.Privileged, func(a, b PrivilegedFile) int { return strings.Compare(a.Path, b.Path) })
	slices.SortStableFunc(f.Keys, func(a, b KeyHit) int { return strings.Compare(a.Path, b.Path) })
	slices.SortStableFunc(f.Credentials, func(a, b Credential) int { return strings.Compare(a.Path, b.Path) })
	slices.SortStableFunc(f.Secrets, func(a, b SecretHit) int { return strings.Compare(a.Path+"\x00"+a.Secret, b.Path+"\x00"+b.Secret) })
}

// limitedWriter keeps the first bytes and forgets the others.
type limitedWriter struct {
	w    io.Writer
	left int
}

func (l *limitedWriter) Write(b []byte) (int, error) {
	keep := b[:min(len(b), l.left)]
	l.left -= len(keep)
	if _, err := l.w.Write(keep); err != nil {
		return 0, err
	}
	return len(b), nil
}
