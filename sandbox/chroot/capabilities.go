package chroot

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// capabilitySet has bit n for capability n.
type capabilitySet uint64

// numbers are the capabilities that a command may get.
var numbers = map[string]uint{
	"CAP_CHOWN": unix.CAP_CHOWN, "CAP_DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE, "CAP_FOWNER": unix.CAP_FOWNER, "CAP_FSETID": unix.CAP_FSETID,
	"CAP_SETGID": unix.CAP_SETGID, "CAP_SETUID": unix.CAP_SETUID, "CAP_SETFCAP": unix.CAP_SETFCAP, "CAP_KILL": unix.CAP_KILL,
}

func parseCapabilities(names []string) (capabilitySet, error) {
	var s capabilitySet
	for _, name := range names {
		n, ok := numbers[name]
		if !ok {
			return 0, fmt.Errorf("a command in a chroot cannot have %s", name)
		}
		s |= 1 << n
	}
	return s, nil
}

// bound takes all others out of the bounding set, so that no program brings them back.
func (s capabilitySet) bound() error {
	for n := uint(0); n < 64; n++ {
		if s&(1<<n) != 0 {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(n), 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // the kernel has no more
		}
		if err != nil {
			return os.NewSyscallError("prctl", err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	return nil
}

// set makes these what this thread has.
func (s capabilitySet) set() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{
		{Effective: uint32(s), Permitted: uint32(s)},
		{Effective: uint32(s >> 32), Permitted: uint32(s >> 32)},
	}
	return os.NewSyscallError("capset", unix.Capset(&header, &data[0]))
}
