package files

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/nstest"
	"github.com/cooper-build/cooper/sandbox/userns"
)

// TestMain runs the tests as root of a user namespace, and on a tmpfs: they make some hundred thousand files.
func TestMain(m *testing.M) {
	if slices.ContainsFunc(os.Args, func(a string) bool { return strings.HasPrefix(a, "-test.fuzz=") || a == "-test.fuzzworker" }) {
		// Fuzzing needs no namespace, and its workers talk over descriptors that a new one does not get.
		os.Exit(m.Run())
	}
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
