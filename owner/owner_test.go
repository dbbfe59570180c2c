package owner_test

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/nstest"
	"github.com/cooper-build/cooper/owner"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// TestEveryKindOfFileKeepsItsOwner also through what moves an inode from name to name.
func TestEveryKindOfFileKeepsItsOwner(t *testing.T) {
	dir := t.TempDir()
	for kind, create := range map[string]func(string) error{
		"file":   func(p string) error { return os.WriteFile(p, []byte("x"), 0o400) },
		"dir":    func(p string) error { return os.Mkdir(p, 0o500) },
		"link":   func(p string) error { return os.Symlink("/nowhere", p) },
		"pipe":   func(p string) error { return unix.Mkfifo(p, 0o600) },
		"socket": func(p string) error { return unix.Mknod(p, unix.S_IFSOCK|0o600, 0) },
	} {
		t.Run(kind, func(t *testing.T) {
			name := filepath.Join(dir, kind)
			if err := create(name); err != nil {
				t.Fatal(err)
			}
			for _, want := range []owner.IDs{{UID: 33, GID: 33}, {GID: 42}, {UID: 1<<32 - 2, GID: 7}, {UID: 7}} {
				set(t, name, want)
				if got := get(t, name); got != want {
					t.Errorf("recorded %v, read %v", want, got)
				}
			}
			if err := os.Rename(name, name+"2"); err != nil {
				t.Fatal(err)
			}
			if got, want := get(t, name+"2"), (owner.IDs{UID: 7}); got != want {
				t.Errorf("after a rename it belongs to %v, want %v", got, want)
			}
			set(t, name+"2", owner.IDs{})
			if got := get(t, name+"2"); got != (owner.IDs{}) {
				t.Errorf("given back to root it belongs to %v", got)
			}
			if n, err := unix.Llistxattr(name+"2", nil); n != 0 || err != nil {
				t.Errorf("given back to root it keeps %d bytes of attributes: %v", n, err)
			}
		})
	}
}

func TestWhatIsNoRecordIsRoot(t *testing.T) {
	for _, value := range []string{"", "x", "\x00\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"} {
		for _, mode := range []uint32{unix.S_IFREG, unix.S_IFLNK} {
			if got, _ := owner.Decode(value, mode); got != (owner.IDs{}) {
				t.Errorf("%q on a file of type %o is taken for the owner %v", value, mode, got)
			}
		}
	}
}

func with(t *testing.T, name string, do func(path string, mode uint32)) {
	t.Helper()
	fd, err := unix.Open(name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	do("/proc/self/fd/"+strconv.Itoa(fd), st.Mode)
}

func set(t *testing.T, name string, ids owner.IDs) {
	t.Helper()
	with(t, name, func(path string, mode uint32) {
		if err := owner.Record(path, mode, ids); err != nil {
			t.Fatal(err)
		}
	})
}

func get(t *testing.T, name string) (ids owner.IDs) {
	t.Helper()
	with(t, name, func(path string, mode uint32) {
		var err error
		if ids, err = owner.Read(path, mode); err != nil {
			t.Fatal(err)
		}
	})
	return ids
}
