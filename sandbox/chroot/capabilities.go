package chroot

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Capable reports whether this process has a capability.
func Capable(n uint) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[n/32].Effective&(1<<(n%32)) != 0
}

// needed are the capabilities that a command gets, and what it takes to start it.
var needed = []struct {
	name   string
	number uint
}{
	{"CAP_CHOWN", unix.CAP_CHOWN}, {"CAP_DAC_OVERRIDE", unix.CAP_DAC_OVERRIDE}, {"CAP_FOWNER", unix.CAP_FOWNER}, {"CAP_FSETID", unix.CAP_FSETID},
	{"CAP_KILL", unix.CAP_KILL}, {"CAP_SETFCAP", unix.CAP_SETFCAP}, {"CAP_SETGID", unix.CAP_SETGID}, {"CAP_SETPCAP", unix.CAP_SETPCAP},
	{"CAP_SETUID", unix.CAP_SETUID}, {"CAP_SYS_CHROOT", unix.CAP_SYS_CHROOT},
}

// Impossible says why this process can run no command in a chroot, or nothing.
func Impossible() string {
	if os.Geteuid() != 0 {
		return "only root can run commands in a chroot"
	}
	for _, c := range needed {
		if !Capable(c.number) {
			return "root has no " + c.name + " here"
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
