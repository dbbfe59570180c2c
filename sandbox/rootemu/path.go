package rootemu

import (
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/owner"
)

// A file is one that a process named. name is a path of ours that leads to exactly this file.
type file struct {
	name string
	fd   int // -1 when name is a descriptor of the process
	st   unix.Stat_t
	own  owner.IDs
}

func (f *file) close() {
	if f.fd >= 0 {
		unix.Close(f.fd)
	}
}

// foreign reports that the file belongs to none of the ids here: nobody inside can have changed that.
func (f *file) foreign() bool { return f.st.Uid != 0 }

func ourName(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

func theirs(r *request, name string) string { return "/proc/" + strconv.Itoa(r.pid) + "/" + name }

func theirFD(r *request, fd int) string { return theirs(r, "fd/"+strconv.Itoa(fd)) }

// look describes an open file; fd is closed with it, or at once after an error.
func look(fd int) (file, error) {
	f := file{name: ourName(fd), fd: fd}
	if err := unix.Fstat(fd, &f.st); err != nil {
		unix.Close(fd)
		return f, err
	}
	return f, f.readOwner()
}

// lookAt describes what a name of ours leads to.
func lookAt(name string) (file, error) {
	f := file{name: name, fd: -1}
	if err := unix.Stat(name, &f.st); err != nil {
		return f, err
	}
	return f, f.readOwner()
}

func (f *file) readOwner() (err error) {
	f.own = owner.IDs{UID: f.st.Uid, GID: f.st.Gid}
	if !f.foreign() {
		f.own, err = owner.Read(f.name, f.st.Mode)
	}
	if err != nil {
		f.close()
	}
	return err
}

// subject describes what a call with a directory, a path and flags is about.
func (s *Supervisor) subject(r *request, dir int, address uint64, flags uint64) (file, error) {
	name := ""
	if flags&unix.AT_EMPTY_PATH == 0 || address != 0 {
		var err error
		if name, err = s.text(r, address); err != nil {
			return file{}, err
		}
	}
	if name == "" {
		switch {
		case flags&unix.AT_EMPTY_PATH == 0:
			return file{}, unix.ENOENT
		case dir == unix.AT_FDCWD:
			return lookAt(theirs(r, "cwd"))
		}
		return lookAt(theirFD(r, dir))
	}
	fd, err := s.open(r, dir, name, flags&unix.AT_SYMLINK_NOFOLLOW == 0)
	if err != nil {
		return file{}, err
	}
	return look(fd)
}

// dirArg is a directory argument: the kernel looks at 32 bits of it.
func dirArg(v uint64) int { return int(int32(v)) }

// base opens the directory that a path begins at.
func (s *Supervisor) base(r *request, dir int, name string) (int, error) {
	const flags = unix.O_PATH | unix.O_CLOEXEC
	switch {
	case strings.HasPrefix(name, "/") && !r.who.moved:
		return unix.FcntlInt(uintptr(s.root), unix.F_DUPFD_CLOEXEC, 3)
	case strings.HasPrefix(name, "/"):
		return unix.Open(theirs(r, "root"), flags, 0)
	case dir == unix.AT_FDCWD:
		return unix.Open(theirs(r, "cwd"), flags, 0)
	}
	return unix.Open(theirFD(r, dir), flags, 0)
}

const resolve = unix.RESOLVE_NO_MAGICLINKS

// open opens, with O_PATH, what a path means to the process.
func (s *Supervisor) open(r *request, dir int, name string, follow bool) (int, error) {
	if n, ok := ownDescriptor(name); ok && follow {
		return unix.Open(theirFD(r, n), unix.O_PATH|unix.O_CLOEXEC, 0)
	}
	flags := uint64(unix.O_PATH | unix.O_CLOEXEC)
	if !follow {
		flags |= unix.O_NOFOLLOW
	}
	if strings.HasPrefix(name, "/") && !r.who.moved {
		return openat2(s.root, name, flags, resolve|unix.RESOLVE_IN_ROOT)
	}
	base, err := s.base(r, dir, name)
	if err != nil {
		return -1, err
	}
	defer unix.Close(base)
	if strings.HasPrefix(name, "/") {
		return openat2(base, name, flags, resolve|unix.RESOLVE_IN_ROOT)
	}
	fd, err := openat2(base, name, flags, resolve|unix.RESOLVE_BENEATH)
	if err == unix.EXDEV { // it leaves the directory, by ".." or an absolute link
		fd, err = s.walk(r, base, name, follow)
	}
	return fd, err
}

// ownDescriptor recognises the names by which a process finds its own descriptors. To us they lead elsewhere.
func ownDescriptor(name string) (int, bool) {
	for _, prefix := range []string{"/proc/self/fd/", "/dev/fd/", "/proc/thread-self/fd/"} {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			n, err := strconv.ParseUint(rest, 10, 31)
			return int(n), err == nil
		}
	}
	return 0, false
}

// openat2 tries again when something was renamed meanwhile, but not for ever.
func openat2(dir int, name string, flags, resolve uint64) (int, error) {
	how := unix.OpenHow{Flags: flags, Resolve: resolve}
	var err error
	for range 64 {
		var fd int
		if fd, err = unix.Openat2(dir, name, &how); err != unix.EAGAIN && err != unix.EINTR {
			return fd, err
		}
	}
	return -1, err
}

const maxLinks = 40 // in one path, as in the kernel

// walk resolves a path name by name. ".." ends at the root of the process: below it by comparison, and the root of a
// mount namespace has nothing above.
func (s *Supervisor) walk(r *request, base int, name string, follow bool) (int, error) {
	const flags = unix.O_PATH | unix.O_CLOEXEC | unix.O_NOFOLLOW
	root, err := s.base(r, unix.AT_FDCWD, "/")
	if err != nil {
		return -1, err
	}
	defer unix.Close(root)
	here, err := unix.FcntlInt(uintptr(base), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return -1, err
	}
	for rest, links := strings.Split(name, "/"), 0; len(rest) > 0; {
		part := rest[0]
		rest = rest[1:]
		if part == "" || part == "." || part == ".." && sameFile(here, root) {
			continue
		}
		next, err := unix.Openat(here, part, flags, 0)
		if err != nil {
			unix.Close(here)
			return -1, err
		}
		target, isLink := "", false
		if follow || len(rest) > 0 {
			target, isLink = readLink(next)
		}
		if !isLink {
			unix.Close(here)
			here = next
			continue
		}
		unix.Close(next)
		if links++; links > maxLinks {
			unix.Close(here)
			return -1, unix.ELOOP
		}
		if strings.HasPrefix(target, "/") {
			if err := unix.Dup3(root, here, unix.O_CLOEXEC); err != nil {
				unix.Close(here)
				return -1, err
			}
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return here, nil
}

func sameFile(a, b int) bool {
	var x, y unix.Stat_t
	return unix.Fstat(a, &x) == nil && unix.Fstat(b, &y) == nil && x.Dev == y.Dev && x.Ino == y.Ino
}

func readLink(fd int) (string, bool) {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFLNK {
		return "", false
	}
	var b [unix.PathMax]byte
	n, err := unix.Readlinkat(fd, "", b[:])
	return string(b[:max(n, 0)]), err == nil
}

// A place is a name in a directory, where something may be.
type place struct {
	dir    file
	name   string
	exists bool
}

// locate finds the place that a call makes something at. With follow a link there counts as where it leads.
func (s *Supervisor) locate(r *request, dir int, name string, follow bool) (place, error) {
	parent, name, err := s.parent(r, dir, name)
	if err != nil {
		return place{}, err
	}
	for links := 0; ; links++ {
		var st unix.Stat_t
		err := unix.Fstatat(parent, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err != nil && err != unix.ENOENT {
			unix.Close(parent)
			return place{}, err
		}
		if err != nil || !follow || st.Mode&unix.S_IFMT != unix.S_IFLNK {
			f, lookErr := look(parent)
			return place{dir: f, name: name, exists: err == nil}, lookErr
		}
		if links == maxLinks {
			unix.Close(parent)
			return place{}, unix.ELOOP
		}
		next, base, err := s.through(r, parent, name)
		unix.Close(parent)
		if err != nil {
			return place{}, err
		}
		parent, name = next, base
	}
}

// through opens the directory that the link name in dir leads into.
func (s *Supervisor) through(r *request, dir int, name string) (int, string, error) {
	var b [unix.PathMax]byte
	n, err := unix.Readlinkat(dir, name, b[:])
	if err != nil {
		return -1, "", err
	}
	target := string(b[:n])
	if strings.HasPrefix(target, "/") {
		return s.parent(r, unix.AT_FDCWD, target)
	}
	above, base, err := splitPath(target)
	if err != nil {
		return -1, "", err
	}
	fd, err := s.walk(r, dir, above, true)
	return fd, base, err
}

// parent opens the directory that a path's last name is in.
func (s *Supervisor) parent(r *request, dir int, name string) (int, string, error) {
	above, base, err := splitPath(name)
	if err != nil {
		return -1, "", err
	}
	if above == "" {
		fd, err := s.base(r, dir, above)
		return fd, base, err
	}
	fd, err := s.open(r, dir, above, true)
	return fd, base, err
}

// splitPath cuts the last name off. There is none in "", "/", "." and "..".
func splitPath(name string) (above, base string, err error) {
	above, base = path.Split(strings.TrimRight(name, "/"))
	if base == "" || base == "." || base == ".." {
		return "", "", unix.ENOENT
	}
	return above, base, nil
}
