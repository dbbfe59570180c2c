package rootemu

import (
	"encoding/binary"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/notify"
)

// getsockopt tells who is at the other end of a unix socket. Servers let users in by that.
func getsockopt(s *Supervisor, r *request) notify.Answer {
	const size = 12 // struct ucred
	var room [4]byte
	if r.Args[1] != unix.SOL_SOCKET || peek(r, r.Args[4], room[:]) != nil || binary.NativeEndian.Uint32(room[:]) < size {
		return notify.Pass
	}
	peer, err := peerOf(r)
	if err != nil || peer <= 0 {
		return notify.Pass
	}
	index, marked := readMark(peer)
	if !marked {
		return notify.Pass
	}
	pid, err := pidInside(peer)
	if err != nil {
		return notify.Pass
	}
	who := s.ids.get(index, s.first)
	var cred []byte
	for _, v := range []uint32{pid, who.user.effective, who.group.effective} {
		cred = binary.NativeEndian.AppendUint32(cred, v)
	}
	if err := poke(r, r.Args[3], cred); err != nil {
		return notify.Refuse(err)
	}
	if err := poke(r, r.Args[4], binary.NativeEndian.AppendUint32(nil, size)); err != nil {
		return notify.Refuse(err)
	}
	return notify.Answer{}
}

// peerOf is the process at the other end, by its number here.
func peerOf(r *request) (int, error) {
	process, err := leader(r.pid)
	if err != nil {
		return 0, err
	}
	pidfd, err := unix.PidfdOpen(process, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, int(int32(r.Args[0])), 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}

// pidInside is the number of a process in its own namespace.
func pidInside(pid int) (uint32, error) {
	text, err := readSmall("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return 0, err
	}
	all, err := field(text, "NSpid:")
	if err != nil {
		return 0, err
	}
	last := all[strings.LastIndexAny(all, " \t")+1:]
	n, err := strconv.ParseUint(last, 10, 32)
	return uint32(n), err
}
