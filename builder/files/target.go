package files

import (
	"errors"
	"fmt"
	"os"
	"path"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/snapshot/layer"
)

// target is the tree that actions change. All its paths are as resolve gives them: relative to the root and free of
// links.
type target struct {
	dir   int
	upper int // Options.Upper, or -1
	o     Options
}

func openTarget(root string, o Options) (*target, error) {
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open the root directory: %w", err)
	}
	t := &target{dir: fd, upper: -1, o: o}
	if o.Upper == "" {
		return t, nil
	}
	if t.upper, err = unix.Open(o.Upper, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		t.close()
		return nil, fmt.Errorf("open the upper directory: %w", err)
	}
	return t, nil
}

func (t *target) close() {
	unix.Close(t.dir)
	if t.upper >= 0 {
		unix.Close(t.upper)
	}
}

// resolve follows the links in a path of the build.
func (t *target) resolve(p string, follow bool) (string, error) {
	real, err := resolve(t.dir, p, follow, nil)
	return real, failed("resolve", p, err)
}

// openDir opens a directory for the calls that work relative to one.
func (t *target) openDir(p string) (int, error) {
	fd, err := openBeneath(t.dir, p, unix.O_RDONLY|unix.O_DIRECTORY)
	return fd, failed("open", p, err)
}

// look is what a file is given besides its content.
type look struct {
	// mode is the permissions; keepMode leaves them as they are.
	mode     os.FileMode
	keepMode bool
	// own is the owner; nil leaves it to the kernel: the builder, or the group of a setgid directory.
	own    *ids
	xattrs []xattr
	// mtime is the modification time; nil leaves it.
	mtime *unix.Timespec
}

type ids struct{ uid, gid int }

// stamp chooses a modification time: the action's, else the source's, never above the epoch. Without any of them it
// is nil, which leaves the present.
func (t *target) stamp(wanted *time.Time, source *unix.Timespec) *unix.Timespec {
	ts := source
	if wanted != nil {
		ts = timespec(*wanted)
	}
	if t.o.Epoch == nil {
		return ts
	}
	if epoch := timespec(*t.o.Epoch); ts == nil || later(*ts, *epoch) {
		return epoch
	}
	return ts
}

func timespec(t time.Time) *unix.Timespec {
	return &unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
}

func later(a, b unix.Timespec) bool { return a.Sec > b.Sec || a.Sec == b.Sec && a.Nsec > b.Nsec }

// dress gives an open file, which is no link, its look. The order matters: a change of owner clears setuid bits and
// capabilities.
func (t *target) dress(f *os.File, l look) error {
	if l.own != nil {
		if err := layer.SetOwner(f, l.own.uid, l.own.gid, t.o.Single); err != nil {
			return err
		}
	}
	fd := int(f.Fd())
	file := fdPath(fd)
	if !l.keepMode {
		err := unix.Fchmod(fd, modeBits(l.mode))
		if errors.Is(err, unix.EBADF) { // opened with O_PATH
			err = unix.Chmod(file, modeBits(l.mode))
		}
		if err != nil {
			return err
		}
	}
	for _, x := range l.xattrs {
		if err := unix.Setxattr(file, x.name, []byte(x.value), 0); err != nil {
			return fmt.Errorf("set attribute %s: %w", x.name, err)
		}
	}
	if l.mtime == nil {
		return nil
	}
	return unix.UtimesNanoAt(fd, "", []unix.Timespec{*l.mtime, *l.mtime}, unix.AT_EMPTY_PATH)
}

// dressAt is dress for something that was just made.
func (t *target) dressAt(dir int, name string, l look) error {
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "")
	defer f.Close()
	return t.dress(f, l)
}

// mkdirAt makes a directory, which must not exist, and opens it.
func (t *target) mkdirAt(dir int, name string, l look) (int, error) {
	if err := unix.Mkdirat(dir, name, 0o700); err != nil {
		return -1, err
	}
	fd, err := openDirAt(dir, name)
	if err != nil {
		return -1, err
	}
	if err := t.dressFD(fd, l); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// dressFD is dress for a descriptor that the caller keeps.
func (t *target) dressFD(fd int, l look) error {
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(own), "")
	defer f.Close()
	return t.dress(f, l)
}

// symlinkAt makes a link, which must not exist.
func (t *target) symlinkAt(to string, dir int, name string, l look) error {
	if err := unix.Symlinkat(to, dir, name); err != nil {
		return err
	}
	if l.own != nil {
		fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		f := os.NewFile(uintptr(fd), "")
		defer f.Close()
		if err := layer.SetOwner(f, l.own.uid, l.own.gid, t.o.Single); err != nil {
			return err
		}
	}
	if l.mtime == nil {
		return nil
	}
	return unix.UtimesNanoAt(dir, name, []unix.Timespec{*l.mtime, *l.mtime}, unix.AT_SYMLINK_NOFOLLOW)
}

// createAt makes an empty file, which must not exist.
func createAt(dir int, name string) (*os.File, error) {
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// mkdirAll makes a directory and those above it, and tells which, outermost first. What exists stays as it is.
func (t *target) mkdirAll(p string, l look) (made []string, err error) {
	fd, err := unix.FcntlInt(uintptr(t.dir), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer func() { unix.Close(fd) }()
	var done string
	for _, c := range components(p) {
		done = path.Join(done, c)
		next, err := openDirAt(fd, c)
		if isNotExist(err) {
			next, err = t.mkdirAt(fd, c, l)
			made = append(made, done)
		}
		if errors.Is(err, unix.ELOOP) {
			err = unix.ENOTDIR
		}
		if err != nil {
			return nil, failed("make directory", done, err)
		}
		unix.Close(fd)
		fd = next
	}
	return made, nil
}

// restamp gives directories that mkdirAll made their modification time again, after things were made in them.
func (t *target) restamp(made []string, mtime *unix.Timespec) error {
	if mtime == nil {
		return nil
	}
	for _, p := range made {
		fd, err := t.openDir(p)
		if err != nil {
			return err
		}
		err = t.dressFD(fd, look{keepMode: true, mtime: mtime})
		unix.Close(fd)
		if err != nil {
			return failed("set the time of", p, err)
		}
	}
	return nil
}

// makeRoom makes room for something that is no directory. What is there goes, but a directory only if all is set.
func makeRoom(dir int, name string, all bool) error {
	st, err := lstatAt(dir, name)
	if isNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return unix.Unlinkat(dir, name, 0)
	}
	if !all {
		return unix.EISDIR
	}
	return removeAll(dir, name)
}

// removeAll removes name in dir with everything in it. Links are removed and never followed.
func removeAll(dir int, name string) error {
	err := unix.Unlinkat(dir, name, 0)
	if err == nil || isNotExist(err) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return err
	}
	fd, dirErr := openDirAt(dir, name)
	if dirErr != nil {
		return err
	}
	defer unix.Close(fd)
	names, err := readNames(fd)
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := removeAll(fd, n); err != nil {
			return err
		}
	}
	return unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
}
