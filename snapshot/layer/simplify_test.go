package layer

import (
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/nstest"
	"github.com/cooper-build/cooper/owner"
)

func TestSimplifyDropsOnlyWhatSaysNothing(t *testing.T) {
	when := time.Unix(1_600_000_000, 0)
	write := func(t *testing.T, dir, name, content string) string {
		t.Helper()
		file := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(file), 0o755))
		must(t, os.WriteFile(file, []byte(content), 0o644))
		must(t, os.Chtimes(file, when, when))
		return file
	}
	for _, c := range []struct {
		name   string
		make   func(t *testing.T, upper, lower, lowest string)
		remain []string
	}{
		{"an equal file", func(t *testing.T, upper, lower, lowest string) {
			write(t, upper, "d/f", "x")
			write(t, lowest, "d/f", "x")
		}, nil},
		{"equal in size and time, with another content", func(t *testing.T, upper, lower, lowest string) {
			write(t, upper, "f", "x")
			write(t, lower, "f", "y")
		}, []string{"f"}},
		{"another mode", func(t *testing.T, upper, lower, lowest string) {
			must(t, os.Chmod(write(t, upper, "f", "x"), 0o600))
			write(t, lower, "f", "x")
		}, []string{"f"}},
		{"another time", func(t *testing.T, upper, lower, lowest string) {
			later := when.Add(time.Nanosecond)
			must(t, os.Chtimes(write(t, upper, "f", "x"), later, later))
			write(t, lower, "f", "x")
		}, []string{"f"}},
		{"another attribute", func(t *testing.T, upper, lower, lowest string) {
			must(t, unix.Setxattr(write(t, upper, "f", "x"), "user.a", []byte("1"), 0))
			write(t, lower, "f", "x")
		}, []string{"f"}},
		{"one of several names", func(t *testing.T, upper, lower, lowest string) {
			must(t, os.Link(write(t, upper, "f", "x"), filepath.Join(upper, "g")))
			write(t, lower, "f", "x")
		}, []string{"f", "g"}},
		{"hidden by the layer between", func(t *testing.T, upper, lower, lowest string) {
			write(t, upper, "f", "x")
			must(t, unix.Mkdir(filepath.Join(lower, "f"), 0o755))
			write(t, lowest, "f", "x")
		}, []string{"f"}},
		{"hidden by an opaque directory of the layer between", func(t *testing.T, upper, lower, lowest string) {
			write(t, upper, "d/f", "x")
			must(t, unix.Mkdir(filepath.Join(lower, "d"), 0o755))
			must(t, unix.Setxattr(filepath.Join(lower, "d"), xattrOpaque, []byte("y"), 0))
			write(t, lowest, "d/f", "x")
		}, []string{"d", "d/f"}},
		{"an equal link", func(t *testing.T, upper, lower, lowest string) {
			for _, dir := range []string{upper, lower} {
				must(t, os.Symlink("to", filepath.Join(dir, "l")))
				times := []unix.Timespec{{Sec: when.Unix()}, {Sec: when.Unix()}}
				must(t, unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, "l"), times, unix.AT_SYMLINK_NOFOLLOW))
			}
		}, nil},
		{"a link of another owner, where owners are recorded", func(t *testing.T, upper, lower, lowest string) {
			for _, dir := range []string{upper, lower} {
				link := filepath.Join(dir, "l")
				must(t, os.Symlink("to", link))
				fd, err := unix.Open(link, unix.O_PATH|unix.O_NOFOLLOW, 0)
				must(t, err)
				defer closeFD(fd)
				must(t, owner.Record(procPath(fd), unix.S_IFLNK, owner.IDs{UID: map[string]uint32{upper: 7, lower: 8}[dir]}))
				times := []unix.Timespec{{Sec: when.Unix()}, {Sec: when.Unix()}}
				must(t, unix.UtimesNanoAt(unix.AT_FDCWD, link, times, unix.AT_SYMLINK_NOFOLLOW))
			}
		}, []string{"l"}},
		{"sockets in an old directory and in new ones", func(t *testing.T, upper, lower, lowest string) {
			write(t, upper, "d/f", "x")
			write(t, lower, "d/f", "x")
			must(t, os.MkdirAll(filepath.Join(upper, "new/e"), 0o755))
			for _, name := range []string{"d/s", "new/s", "new/e/s"} {
				must(t, unix.Mknod(filepath.Join(upper, name), unix.S_IFSOCK|0o600, 0))
			}
		}, []string{"new", "new/e"}},
		{"a socket over a file", func(t *testing.T, upper, lower, lowest string) {
			must(t, unix.Mknod(filepath.Join(upper, "f"), unix.S_IFSOCK|0o600, 0))
			write(t, lower, "f", "x")
		}, []string{"f"}},
		{"a new file beside an equal one", func(t *testing.T, upper, lower, lowest string) {
			write(t, upper, "d/f", "x")
			write(t, upper, "d/new", "x")
			write(t, lower, "d/f", "x")
		}, []string{"d", "d/new"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			upper, lower, lowest := t.TempDir(), t.TempDir(), t.TempDir()
			c.make(t, upper, lower, lowest)
			for _, dir := range []string{upper, lower, lowest} { // as a COPY or a RUN that keeps the time leaves it
				if _, err := os.Stat(filepath.Join(dir, "d")); err == nil {
					must(t, os.Chtimes(filepath.Join(dir, "d"), when, when))
				}
			}
			must(t, Simplify(t.Context(), upper, []string{lower, lowest}))
			var remain []string
			must(t, filepath.WalkDir(upper, func(p string, _ os.DirEntry, err error) error {
				if rel, _ := filepath.Rel(upper, p); rel != "." {
					remain = append(remain, rel)
				}
				return err
			}))
			if d := cmp.Diff(c.remain, remain); d != "" {
				t.Errorf("what remains in the layer (-want +got):\n%s", d)
			}
			must(t, Diff(t.Context(), upper, io.Discard, DiffOptions{Single: nstest.Single()}))
		})
	}
}

func TestSimplifyHidesNamesInsteadOfDirectories(t *testing.T) {
	upper, lower, lowest := t.TempDir(), t.TempDir(), t.TempDir()
	for _, name := range []string{"d/e", "d/new"} {
		must(t, os.MkdirAll(filepath.Join(upper, name), 0o755))
	}
	must(t, os.WriteFile(filepath.Join(upper, "d/kept"), []byte("new"), 0o644))
	must(t, unix.Setxattr(filepath.Join(upper, "d"), xattrOpaque, []byte("y"), 0))
	must(t, os.MkdirAll(filepath.Join(lower, "d/e"), 0o755))
	must(t, os.WriteFile(filepath.Join(lower, "d/e/of-lower"), nil, 0o644))
	must(t, unix.Mknod(filepath.Join(lower, "d/gone"), unix.S_IFCHR, 0))
	must(t, os.MkdirAll(filepath.Join(lowest, "d/e"), 0o755))
	for _, name := range []string{"d/kept", "d/gone", "d/of-lowest", "d/e/deep"} {
		must(t, os.WriteFile(filepath.Join(lowest, name), nil, 0o644))
	}
	when := time.Unix(1_600_000_000, 0)
	must(t, os.Chtimes(filepath.Join(upper, "d"), when, when))
	must(t, Simplify(t.Context(), upper, []string{lower, lowest}))

	var found []string
	must(t, filepath.WalkDir(upper, func(p string, e os.DirEntry, err error) error {
		must(t, err)
		rel, _ := filepath.Rel(upper, p)
		if e.Type()&os.ModeCharDevice != 0 {
			rel = "-" + rel
		}
		found = append(found, rel)
		return nil
	}))
	want := []string{".", "d", "d/e", "-d/e/deep", "-d/e/of-lower", "d/kept", "d/new", "-d/of-lowest"}
	if d := cmp.Diff(want, found); d != "" {
		t.Errorf("names in the layer, - for whiteouts (-want +got):\n%s", d)
	}
	fd, err := unix.Open(filepath.Join(upper, "d"), openDirectory, 0)
	must(t, err)
	defer closeFD(fd)
	if isOpaque(fd) {
		t.Error("the directory is still opaque")
	}
	if a, err := attributesOf(fd); err != nil || !a.mtime.Equal(when) {
		t.Errorf("the directory's time is %v %v, want %v", a.mtime, err, when)
	}
}
