package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// rootfs is a root directory that is being dressed for a run: mounts are laid
// over it in our own mount namespace, which the container then copies, and
// mount points that did not exist are made and remembered.
//
// Nothing in it is trusted: symbolic links are resolved by rootfs itself, from
// descriptor to descriptor, so that neither an absolute link nor one with many
// ".." leads out, and no path is walked twice (CVE-2024-23652, -45310).
type rootfs struct {
	dir    int // the root directory, O_PATH
	mounts []int
	stubs  []stub
}

// stub is a mount point that restore removes again.
type stub struct {
	parent int // O_PATH, so that it is found wherever the process moved it
	name   string
	dir    bool
	ino    uint64
	dev    uint64
}

func openRootfs(root string) (*rootfs, error) {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open root directory", Path: root, Err: err}
	}
	return &rootfs{dir: fd}, nil
}

// restore undoes everything: afterwards the root holds what the process left in
// it, with the times it left. It goes on after an error.
func (r *rootfs) restore() error {
	var errs []error
	for _, fd := range slices.Backward(r.mounts) {
		err := unix.Unmount("/proc/self/fd/"+strconv.Itoa(fd), unix.MNT_DETACH)
		errs = append(errs, os.NewSyscallError("umount2", err))
		unix.Close(fd)
	}
	for _, s := range slices.Backward(r.stubs) {
		if err := s.remove(); err != nil {
			errs = append(errs, fmt.Errorf("remove mount point %s: %w", s.name, err))
		}
		unix.Close(s.parent)
	}
	unix.Close(r.dir)
	return errors.Join(errs...)
}

// remove takes the mount point away unless the process made something of it:
// put another file in its place or something into the directory.
func (s stub) remove() error {
	var st unix.Stat_t
	err := unix.Fstatat(s.parent, s.name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Ino != s.ino || st.Dev != s.dev || (!s.dir && st.Size != 0) {
		return nil
	}
	return keepTimes(s.parent, func() error {
		flags := 0
		if s.dir {
			flags = unix.AT_REMOVEDIR
		}
		err := unix.Unlinkat(s.parent, s.name, flags)
		if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	})
}

// keepTimes sets the modification time of dir back after change. Since that is
// done when a mount point is made and again when it goes, a time that the
// process itself set in between stays.
func keepTimes(dir int, change func() error) error {
	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil {
		return err
	}
	if err := change(); err != nil {
		return err
	}
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, st.Mtim}
	return unix.UtimesNanoAt(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(dir), times, 0)
}

// system opens one of the directories whose content is ours, /proc, /dev and /sys, and makes sure that it is a plain one to mount
// on. A link in its place has been the way out of other runtimes (CVE-2019-19921, CVE-2026-41579).
func (r *rootfs) system(name string) (int, error) {
	fd, err := unix.Openat(r.dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		fd, err = r.make(r.dir, name, true)
	}
	if err != nil {
		return -1, fmt.Errorf("/%s: %w", name, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		unix.Close(fd)
		return -1, &hinted{
			error: fmt.Errorf("/%s is not a directory in this image, and the sandbox will not follow it", name),
			hint:  "a base image with a link or file in place of /" + name + " is broken or hostile; use another one",
		}
	}
	return fd, nil
}

// mount lays one mount over its target.
func (r *rootfs) mount(m Mount) error {
	tree, isDir, err := m.open()
	if err != nil {
		return err
	}
	target, err := r.locate(m.Target, isDir)
	if err != nil {
		unix.Close(tree)
		return err
	}
	defer unix.Close(target)
	return r.lay(tree, target)
}

// open returns the mount, not yet attached to anything, and whether it is a
// directory.
func (m Mount) open() (fd int, isDir bool, err error) {
	if m.Kind == Tmpfs {
		fd, err = m.openTmpfs()
	} else {
		fd, err = m.openBind()
	}
	if err != nil {
		return -1, false, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, false, err
	}
	return fd, st.Mode&unix.S_IFMT == unix.S_IFDIR, nil
}

func (m Mount) openBind() (int, error) {
	source, err := unix.Open(m.Source, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: m.Source, Err: err}
	}
	defer unix.Close(source)
	if inside := strings.Trim(m.Select, "/"); inside != "" {
		selected, err := openInRoot(source, inside)
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: m.Select, Err: err}
		}
		defer unix.Close(selected)
		source = selected
	}
	// recursive, because the kernel does not show in a user namespace what a
	// mount of the namespace above covers
	const clone = unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_RECURSIVE | unix.AT_EMPTY_PATH
	tree, err := unix.OpenTree(source, "", clone)
	if err != nil {
		return -1, os.NewSyscallError("open_tree", err)
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV}
	if m.ReadOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
		unix.Close(tree)
		return -1, os.NewSyscallError("mount_setattr", err)
	}
	return tree, nil
}

// openInRoot opens a path beneath dir. The kernel gives up with EAGAIN when
// something is renamed meanwhile, which an attacker can do all day.
func openInRoot(dir int, name string) (int, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	for range 128 {
		fd, err := unix.Openat2(dir, name, &how)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
	return -1, unix.EAGAIN
}

func (m Mount) openTmpfs() (int, error) {
	mode := uint64(m.Mode.Perm())
	if m.Mode == 0 {
		mode = 0o1777
	} else if m.Mode&os.ModeSticky != 0 {
		mode |= 0o1000
	}
	options := [][2]string{{"mode", strconv.FormatUint(mode, 8)}}
	if m.Size > 0 {
		options = append(options, [2]string{"size", strconv.FormatInt(m.Size, 10)})
	}
	attributes := unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV
	if m.ReadOnly {
		attributes |= unix.MOUNT_ATTR_RDONLY
	}
	return newFileSystem("tmpfs", options, attributes)
}

// newFileSystem returns the mount of a new file system, not yet attached to anything.
func newFileSystem(kind string, options [][2]string, attributes int) (int, error) {
	config, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, os.NewSyscallError("fsopen "+kind, err)
	}
	defer unix.Close(config)
	for _, o := range slices.Concat([][2]string{{"source", kind}}, options) {
		if err := unix.FsconfigSetString(config, o[0], o[1]); err != nil {
			return -1, fmt.Errorf("%s option %s=%s: %w", kind, o[0], o[1], err)
		}
	}
	if err := unix.FsconfigCreate(config); err != nil {
		return -1, os.NewSyscallError("fsconfig "+kind, err)
	}
	fd, err := unix.Fsmount(config, unix.FSMOUNT_CLOEXEC, attributes)
	if err != nil {
		return -1, os.NewSyscallError("fsmount "+kind, err)
	}
	return fd, nil
}

// workDir makes the working directory where it is missing, and refuses one that would be reached through /proc,
// /dev or /sys: /proc/self/fd/7 is a door, not a directory (CVE-2024-21626).
func (r *rootfs) workDir(dir string) error {
	fd, err := r.walk(dir, func(parent int, name string, _ bool) (int, error) { return makeAndOpen(parent, name, true) })
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return unix.ENOTDIR
	}
	return nil
}

// locate returns the mount point for target, making what is missing.
func (r *rootfs) locate(target string, isDir bool) (int, error) {
	fd, err := r.walk(target, func(parent int, name string, last bool) (int, error) {
		return r.make(parent, name, isDir || !last)
	})
	if err != nil {
		return -1, err
	}
	var st, root unix.Stat_t
	if err := errors.Join(unix.Fstat(fd, &st), unix.Fstat(r.dir, &root)); err != nil {
		unix.Close(fd)
		return -1, err
	}
	if st.Dev == root.Dev && st.Ino == root.Ino {
		unix.Close(fd)
		return -1, errors.New("it is the root directory")
	}
	if got := st.Mode&unix.S_IFMT == unix.S_IFDIR; got != isDir {
		unix.Close(fd)
		return -1, fmt.Errorf("the image has a %s in its place", map[bool]string{true: "directory", false: "file"}[got])
	}
	return fd, nil
}

// maxLinks is how many symbolic links a path may lead through, as in the kernel.
const maxLinks = 40

// walk opens target beneath the root, O_PATH. Links are followed as they are for
// a process whose root this is. missing is called for each component that does
// not exist; without it that is ENOENT. The root itself and everything in the
// directories whose content is ours is refused.
func (r *rootfs) walk(target string, missing func(parent int, name string, last bool) (int, error)) (int, error) {
	var stack []int // from below the root; its top is where we are
	defer func() {
		for _, fd := range stack {
			unix.Close(fd)
		}
	}()
	links := 0
	rest := components(target)
	for len(rest) > 0 {
		name := rest[0]
		rest = rest[1:]
		here := r.dir
		if len(stack) > 0 {
			here = stack[len(stack)-1]
		}
		if name == ".." {
			if len(stack) > 0 {
				unix.Close(here)
				stack = stack[:len(stack)-1]
			}
			continue
		}
		if len(stack) == 0 && (name == "proc" || name == "dev" || name == "sys") {
			return -1, fmt.Errorf("it leads into /%s, which is the sandbox's own", name)
		}
		fd, err := unix.Openat(here, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) && missing != nil {
			fd, err = missing(here, name, len(rest) == 0)
		}
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: name, Err: err}
		}
		link, isLink, err := readLink(fd)
		if err != nil {
			unix.Close(fd)
			return -1, err
		}
		if !isLink {
			stack = append(stack, fd)
			continue
		}
		unix.Close(fd)
		if links++; links > maxLinks {
			return -1, unix.ELOOP
		}
		if path.IsAbs(link) {
			for _, fd := range stack {
				unix.Close(fd)
			}
			stack = nil
		}
		rest = append(components(link), rest...)
	}
	if len(stack) == 0 {
		return unix.FcntlInt(uintptr(r.dir), unix.F_DUPFD_CLOEXEC, 3)
	}
	fd := stack[len(stack)-1]
	stack = stack[:len(stack)-1]
	return fd, nil
}

func components(name string) []string {
	return slices.DeleteFunc(strings.Split(name, "/"), func(c string) bool { return c == "" || c == "." })
}

// readLink returns the target of the symbolic link that fd is, if it is one.
func readLink(fd int) (target string, isLink bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", false, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		return "", false, nil
	}
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", b)
	if err != nil {
		return "", false, os.NewSyscallError("readlinkat", err)
	}
	return string(b[:n]), true, nil
}

// make makes a mount point, remembers it and opens it. The parent's times stay.
func (r *rootfs) make(parent int, name string, isDir bool) (fd int, err error) {
	err = keepTimes(parent, func() error {
		fd, err = makeAndOpen(parent, name, isDir)
		return err
	})
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return -1, err
	}
	held, err := unix.FcntlInt(uintptr(parent), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return -1, err
	}
	r.stubs = append(r.stubs, stub{parent: held, name: name, dir: isDir, ino: st.Ino, dev: st.Dev})
	return fd, nil
}

// makeAndOpen never opens what it did not make. The mode is set by hand, as our
// umask is not the image's.
func makeAndOpen(parent int, name string, isDir bool) (int, error) {
	if !isDir {
		fd, err := unix.Openat(parent, name, unix.O_RDONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return -1, err
		}
		return fd, unix.Fchmod(fd, 0o644)
	}
	if err := unix.Mkdirat(parent, name, 0o755); err != nil {
		return -1, err
	}
	fd, err := unix.Openat(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return fd, unix.Fchmod(fd, 0o755)
}
