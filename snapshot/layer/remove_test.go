package layer

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// A command can leave a tree that has no path and more levels than there may be open files.
func TestRemoveAllOfATreeWithoutAPath(t *testing.T) {
	top := filepath.Join(t.TempDir(), "top")
	if err := os.Mkdir(top, 0o755); err != nil {
		t.Fatal(err)
	}
	dir, err := unix.Open(top, unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	const levels = 1200
	for range levels {
		for _, name := range []string{"a", "b", ".lifted-1"} {
			if err := unix.Mkdirat(dir, name, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		f, err := unix.Openat(dir, "f", unix.O_CREAT|unix.O_WRONLY, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(f)
		below, err := unix.Openat(dir, "a", unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(dir)
		dir = below
	}
	unix.Close(dir)
	if err := RemoveAll(top); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(top); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the tree is still there: %v", err)
	}
}
