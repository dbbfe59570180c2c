package rootemu

import (
	"encoding/binary"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/notify"

	"github.com/cooper-build/cooper/owner"
)

// chown answers calls that change an owner. The kernel is told to give the file to the one id there is: it checks
// what there is to check, copies the file up, and clears what a change of owner clears.
func (s *Supervisor) chown(r *request, f file, uid, gid uint32) notify.Answer {
	if special(f.name) {
		return notify.Pass
	}
	want := f.own
	if uid != keep {
		want.UID = uid
	}
	if gid != keep {
		want.GID = gid
	}
	if f.foreign() || !mayChown(&r.who, f.own, want) {
		return notify.Refuse(unix.EPERM)
	}
	if f.fd < 0 { // hold it, so that it stays this file
		fd, err := unix.Open(f.name, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return notify.Pass
		}
		defer unix.Close(fd)
		f.name = ourName(fd)
	}
	if !s.listener.Valid(r.Call) {
		return notify.Pass
	}
	zero := func(id uint32) int {
		if id == keep {
			return -1
		}
		return 0
	}
	err := unix.Chown(f.name, zero(uid), zero(gid))
	for err == unix.EINTR { // a copy of much that our own scheduler disturbed
		err = unix.Chown(f.name, zero(uid), zero(gid))
	}
	if err != nil {
		return notify.Refuse(err)
	}
	if err := owner.Record(f.name, f.st.Mode, want); err != nil && uint64(f.st.Dev) == s.rootDev {
		return notify.Refuse(err)
	}
	return notify.Answer{} // what is not in the tree, a tmpfs of an old kernel, need not keep its owner
}

func mayChown(who *creds, is, want owner.IDs) bool {
	switch {
	case who.privileged() || is == want && is.UID == who.user.files:
		return true
	case is.UID != who.user.files || want.UID != is.UID:
		return false
	}
	return who.in(want.GID)
}

func chownAt(flags uint64) handler { // chown, lchown
	return func(s *Supervisor, r *request) notify.Answer {
		f, err := s.subject(r, unix.AT_FDCWD, r.Args[0], flags)
		if err != nil {
			return notify.Pass
		}
		defer f.close()
		return s.chown(r, f, uint32(r.Args[1]), uint32(r.Args[2]))
	}
}

func fchown(s *Supervisor, r *request) notify.Answer {
	f, err := lookAt(theirFD(r, dirArg(r.Args[0])))
	if err != nil || opensNothing(r, dirArg(r.Args[0])) {
		return notify.Pass
	}
	return s.chown(r, f, uint32(r.Args[1]), uint32(r.Args[2]))
}

// opensNothing reports a descriptor that only names a file: the kernel lets fchown do nothing to it.
func opensNothing(r *request, fd int) bool {
	flags, err := descriptorFlags(r, fd)
	return err != nil || flags&unix.O_PATH != 0
}

func fchownat(s *Supervisor, r *request) notify.Answer {
	f, err := s.subject(r, dirArg(r.Args[0]), r.Args[1], r.Args[4])
	if err != nil {
		return notify.Pass
	}
	defer f.close()
	return s.chown(r, f, uint32(r.Args[2]), uint32(r.Args[3]))
}

// showStat answers calls that fill a struct stat. Where nothing is recorded the kernel's answer is the right one.
func showStat(r *request, f file, err error, address uint64) notify.Answer {
	if err != nil {
		return notify.Pass
	}
	defer f.close()
	if f.foreign() || f.own == (owner.IDs{}) {
		return notify.Pass
	}
	f.st.Uid, f.st.Gid = f.own.UID, f.own.GID
	bytes := unsafe.Slice((*byte)(unsafe.Pointer(&f.st)), unsafe.Sizeof(f.st))
	if err := poke(r, address, bytes); err != nil {
		return notify.Refuse(err)
	}
	return notify.Answer{}
}

func statAt(flags uint64) handler { // stat, lstat
	return func(s *Supervisor, r *request) notify.Answer {
		f, err := s.subject(r, unix.AT_FDCWD, r.Args[0], flags)
		return showStat(r, f, err, r.Args[1])
	}
}

func fstat(_ *Supervisor, r *request) notify.Answer {
	f, err := lookAt(theirFD(r, dirArg(r.Args[0])))
	return showStat(r, f, err, r.Args[1])
}

func fstatat(s *Supervisor, r *request) notify.Answer {
	f, err := s.subject(r, dirArg(r.Args[0]), r.Args[1], r.Args[3])
	return showStat(r, f, err, r.Args[2])
}

func statx(s *Supervisor, r *request) notify.Answer {
	f, err := s.subject(r, dirArg(r.Args[0]), r.Args[1], r.Args[2])
	if err != nil {
		return notify.Pass
	}
	defer f.close()
	if f.foreign() || f.own == (owner.IDs{}) {
		return notify.Pass
	}
	const sync = unix.AT_STATX_FORCE_SYNC | unix.AT_STATX_DONT_SYNC
	var x unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, f.name, int(r.Args[2]&sync), int(uint32(r.Args[3])), &x); err != nil {
		return notify.Pass
	}
	x.Uid, x.Gid = f.own.UID, f.own.GID
	bytes := unsafe.Slice((*byte)(unsafe.Pointer(&x)), unsafe.Sizeof(x))
	if err := poke(r, r.Args[4], bytes); err != nil {
		return notify.Refuse(err)
	}
	return notify.Answer{}
}

// special reports a file system whose files are the kernel's own.
func special(name string) bool {
	var st unix.Statfs_t
	if err := unix.Statfs(name, &st); err != nil {
		return true
	}
	switch int64(st.Type) {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.DEVPTS_SUPER_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC:
		return true
	}
	return false
}

const (
	mayRead  = 4
	mayWrite = 2
	maySeek  = 1 // search a directory, execute a file
)

// permits tells whether a file lets a user do something, by its mode.
func (f *file) permits(who *creds, want uint32) bool {
	if who.user.files == 0 {
		return true
	}
	bits := f.st.Mode
	switch {
	case f.own.UID == who.user.files:
		bits >>= 6
	case who.in(f.own.GID):
		bits >>= 3
	}
	if bits&want == want || special(f.name) {
		return true
	}
	const list = "system.posix_acl_access"
	_, err := unix.Getxattr(f.name, list, nil)
	return err == nil || owner.ReadACL(f.name, list, f.st.Mode) != nil // who made a list knows better
}

// reachable tells whether a user may search the directory and all above it.
func (s *Supervisor) reachable(who *creds, dir int) bool {
	if who.user.files == 0 {
		return true
	}
	fd, err := unix.Openat(dir, ".", unix.O_PATH|unix.O_CLOEXEC, 0)
	for depth := 0; err == nil && depth < 256; depth++ {
		f, lookErr := look(fd)
		if lookErr != nil {
			return true
		}
		atRoot := sameFile(fd, s.root)
		ok := f.permits(who, maySeek)
		if !atRoot && ok {
			fd, err = unix.Openat(f.fd, "..", unix.O_PATH|unix.O_CLOEXEC, 0)
		}
		f.close()
		if atRoot || !ok {
			return ok
		}
	}
	return true
}

// mayChange tells whether a user may make and rename things in a directory.
func (s *Supervisor) mayChange(who *creds, dir file) bool {
	return dir.permits(who, mayWrite|maySeek) && s.reachable(who, dir.fd)
}

// A pending file is one that the kernel is making and that will belong to somebody else. It gets its owner at the
// next call of anybody: before, nobody can have asked.
type pending struct {
	pid  int
	dir  int
	dev  uint64
	ino  uint64
	name string
	own  owner.IDs
}

// maxPending is reached only by calls that failed and whose process then ended or calls nothing.
const maxPending = 128

// settle gives pending files their owners. pid has made its file by now, or failed to; 0 means that everybody has.
func (s *Supervisor) settle(pid int) {
	if len(s.pending) == 0 {
		return
	}
	left := s.pending[:0]
	for _, p := range s.pending {
		if p.record() || p.pid == pid || pid == 0 {
			unix.Close(p.dir)
			continue
		}
		left = append(left, p)
	}
	s.pending = left
}

// record writes the owner if the file is there.
func (p *pending) record() bool {
	fd, err := unix.Openat(p.dir, p.name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	f, err := look(fd)
	if err != nil {
		return false
	}
	defer f.close()
	if !f.foreign() && f.own == (owner.IDs{}) {
		_ = owner.Record(f.name, f.st.Mode, p.own) // a file system without attributes is none of a layer
	}
	return true
}

// creates answers calls that make a file: the kernel makes it, and we remember whose it is.
func (s *Supervisor) creates(r *request, dir int, address uint64) notify.Answer {
	name, err := s.text(r, address)
	if err != nil {
		return notify.Pass
	}
	at, err := s.locate(r, dir, name, false)
	if err != nil {
		return notify.Pass
	}
	defer at.dir.close()
	return s.createsAt(r, at)
}

func (s *Supervisor) createsAt(r *request, at place) notify.Answer {
	if at.exists {
		return notify.Pass
	}
	if !s.mayChange(&r.who, at.dir) {
		return notify.Refuse(unix.EACCES)
	}
	s.forget(at)
	own := r.who.maker()
	if at.dir.st.Mode&unix.S_ISGID != 0 {
		own.GID = at.dir.own.GID
	}
	if own == (owner.IDs{}) || at.dir.foreign() && special(at.dir.name) {
		return notify.Pass
	}
	held, err := unix.FcntlInt(uintptr(at.dir.fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return notify.Pass
	}
	if len(s.pending) == maxPending {
		unix.Close(s.pending[0].dir)
		s.pending = s.pending[1:]
	}
	s.pending = append(s.pending, pending{r.pid, held, uint64(at.dir.st.Dev), at.dir.st.Ino, at.name, own})
	return notify.Pass
}

// forget drops what an earlier call failed to make at a place.
func (s *Supervisor) forget(at place) {
	for i, p := range s.pending {
		if p.name == at.name && p.ino == at.dir.st.Ino && p.dev == uint64(at.dir.st.Dev) {
			unix.Close(p.dir)
			s.pending = append(s.pending[:i], s.pending[i+1:]...)
			return
		}
	}
}

// makes is a call whose path is its argument number at, relative to its argument dir, or to the working directory.
func makes(dir, at int) handler {
	return func(s *Supervisor, r *request) notify.Answer {
		return s.creates(r, from(r, dir), r.Args[at])
	}
}

const cwd = -1 // instead of the number of a directory argument

// opens answers calls that open a file to write to it or to make it.
func (s *Supervisor) opens(r *request, dir int, address, flags uint64) notify.Answer {
	name, err := s.text(r, address)
	if err != nil {
		return notify.Pass
	}
	if flags&unix.O_CREAT != 0 && flags&unix.O_TMPFILE != unix.O_TMPFILE {
		at, err := s.locate(r, dir, name, flags&(unix.O_EXCL|unix.O_NOFOLLOW) == 0)
		if err != nil {
			return notify.Pass
		}
		defer at.dir.close()
		if !at.exists {
			return s.createsAt(r, at)
		}
	}
	if r.who.user.files == 0 || flags&unix.O_PATH != 0 {
		return notify.Pass
	}
	fd, err := s.open(r, dir, name, flags&unix.O_NOFOLLOW == 0)
	if err != nil {
		return notify.Pass
	}
	f, err := look(fd)
	if err != nil {
		return notify.Pass
	}
	defer f.close()
	want := uint32(0)
	switch flags & unix.O_ACCMODE {
	case unix.O_WRONLY:
		want = mayWrite
	case unix.O_RDWR:
		want = mayWrite | mayRead
	}
	if !f.permits(&r.who, want) {
		return notify.Refuse(unix.EACCES)
	}
	return notify.Pass
}

func openat(s *Supervisor, r *request) notify.Answer {
	return s.opens(r, dirArg(r.Args[0]), r.Args[1], r.Args[2])
}

func open(s *Supervisor, r *request) notify.Answer {
	return s.opens(r, unix.AT_FDCWD, r.Args[0], r.Args[1])
}

func creat(s *Supervisor, r *request) notify.Answer {
	return s.opens(r, unix.AT_FDCWD, r.Args[0], unix.O_CREAT|unix.O_WRONLY|unix.O_TRUNC)
}

func openHow(s *Supervisor, r *request) notify.Answer {
	var flags [8]byte // the first member of struct open_how
	if err := peek(r, r.Args[2], flags[:]); err != nil {
		return notify.Pass
	}
	how := binary.NativeEndian.Uint64(flags[:])
	if how&(unix.O_CREAT|unix.O_WRONLY|unix.O_RDWR) == 0 {
		return notify.Pass
	}
	return s.opens(r, dirArg(r.Args[0]), r.Args[1], how)
}

// bind makes a file when the address of a unix socket is a path.
func bind(s *Supervisor, r *request) notify.Answer {
	size := r.Args[2]
	if size < 3 || size > 2+108 {
		return notify.Pass
	}
	address := make([]byte, size)
	if err := peek(r, r.Args[1], address); err != nil || binary.NativeEndian.Uint16(address) != unix.AF_UNIX || address[2] == 0 {
		return notify.Pass
	}
	name, _, _ := strings.Cut(string(address[2:]), "\x00")
	at, err := s.locate(r, unix.AT_FDCWD, name, false)
	if err != nil {
		return notify.Pass
	}
	defer at.dir.close()
	return s.createsAt(r, at)
}

// refused asks whether a user may make or rename the name that a path ends with. A path that means nothing to us is the
// kernel's to judge.
func (s *Supervisor) refused(r *request, dir int, address uint64) bool {
	if r.who.user.files == 0 {
		return false
	}
	name, err := s.text(r, address)
	if err != nil {
		return false
	}
	at, err := s.locate(r, dir, name, false)
	if err != nil {
		return false
	}
	defer at.dir.close()
	return !s.mayChange(&r.who, at.dir)
}

// from is the directory that a path argument begins at.
func from(r *request, dir int) int {
	if dir == cwd {
		return unix.AT_FDCWD
	}
	return dirArg(r.Args[dir])
}

// renames only asks whether the user may. That it comes here at all gives pending files their owners in time.
func renames(oldDir, old, newDir, new int) handler {
	return func(s *Supervisor, r *request) notify.Answer {
		if s.refused(r, from(r, oldDir), r.Args[old]) || s.refused(r, from(r, newDir), r.Args[new]) {
			return notify.Refuse(unix.EACCES)
		}
		return notify.Pass
	}
}

func link(s *Supervisor, r *request) notify.Answer {
	if s.refused(r, unix.AT_FDCWD, r.Args[1]) {
		return notify.Refuse(unix.EACCES)
	}
	return notify.Pass
}

// linkat also gives a file that had no name until now (O_TMPFILE) to who made it.
func linkat(s *Supervisor, r *request) notify.Answer {
	if r.who.maker() == (owner.IDs{}) {
		return notify.Pass
	}
	if s.refused(r, dirArg(r.Args[2]), r.Args[3]) {
		return notify.Refuse(unix.EACCES)
	}
	flags := r.Args[4] & unix.AT_EMPTY_PATH
	if r.Args[4]&unix.AT_SYMLINK_FOLLOW == 0 {
		flags |= unix.AT_SYMLINK_NOFOLLOW
	}
	f, err := s.subject(r, dirArg(r.Args[0]), r.Args[1], flags)
	if err != nil {
		return notify.Pass
	}
	defer f.close()
	if f.st.Nlink == 0 && f.fd >= 0 && !f.foreign() && f.own == (owner.IDs{}) && s.listener.Valid(r.Call) {
		_ = owner.Record(f.name, f.st.Mode, r.who.maker()) // a file system without attributes is none of a layer
	}
	return notify.Pass
}

// accesses answers calls that ask what a user may do.
func (s *Supervisor) accesses(r *request, dir int, address, mode, flags uint64) notify.Answer {
	who := r.who
	if flags&unix.AT_EACCESS == 0 {
		who.user.files, who.group.files = who.user.real, who.group.real
	} else {
		who.user.files, who.group.files = who.user.effective, who.group.effective
	}
	if who.user.files == 0 {
		return notify.Pass
	}
	f, err := s.subject(r, dir, address, flags&(unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW))
	if err != nil {
		return notify.Pass
	}
	defer f.close()
	if !f.permits(&who, uint32(mode&7)) {
		return notify.Refuse(unix.EACCES)
	}
	if f.st.Mode&unix.S_IFMT == unix.S_IFDIR && f.fd >= 0 {
		above, err := unix.Openat(f.fd, "..", unix.O_PATH|unix.O_CLOEXEC, 0)
		if err == nil {
			defer unix.Close(above)
			if !s.reachable(&who, above) {
				return notify.Refuse(unix.EACCES)
			}
		}
		return notify.Pass
	}
	name, err := s.text(r, address)
	if err != nil || name == "" {
		return notify.Pass
	}
	parent, _, err := s.parent(r, dir, name)
	if err != nil {
		return notify.Pass
	}
	defer unix.Close(parent)
	if !s.reachable(&who, parent) {
		return notify.Refuse(unix.EACCES)
	}
	return notify.Pass
}

func access(s *Supervisor, r *request) notify.Answer {
	return s.accesses(r, unix.AT_FDCWD, r.Args[0], r.Args[1], 0)
}

func faccessat(s *Supervisor, r *request) notify.Answer {
	return s.accesses(r, dirArg(r.Args[0]), r.Args[1], r.Args[2], 0)
}

func faccessat2(s *Supervisor, r *request) notify.Answer {
	return s.accesses(r, dirArg(r.Args[0]), r.Args[1], r.Args[2], r.Args[3])
}

func descriptorFlags(r *request, fd int) (uint64, error) {
	text, err := readSmall(theirs(r, "fdinfo/"+strconv.Itoa(fd)))
	if err != nil {
		return 0, err
	}
	return octalField(text, "flags:")
}
