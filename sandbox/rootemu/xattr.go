package rootemu

import (
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/notify"

	"github.com/cooper-build/cooper/owner"
)

// What a call does with an attribute.
type xattrUse int

const (
	getting xattrUse = iota
	setting
	removing
)

// The records are nobody's business inside: programs that copy attributes would copy owners, and no other rung shows
// them.

// xattrs answers calls that name an attribute of a path.
func xattrs(use xattrUse, flags uint64) handler {
	return func(s *Supervisor, r *request) notify.Answer {
		return s.xattr(r, use, func() (file, error) { return s.subject(r, unix.AT_FDCWD, r.Args[0], flags) })
	}
}

// fxattrs answers those of a descriptor.
func fxattrs(use xattrUse) handler {
	return func(s *Supervisor, r *request) notify.Answer {
		return s.xattr(r, use, func() (file, error) { return lookAt(theirFD(r, dirArg(r.Args[0]))) })
	}
}

func (s *Supervisor) xattr(r *request, use xattrUse, find func() (file, error)) notify.Answer {
	name, err := s.text(r, r.Args[1])
	if err == nil && strings.HasPrefix(name, "system.posix_acl_") {
		f, err := find()
		if err != nil {
			return notify.Pass
		}
		defer f.close()
		return s.acl(r, use, name, f)
	}
	if _, ok := owner.ACLName(name); ok {
		name = owner.Xattr
	}
	if err != nil || name != owner.Xattr && name != owner.XattrOther {
		return notify.Pass
	}
	if name == owner.XattrOther {
		if use != getting && !r.who.privileged() {
			return notify.Refuse(unix.EPERM)
		}
		f, err := find()
		if err != nil {
			return notify.Pass
		}
		defer f.close()
		if kind := f.st.Mode & unix.S_IFMT; kind == unix.S_IFREG || kind == unix.S_IFDIR || f.foreign() {
			return notify.Pass
		}
	}
	if use == setting {
		return notify.Refuse(unix.EOPNOTSUPP)
	}
	return notify.Refuse(unix.ENODATA)
}

func listxattr(flags uint64) handler {
	return func(s *Supervisor, r *request) notify.Answer {
		f, err := s.subject(r, unix.AT_FDCWD, r.Args[0], flags)
		return listed(r, f, err)
	}
}

func flistxattr(_ *Supervisor, r *request) notify.Answer {
	f, err := lookAt(theirFD(r, dirArg(r.Args[0])))
	return listed(r, f, err)
}

// listed leaves the record out of a list.
func listed(r *request, f file, err error) notify.Answer {
	if err != nil {
		return notify.Pass
	}
	defer f.close()
	if f.foreign() {
		return notify.Pass
	}
	list := make([]byte, 64<<10)
	n, err := unix.Listxattr(f.name, list)
	if err != nil {
		return notify.Pass
	}
	kind := f.st.Mode & unix.S_IFMT
	plain := kind == unix.S_IFREG || kind == unix.S_IFDIR
	var shown strings.Builder
	records := 0
	for name := range strings.SplitSeq(string(list[:n]), "\x00") {
		acl, isACL := owner.ACLName(name)
		switch {
		case isACL:
			records++
			shown.WriteString(acl + "\x00")
		case name == owner.Xattr || name == owner.XattrOther && !plain:
			records++
		case name != "":
			shown.WriteString(name + "\x00")
		}
	}
	if records == 0 {
		return notify.Pass
	}
	switch room := r.Args[2]; {
	case room == 0:
	case room < uint64(shown.Len()):
		return notify.Refuse(unix.ERANGE)
	default:
		if err := poke(r, r.Args[1], []byte(shown.String())); err != nil {
			return notify.Refuse(err)
		}
	}
	return notify.Answer{Value: int64(shown.Len())}
}

// acl answers calls about an access list. One that the kernel cannot keep is recorded, and the file gets the mode that
// goes with it.
func (s *Supervisor) acl(r *request, use xattrUse, name string, f file) notify.Answer {
	record, ok := owner.ACLRecord(name)
	if !ok || f.foreign() || f.st.Mode&unix.S_IFMT == unix.S_IFLNK || special(f.name) {
		return notify.Pass
	}
	if use == getting {
		acl := owner.ReadACL(f.name, name, f.st.Mode)
		switch room := r.Args[3]; {
		case acl == nil:
			return notify.Pass
		case room == 0:
		case room < uint64(len(acl)):
			return notify.Refuse(unix.ERANGE)
		default:
			if err := poke(r, r.Args[2], acl); err != nil {
				return notify.Refuse(err)
			}
		}
		return notify.Answer{Value: int64(len(acl))}
	}
	if f.own.UID != r.who.user.files && !r.who.privileged() {
		return notify.Refuse(unix.EPERM)
	}
	if f.fd < 0 {
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
	var acl []byte
	if size := r.Args[3]; use == setting && size <= 64<<10 {
		acl = make([]byte, size)
		if err := peek(r, r.Args[2], acl); err != nil {
			return notify.Refuse(err)
		}
	}
	if !owner.NamesOthers(acl) {
		if err := unix.Removexattr(f.name, record); err == nil && use == removing {
			return notify.Answer{}
		}
		return notify.Pass
	}
	if err := unix.Setxattr(f.name, record, acl, 0); err != nil {
		return notify.Refuse(err)
	}
	if err := unix.Removexattr(f.name, name); err != nil && err != unix.ENODATA {
		return notify.Refuse(err)
	}
	if strings.HasSuffix(name, "default") {
		return notify.Answer{}
	}
	return failureOrNone(unix.Chmod(f.name, owner.ACLMode(acl, f.st.Mode&0o7777)))
}

func failureOrNone(err error) notify.Answer {
	if err != nil {
		return notify.Refuse(err)
	}
	return notify.Answer{}
}
