package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/owner"
)

// DiffOptions says how a layer is written. The zero value keeps everything as it is.
type DiffOptions struct {
	// Epoch clamps modification times; nil keeps them.
	Epoch *time.Time
	// StripPrivilege names the paths, relative to the root, that lose setuid, setgid and file
	// capabilities. All other names of the same file lose them too.
	StripPrivilege map[string]bool
	// Single says that owners are recorded in user.rootlesscontainers.
	Single bool
	// Base is the directory that the root's own attributes are compared with; the root gets an entry
	// when they differ. Empty stands for 0755, owned by root.
	Base string
}

// Diff writes the uncompressed layer that an overlay upper directory is. The bytes depend on names,
// contents and attributes only. An empty directory gives an empty archive. The directory must not
// change meanwhile.
func Diff(ctx context.Context, upper string, w io.Writer, o DiffOptions) error {
	strip, err := namesToStrip(upper, o.StripPrivilege)
	if err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	keepRoot, err := RootChanged(upper, o.Base)
	if err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	root, err := unix.Open(upper, openDirectory, 0)
	if err != nil {
		return fmt.Errorf("write layer: open %s: %w", upper, err)
	}
	defer closeFD(root)
	d := differ{
		out: tar.NewWriter(w), epoch: o.Epoch, strip: strip, keepRoot: keepRoot, single: o.Single,
		linked: map[uint64]string{}, buf: make([]byte, 256<<10),
	}
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	if err := d.directory(ctx, directory{fd: root}, &st); err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	if err := d.out.Close(); err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	return nil
}

// markerError says that a file has a name that means something else in a layer.
type markerError struct{}

func (*markerError) Error() string { return "the name begins with " + whiteoutPrefix }

// Hint names the way out.
func (*markerError) Hint() string {
	return "names that begin with .wh. mark deleted files in a layer (OCI image-spec, layer.md), so no layer can hold such a file: rename or remove it in the same step"
}

// differ writes one layer.
type differ struct {
	out      *tar.Writer
	epoch    *time.Time
	strip    map[string]bool
	keepRoot bool
	single   bool
	linked   map[uint64]string // the first name of each file that may have several, by inode
	buf      []byte
}

// directory writes one and all that is in it, sorted by name.
func (d *differ) directory(ctx context.Context, dir directory, st *unix.Stat_t) error {
	attrs, err := readXattrs(dir.fd)
	if err != nil {
		return at(dir.path, err)
	}
	if dir.path != "" || d.keepRoot {
		h := d.header(dir.path, st, attrs)
		h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
		if dir.path == "" {
			h.Name = "./"
		}
		if err := d.out.WriteHeader(h); err != nil {
			return at(dir.path, err)
		}
	}
	if valueOf(attrs, xattrOpaque) == "y" {
		if err := d.marker(dir.join(opaqueMarker)); err != nil {
			return err
		}
	}
	names, err := readNames(dir.fd)
	if err != nil {
		return at(dir.path, err)
	}
	slices.Sort(names)
	for _, name := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := d.child(ctx, dir, name); err != nil {
			return err
		}
	}
	return nil
}

// child writes one name of a directory.
func (d *differ) child(ctx context.Context, dir directory, name string) error {
	full := dir.join(name)
	var st unix.Stat_t
	if err := unix.Fstatat(dir.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return at(full, err)
	}
	if strings.HasPrefix(name, whiteoutPrefix) {
		return at(full, &markerError{})
	}
	if isWhiteout(&st) {
		return d.marker(dir.join(whiteoutPrefix + name))
	}
	how := unix.O_PATH
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		how = unix.O_RDONLY | unix.O_DIRECTORY
	case unix.S_IFREG:
		how = unix.O_RDONLY
	case unix.S_IFSOCK:
		return at(full, errors.New("a layer holds no sockets"))
	}
	fd, err := unix.Openat(dir.fd, name, how|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return at(full, err)
	}
	defer closeFD(fd)
	if isDir(&st) {
		return d.directory(ctx, directory{fd: fd, path: full}, &st)
	}
	return at(full, d.file(ctx, dir, name, fd, &st))
}

// file writes what is no directory, and is open.
func (d *differ) file(ctx context.Context, dir directory, name string, fd int, st *unix.Stat_t) error {
	attrs, err := readXattrs(fd)
	if err != nil {
		return err
	}
	h := d.header(dir.join(name), st, attrs)
	if st.Nlink > 1 {
		first, known := d.linked[st.Ino]
		if known {
			h.Typeflag, h.Linkname = tar.TypeLink, first
			return d.out.WriteHeader(h)
		}
		d.linked[st.Ino] = h.Name
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
		if err := d.out.WriteHeader(h); err != nil {
			return err
		}
		return d.content(ctx, fd, st.Size)
	case unix.S_IFLNK:
		n, err := unix.Readlinkat(dir.fd, name, d.buf)
		if err != nil {
			return err
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, string(d.buf[:n])
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR:
		h.Typeflag = tar.TypeChar
	case unix.S_IFBLK:
		h.Typeflag = tar.TypeBlock
	}
	if h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock {
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	}
	return d.out.WriteHeader(h)
}

// content writes a file's bytes.
func (d *differ) content(ctx context.Context, fd int, size int64) error {
	for size > 0 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := unix.Read(fd, d.buf[:min(size, int64(len(d.buf)))])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return fmt.Errorf("read: %w", err)
		case n == 0:
			return fmt.Errorf("read: %w", io.ErrUnexpectedEOF)
		}
		if _, err := d.out.Write(d.buf[:n]); err != nil {
			return err
		}
		size -= int64(n)
	}
	return nil
}

// marker writes an entry that stands for something that is not there.
func (d *differ) marker(name string) error {
	return at(name, d.out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, ModTime: time.Unix(0, 0)}))
}

// at says which file an error is about. A caller that wants no more is no error of the file.
func at(name string, err error) error {
	if err == nil || errors.Is(err, io.ErrClosedPipe) {
		return err
	}
	return fmt.Errorf("%s: %w", shown(name), err)
}

// header is what a layer means to say of a file, whatever its type.
func (d *differ) header(name string, st *unix.Stat_t, attrs []xattr) *tar.Header {
	h := &tar.Header{Name: name, Mode: int64(st.Mode & 0o7777), ModTime: modTime(st, d.epoch)}
	if !d.single {
		h.Uid, h.Gid = int(st.Uid), int(st.Gid)
	} else if ids, ok := owner.Decode(valueOf(attrs, owner.Attribute(st.Mode)), st.Mode); ok {
		h.Uid, h.Gid = int(ids.UID), int(ids.GID)
	}
	program := isDir(st) || st.Mode&unix.S_IFMT == unix.S_IFREG // a capability means nothing on a link or a pipe, unless it is a record
	strip := d.strip[name]
	for _, a := range attrs {
		switch {
		case a.value == "", ours(a.name), hostOnly(a.name): // PAX has no empty values
		case a.name == xattrCapability && (strip || !program):
		default:
			addXattr(h, a.name, a.value)
		}
	}
	if d.single {
		for _, a := range attrs { // an access list that names ids which are not here is recorded
			name, ok := owner.ACLName(a.name)
			if !ok || a.value == "" {
				continue
			}
			if strings.HasSuffix(name, "access") {
				a.value = string(owner.WithMode([]byte(a.value), st.Mode&0o7777))
			}
			addXattr(h, name, a.value)
		}
	}
	if strip && !isDir(st) {
		h.Mode &^= 0o6000
	}
	return h
}

func addXattr(h *tar.Header, name, value string) {
	if h.PAXRecords == nil {
		h.PAXRecords = map[string]string{}
	}
	h.PAXRecords[paxXattr+name] = value
}

// modTime is the time that a layer gives a file: in seconds, and none after the epoch if there is one.
func modTime(st *unix.Stat_t, epoch *time.Time) time.Time {
	t := time.Unix(st.Mtim.Sec, 0)
	if epoch != nil && t.After(*epoch) {
		return epoch.Truncate(time.Second)
	}
	return t
}

// RootChanged reports whether the root's own attributes, times aside, differ from those of the
// directory base, or from 0755 owned by root when base is empty.
func RootChanged(upper, base string) (bool, error) {
	have, err := describeRoot(upper)
	if err != nil {
		return false, err
	}
	want := "755 0 0"
	if base != "" {
		if want, err = describeRoot(base); err != nil {
			return false, err
		}
	}
	return have != want, nil
}

func describeRoot(dir string) (string, error) {
	fd, err := unix.Open(dir, openDirectory, 0)
	if err != nil {
		return "", fmt.Errorf("open %s: %w", dir, err)
	}
	defer closeFD(fd)
	return attributesText(fd)
}

// escapedOverlay begins what Linux 6.7 makes of an attribute that a command in an overlay calls user.overlay.
const escapedOverlay = "user.overlay.overlay."

// attributesText tells what a directory has apart from its contents and times.
func attributesText(fd int) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	attrs, err := readXattrs(fd)
	if err != nil {
		return "", err
	}
	text := fmt.Sprintf("%o %d %d", st.Mode&0o7777, st.Uid, st.Gid)
	for _, a := range attrs {
		if strings.HasPrefix(a.name, "user.overlay.") && !strings.HasPrefix(a.name, escapedOverlay) || hostOnly(a.name) {
			continue
		}
		text += fmt.Sprintf(" %q=%q", a.name, a.value)
	}
	return text, nil
}

// namesToStrip completes the listed names by the other names of the same files: a setuid program
// would survive under any of them.
func namesToStrip(upper string, listed map[string]bool) (map[string]bool, error) {
	names := map[string]bool{}
	inodes := map[uint64]bool{}
	root, err := unix.Open(upper, openDirectory, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", upper, err)
	}
	defer closeFD(root)
	for name, strip := range listed {
		if !strip {
			continue
		}
		name = strings.TrimPrefix(path.Clean("/"+name), "/")
		names[name] = true
		st, err := statBeneath(root, name)
		if err == nil && st.Nlink > 1 && !isDir(&st) {
			inodes[st.Ino] = true
		}
	}
	if len(inodes) == 0 {
		return names, nil
	}
	return names, addLinks(root, "", inodes, names)
}

func statBeneath(root int, name string) (unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := openBeneath(root, name, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return st, err
	}
	defer closeFD(fd)
	return st, unix.Fstat(fd, &st)
}

// addLinks adds every name below dir whose inode is one of inodes.
func addLinks(dir int, at string, inodes map[uint64]bool, names map[string]bool) error {
	children, err := readNames(dir)
	if err != nil {
		return err
	}
	for _, child := range children {
		st, exists, err := lstatAt(dir, child)
		if err != nil {
			return err
		}
		name := path.Join(at, child)
		if !exists || !isDir(&st) {
			if exists && inodes[st.Ino] {
				names[name] = true
			}
			continue
		}
		fd, err := unix.Openat(dir, child, openDirectory, 0)
		if err != nil {
			return err
		}
		err = addLinks(fd, name, inodes, names)
		closeFD(fd)
		if err != nil {
			return err
		}
	}
	return nil
}
