package sandbox

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/chroot"
	"github.com/cooper-build/cooper/sandbox/first"
)

// leastApart is the first version of Landlock (Linux 5.19) whose rules can allow that files are moved and linked between directories. Any
// rules of an older one forbid that.
const leastApart = 2

// apart opens rules that keep a process from looking into those that it did not start, or changing them: ptrace's check asks Landlock,
// whoever the user is, and much of what /proc has asks ptrace's check. Everything else stays as it is. Without Landlock there are none.
func apart(root string) (*os.File, error) {
	if chroot.Landlock() < leastApart {
		return nil, nil
	}
	attr := unix.LandlockRulesetAttr{Handled_access_fs: unix.LANDLOCK_ACCESS_FS_REFER}
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr.Handled_access_fs), 0)
	if errno != 0 {
		return nil, os.NewSyscallError("landlock_create_ruleset", errno)
	}
	rules := os.NewFile(fd, "landlock")
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errors.Join(&os.PathError{Op: "open", Path: root, Err: err}, rules.Close())
	}
	defer unix.Close(dir)
	below := unix.LandlockPathBeneathAttr{Allowed_access: unix.LANDLOCK_ACCESS_FS_REFER, Parent_fd: int32(dir)}
	if _, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, fd, unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&below)), 0, 0, 0); errno != 0 {
		return nil, errors.Join(os.NewSyscallError("landlock_add_rule", errno), rules.Close())
	}
	return rules, nil
}

// stayApart enters the rules of apart. No mount can be made afterwards.
func (c *calls) stayApart() {
	c.add("keep apart by Landlock", unix.SYS_LANDLOCK_RESTRICT_SELF, first.Given(0), null)
}
