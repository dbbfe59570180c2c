package files

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// unpack extracts s if it is an archive, and tells whether it was one. As in BuildKit whatever begins with a valid
// tar header is an archive; an empty one and a broken one are files like others.
func (d *destination) unpack(ctx context.Context, s start) (bool, error) {
	f, err := openRegular(s.dir, s.name)
	if err != nil {
		return false, failed("read", s.path, err)
	}
	defer f.Close()
	if is, err := isArchive(f); err != nil || !is {
		return false, failed("unpack", s.path, err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return false, failed("read", s.path, bare(err))
	}
	p, err := d.resolve(d.copy.Dst, true)
	if err != nil {
		return false, err
	}
	if err := d.mkdirs(p, dirMode); err != nil {
		return false, err
	}
	fd, err := d.openDir(p)
	if err != nil {
		return false, err
	}
	// The destination is the root for everything in the archive, including the links that it meets there.
	u := &unpacker{target: &target{dir: fd, upper: -1, o: d.o}, own: d.own}
	defer u.close()
	if err := u.unpack(ctx, f); err != nil {
		return false, fmt.Errorf("unpack %s: %w", shown(s.path), err)
	}
	return true, nil
}

// isArchive tells whether f is an archive. One that would take too much memory to find out is an error, because to
// copy it as a file would be silently wrong.
func isArchive(f *os.File) (bool, error) {
	r, err := decompress(f)
	var memory *memoryError
	if errors.As(err, &memory) {
		return false, err
	}
	if err != nil {
		return false, nil
	}
	defer r.Close()
	_, err = tar.NewReader(r).Next()
	return err == nil, nil
}

// unpacker extracts one archive. Names such as .wh.x mean nothing here: that is how layers say something, and this
// is an archive of a user.
type unpacker struct {
	*target
	own  *ids // replaces the owners in the archive
	dirs []dirTime
}

// dirTime is a directory's modification time, which is set when nothing more is made in it.
type dirTime struct {
	path  string
	mtime *unix.Timespec
}

func (u *unpacker) unpack(ctx context.Context, f *os.File) error {
	r, err := decompress(f)
	if err != nil {
		return err
	}
	defer r.Close()
	entries := tar.NewReader(r)
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		h, err := entries.Next()
		if errors.Is(err, io.EOF) {
			return u.setDirTimes()
		}
		if err != nil {
			return err
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if err := u.entry(ctx, h, entries); err != nil {
			return fmt.Errorf("%q: %w", h.Name, bare(err))
		}
	}
}

func (u *unpacker) setDirTimes() error {
	for _, d := range u.dirs {
		fd, err := openBeneath(u.dir, d.path, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			continue // a later entry took its place
		}
		err = u.dressFD(fd, look{keepMode: true, mtime: d.mtime})
		unix.Close(fd)
		if err != nil {
			return failed("set the time of", d.path, err)
		}
	}
	return nil
}

// entry makes what one header says.
func (u *unpacker) entry(ctx context.Context, h *tar.Header, content io.Reader) error {
	name := path.Clean(h.Name)
	if name == ".." || strings.HasPrefix(name, "../") {
		return errors.New("it leads out of the archive")
	}
	if name == "." {
		// Archives of "." describe a directory that is the user's already.
		return nil
	}
	l, err := u.look(h)
	if err != nil {
		return err
	}
	if name == "/" {
		if h.Typeflag != tar.TypeDir {
			return errors.New("it would replace the destination itself")
		}
		u.dirs = append(u.dirs, dirTime{"", l.mtime})
		return u.dressFD(u.dir, l)
	}
	above, err := u.resolve(path.Dir(name), true)
	if err != nil {
		return err
	}
	made, err := u.mkdirAll(above, look{mode: dirMode, own: &ids{}})
	if err != nil {
		return err
	}
	for _, p := range made {
		u.dirs = append(u.dirs, dirTime{p, u.stamp(nil, nil)})
	}
	dir, err := u.openDir(above)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	if h.Typeflag == tar.TypeDir {
		u.dirs = append(u.dirs, dirTime{path.Join(above, path.Base(name)), l.mtime})
		return u.makeDir(dir, path.Base(name), l)
	}
	if err := makeRoom(dir, path.Base(name), true); err != nil {
		return err
	}
	return u.make(ctx, h, content, dir, path.Base(name), l)
}

// make makes what is no directory, where nothing is.
func (u *unpacker) make(ctx context.Context, h *tar.Header, content io.Reader, dir int, name string, l look) error {
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		return u.makeFile(ctx, content, dir, name, l)
	case tar.TypeSymlink:
		return u.symlinkAt(h.Linkname, dir, name, l)
	case tar.TypeLink:
		return u.makeLink(h.Linkname, dir, name, l)
	case tar.TypeFifo:
		if err := unix.Mknodat(dir, name, unix.S_IFIFO|0o600, 0); err != nil {
			return err
		}
		return u.dressAt(dir, name, l)
	case tar.TypeChar, tar.TypeBlock:
		return errors.New("it is a device, which a build without root cannot make")
	}
	return fmt.Errorf("its type %s is not supported", strconv.QuoteRune(rune(h.Typeflag)))
}

func (u *unpacker) look(h *tar.Header) (look, error) {
	own := u.own
	if own == nil {
		own = &ids{uid: h.Uid, gid: h.Gid}
		if err := own.check(); err != nil {
			return look{}, err
		}
	}
	// As in BuildKit: a time before 1970 is 1970.
	mtime := timespec(h.ModTime)
	if h.ModTime.Before(time.Unix(0, 0)) {
		mtime = &unix.Timespec{}
	}
	l := look{mode: fileMode(uint32(h.Mode & 0o7777)), own: own, mtime: u.stamp(nil, mtime)}
	for record, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(record, "SCHILY.xattr."); ok && carried(name) {
			l.xattrs = append(l.xattrs, xattr{name, value})
		}
	}
	return l, nil
}

// makeDir makes a directory or changes the one that is there.
func (u *unpacker) makeDir(dir int, name string, l look) error {
	st, err := lstatAt(dir, name)
	if err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		fd, err := openDirAt(dir, name)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return u.dressFD(fd, l)
	}
	if err := makeRoom(dir, name, true); err != nil {
		return err
	}
	fd, err := u.mkdirAt(dir, name, l)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

func (u *unpacker) makeFile(ctx context.Context, content io.Reader, dir int, name string, l look) error {
	f, err := createAt(dir, name)
	if err != nil {
		return err
	}
	err = copyContent(ctx, f, content)
	if err == nil {
		err = u.dress(f, l)
	}
	return errors.Join(err, f.Close())
}

// makeLink makes a hard link to something that is in the destination. The look is that of the last header that names
// the file, as with every tar program.
func (u *unpacker) makeLink(to string, dir int, name string, l look) error {
	p, err := u.resolve(to, false)
	if err != nil {
		return err
	}
	if p == "" {
		return errors.New("it is a hard link to a directory")
	}
	from, err := u.openDir(parent(p))
	if err != nil {
		return err
	}
	defer unix.Close(from)
	if err := unix.Linkat(from, path.Base(p), dir, name, 0); err != nil {
		return fmt.Errorf("hard link to %q: %w", to, err)
	}
	st, err := lstatAt(dir, name)
	if err != nil || st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return err
	}
	return u.dressAt(dir, name, l)
}

// piece is how much is copied between two looks at whether the build still goes on.
const piece = 64 << 20

// copyContent copies what is no file of its own.
func copyContent(ctx context.Context, to *os.File, from io.Reader) error {
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		_, err := io.CopyN(to, from, piece)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return bare(err)
		}
	}
}
