package chroot

import (
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/notify"
)

// oldOpening are those that newer architectures have no number for.
func oldOpening() []call {
	return []call{
		{"open", unix.SYS_OPEN, func(s *supervisor, n *notify.Call) notify.Answer {
			return s.open(n, unix.AT_FDCWD, n.Args[0], n.Args[1])
		}},
		{"chmod", unix.SYS_CHMOD, func(s *supervisor, n *notify.Call) notify.Answer {
			return s.changeMode(n, unix.AT_FDCWD, n.Args[0], n.Args[1])
		}},
		{"creat", unix.SYS_CREAT, func(s *supervisor, n *notify.Call) notify.Answer {
			return s.open(n, unix.AT_FDCWD, n.Args[0], unix.O_CREAT|unix.O_WRONLY|unix.O_TRUNC)
		}},
	}
}

func oldLooking() []call {
	byName := func(s *supervisor, n *notify.Call) notify.Answer {
		return s.stat(n, unix.AT_FDCWD, n.Args[0], n.Args[1])
	}
	return []call{
		{"stat", unix.SYS_STAT, byName},
		{"lstat", unix.SYS_LSTAT, byName},
		{"newfstatat", unix.SYS_NEWFSTATAT, func(s *supervisor, n *notify.Call) notify.Answer {
			return s.stat(n, int(int32(n.Args[0])), n.Args[1], n.Args[2])
		}},
	}
}
