package nstest

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/userns"
)

func TestMain(m *testing.M) { Main(m) }

func TestTestsRunAsRootOfAPrivateMountNamespace(t *testing.T) {
	ids, ok := userns.Inside()
	if !ok || os.Geteuid() != 0 {
		t.Fatalf("not inside (%v) or not root (%d)", ok, os.Geteuid())
	}
	if os.Getenv("COOPER_TEST_USERNS") == "single" && !Single() {
		t.Errorf("map is %s, a single id was asked for", ids)
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatalf("mount: %v", err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatalf("unmount: %v", err)
	}
}
