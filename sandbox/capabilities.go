package sandbox

import "golang.org/x/sys/unix"

// capabilities has bit n for capability n.
type capabilities uint64

// allowed are the capabilities of the process: what package managers need to place files of
// many owners, and to act as their users. Docker's other five are dangerous
// (NET_RAW, MKNOD, SETPCAP) or useless (NET_BIND_SERVICE, AUDIT_WRITE) here.
var allowed = []struct {
	name   string
	number uint
}{
	{"CAP_CHOWN", unix.CAP_CHOWN}, {"CAP_DAC_OVERRIDE", unix.CAP_DAC_OVERRIDE}, {"CAP_FOWNER", unix.CAP_FOWNER}, {"CAP_FSETID", unix.CAP_FSETID},
	{"CAP_SETGID", unix.CAP_SETGID}, {"CAP_SETUID", unix.CAP_SETUID}, {"CAP_SETFCAP", unix.CAP_SETFCAP}, {"CAP_KILL", unix.CAP_KILL},
	{"CAP_SYS_CHROOT", unix.CAP_SYS_CHROOT},
}

func allowedCapabilities() capabilities {
	var set capabilities
	for _, c := range allowed {
		set |= 1 << c.number
	}
	return set
}

// allCapabilities are also those that the kernel does not know yet, which it leaves out.
const allCapabilities = ^capabilities(0)
