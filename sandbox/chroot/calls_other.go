//go:build !amd64

package chroot

import (
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/notify"
)

func oldOpening() []call { return nil }

func oldLooking() []call {
	return []call{{"newfstatat", unix.SYS_FSTATAT, func(s *supervisor, n *notify.Call) notify.Answer {
		return s.stat(n, int(int32(n.Args[0])), n.Args[1], n.Args[2])
	}}}
}
