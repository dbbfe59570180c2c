package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"strings"
	"time"

	umoci "github.com/opencontainers/umoci/oci/layer"
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
	// Inside the user namespace the ids of the files are those of the layer: no mapping.
	format := umoci.OverlayfsRootfs{MapOptions: umoci.MapOptions{Rootless: o.Single}, UserXattr: true}
	raw := umoci.GenerateInsertLayer(upper, ".", false, &umoci.RepackOptions{OnDiskFormat: format})
	defer raw.Close() // ends umoci's goroutine when we stop early
	rewrite := rewriter{epoch: o.Epoch, strip: strip, keepRoot: keepRoot, single: o.Single, buf: make([]byte, 256<<10)}
	err = rewrite.copy(ctx, tar.NewWriter(w), tar.NewReader(raw))
	if err == nil {
		// umoci ends its archive in good order also when it gives up in the midst: only what follows says so.
		_, err = io.Copy(io.Discard, raw)
	}
	if err != nil {
		return fmt.Errorf("write layer: %w", explained(err))
	}
	return nil
}

// explained adds a next step to what umoci refuses.
func explained(err error) error {
	if strings.Contains(err.Error(), "whiteout prefix") {
		return &markerError{err}
	}
	return err
}

// markerError says that a file has a name that means something else in a layer.
type markerError struct{ error }

func (e *markerError) Unwrap() error { return e.error }

// Hint names the way out.
func (e *markerError) Hint() string {
	return "names that begin with .wh. mark deleted files in a layer (OCI image-spec, layer.md), so no layer can hold such a file: rename or remove it in the same step"
}

// rewriter makes the one pass over umoci's archive.
type rewriter struct {
	epoch    *time.Time
	strip    map[string]bool
	keepRoot bool
	single   bool
	buf      []byte
}

func (r *rewriter) copy(ctx context.Context, out *tar.Writer, in *tar.Reader) error {
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		header, err := in.Next()
		if errors.Is(err, io.EOF) {
			return out.Close()
		}
		if err != nil {
			return err
		}
		if path.Clean(header.Name) == "." && !r.keepRoot {
			continue
		}
		if err := out.WriteHeader(r.header(header)); err != nil {
			return fmt.Errorf("%s: %w", shown(header.Name), err)
		}
		if header.Typeflag != tar.TypeReg {
			continue
		}
		// The wrappers hide ReadFrom and WriteTo, which know no context and no buffer of ours.
		if _, err := io.CopyBuffer(writer{ctx, out}, reader{in}, r.buf); err != nil {
			return fmt.Errorf("%s: %w", shown(header.Name), err)
		}
	}
}

type reader struct{ io.Reader }

type writer struct {
	ctx context.Context // of the one copy this writer lives for
	io.Writer
}

func (w writer) Write(b []byte) (int, error) {
	if w.ctx.Err() != nil {
		return 0, context.Cause(w.ctx)
	}
	return w.Writer.Write(b)
}

// header builds the entry anew from what a layer means to say, so that nothing else can get in.
func (r *rewriter) header(in *tar.Header) *tar.Header {
	out := &tar.Header{
		Typeflag: in.Typeflag, Name: in.Name, Linkname: in.Linkname, Size: in.Size,
		Mode: in.Mode & 0o7777, Uid: in.Uid, Gid: in.Gid,
		ModTime:  r.clamp(in.ModTime),
		Devmajor: in.Devmajor, Devminor: in.Devminor,
		PAXRecords: maps.Clone(in.PAXRecords),
	}
	if path.Clean(in.Name) == "." {
		out.Name = "./"
	}
	if in.Typeflag != tar.TypeReg && in.Typeflag != tar.TypeDir {
		r.recordedOwner(out)
	}
	if r.single {
		recordedACLs(out)
	}
	maps.DeleteFunc(out.PAXRecords, func(record, _ string) bool {
		name, isXattr := strings.CutPrefix(record, paxXattr)
		return !isXattr || ours(name) || hostOnly(name)
	})
	if r.strip[path.Clean(in.Name)] {
		if in.Typeflag != tar.TypeDir {
			out.Mode &^= 0o6000
		}
		delete(out.PAXRecords, paxXattr+xattrCapability)
	}
	return out
}

// recordedOwner turns the record of who owns a link or a pipe, or has another name for one, into the owner.
func (r *rewriter) recordedOwner(h *tar.Header) {
	ids, ok := owner.Decode(h.PAXRecords[paxXattr+owner.XattrOther], unix.S_IFLNK)
	if ok && r.single {
		h.Uid, h.Gid = int(ids.UID), int(ids.GID)
	}
	if ok || h.Typeflag != tar.TypeLink { // a capability means nothing on a link or a pipe
		delete(h.PAXRecords, paxXattr+owner.XattrOther)
	}
}

// recordedACLs turns the record of an access list that names ids which are not here into the list.
func recordedACLs(h *tar.Header) {
	for record, value := range h.PAXRecords {
		name, ok := owner.ACLName(strings.TrimPrefix(record, paxXattr))
		if !ok {
			continue
		}
		if strings.HasSuffix(name, "access") {
			value = string(owner.WithMode([]byte(value), uint32(h.Mode)))
		}
		h.PAXRecords[paxXattr+name] = value
	}
}

func (r *rewriter) clamp(t time.Time) time.Time {
	if r.epoch != nil && t.After(*r.epoch) {
		t = *r.epoch
	}
	return t.Truncate(time.Second)
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
		if strings.HasPrefix(a.name, "user.overlay.") || hostOnly(a.name) {
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
