package chroot

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/first"
)

// leastLandlock is the first version (Linux 6.12) that keeps signals inside.
const leastLandlock = 6

// Landlock returns the version that the kernel has, 0 if it has none.
func Landlock() int {
	version, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0
	}
	return int(version)
}

// allAccess are the rights to files that version 6 knows.
const allAccess = unix.LANDLOCK_ACCESS_FS_IOCTL_DEV<<1 - 1

// Ruleset opens rules that leave a process some rights to files, and those only below a directory, and keep to itself what scoped names.
func Ruleset(root string, access, scoped uint64) (*os.File, error) {
	attr := unix.LandlockRulesetAttr{Handled_access_fs: access, Scoped: scoped} // what an older kernel does not know is 0
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if errno != 0 {
		return nil, os.NewSyscallError("landlock_create_ruleset", errno)
	}
	rules := os.NewFile(fd, "landlock")
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errors.Join(&os.PathError{Op: "open", Path: root, Err: err}, rules.Close())
	}
	defer unix.Close(dir)
	below := unix.LandlockPathBeneathAttr{Allowed_access: access, Parent_fd: int32(dir)}
	if _, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, fd, unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&below)), 0, 0, 0); errno != 0 {
		return nil, errors.Join(os.NewSyscallError("landlock_add_rule", errno), rules.Close())
	}
	return rules, nil
}

// Confine is the call that enters the rules of Ruleset, which are the first descriptor that the process is given. No mount can be made
// afterwards.
func Confine() first.Call {
	return first.Call{What: "confine by Landlock", Number: unix.SYS_LANDLOCK_RESTRICT_SELF, Args: []first.Arg{first.Given(0), first.Int(0)}}
}
