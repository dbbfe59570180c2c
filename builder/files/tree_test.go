package files

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// plant makes a tree from lines of text:
//
//	d PATH [MODE]           directory
//	f PATH [MODE [CONTENT]] file
//	l PATH TARGET           symbolic link
//	h PATH FIRST            hard link to an earlier file
//	p PATH [MODE]           FIFO
//	s PATH                  socket
//	o PATH UID GID          owner, where the id map allows it
//	x PATH NAME VALUE       extended attribute
//
// Directories above are made when they are missing. Every path gets a modification time of its own, long ago.
func plant(t testing.TB, root string, lines ...string) string {
	t.Helper()
	must(t, os.MkdirAll(root, 0o755))
	must(t, os.Chmod(root, 0o755))
	for _, line := range lines {
		w := strings.Fields(line)
		p := filepath.Join(root, unescape(w[1]))
		must(t, os.MkdirAll(filepath.Dir(p), 0o755))
		plantOne(t, root, p, w)
	}
	all := allPaths(t, root)
	for i, p := range all {
		must(t, lutime(p, planted.Add(time.Duration(i)*time.Hour+123456789)))
	}
	return root
}

var planted = time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)

// unescape lets a path have spaces in the text.
func unescape(s string) string { return strings.ReplaceAll(s, "%20", " ") }

func plantOne(t testing.TB, root, p string, w []string) {
	t.Helper()
	mode := func(otherwise os.FileMode) os.FileMode {
		if len(w) < 3 {
			return otherwise
		}
		n, err := strconv.ParseUint(w[2], 8, 32)
		must(t, err)
		return fileMode(uint32(n))
	}
	switch w[0] {
	case "d":
		must(t, os.MkdirAll(p, 0o755))
		must(t, os.Chmod(p, mode(0o755)))
	case "f":
		content := "content of " + w[1]
		if len(w) > 3 {
			content = strings.Join(w[3:], " ")
		}
		must(t, os.WriteFile(p, []byte(content), 0o644))
		must(t, os.Chmod(p, mode(0o644)))
	case "l":
		must(t, os.Symlink(w[2], p))
	case "h":
		must(t, os.Link(filepath.Join(root, w[2]), p))
	case "p":
		must(t, unix.Mkfifo(p, 0o644))
		must(t, os.Chmod(p, mode(0o644)))
	case "s":
		must(t, unix.Mknod(p, unix.S_IFSOCK|0o755, 0))
	case "o":
		uid, _ := strconv.Atoi(w[2])
		gid, _ := strconv.Atoi(w[3])
		st, err := os.Lstat(p)
		must(t, err)
		if !singleID() {
			must(t, os.Lchown(p, uid, gid))
			if st.Mode()&os.ModeSymlink == 0 {
				must(t, os.Chmod(p, st.Mode()))
			}
		}
	case "x":
		must(t, unix.Setxattr(p, w[2], []byte(w[3]), 0))
	default:
		t.Fatalf("what is %q", w)
	}
}

func allPaths(t testing.TB, root string) []string {
	t.Helper()
	var all []string
	must(t, filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		all = append(all, p)
		return err
	}))
	// Directories last, so that what is done to their entries does not change them afterwards.
	sort.SliceStable(all, func(i, j int) bool { return len(all[i]) > len(all[j]) })
	return all
}

func lutime(p string, at time.Time) error {
	ts := unix.NsecToTimespec(at.UnixNano())
	return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// picture is a tree as text, one line for each path.
type picture []string

// take makes a picture of everything that a layer would have. Modification times younger than the test are "now".
func take(t testing.TB, root string, times bool) picture {
	t.Helper()
	var all picture
	first := map[uint64]string{}
	must(t, filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		all = append(all, rel+" "+describe(t, p, rel, first, times))
		return nil
	}))
	slices.Sort(all)
	return all
}

func describe(t testing.TB, p, rel string, first map[uint64]string, times bool) string {
	t.Helper()
	fi, err := os.Lstat(p)
	must(t, err)
	st := fi.Sys().(*syscall.Stat_t)
	line := fmt.Sprintf("%v %d:%d", fi.Mode(), st.Uid, st.Gid)
	switch {
	case fi.Mode().IsRegular():
		content, err := os.ReadFile(p)
		must(t, err)
		line += fmt.Sprintf(" %q", content)
		if st.Nlink > 1 {
			if f, ok := first[st.Ino]; ok {
				line += " =" + f
			} else {
				first[st.Ino] = rel
			}
		}
	case fi.Mode()&os.ModeSymlink != 0:
		to, err := os.Readlink(p)
		must(t, err)
		line += " -> " + to
	}
	names, err := listXattrs(p)
	must(t, err)
	slices.Sort(names)
	for _, n := range names {
		v, err := getXattr(p, n)
		must(t, err)
		line += fmt.Sprintf(" %s=%q", n, v)
	}
	if times {
		at := "now"
		if fi.ModTime().Before(planted.AddDate(5, 0, 0)) {
			at = fi.ModTime().UTC().Format(time.RFC3339Nano)
		}
		line += " " + at
	}
	return line
}
