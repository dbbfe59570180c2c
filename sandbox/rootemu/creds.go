package rootemu

import (
	"encoding/binary"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/notify"

	"github.com/cooper-build/cooper/owner"
)

// four are the ids of one kind that a process has.
type four struct{ real, effective, saved, files uint32 }

// creds are who a process believes to be.
type creds struct {
	user, group four
	groups      string // supplementary, as getgroups gives them
	moved       bool   // it may have called chroot
	keeps, kept bool   // PR_SET_KEEPCAPS is on; it was when the last id of root went
}

func newCreds(uid, gid uint32, groups []uint32) creds {
	var list []byte
	for _, g := range groups {
		list = binary.NativeEndian.AppendUint32(list, g)
	}
	return creds{user: four{uid, uid, uid, uid}, group: four{gid, gid, gid, gid}, groups: string(sortedGroups(list))}
}

// privileged reports whether it has the capabilities that root has here.
func (c *creds) privileged() bool { return c.user.effective == 0 }

// maySwitch reports whether the process may take any id. Who kept the capabilities of root may, until it gives them up: that it
// does in the kernel.
func maySwitch(r *request, capability int) bool {
	if r.who.privileged() || !r.who.kept {
		return r.who.privileged()
	}
	text, err := readSmall(theirs(r, "status"))
	if err != nil {
		return false
	}
	value, err := field(text, "CapEff:")
	if err != nil {
		return false
	}
	set, err := strconv.ParseUint(value, 16, 64)
	return err == nil && set&(1<<capability) != 0
}

// in reports whether a file of this group is one of the process's own group.
func (c *creds) in(gid uint32) bool {
	if gid == c.group.files {
		return true
	}
	list := []byte(c.groups)
	for ; len(list) >= 4; list = list[4:] {
		if binary.NativeEndian.Uint32(list) == gid {
			return true
		}
	}
	return false
}

// A process carries its credentials in its soft limit RLIMIT_LOCKS, which Linux has not looked at since version 2.4,
// as an index into the table. So the kernel itself hands them on at fork and keeps them through exec, there is nothing
// to be cleaned up, and no process can be too quick for us. Its hard limit stays. The process never sees it: calls that
// name this limit are answered here.
const (
	markLimit = unix.RLIMIT_LOCKS
	markBase  = 1 << 40
)

func readMark(pid int) (index int, marked bool) {
	var l unix.Rlimit
	if err := unix.Prlimit(pid, markLimit, nil, &l); err != nil || l.Cur < markBase || l.Cur >= markBase+maxCreds {
		return 0, false
	}
	return int(l.Cur - markBase), true
}

func writeMark(pid, index int) unix.Errno {
	var l unix.Rlimit
	err := unix.Prlimit(pid, markLimit, nil, &l)
	if err == nil {
		l.Cur = markBase + uint64(index)
		err = unix.Prlimit(pid, markLimit, &l, nil)
	}
	errno, _ := err.(unix.Errno)
	return errno
}

// table holds every set of credentials that was ever needed. Its bounds keep a command that invents them from
// filling our memory.
type table struct {
	list  []creds
	index map[creds]int
	bytes int
}

const (
	maxCreds  = 1 << 14
	maxGroups = 1 << 16 // of one process, as in the kernel
	maxBytes  = 64 << 20
)

func (t *table) get(index int, otherwise creds) creds {
	if index < len(t.list) {
		return t.list[index]
	}
	return otherwise
}

func (t *table) put(c creds) (index int, ok bool) {
	if i, known := t.index[c]; known {
		return i, true
	}
	if len(t.list) == maxCreds || t.bytes+len(c.groups) > maxBytes {
		return 0, false
	}
	if t.index == nil {
		t.index = map[creds]int{}
	}
	t.list = append(t.list, c)
	t.bytes += len(c.groups)
	t.index[c] = len(t.list) - 1
	return len(t.list) - 1, true
}

// become gives the process credentials.
func (s *Supervisor) become(r *request, c creds) unix.Errno {
	index, ok := s.ids.put(c)
	if !ok {
		return unix.EAGAIN
	}
	if !s.listener.Valid(r.Call) {
		return unix.ESRCH
	}
	return writeMark(r.pid, index)
}

func (s *Supervisor) changed(r *request, c creds) notify.Answer {
	if c == r.who {
		return notify.Answer{}
	}
	return notify.Answer{Errno: s.become(r, c)}
}

const keep = ^uint32(0) // -1: leave this id as it is

// The rules for changing ids are those of credentials(7), the same for users and groups but for who is privileged:
// that is decided by the user alone.

func (f four) has(id uint32) bool { return id == f.real || id == f.effective || id == f.saved }

// set is setuid and setgid.
func (f four) set(id uint32, privileged bool) (four, unix.Errno) {
	switch {
	case id == keep:
		return f, unix.EINVAL
	case privileged:
		return four{id, id, id, id}, 0
	case id == f.real || id == f.saved:
		f.effective, f.files = id, id
		return f, 0
	}
	return f, unix.EPERM
}

// setTwo is setreuid and setregid.
func (f four) setTwo(re, ef uint32, privileged bool) (four, unix.Errno) {
	n := f
	if re != keep {
		if re != f.real && re != f.effective && !privileged {
			return f, unix.EPERM
		}
		n.real = re
	}
	if ef != keep {
		if !f.has(ef) && !privileged {
			return f, unix.EPERM
		}
		n.effective = ef
	}
	if re != keep || ef != keep && ef != f.real {
		n.saved = n.effective
	}
	n.files = n.effective
	return n, 0
}

// setThree is setresuid and setresgid.
func (f four) setThree(re, ef, sa uint32, privileged bool) (four, unix.Errno) {
	for _, id := range []uint32{re, ef, sa} {
		if id != keep && !f.has(id) && !privileged {
			return f, unix.EPERM
		}
	}
	for _, c := range []struct {
		to *uint32
		id uint32
	}{{&f.real, re}, {&f.effective, ef}, {&f.saved, sa}} {
		if c.id != keep {
			*c.to = c.id
		}
	}
	f.files = f.effective
	return f, 0
}

// setFiles is setfsuid and setfsgid, which tell nobody whether they did anything.
func (f four) setFiles(id uint32, privileged bool) four {
	if id != keep && (f.has(id) || id == f.files || privileged) {
		f.files = id
	}
	return f
}

// pick says whether a call is about the user or the group.
type pick struct {
	of         func(*creds) *four
	capability int // that lets a process take any
}

func user() pick  { return pick{func(c *creds) *four { return &c.user }, unix.CAP_SETUID} }
func group() pick { return pick{func(c *creds) *four { return &c.group }, unix.CAP_SETGID} }

func setter(which pick, change func(f four, a [3]uint32, privileged bool) (four, unix.Errno)) handler {
	return func(s *Supervisor, r *request) notify.Answer {
		a := [3]uint32{uint32(r.Args[0]), uint32(r.Args[1]), uint32(r.Args[2])}
		c := r.who
		changed, errno := change(*which.of(&c), a, maySwitch(r, which.capability))
		if errno != 0 {
			return notify.Refuse(errno)
		}
		*which.of(&c) = changed
		if r.who.user.has(0) && !c.user.has(0) {
			c.kept = c.keeps
		}
		return s.changed(r, c)
	}
}

func setID(which pick) handler {
	return setter(which, func(f four, a [3]uint32, p bool) (four, unix.Errno) { return f.set(a[0], p) })
}

func setReID(which pick) handler {
	return setter(which, func(f four, a [3]uint32, p bool) (four, unix.Errno) { return f.setTwo(a[0], a[1], p) })
}

func setResID(which pick) handler {
	return setter(which, func(f four, a [3]uint32, p bool) (four, unix.Errno) { return f.setThree(a[0], a[1], a[2], p) })
}

func setFSID(which pick) handler {
	return func(s *Supervisor, r *request) notify.Answer {
		c := r.who
		before := which.of(&c).files
		*which.of(&c) = which.of(&c).setFiles(uint32(r.Args[0]), maySwitch(r, which.capability))
		s.changed(r, c)
		return notify.Answer{Value: int64(before)}
	}
}

func getReal(which pick) handler {
	return func(_ *Supervisor, r *request) notify.Answer {
		return notify.Answer{Value: int64(which.of(&r.who).real)}
	}
}

func getEffective(which pick) handler {
	return func(_ *Supervisor, r *request) notify.Answer {
		return notify.Answer{Value: int64(which.of(&r.who).effective)}
	}
}

func getThree(which pick) handler {
	return func(_ *Supervisor, r *request) notify.Answer {
		f := which.of(&r.who)
		for i, id := range []uint32{f.real, f.effective, f.saved} {
			if err := poke(r, r.Args[i], binary.NativeEndian.AppendUint32(nil, id)); err != nil {
				return notify.Refuse(err)
			}
		}
		return notify.Answer{}
	}
}

func getgroups(_ *Supervisor, r *request) notify.Answer {
	room, have := int(int32(r.Args[0])), len(r.who.groups)/4
	switch {
	case room < 0 || room > 0 && room < have:
		return notify.Refuse(unix.EINVAL)
	case room > 0:
		if err := poke(r, r.Args[1], []byte(r.who.groups)); err != nil {
			return notify.Refuse(err)
		}
	}
	return notify.Answer{Value: int64(have)}
}

// keepCaps notes what the kernel does not: for it, the process never ceases to be root.
func keepCaps(s *Supervisor, r *request) notify.Answer {
	c := r.who
	c.keeps = r.Args[1] == 1
	if errno := s.become(r, c); errno != 0 {
		return notify.Refuse(errno)
	}
	return notify.Pass
}

func setgroups(s *Supervisor, r *request) notify.Answer {
	if !maySwitch(r, unix.CAP_SETGID) {
		return notify.Refuse(unix.EPERM)
	}
	n := int(int32(r.Args[0]))
	if n < 0 || n > maxGroups {
		return notify.Refuse(unix.EINVAL)
	}
	list := make([]byte, 4*n)
	if err := peek(r, r.Args[1], list); err != nil {
		return notify.Refuse(err)
	}
	c := r.who
	c.groups = string(sortedGroups(list))
	return s.changed(r, c)
}

// sortedGroups sorts as the kernel does.
func sortedGroups(list []byte) []byte {
	ids := make([]uint32, 0, len(list)/4)
	for ; len(list) >= 4; list = list[4:] {
		ids = append(ids, binary.NativeEndian.Uint32(list))
	}
	slices.Sort(ids)
	var sorted []byte
	for _, id := range ids {
		sorted = binary.NativeEndian.AppendUint32(sorted, id)
	}
	return sorted
}

// limit answers for the limit that holds the mark: it is infinite, and setting it changes nothing.
func limit(old int) handler {
	return func(_ *Supervisor, r *request) notify.Answer {
		if old >= 0 && r.Args[old] != 0 {
			infinite := binary.NativeEndian.AppendUint64(binary.NativeEndian.AppendUint64(nil, unix.RLIM_INFINITY), unix.RLIM_INFINITY)
			if err := poke(r, r.Args[old], infinite); err != nil {
				return notify.Refuse(err)
			}
		}
		return notify.Answer{}
	}
}

func chroot(s *Supervisor, r *request) notify.Answer {
	if !r.who.privileged() {
		return notify.Refuse(unix.EPERM)
	}
	c := r.who
	c.moved = true
	if errno := s.become(r, c); errno != 0 {
		return notify.Refuse(errno)
	}
	return notify.Pass
}

// maker is who owns what the process makes.
func (c *creds) maker() owner.IDs { return owner.IDs{UID: c.user.files, GID: c.group.files} }
