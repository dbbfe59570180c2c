package sandbox_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox"
)

// listing describes everything below dir, with all that a layer would record.
func listing(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		entries[name] = describe(t, path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

func describe(t *testing.T, path string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	link, _ := os.Readlink(path)
	size := st.Size
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		size = 0 // the file system's business
	}
	return fmt.Sprintf("%o %d:%d size %d mtime %d.%09d %s", st.Mode, st.Uid, st.Gid, size, st.Mtim.Sec, st.Mtim.Nsec, link)
}

// old sets the times of everything below dir back, so that a later change shows.
func old(t *testing.T, dir string) {
	t.Helper()
	var paths []string
	filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		paths = append(paths, path)
		return err
	})
	times := []unix.Timespec{{Sec: 1e9, Nsec: 123}, {Sec: 1e9, Nsec: 456}}
	for _, path := range paths {
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			t.Fatal(err)
		}
	}
}

// roots are the shapes of base image that mount points meet.
var roots = []struct {
	name   string
	change func(t *testing.T, root string)
}{
	{"nothing there", func(*testing.T, string) {}},
	{"no etc", func(t *testing.T, root string) { remove(t, filepath.Join(root, "etc")) }},
	{"everything there", func(t *testing.T, root string) {
		for _, dir := range []string{"proc", "dev", "sys", "dev/shm", "dev/pts"} {
			mkdir(t, filepath.Join(root, dir))
		}
		for _, name := range []string{"hosts", "hostname", "resolv.conf"} {
			write(t, filepath.Join(root, "etc", name), "the image's own", 0o600)
		}
	}},
	{"dangling resolv.conf of systemd", func(t *testing.T, root string) {
		symlink(t, "../run/systemd/resolve/stub-resolv.conf", filepath.Join(root, "etc/resolv.conf"))
		mkdir(t, filepath.Join(root, "run"))
	}},
	{"absolute links", func(t *testing.T, root string) {
		symlink(t, "/run/resolv.conf", filepath.Join(root, "etc/resolv.conf"))
		symlink(t, "/nowhere/at/all/hosts", filepath.Join(root, "etc/hosts"))
		symlink(t, "/etc/hosts2", filepath.Join(root, "etc/hostname"))
	}},
	{"etc is a link", func(t *testing.T, root string) {
		mkdir(t, filepath.Join(root, "usr"))
		if err := os.Rename(filepath.Join(root, "etc"), filepath.Join(root, "usr/etc")); err != nil {
			t.Fatal(err)
		}
		symlink(t, "/usr/etc", filepath.Join(root, "etc"))
	}},
	{"etc is a dangling link", func(t *testing.T, root string) {
		remove(t, filepath.Join(root, "etc"))
		symlink(t, "../../usr/etc", filepath.Join(root, "etc"))
	}},
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}

const lookAround = `cat /etc/hosts /etc/hostname; test -f /etc/resolv.conf || echo no resolv.conf; ls /proc/1/exe /dev/null`

func TestCommandThatChangesNothingLeavesNothing(t *testing.T) {
	inEach(t, commandThatChangesNothingLeavesNothing)
}

// inEach runs a test with namespaces and in a chroot.
func inEach(t *testing.T, test func(t *testing.T, chroot bool)) {
	t.Run("namespaces", func(t *testing.T) { test(t, false) })
	t.Run("chroot", func(t *testing.T) {
		needsRoot(t)
		test(t, true)
	})
}

func commandThatChangesNothingLeavesNothing(t *testing.T, chroot bool) {
	for _, c := range roots {
		t.Run(c.name, func(t *testing.T) {
			root := busybox(t)
			c.change(t, root)
			old(t, root)
			before := listing(t, root)
			cache := t.TempDir()
			s := shell(t, root, lookAround+"; test -f /deep/er/cache/x && test -d /run/secrets && df /run/secrets | head -1")
			size := int64(1 << 20)
			if s.Chroot = chroot; chroot {
				size = 0
			}
			write(t, filepath.Join(cache, "x"), "", 0o644)
			s.Hosts = []sandbox.HostEntry{{Name: "registry.test", IP: "192.0.2.7"}}
			s.Mounts = []sandbox.Mount{
				{Source: cache, Target: "/deep/er/cache"},
				{Kind: sandbox.Tmpfs, Target: "/run/secrets", Size: size, Mode: 0o700},
			}
			out := mustRun(t, s)
			if !strings.Contains(out, "127.0.0.1\tlocalhost buildkitsandbox\n") || !strings.Contains(out, "192.0.2.7\tregistry.test\nbuildkitsandbox\n") || strings.Contains(out, "no resolv.conf") {
				t.Errorf("private files are not in place: %s", out)
			}
			if diff := cmp.Diff(before, listing(t, root)); diff != "" {
				t.Errorf("a RUN of nothing would make a layer (-before +after):\n%s", diff)
			}
		})
	}
}

func TestUpperDirectoryShowsNoChange(t *testing.T) {
	for _, c := range roots {
		t.Run(c.name, func(t *testing.T) {
			lower := busybox(t)
			c.change(t, lower)
			old(t, lower)
			upper, merged := overlay(t, lower)
			mustRun(t, shell(t, merged, lookAround))
			for name, got := range listing(t, upper) {
				// The kernel copies a directory up when a mount point is made in it.
				// Equal to the one below it is no change, and the store drops it.
				if name == "." {
					continue
				}
				if want := describe(t, filepath.Join(lower, name)); got != want || !strings.HasPrefix(got, "4") {
					t.Errorf("upper directory has %s: %s, below it is %s", name, got, want)
				}
			}
			if got, want := describe(t, merged), describe(t, lower); got != want {
				t.Errorf("root is %s, was %s", got, want)
			}
		})
	}
}

func overlay(t *testing.T, lower string) (upper, merged string) {
	t.Helper()
	dir := t.TempDir()
	upper, merged = filepath.Join(dir, "upper"), filepath.Join(dir, "merged")
	for _, name := range []string{"upper", "work", "merged"} {
		mkdir(t, filepath.Join(dir, name))
	}
	old(t, upper)
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s/work,userxattr", lower, upper, dir)
	if err := unix.Mount("overlay", merged, "overlay", 0, options); err != nil {
		t.Fatalf("mount overlay: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(merged, unix.MNT_DETACH) })
	return upper, merged
}

func TestWhatTheCommandWritesStays(t *testing.T) { inEach(t, whatTheCommandWritesStays) }

func whatTheCommandWritesStays(t *testing.T, chroot bool) {
	root := busybox(t)
	remove(t, filepath.Join(root, "etc"))
	old(t, root)
	s := shell(t, root, `
		mkdir -p /etc && echo kept > /etc/passwd && echo lost > /etc/hosts && echo lost > /deep/mount/x
		echo kept > /deep/kept && mkdir /sys.d && touch -d '2001-02-03 04:05:06' /deep`)
	s.Chroot = chroot
	s.Mounts = []sandbox.Mount{{Kind: sandbox.Tmpfs, Target: "/deep/mount"}}
	mustRun(t, s)
	var got []string
	for name := range listing(t, root) {
		if !strings.HasPrefix(name, "bin") {
			got = append(got, name)
		}
	}
	slices.Sort(got)
	if diff := cmp.Diff([]string{".", "deep", "deep/kept", "etc", "etc/passwd", "sys.d", "tmp"}, got); diff != "" {
		t.Errorf("files after the run (-want +got):\n%s", diff)
	}
	deep, err := os.Stat(filepath.Join(root, "deep"))
	if err != nil {
		t.Fatal(err)
	}
	if want := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC); !deep.ModTime().Equal(want) {
		t.Errorf("time that the command set is %v after the run, want %v", deep.ModTime(), want)
	}
	if top, _ := os.Stat(root); top.ModTime().Unix() == 1e9 {
		t.Error("the command made directories in /, but its time says otherwise")
	}
}

// sentinel makes a directory outside the root that an attack aims at, and fails
// the test if anything about it changes.
func sentinel(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "sentinel")
	mkdir(t, filepath.Join(dir, "sub"))
	for _, name := range []string{"hosts", "hostname", "resolv.conf", "null", "sub/hosts"} {
		write(t, filepath.Join(dir, name), "", 0o644)
	}
	old(t, dir)
	before := listing(t, dir)
	t.Cleanup(func() {
		if diff := cmp.Diff(before, listing(t, dir)); diff != "" {
			t.Errorf("an image changed files outside its root (-before +after):\n%s", diff)
		}
	})
	return dir
}

func TestImageCannotLeadTheSandboxOutside(t *testing.T) { inEach(t, imageCannotLeadTheSandboxOutside) }

func imageCannotLeadTheSandboxOutside(t *testing.T, chroot bool) {
	up := strings.Repeat("../", 20)
	for _, c := range []struct {
		name    string
		prepare func(t *testing.T, root, sentinel string)
		refused string // part of the error; empty: the command runs, on files inside the root
	}{
		{"proc is a link", func(t *testing.T, root, s string) { symlink(t, s, filepath.Join(root, "proc")) }, "/proc is not a directory"},
		{"dev is a link", func(t *testing.T, root, s string) { symlink(t, s, filepath.Join(root, "dev")) }, "/dev is not a directory"},
		{"sys is a link", func(t *testing.T, root, s string) { symlink(t, up+s, filepath.Join(root, "sys")) }, "/sys is not a directory"},
		{"dev is a link inside", func(t *testing.T, root, _ string) { symlink(t, "tmp", filepath.Join(root, "dev")) }, "/dev is not a directory"},
		{"proc is a file", func(t *testing.T, root, _ string) { write(t, filepath.Join(root, "proc"), "", 0o644) }, "/proc is not a directory"},
		{"dev is a fifo", func(t *testing.T, root, _ string) { fifo(t, filepath.Join(root, "dev")) }, "/dev is not a directory"},
		{"dev/null is a link", func(t *testing.T, root, s string) {
			mkdir(t, filepath.Join(root, "dev"))
			symlink(t, s+"/null", filepath.Join(root, "dev/null"))
			symlink(t, s, filepath.Join(root, "dev/shm"))
			symlink(t, s+"/ptmx", filepath.Join(root, "dev/ptmx"))
		}, ""},
		{"etc is a link outside", func(t *testing.T, root, s string) {
			remove(t, filepath.Join(root, "etc"))
			symlink(t, s, filepath.Join(root, "etc"))
		}, ""},
		{"files of etc are links outside", func(t *testing.T, root, s string) {
			for _, name := range []string{"hosts", "hostname", "resolv.conf"} {
				symlink(t, up+s+"/"+name, filepath.Join(root, "etc", name))
			}
		}, ""},
		{"hosts is a link to itself", func(t *testing.T, root, _ string) { symlink(t, "hosts", filepath.Join(root, "etc/hosts")) }, "too many levels of symbolic links"},
		{"hosts leads into proc", func(t *testing.T, root, _ string) {
			symlink(t, "/proc/sys/kernel/core_pattern", filepath.Join(root, "etc/hosts"))
		}, "leads into /proc"},
		{"hosts is a directory", func(t *testing.T, root, _ string) { mkdir(t, filepath.Join(root, "etc/hosts")) }, "has a directory in its place"},
		{"hosts is a fifo", func(t *testing.T, root, _ string) { fifo(t, filepath.Join(root, "etc/hosts")) }, ""},
		{"resolv.conf is beneath a file", func(t *testing.T, root, _ string) {
			symlink(t, "passwd/x", filepath.Join(root, "etc/resolv.conf"))
		}, "not a directory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root, outside := busybox(t), sentinel(t)
			c.prepare(t, root, outside)
			old(t, root)
			before := listing(t, root)
			s := shell(t, root, "echo x > /dev/null; cat /etc/hosts /etc/hostname; echo hostile >> /etc/hosts")
			s.Chroot = chroot
			out, err := run(t, s)
			switch {
			case c.refused == "" && err != nil:
				t.Errorf("run: %v\n%s", err, out)
			case c.refused == "" && !strings.Contains(out, "localhost"):
				t.Errorf("hosts inside is %q", out)
			case c.refused != "" && (err == nil || !strings.Contains(err.Error(), c.refused)):
				t.Errorf("error is %v, want it to say %q", err, c.refused)
			}
			if diff := cmp.Diff(before, listing(t, root)); diff != "" {
				t.Errorf("root is changed (-before +after):\n%s", diff)
			}
		})
	}
}

func fifo(t *testing.T, path string) {
	t.Helper()
	if err := unix.Mkfifo(path, 0o644); err != nil {
		t.Fatal(err)
	}
}

// CVE-2024-23652: the cleaner followed what the command had put in place of the
// mount point's parent.
func TestCommandCannotLeadTheCleanerOutside(t *testing.T) {
	inEach(t, commandCannotLeadTheCleanerOutside)
}

func commandCannotLeadTheCleanerOutside(t *testing.T, chroot bool) {
	for _, c := range []struct{ name, script string }{
		{"parent becomes a link", "mv /etc /elsewhere && ln -s SENTINEL /etc"},
		{"parent becomes a link upwards", "mv /etc /elsewhere && ln -s ../../../../../../../..SENTINEL /etc"},
		{"parent of the parent becomes a link", "mv /a /elsewhere && ln -s SENTINEL /a"},
		{"parent moves into another", "mkdir /c && mv /etc /c/etc && mkdir /etc && echo mine > /etc/hosts"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root, outside := busybox(t), sentinel(t)
			s := shell(t, root, strings.ReplaceAll(c.script, "SENTINEL", outside))
			s.Chroot = chroot
			s.Mounts = []sandbox.Mount{{Kind: sandbox.Tmpfs, Target: "/a/sub/mount"}}
			mustRun(t, s)
			for name, entry := range listing(t, root) {
				base := filepath.Base(name)
				if (base == "hosts" && !strings.Contains(entry, "size 5")) || base == "resolv.conf" || base == "mount" {
					t.Errorf("mount point %s is left: %s", name, entry)
				}
			}
		})
	}
}

func TestMounts(t *testing.T) {
	root, outside := busybox(t), sentinel(t)
	source := t.TempDir()
	mkdir(t, filepath.Join(source, "dir"))
	write(t, filepath.Join(source, "dir/file"), "content", 0o644)
	symlink(t, outside, filepath.Join(source, "absolute"))
	symlink(t, strings.Repeat("../", 20)+outside, filepath.Join(source, "relative"))
	symlink(t, "/dir", filepath.Join(source, "inside"))
	bind := func(selected, target string, readOnly bool) sandbox.Mount {
		return sandbox.Mount{Source: source, Select: selected, Target: target, ReadOnly: readOnly}
	}
	for _, c := range []struct {
		name   string
		mounts []sandbox.Mount
		script string
		output string
		fails  string
	}{
		{"directory", []sandbox.Mount{bind("", "/m", false)}, "cat /m/dir/file", "content", ""},
		{"file", []sandbox.Mount{bind("dir/file", "/m/file", true)}, "cat /m/file", "content", ""},
		{"read only", []sandbox.Mount{bind("", "/m", true)}, "touch /m/x 2>&1 || echo refused", "touch: /m/x: Read-only file system\nrefused\n", ""},
		{"in order", []sandbox.Mount{{Kind: sandbox.Tmpfs, Target: "/m"}, bind("dir", "/m/in", true)}, "cat /m/in/file", "content", ""},
		{"over etc", []sandbox.Mount{bind("dir", "/etc", true)}, "ls /etc", "file\n", ""},
		{"link in the selection resolved inside", []sandbox.Mount{bind("inside", "/m", true)}, "cat /m/file", "content", ""},
		{"absolute link in the selection", []sandbox.Mount{bind("absolute", "/m", false)}, "true", "", "no such file"},
		{"relative link in the selection", []sandbox.Mount{bind("relative", "/m", false)}, "true", "", "no such file"},
		{"dots in the selection", []sandbox.Mount{bind("../../../../../.."+outside, "/m", false)}, "true", "", "no such file"},
		{"tmpfs has its size", []sandbox.Mount{{Kind: sandbox.Tmpfs, Target: "/m", Size: 1 << 20}}, "dd if=/dev/zero of=/m/x bs=1024 count=2048 2>/dev/null || stat -c %s /m/x", "1048576\n", ""},
		{"tmpfs has its mode", []sandbox.Mount{{Kind: sandbox.Tmpfs, Target: "/m", Mode: 0o700}, {Kind: sandbox.Tmpfs, Target: "/n"}}, "stat -c %a /m /n", "700\n1777\n", ""},
		{"nothing on the root", []sandbox.Mount{bind("", "/", false)}, "true", "", "root"},
		{"nothing on the root by dots", []sandbox.Mount{bind("", "/etc/..", false)}, "true", "", "root"},
		{"nothing in proc", []sandbox.Mount{bind("dir/file", "/proc/self/attr/current", false)}, "true", "", "leads into /proc"},
		{"nothing in dev", []sandbox.Mount{bind("dir/file", "/dev/null", false)}, "true", "", "leads into /dev"},
		{"a name of its own in dev", []sandbox.Mount{bind("dir", "/dev/pipes/", true), bind("dir/file", "/dev/f", false)}, "cat /dev/pipes/file /dev/f; touch /dev/pipes/x 2>/dev/null || echo refused", "contentcontentrefused\n", ""},
		{"nothing deep in dev", []sandbox.Mount{bind("", "/dev/a", true), bind("dir", "/dev/a/absolute", false)}, "true", "", "leads into /dev"},
		{"nothing in sys by dots", []sandbox.Mount{bind("", "/etc/../sys", false)}, "true", "", "leads into /sys"},
		{"relative target", []sandbox.Mount{bind("", "m", false)}, "true", "", "not absolute"},
	} {
		t.Run(c.name, func(t *testing.T) {
			old(t, root)
			before := listing(t, root)
			s := shell(t, root, c.script)
			s.Mounts = c.mounts
			out, err := run(t, s)
			if c.fails == "" && (err != nil || out != c.output) {
				t.Errorf("run gave %q, %v; want %q", out, err, c.output)
			}
			if c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)) {
				t.Errorf("error is %v, want it to say %q", err, c.fails)
			}
			if diff := cmp.Diff(before, listing(t, root)); diff != "" {
				t.Errorf("root is changed (-before +after):\n%s", diff)
			}
		})
	}
}

func TestWorkingDirectory(t *testing.T) {
	root := busybox(t)
	symlink(t, "/proc/self/fd", filepath.Join(root, "door"))
	symlink(t, "/tmp", filepath.Join(root, "link"))
	for _, c := range []struct{ dir, want string }{
		{"/tmp", "/tmp\n"},
		{"/link", "/tmp\n"},
		{"/made/on/demand", "/made/on/demand\n"},
		{"/../../tmp/../tmp", "/tmp\n"},
	} {
		s := shell(t, root, "readlink /proc/self/cwd")
		s.Dir = c.dir
		if got := mustRun(t, s); got != c.want {
			t.Errorf("in %s the process is at %q, want %q", c.dir, got, c.want)
		}
	}
	for _, dir := range []string{"/proc/self/fd/7", "/proc/self/fd/8", "/door/7", "/door/9", "/proc/1/root", "/dev/fd/7", "/bin/../proc/self/cwd", "/etc/passwd", "tmp"} {
		s := shell(t, root, "pwd; ls ..")
		s.Dir = dir
		out, err := run(t, s)
		var exit *sandbox.ExitError
		if err == nil || errors.As(err, &exit) {
			t.Errorf("working directory %s was accepted: the process saw %q of the machine", dir, out)
		}
	}
}

// The nodes are the machine's own, and where root runs the build, so is root.
func TestCommandCannotChangeTheMachinesDeviceNodes(t *testing.T) {
	out := mustRun(t, shell(t, busybox(t), "for f in /dev/null /proc/keys; do chmod 600 $f; touch -d 2001-02-03 $f; done 2>&1; echo x > /dev/null; stat -c %a /dev/null"))
	host, err := os.Stat("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	if host.Mode().Perm() != 0o666 || strings.Count(out, "Read-only") != 4 {
		os.Chmod("/dev/null", 0o666)
		t.Errorf("a command changed the machine's /dev/null: %s", out)
	}
}
