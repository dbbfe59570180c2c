package sandbox

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/chroot"
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
	return chroot.Ruleset(root, unix.LANDLOCK_ACCESS_FS_REFER, 0)
}
