package account

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
)

const passwd = `# a comment
root:x:0:0:root:/root:/bin/sh
app:x:1000:1001:App:/home/app:/bin/sh
app:x:7:7:a second entry never counts:/:/bin/sh
nobody:x:65534:65534::/nonexistent:/bin/false

1234:x:0:0:a name that looks like a number:/root:/bin/sh
４２:x:0:0:unicode digits:/root:/bin/sh
0x0:x:77:77:hexadecimal:/h:/bin/sh
big:x:4294967296:0:truncates to root:/root:/bin/sh
big2:x:2147483648:0:out of range:/root:/bin/sh
minus:x:-1:0:negative:/root:/bin/sh
words:x:zero:0:not a number:/root:/bin/sh
empty:x::0:empty:/root:/bin/sh
badgroup:x:50:4294967296:group out of range:/root:/bin/sh
short
`

const group = `root:x:0:
app:x:1001:
wheel:x:10:root,app
docker:x:999:app
users:x:100:someone,apple
9:x:0:number as a name
biggroup:x:4294967296:nobody
`

func rootWith(t *testing.T, passwd, group string) string {
	t.Helper()
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"passwd": passwd, "group": group} {
		if content == "" {
			continue
		}
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestResolveFindsWhoIsMeant(t *testing.T) {
	root := rootWith(t, passwd, group)
	tests := []struct {
		spec string
		want Identity
	}{
		{"", Identity{Home: "/root", Groups: []uint32{10}}},
		{"0", Identity{Home: "/root", Groups: []uint32{10}}},
		{"00", Identity{Home: "/root", Groups: []uint32{10}}},
		{"root", Identity{Home: "/root", Groups: []uint32{10}}},
		{"root:", Identity{Home: "/root", Groups: []uint32{10}}},
		{"root:0", Identity{}},
		{"root:root", Identity{}},
		{":0", Identity{Home: "/root"}},
		{":docker", Identity{GID: 999, Home: "/root"}},
		{"app", Identity{UID: 1000, GID: 1001, Groups: []uint32{10, 999}, Home: "/home/app"}},
		{"1000", Identity{UID: 1000, GID: 1001, Groups: []uint32{10, 999}, Home: "/home/app"}},
		{"app:docker", Identity{UID: 1000, GID: 999, Home: "/home/app"}},
		{"app:5", Identity{UID: 1000, GID: 5, Home: "/home/app"}},
		{"1000:0", Identity{UID: 1000}},
		{"1000:wheel", Identity{UID: 1000, GID: 10, Home: "/home/app"}},
		{"4242", Identity{UID: 4242}},
		{"4242:4343", Identity{UID: 4242, GID: 4343}},
		{"2147483647", Identity{UID: 2147483647}},
		// The entry named 1234 is root; the number must stay a number.
		{"1234", Identity{UID: 1234}},
		{"1234:9", Identity{UID: 1234, GID: 9}},
		// Neither is a number, so the image's own entry counts, and it is the resolved id that policy sees.
		{"４２", Identity{Home: "/root"}},
		{"0x0", Identity{UID: 77, GID: 77, Home: "/h"}},
	}
	for _, tt := range tests {
		got, err := Resolve(root, tt.spec)
		if err != nil {
			t.Errorf("Resolve(%q): %v", tt.spec, err)
			continue
		}
		if d := cmp.Diff(tt.want, got, cmpopts.EquateEmpty()); d != "" {
			t.Errorf("Resolve(%q) differs (-want +got):\n%s", tt.spec, d)
		}
	}
}

func TestResolveRefusesWhatCouldBecomeRoot(t *testing.T) {
	root := rootWith(t, passwd, group)
	for _, spec := range []string{
		"+0", "-1", "-0", "+1000", "4294967296", "2147483648", "18446744073709551616", "99999999999999999999999",
		" root", "root ", "0 ", " 0", "\t0", "0x1", "1e3", "１", "nosuch", "nosuch:0", "short",
		"big", "big2", "minus", "words", "empty", "badgroup",
		"1000:4294967296", "1000:-1", "1000:+0", "1000:nosuch", "app:biggroup", "app: docker", "0:0:0", "root:0:0",
		"nobody",
	} {
		got, err := Resolve(root, spec)
		if err == nil {
			t.Errorf("USER %q became %+v: an image could run as an id that policy did not see", spec, got)
		}
	}
}

func TestResolveAgreesWithTheReferenceOnValidInput(t *testing.T) {
	const passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:\nsys:x:3:3:::\n"
	const group = "root:x:0:\nwheel:x:10:root,app\nsys:x:3:app\n"
	root := rootWith(t, passwd, group)
	for _, spec := range []string{
		"root", "app", "sys", "0", "3", "1000", "500", "app:wheel", "app:7", "1000:sys", "500:wheel", ":wheel", "app:", "0:sys",
	} {
		ref, err := user.GetExecUser(spec, nil, strings.NewReader(passwd), strings.NewReader(group))
		if err != nil {
			t.Fatalf("reference on %q: %v", spec, err)
		}
		want := Identity{UID: uint32(ref.Uid), GID: uint32(ref.Gid), Home: ref.Home}
		for _, g := range ref.Sgids {
			want.Groups = append(want.Groups, uint32(g))
		}
		got, err := Resolve(root, spec)
		if err != nil {
			t.Errorf("Resolve(%q): %v", spec, err)
		}
		if d := cmp.Diff(want, got, cmpopts.EquateEmpty()); d != "" {
			t.Errorf("Resolve(%q) differs from moby/sys/user (-want +got):\n%s", spec, d)
		}
	}
}

func TestAnImageWithoutFilesHasNumbersOnly(t *testing.T) {
	root := t.TempDir()
	for spec, want := range map[string]Identity{"": {}, "0": {}, "7": {UID: 7}, "7:8": {UID: 7, GID: 8}, "root:root": {}} {
		got, err := Resolve(root, spec)
		if err != nil || got.UID != want.UID || got.GID != want.GID {
			t.Errorf("Resolve(%q) = %+v, %v; want %+v", spec, got, err, want)
		}
	}
	_, err := Resolve(root, "app")
	if err == nil || err.Error() != `no user "app": the image has no /etc/passwd` {
		t.Errorf("got %v", err)
	}
	var hint interface{ Hint() string }
	if !errors.As(err, &hint) || hint.Hint() == "" {
		t.Errorf("no hint on %v", err)
	}
	root = rootWith(t, passwd, group)
	if _, err = Resolve(root, "web"); err == nil || err.Error() != `no user "web" in /etc/passwd of the image` {
		t.Errorf("got %v", err)
	}
	if _, err = Resolve(root, "app:web"); err == nil || err.Error() != `no group "web" in /etc/group of the image` {
		t.Errorf("got %v", err)
	}
}

func TestLookupsNeverTakeANameForANumber(t *testing.T) {
	root := rootWith(t, passwd, group)
	if uid, gid, found, err := LookupUser(root, "app"); uid != 1000 || gid != 1001 || !found || err != nil {
		t.Errorf("LookupUser(app) = %d, %d, %t, %v", uid, gid, found, err)
	}
	if _, _, found, err := LookupUser(root, "1000"); found || err != nil {
		t.Errorf("LookupUser(1000) found %t, %v", found, err)
	}
	if gid, found, err := LookupGroup(root, "docker"); gid != 999 || !found || err != nil {
		t.Errorf("LookupGroup(docker) = %d, %t, %v", gid, found, err)
	}
	if _, found, err := LookupGroup(t.TempDir(), "docker"); found || err != nil {
		t.Errorf("LookupGroup without a file: found %t, %v", found, err)
	}
	if _, _, _, err := LookupUser(root, "big"); err == nil {
		t.Error("4294967296 in /etc/passwd became an owner")
	}
}

// A sentinel outside the root says root:x:555:555; meeting 555 means that the host's files were read.
const sentinel = "root:x:555:555:host:/host:/bin/sh\nspy:x:555:555:host:/host:/bin/sh\n"

func TestLinksInEtcStayInTheImage(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "passwd")
	if err := os.WriteFile(outside, []byte(sentinel), 0o644); err != nil {
		t.Fatal(err)
	}
	outsideDir := filepath.Dir(outside)
	depth := strings.Repeat("../", 40)
	tests := map[string]func(t *testing.T, root string){
		"absolute link":   func(t *testing.T, root string) { link(t, outside, root, "etc/passwd") },
		"relative climb":  func(t *testing.T, root string) { link(t, depth+outside, root, "etc/passwd") },
		"etc is the link": func(t *testing.T, root string) { remove(t, root, "etc"); link(t, outsideDir, root, "etc") },
		"through proc":    func(t *testing.T, root string) { link(t, "/proc/self/root"+outside, root, "etc/passwd") },
		"link chain": func(t *testing.T, root string) {
			link(t, "/a", root, "etc/passwd")
			link(t, outside, root, "a")
		},
	}
	for name, prepare := range tests {
		t.Run(name, func(t *testing.T) {
			root := rootWith(t, "", "")
			prepare(t, root)
			if got, err := Resolve(root, "spy"); err == nil {
				t.Errorf("user of the host resolved to %+v: an image can read the builder's files", got)
			}
			if got, err := Resolve(root, ""); err != nil || got.GID == 555 {
				t.Errorf("default user is %+v, %v", got, err)
			}
		})
	}
}

func TestLinksInsideTheImageAreFollowed(t *testing.T) {
	for _, target := range []string{"/usr/lib/passwd", "../usr/lib/passwd", "../../../../usr/lib/passwd"} {
		root := rootWith(t, "", "")
		if err := os.MkdirAll(filepath.Join(root, "usr/lib"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "usr/lib/passwd"), []byte(passwd), 0o644); err != nil {
			t.Fatal(err)
		}
		link(t, target, root, "etc/passwd")
		if got, err := Resolve(root, "app"); err != nil || got.UID != 1000 {
			t.Errorf("passwd -> %s: got %+v, %v", target, got, err)
		}
	}
}

// Each of these must end at once: reading a FIFO would wait for ever, and reading a large sparse file would take all
// memory. The test's own timeout is the alarm.
func TestWhatIsNoSmallRegularFileIsRefused(t *testing.T) {
	tests := map[string]func(t *testing.T, p string){
		"fifo": func(t *testing.T, p string) {
			if err := unix.Mkfifo(p, 0o666); err != nil {
				t.Fatal(err)
			}
		},
		"socket": func(t *testing.T, p string) {
			if err := unix.Mknod(p, unix.S_IFSOCK|0o666, 0); err != nil {
				t.Fatal(err)
			}
		},
		"directory": func(t *testing.T, p string) {
			if err := os.Mkdir(p, 0o755); err != nil {
				t.Fatal(err)
			}
		},
		"link to itself": func(t *testing.T, p string) { link(t, "passwd", filepath.Dir(p), "passwd") },
		"10 GiB sparse": func(t *testing.T, p string) {
			if err := os.WriteFile(p, []byte(passwd), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(p, 10<<30); err != nil {
				t.Fatal(err)
			}
		},
		"one line of 11 MiB": func(t *testing.T, p string) {
			if err := os.WriteFile(p, bytes.Repeat([]byte("a"), 11<<20), 0o644); err != nil {
				t.Fatal(err)
			}
		},
	}
	if os.Getuid() == 0 {
		tests["device"] = func(t *testing.T, p string) {
			// /dev/zero never ends; where device nodes cannot be made there is none to be met either.
			if err := unix.Mknod(p, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))); err != nil && !errors.Is(err, unix.EPERM) {
				t.Fatal(err)
			} else if err != nil {
				link(t, "passwd", filepath.Dir(p), "passwd")
			}
		}
	}
	for name, prepare := range tests {
		t.Run(name, func(t *testing.T) {
			root := rootWith(t, "", "")
			prepare(t, filepath.Join(root, "etc/passwd"))
			if got, err := Resolve(root, "app"); err == nil {
				t.Errorf("got %+v from a %s", got, name)
			} else if strings.Contains(err.Error(), root) {
				t.Errorf("the error shows a path of this machine: %v", err)
			}
			if got, err := Resolve(root, ""); err != nil || got.UID != 0 {
				t.Errorf("an image without USER does not run: %+v, %v", got, err)
			}
			if got, err := Resolve(root, "12:13"); err != nil || got.UID != 12 || got.GID != 13 {
				t.Errorf("numbers need no file: %+v, %v", got, err)
			}
		})
	}
}

func TestHugeNumbersOfGroupsAreBounded(t *testing.T) {
	var many strings.Builder
	for range maxGroups + 1 {
		many.WriteString("g:x:1:root\n")
	}
	root := rootWith(t, passwd, many.String())
	if got, err := Resolve(root, "root"); err == nil {
		t.Errorf("got %d groups, more than the kernel takes", len(got.Groups))
	}
	root = rootWith(t, strings.Repeat(":", maxFileSize-1)+"\n", strings.Repeat(",", maxFileSize-1)+"\n")
	if _, err := Resolve(root, "app"); err == nil {
		t.Error("found a user in colons")
	}
}

func link(t *testing.T, target, root, name string) {
	t.Helper()
	if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, root, name string) {
	t.Helper()
	if err := os.RemoveAll(filepath.Join(root, name)); err != nil {
		t.Fatal(err)
	}
}

func FuzzResolve(f *testing.F) {
	f.Add("app:docker", passwd, group)
	f.Add("0", "root:x:0:0", "")
	f.Add("x", "x:::", "x:x")
	root := f.TempDir()
	if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, spec, passwd, group string) {
		for name, content := range map[string]string{"passwd": passwd, "group": group} {
			if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := Resolve(root, spec)
		if err == nil && (got.UID > maxID || got.GID > maxID) {
			t.Errorf("Resolve(%q) = %+v is out of range", spec, got)
		}
		if strings.HasPrefix(spec, "-") && err == nil && got.UID == 0 && strings.Trim(spec[1:], "0123456789") == "" {
			t.Errorf("%q became root", spec)
		}
	})
}

func TestRenamesElsewhereDoNotKeepAnyoneFromAnAccount(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"etc", "usr"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "usr/passwd"), []byte("app:x:7:7::/:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../usr/passwd", filepath.Join(root, "etc/passwd")); err != nil {
		t.Fatal(err)
	}
	elsewhere := filepath.Join(t.TempDir(), "d")
	if err := os.Mkdir(elsewhere, 0o755); err != nil {
		t.Fatal(err)
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { // as other steps of the build do when they commit
		defer close(stopped)
		for from, to := elsewhere, elsewhere+"2"; ; from, to = to, from {
			select {
			case <-stop:
				return
			default:
				_ = os.Rename(from, to)
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	for range 20_000 {
		if id, err := Resolve(root, "app"); err != nil || id.UID != 7 {
			t.Fatalf("app is %v (%v), want 7: a build fails now and then because another one commits", id, err)
		}
	}
}
