package files

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/nstest"
	"github.com/cooper-build/cooper/sandbox/userns"
)

// TestMain runs the tests as root of a user namespace, and on a tmpfs: they make some hundred thousand files.
func TestMain(m *testing.M) {
	if _, inside := userns.Inside(); inside {
		if err := useTmpfs(); err != nil {
			fmt.Fprintln(os.Stderr, "tests use the disk, for want of a tmpfs:", err)
		}
	}
	nstest.Main(m)
}

// useTmpfs hides /mnt, which only this process and its children see.
func useTmpfs() error {
	const dir = "/mnt"
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return err
	}
	return os.Setenv("TMPDIR", dir)
}

func singleID() bool { return nstest.Single() }
