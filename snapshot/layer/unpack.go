package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// What one layer may unpack to when the options do not say.
const (
	DefaultMaxBytes   = 256 << 30
	DefaultMaxEntries = 8 << 20
)

// UnpackOptions says how a layer is applied. The zero value suits a map of many ids.
type UnpackOptions struct {
	// Single records owners in user.rootlesscontainers instead of changing them.
	Single bool
	// MaxBytes and MaxEntries bound what is written; 0 means the default.
	MaxBytes, MaxEntries int64
	// Warn is told of what was left out because no user namespace allows it: device nodes, and
	// attributes the kernel keeps to itself. Nil is silence.
	Warn func(name, what string)
}

// Unpack applies an uncompressed layer stream to the overlay upper directory dir. A nil error means
// that dir holds all that the stream says, with owners, modes, attributes and times; after an error
// its contents are of no use. What dir held before counts as layers applied earlier: whiteouts remove
// it, and stay to hide what lies below dir.
//
// The layers below need not be there yet: what depends on them is returned, to be asked for later.
//
// The stream is read to its end-of-archive mark, not beyond.
func Unpack(ctx context.Context, dir string, stream io.Reader, o UnpackOptions) (*Implied, error) {
	root, err := unix.Open(dir, openDirectory, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", dir, err)
	}
	defer closeFD(root)
	u, err := newUnpacker(root, o)
	if err != nil {
		return nil, fmt.Errorf("unpack layer: %w", err)
	}
	defer u.forgetParent()
	if err := u.all(ctx, stream); err != nil {
		return nil, err
	}
	if err := u.setTimes(); err != nil {
		return nil, fmt.Errorf("unpack layer: %w", err)
	}
	return &Implied{dir: dir, names: u.inherits, root: !u.rootDescribed}, nil
}

func (u *unpacker) all(ctx context.Context, stream io.Reader) error {
	archive := tar.NewReader(stream)
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read layer: %w", err)
		}
		if err := u.entry(ctx, header, archive); err != nil {
			return fmt.Errorf("unpack %s: %w", shown(header.Name), err)
		}
	}
}

type unpacker struct {
	options UnpackOptions
	root    int
	buf     []byte
	entries int64
	bytes   int64

	// times holds the modification time of every directory that we made or changed the contents of,
	// by its resolved path. They are set last.
	times map[string]time.Time

	// inherits holds the directories that were made because something lies in them, and that may
	// cover others, by resolved path.
	inherits      map[string]struct{}
	rootDescribed bool

	// touched holds what this layer made, by resolved path. It is nil when dir was empty at the
	// start: then this layer made everything.
	touched map[string]struct{}

	// parent is the directory of the entry before, which mostly is that of the next one. Whatever
	// may change what its name means makes it stale.
	parent      directory
	parentName  string
	hasParent   bool
	parentStale bool

	implied *implied // the last one of the walk going on, nil outside of it
}

// directory is an open directory and the way to it without symlinks ("" for the root).
type directory struct {
	fd   int
	path string
}

func (d directory) join(base string) string { return path.Join(d.path, base) }

func newUnpacker(root int, o UnpackOptions) (*unpacker, error) {
	if o.MaxBytes == 0 {
		o.MaxBytes = DefaultMaxBytes
	}
	if o.MaxEntries == 0 {
		o.MaxEntries = DefaultMaxEntries
	}
	if o.Warn == nil {
		o.Warn = func(string, string) {}
	}
	u := &unpacker{options: o, root: root, buf: make([]byte, 256<<10), times: map[string]time.Time{}, inherits: map[string]struct{}{}}
	if err := u.keepTime(directory{fd: root}); err != nil {
		return nil, err
	}
	names, err := readNames(root)
	if err != nil {
		return nil, err
	}
	if len(names) > 0 {
		u.touched = map[string]struct{}{}
	}
	return u, nil
}

// entry applies one entry of the stream.
func (u *unpacker) entry(ctx context.Context, h *tar.Header, data io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if err := u.count(); err != nil {
		return err
	}
	parts, err := splitName(h.Name)
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		return u.rootEntry(h)
	}
	last := len(parts) - 1
	skip, err := checkMarkers(parts)
	if err != nil || skip {
		return err
	}
	parent, err := u.parentOf(parts[:last])
	if err != nil {
		return err
	}
	base := parts[last]
	if base == opaqueMarker {
		u.touch(parent.path)
		return u.makeOpaque(parent)
	}
	if hidden, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
		return u.whiteout(parent, hidden)
	}
	if err := u.create(ctx, parent, base, h, data); err != nil {
		return err
	}
	u.touch(parent.join(base))
	return nil
}

// count counts what the stream makes us create, also the directories on the way that it does not name: one entry may
// imply two thousand.
func (u *unpacker) count() error {
	if u.entries++; u.entries > u.options.MaxEntries {
		return fmt.Errorf("the layer has more than %d entries", u.options.MaxEntries)
	}
	return nil
}

// checkMarkers judges names that begin with ".wh.": those of aufs itself are skipped, as by docker,
// and no whiteout may name its own directory, the one above, nothing, or be a directory.
func checkMarkers(parts []string) (skip bool, err error) {
	last := len(parts) - 1
	for i, part := range parts {
		if !strings.HasPrefix(part, whiteoutPrefix) {
			continue
		}
		switch hidden := part[len(whiteoutPrefix):]; {
		case i == last && part == opaqueMarker:
		case strings.HasPrefix(part, metaPrefix):
			return true, nil
		case i != last:
			return false, fmt.Errorf("it lies below a whiteout")
		case hidden == "" || hidden == "." || hidden == "..":
			return false, fmt.Errorf("the whiteout names no file")
		}
	}
	return false, nil
}

// rootEntry sets the attributes of the root. The root stays the directory that it is.
func (u *unpacker) rootEntry(h *tar.Header) error {
	if h.Typeflag != tar.TypeDir {
		return fmt.Errorf("the root must stay a directory")
	}
	u.rootDescribed = true
	if err := clearXattrs(u.root); err != nil {
		return err
	}
	return u.describe(directory{fd: u.root}, h)
}

func (u *unpacker) create(ctx context.Context, parent directory, base string, h *tar.Header, data io.Reader) error {
	switch h.Typeflag {
	case tar.TypeReg, '\x00', tar.TypeCont, tar.TypeGNUSparse:
		return u.file(ctx, parent, base, h, data)
	case tar.TypeDir:
		return u.directory(parent, base, h)
	case tar.TypeSymlink:
		return u.symlink(parent, base, h)
	case tar.TypeLink:
		return u.hardLink(parent, base, h)
	case tar.TypeFifo:
		return u.fifo(parent, base, h)
	case tar.TypeChar, tar.TypeBlock:
		return u.device(parent, base, h)
	default:
		return fmt.Errorf("entries of type %q are not part of a layer", string(h.Typeflag))
	}
}

func (u *unpacker) file(ctx context.Context, parent directory, base string, h *tar.Header, data io.Reader) error {
	if h.Size < 0 || h.Size > u.options.MaxBytes-u.bytes {
		return fmt.Errorf("the layer unpacks to more than %d bytes", u.options.MaxBytes)
	}
	u.bytes += h.Size
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(parent.fd, base, flags, 0o600)
	if err == unix.EEXIST {
		if err := u.remove(parent, base); err != nil {
			return err
		}
		fd, err = unix.Openat(parent.fd, base, flags, 0o600)
	}
	if err != nil {
		return fmt.Errorf("create file: %w", err)
	}
	err = u.fill(ctx, fd, h, data)
	if closeErr := unix.Close(fd); err == nil && closeErr != nil {
		err = fmt.Errorf("close file: %w", closeErr)
	}
	if err != nil {
		return err
	}
	return setTime(parent.fd, base, h.ModTime)
}

func (u *unpacker) fill(ctx context.Context, fd int, h *tar.Header, data io.Reader) error {
	var done int64
	for {
		n, readErr := data.Read(u.buf)
		if err := writeAll(fd, u.buf[:n]); err != nil {
			return fmt.Errorf("write file: %w", err)
		}
		done += int64(n)
		if errors.Is(readErr, io.EOF) {
			break
		}
		if readErr != nil {
			return fmt.Errorf("read layer: %w", readErr)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	if done != h.Size {
		return fmt.Errorf("read layer: %w", io.ErrUnexpectedEOF)
	}
	return u.setMetadata(fd, h)
}

func writeAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if err != nil && err != unix.EINTR {
			return err
		}
		b = b[max(n, 0):]
	}
	return nil
}

// directory makes a directory or takes the one that is there. In place of anything else it is
// opaque, because what was there hid everything below.
func (u *unpacker) directory(parent directory, base string, h *tar.Header) error {
	st, exists, err := lstatAt(parent.fd, base)
	if err != nil {
		return err
	}
	replaced := exists && !isDir(&st)
	if replaced {
		if err := u.remove(parent, base); err != nil {
			return err
		}
	}
	if !exists || replaced {
		if err := unix.Mkdirat(parent.fd, base, 0o700); err != nil {
			return fmt.Errorf("create directory: %w", err)
		}
	}
	fd, err := unix.Openat(parent.fd, base, openDirectory, 0)
	if err != nil {
		return fmt.Errorf("open directory: %w", err)
	}
	defer closeFD(fd)
	if exists && !replaced {
		if err := clearXattrs(fd); err != nil {
			return err
		}
	}
	if replaced {
		if err := setOpaque(fd); err != nil {
			return err
		}
	}
	return u.describe(directory{fd: fd, path: parent.join(base)}, h)
}

// describe gives an open directory the attributes of its entry; the time waits for the end.
func (u *unpacker) describe(d directory, h *tar.Header) error {
	u.times[d.path] = h.ModTime
	delete(u.inherits, d.path)
	return u.setMetadata(d.fd, h)
}

func (u *unpacker) symlink(parent directory, base string, h *tar.Header) error {
	if h.Linkname == "" || strings.ContainsRune(h.Linkname, 0) || len(h.Linkname) >= maxName {
		return fmt.Errorf("the link's target is not valid")
	}
	if err := u.remove(parent, base); err != nil {
		return err
	}
	if err := unix.Symlinkat(h.Linkname, parent.fd, base); err != nil {
		return fmt.Errorf("create symlink: %w", err)
	}
	return u.describeName(parent, base, h)
}

func (u *unpacker) fifo(parent directory, base string, h *tar.Header) error {
	if err := u.remove(parent, base); err != nil {
		return err
	}
	if err := unix.Mknodat(parent.fd, base, unix.S_IFIFO|0o600, 0); err != nil {
		return fmt.Errorf("create pipe: %w", err)
	}
	return u.describeName(parent, base, h)
}

// device leaves the node out: no user namespace can make one. A node 0:0 is overlay's whiteout, and
// a layer has no other use for it than to forge one.
func (u *unpacker) device(parent directory, base string, h *tar.Header) error {
	if h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0 {
		return fmt.Errorf("character device 0:0 would forge a whiteout")
	}
	u.options.Warn(h.Name, "device node left out: a user namespace cannot make one")
	return u.remove(parent, base)
}

// hardLink links to a file that this directory holds. The target is resolved like any parent, inside
// the root, and its last component is never followed.
func (u *unpacker) hardLink(parent directory, base string, h *tar.Header) error {
	parts, err := splitName(h.Linkname)
	if err != nil {
		return fmt.Errorf("link target %s: %w", shown(h.Linkname), err)
	}
	if len(parts) == 0 {
		return fmt.Errorf("link target %s: it is the root", shown(h.Linkname))
	}
	last := len(parts) - 1
	from, err := u.walk(parts[:last], false)
	if err != nil {
		return fmt.Errorf("link target %s: %w", shown(h.Linkname), err)
	}
	defer closeFD(from.fd)
	st, exists, err := lstatAt(from.fd, parts[last])
	switch {
	case err != nil:
		return fmt.Errorf("link target %s: %w", shown(h.Linkname), err)
	case !exists || isWhiteout(&st):
		return fmt.Errorf("link target %s: it is not in this layer", shown(h.Linkname))
	case isDir(&st):
		return fmt.Errorf("link target %s: it is a directory", shown(h.Linkname))
	}
	if old, there, err := lstatAt(parent.fd, base); err == nil && there && old.Ino == st.Ino && old.Dev == st.Dev {
		return nil
	}
	if err := u.remove(parent, base); err != nil {
		return err
	}
	if err := unix.Linkat(from.fd, parts[last], parent.fd, base, 0); err != nil {
		return fmt.Errorf("link to %s: %w", shown(h.Linkname), err)
	}
	return nil
}

// describeName sets the attributes of a link or a pipe, which must not be opened.
func (u *unpacker) describeName(parent directory, base string, h *tar.Header) error {
	fd, err := unix.Openat(parent.fd, base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	if err := u.setMetadata(fd, h); err != nil {
		return err
	}
	return setTime(parent.fd, base, h.ModTime)
}

// setMetadata sets owner, then attributes, then mode: each clears some of what comes after it.
func (u *unpacker) setMetadata(fd int, h *tar.Header) error {
	if err := setOwner(fd, h.Uid, h.Gid, u.options.Single); err != nil {
		return err
	}
	attrs, err := wantedXattrs(h.PAXRecords)
	if err != nil {
		return err
	}
	for _, a := range attrs {
		if a.name == xattrCapability && (h.Typeflag == tar.TypeSymlink || h.Typeflag == tar.TypeFifo) {
			continue // it means nothing there, and with a single id it is our record of the owner
		}
		set, err := setXattr(fd, a)
		if err == nil && !set && u.options.Single {
			set, err = recordACL(fd, a)
		}
		if err != nil {
			return err
		}
		if !set {
			u.options.Warn(h.Name, fmt.Sprintf("extended attribute %s left out: the kernel does not allow it here", shown(a.name)))
		}
	}
	if h.Typeflag == tar.TypeSymlink {
		return nil
	}
	if h.Typeflag == tar.TypeFifo { // opened with O_PATH
		err = unix.Chmod(procPath(fd), uint32(h.Mode&0o7777))
	} else {
		err = unix.Fchmod(fd, uint32(h.Mode&0o7777))
	}
	if err != nil {
		return fmt.Errorf("change mode: %w", err)
	}
	return nil
}

// setTime sets the modification and access time of one name, or of dir itself for "".
func setTime(dir int, base string, t time.Time) error {
	if t.IsZero() {
		t = time.Unix(0, 0)
	}
	ts, err := unix.TimeToTimespec(t)
	if err != nil {
		return fmt.Errorf("change times: %w", err)
	}
	if base == "" {
		base = "."
	}
	if err := unix.UtimesNanoAt(dir, base, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("change times: %w", err)
	}
	return nil
}

// setTimes sets the times of directories, now that nothing changes in them any more. A name that
// stopped being a directory in the course of the stream is passed over.
func (u *unpacker) setTimes() error {
	for name, t := range u.times {
		fd, err := openBeneath(u.root, name, openDirectory)
		if notDirectory(err) {
			continue
		}
		if err != nil {
			return err
		}
		err = setTime(fd, "", t)
		closeFD(fd)
		if err != nil {
			return err
		}
	}
	return nil
}

// clearXattrs forgets what an earlier entry set, except the overlay's own marks.
func clearXattrs(fd int) error {
	attrs, err := readXattrs(fd)
	if err != nil {
		return err
	}
	for _, a := range attrs {
		if strings.HasPrefix(a.name, "user.overlay.") || hostOnly(a.name) {
			continue
		}
		if err := unix.Fremovexattr(fd, a.name); err != nil && err != unix.ENODATA && err != unix.EPERM {
			return fmt.Errorf("remove extended attribute %s: %w", shown(a.name), err)
		}
	}
	return nil
}
