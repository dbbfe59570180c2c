package chroot

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Capable reports whether this process has a capability.
func Capable(n uint) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[n/32].Effective&(1<<(n%32)) != 0
}

// Impossible says why this process can run no command in a chroot, or nothing.
func Impossible() string {
	if os.Geteuid() != 0 {
		return "only root can run commands in a chroot"
	}
	needed := map[string]uint{"CAP_SYS_CHROOT": unix.CAP_SYS_CHROOT, "CAP_SETPCAP": unix.CAP_SETPCAP}
	maps.Copy(needed, numbers)
	for _, name := range slices.Sorted(maps.Keys(needed)) {
		if !Capable(needed[name]) {
			return "root has no " + name + " here"
		}
	}
	switch version := Landlock(); {
	case version == 0:
		return "the kernel has no Landlock, or it is switched off, and without it a command could kill the builder"
	case version < leastLandlock:
		return fmt.Sprintf("the kernel's Landlock is version %d, and before version %d (Linux 6.12) a command could kill the builder", version, leastLandlock)
	}
	return ""
}

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
