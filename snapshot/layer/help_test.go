package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/nstest"
)

func TestMain(m *testing.M) {
	// The fuzzer's coordinator is inside already and talks to its workers over descriptors that a
	// second entry would close.
	if slices.Contains(os.Args, "-test.fuzzworker") {
		os.Exit(m.Run())
	}
	nstest.Main(m)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// ent is one entry of a test layer; data makes it a regular file.
type ent struct {
	typ    byte
	name   string
	data   string // or the target of a link
	mode   int64
	uid    int
	gid    int
	mtime  time.Time
	pax    map[string]string
	major  int64
	minor  int64
	header func(*tar.Header)
}

func dir(name string) ent        { return ent{typ: tar.TypeDir, name: name, mode: 0o755} }
func file(name, data string) ent { return ent{typ: tar.TypeReg, name: name, data: data, mode: 0o644} }
func symlink(name, target string) ent {
	return ent{typ: tar.TypeSymlink, name: name, data: target, mode: 0o777}
}
func link(name, target string) ent { return ent{typ: tar.TypeLink, name: name, data: target} }
func fifo(name string) ent         { return ent{typ: tar.TypeFifo, name: name, mode: 0o600} }
func char(name string, major, minor int64) ent {
	return ent{typ: tar.TypeChar, name: name, mode: 0o666, major: major, minor: minor}
}
func wh(name string) ent {
	return file(filepath.Join(filepath.Dir(name), ".wh."+filepath.Base(name)), "")
}
func opq(name string) ent { return file(name+"/.wh..wh..opq", "") }

func (e ent) write(w *tar.Writer) error {
	h := &tar.Header{Typeflag: e.typ, Name: e.name, Mode: e.mode, Uid: e.uid, Gid: e.gid, ModTime: e.mtime,
		PAXRecords: e.pax, Devmajor: e.major, Devminor: e.minor}
	if h.ModTime.IsZero() {
		h.ModTime = time.Unix(1e9, 0)
	}
	if !e.mtime.IsZero() {
		h.Format = tar.FormatPAX
	}
	switch e.typ {
	case tar.TypeReg:
		h.Size = int64(len(e.data))
	case tar.TypeSymlink, tar.TypeLink:
		h.Linkname = e.data
	}
	if e.header != nil {
		e.header(h)
	}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	if e.typ == tar.TypeReg {
		_, err := io.WriteString(w, e.data)
		return err
	}
	return nil
}

func stream(t testing.TB, entries ...ent) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		if err := e.write(w); err != nil {
			t.Fatalf("make entry %q: %v", e.name, err)
		}
	}
	must(t, w.Close())
	return buf.Bytes()
}

// newRoot returns an empty directory with sentinels around it that an escape would hit.
func newRoot(t testing.TB) string {
	t.Helper()
	outside := t.TempDir()
	root := filepath.Join(outside, "root")
	for _, d := range []string{"root", "root-evil", "sentinels"} {
		must(t, os.Mkdir(filepath.Join(outside, d), 0o755))
	}
	for _, f := range []string{"sentinel", "root-evil/sentinel", "sentinels/f", "sentinels/gone"} {
		must(t, os.WriteFile(filepath.Join(outside, f), []byte("untouched"), 0o640))
	}
	t.Cleanup(func() { RemoveAll(root) })
	return root
}

// sentinels describes everything around root.
func sentinels(t testing.TB, root string) string {
	t.Helper()
	outside := filepath.Dir(root)
	var out strings.Builder
	err := filepath.WalkDir(outside, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name == root {
			return fs.SkipDir
		}
		out.WriteString(describe(t, name, strings.TrimPrefix(name, outside)) + "\n")
		return nil
	})
	must(t, err)
	return out.String()
}

// describe tells all about one file, inode number included.
func describe(t testing.TB, name, as string) string {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(name, &st))
	return fmt.Sprintf("%s inode=%d nlink=%d %s", as, st.Ino, st.Nlink, facts(t, name, &st))
}

func facts(t testing.TB, name string, st *unix.Stat_t) string {
	t.Helper()
	text := fmt.Sprintf("mode=%o owner=%d:%d mtime=%d.%09d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		data, err := os.ReadFile(name)
		must(t, err)
		text += fmt.Sprintf(" data=%x", sha256.Sum256(data))
	case unix.S_IFLNK:
		target, err := os.Readlink(name)
		must(t, err)
		return text + " target=" + target
	case unix.S_IFCHR, unix.S_IFBLK:
		text += fmt.Sprintf(" dev=%d", st.Rdev)
	}
	fd, err := unix.Open(name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	attrs, err := readXattrs(fd)
	must(t, err)
	for _, a := range attrs {
		text += fmt.Sprintf(" %s=%x", a.name, a.value)
	}
	return text
}

// tree describes a directory, inode numbers turned into the first name of the inode.
func tree(t testing.TB, root string) []string {
	t.Helper()
	first := map[uint64]string{}
	var lines []string
	err := filepath.WalkDir(root, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		must(t, err)
		var st unix.Stat_t
		must(t, unix.Lstat(name, &st))
		line := rel + " " + facts(t, name, &st)
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if as, known := first[st.Ino]; known {
				line += " same as " + as
			} else {
				first[st.Ino] = rel
			}
		}
		lines = append(lines, line)
		return nil
	})
	must(t, err)
	return lines
}

// kinds describes a directory by names and types alone.
func kinds(t testing.TB, root string) string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(root, func(name string, e fs.DirEntry, err error) error {
		if err != nil || name == root {
			return err
		}
		rel, _ := filepath.Rel(root, name)
		found = append(found, rel+kind(t, name))
		return nil
	})
	must(t, err)
	sort.Strings(found)
	return strings.Join(found, " ")
}

func kind(t testing.TB, name string) string {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(name, &st))
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		var value [2]byte
		if n, err := unix.Getxattr(name, xattrOpaque, value[:]); err == nil && n > 0 {
			return "/!"
		}
		return "/"
	case unix.S_IFLNK:
		return "@"
	case unix.S_IFIFO:
		return "|"
	case unix.S_IFCHR:
		if st.Rdev == 0 {
			return "#"
		}
		return "%"
	}
	return ""
}

func unpackInto(t testing.TB, root string, data []byte) error {
	t.Helper()
	return unpackWith(t.Context(), root, bytes.NewReader(data), UnpackOptions{Single: nstest.Single()})
}

// unpackWith is Unpack on nothing.
func unpackWith(ctx context.Context, root string, data io.Reader, o UnpackOptions) error {
	_, err := Unpack(ctx, root, data, o)
	return err
}
