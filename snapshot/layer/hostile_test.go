package layer

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/nstest"
)

// hostile unpacks layers and fails when anything around the root changed.
func hostile(t *testing.T, layers ...[]ent) (root string, err error) {
	t.Helper()
	root = newRoot(t)
	return root, hostileAt(t, root, layers...)
}

func hostileAt(t *testing.T, root string, layers ...[]ent) (err error) {
	t.Helper()
	before := sentinels(t, root)
	wd, werr := os.Getwd()
	must(t, werr)
	must(t, os.Chdir(filepath.Join(filepath.Dir(root), "sentinels"))) // relative targets must not mean the working directory
	defer os.Chdir(wd)
	for _, entries := range layers {
		if err = unpackInto(t, root, stream(t, entries...)); err != nil {
			break
		}
	}
	if after := sentinels(t, root); after != before {
		t.Errorf("a layer changed files outside its root; an attacker could overwrite the user's files\nbefore:\n%s\nafter:\n%s\nlayers: %+v", before, after, layers)
	}
	return err
}

func TestHostileNamesAreRefused(t *testing.T) {
	long := strings.Repeat("a", 256)
	types := map[string]func(string) ent{
		"dir":      dir,
		"file":     func(n string) ent { return file(n, "x") },
		"symlink":  func(n string) ent { return symlink(n, "/etc") },
		"hardlink": func(n string) ent { return link(n, "ok") },
		"fifo":     fifo,
		"device":   func(n string) ent { return char(n, 1, 3) },
	}
	names := []string{
		"..", "../sentinel", "a/../../sentinel", "./../sentinel", "a/..", "/../sentinel", "../root-evil/sentinel", "../root-evil",
		"a/b/../../../sentinels/f", "..//sentinel", ".wh.", ".wh..", ".wh...", "a/.wh.", "a/.wh..", "a/.wh...", "../.wh.sentinel",
		"sub/../../.wh.sentinel", "../.wh..wh..opq", ".wh.x/y", long, strings.Repeat("a/", 2100) + "a",
	}
	for kind, make := range types {
		for _, name := range names {
			t.Run(kind+" "+name[:min(len(name), 40)], func(t *testing.T) {
				e := make("x")
				e.pax = map[string]string{}
				e.name = name
				_, err := hostile(t, []ent{file("ok", "1"), e})
				if err == nil {
					t.Errorf("%s entry %.60q was accepted", kind, name)
				}
			})
		}
	}
}

func TestTheRootStaysTheDirectoryItIs(t *testing.T) {
	for _, name := range []string{".", "./", "/", "//", "./."} {
		for _, e := range []ent{file("x", "1"), symlink("x", "sentinels"), link("x", "ok"), fifo("x"), char("x", 1, 3)} {
			e.name = name
			if strings.HasSuffix(name, "/") && e.typ != tar.TypeDir {
				e.header = func(h *tar.Header) { h.Name = strings.TrimRight(name, "/") + "/." } // Go writes no such name
			}
			root, err := hostile(t, []ent{file("ok", "1"), e})
			if err == nil {
				t.Errorf("entry %q of type %c was accepted: it would replace the root", name, e.typ)
			}
			if info, err := os.Lstat(root); err != nil || !info.IsDir() {
				t.Errorf("entry %q of type %c replaced the root: %v %v", name, e.typ, info, err)
			}
		}
		e := dir(name)
		e.mode = 0o711
		root, err := hostile(t, []ent{e})
		must(t, err)
		if info, _ := os.Stat(root); info.Mode().Perm() != 0o711 {
			t.Errorf("entry %q did not set the root's mode: %v", name, info.Mode())
		}
	}
}

// Every way out that a symlink may point to, then every type of entry through it and in its place.
func TestSymlinksNeverLeadOut(t *testing.T) {
	outside := func(root, to string) string { return strings.ReplaceAll(to, "OUT", filepath.Dir(root)) }
	targets := []string{
		"..", "../sentinels", "../../", "OUT", "OUT/sentinels", "OUT/root-evil", "../root-evil", "/", "/..", "/../sentinels", ".",
		"./../sentinels", "a/../../sentinels", "/proc/self/root/OUT", "/proc/self/cwd", "/proc/1/root", "x", "y", strings.Repeat("../", 40) + "OUT/sentinels",
	}
	through := []func(string) ent{
		dir,
		func(n string) ent { return file(n, "evil") },
		func(n string) ent { return symlink(n, "gone") },
		func(n string) ent { return link(n, "ok") },
		fifo,
		func(n string) ent { return char(n, 1, 3) },
		wh,
		opq,
		func(n string) ent {
			e := file(n, "evil")
			e.mode = 0o4777
			e.pax = map[string]string{paxXattr + "user.x": "1"}
			return e
		},
	}
	root := newRoot(t)
	must(t, os.Chtimes(filepath.Dir(root), time.Unix(1, 0), time.Unix(1, 0)))
	before := sentinels(t, root)
	t.Chdir(filepath.Join(filepath.Dir(root), "sentinels"))
	n := 0
	for _, target := range targets {
		for _, make := range through {
			for _, name := range []string{"x", "x/f", "x/gone", "x/sentinel", "x/sentinels/f", "x/new/deep", "y/f"} {
				links := []ent{file("ok", "1"), symlink("x", outside(root, target)), symlink("y", "x")}
				e := make(name)
				for _, layers := range [][][]ent{
					{append(links, e)}, // in one layer,
					{links, {e}},       // in two,
					{{e}, links, {e}},  // and where there was something before
				} {
					for _, entries := range layers {
						if unpackInto(t, root, stream(t, entries...)) != nil {
							break
						}
					}
					if after := sentinels(t, root); after != before {
						t.Fatalf("%+v changed files outside\nbefore:\n%s\nafter:\n%s", layers, before, after)
					}
					must(t, RemoveAll(root))
					must(t, os.Mkdir(root, 0o755))
					must(t, os.Chtimes(filepath.Dir(root), time.Unix(1, 0), time.Unix(1, 0))) // this was us
					n++
				}
			}
		}
	}
	if n < 3000 {
		t.Errorf("only %d cases", n)
	}
}

func TestChainsOfLinksThatLookInsideStayInside(t *testing.T) {
	deep := []ent{dir("a"), dir("a/b")}
	cases := map[string][]ent{
		"CVE-2025-11395": append(deep, symlink("a/b/c", "../.."), symlink("a/b/c/d", ".."), file("a/b/c/d/sentinel", "evil"), file("d/sentinel", "evil")),
		"two steps up":   append(deep, symlink("up", ".."), symlink("up2", "up/.."), file("up2/sentinel", "evil"), file("up2/root-evil/sentinel", "evil")),
		"loop":           {symlink("l", "l"), file("l/x", "evil")},
		"loop of two":    {symlink("l", "m"), symlink("m", "l"), file("l/x", "evil")},
		"dir to link":    {dir("d"), file("d/f", "1"), symlink("d", "../sentinels"), file("d/f", "evil"), wh("d/gone")},
		"file to link":   {file("f", "1"), symlink("f", "../sentinel"), file("f", "evil")},
		"link to dir":    {symlink("d", "../sentinels"), dir("d"), file("d/f", "inside")},
	}
	for name, entries := range cases {
		t.Run(name, func(t *testing.T) {
			_, err := hostile(t, entries)
			if strings.HasPrefix(name, "loop") != (err != nil) {
				t.Errorf("err = %v", err)
			}
		})
	}
}

// CVE-2021-32760, CVE-2014-6407: what comes after a link must not change what the link names.
func TestNothingIsWrittenThroughAnExistingFile(t *testing.T) {
	for _, first := range []ent{symlink("x", "../sentinel"), symlink("x", "/sentinel"), link("x", "ok")} {
		for _, second := range []ent{file("x", "evil"), dir("x"), fifo("x"), symlink("x", "y"), char("x", 1, 3)} {
			second.mode, second.uid = 0o4777, 0
			second.pax = map[string]string{paxXattr + "user.evil": "1"}
			if second.typ == tar.TypeSymlink || second.typ == tar.TypeFifo {
				second.pax = nil
			}
			root, err := hostile(t, []ent{file("ok", "good"), first, second})
			must(t, err)
			data, err := os.ReadFile(filepath.Join(root, "ok"))
			must(t, err)
			info, err := os.Stat(filepath.Join(root, "ok"))
			must(t, err)
			if string(data) != "good" || info.Mode().Perm() != 0o644 {
				t.Errorf("after %c %c: ok has %q %v: an entry was written through a link", first.typ, second.typ, data, info.Mode())
			}
		}
	}
}

func TestHardLinksStayInside(t *testing.T) {
	for _, target := range []string{
		"../sentinel", "sentinel", "f", "/sentinel", "../root-evil/sentinel", "x/../../sentinel", "missing", "", ".", "/", "..", "d", "up/sentinel", "gone",
	} {
		_, err := hostile(t, []ent{dir("d"), symlink("up", ".."), wh("gone"), link("stolen", target)})
		if err == nil {
			t.Errorf("hard link to %q was accepted", target)
		}
	}
	root, err := hostile(t, []ent{file("d/ok", "1"), symlink("s", "/d"), link("abs", "/d/ok"), link("via", "s/ok"), link("tosym", "s"), link("d/ok", "abs")})
	must(t, err)
	if got := kinds(t, root); got != "abs d/ d/ok s@ tosym@ via" {
		t.Errorf("tree: %s", got)
	}
	var a, b unix.Stat_t
	must(t, unix.Lstat(filepath.Join(root, "via"), &a))
	must(t, unix.Lstat(filepath.Join(root, "d/ok"), &b))
	if a.Ino != b.Ino || a.Nlink != 3 {
		t.Errorf("not linked: %d %d, %d names", a.Ino, b.Ino, a.Nlink)
	}
}

func TestDeviceNodesAreLeftOutAndTold(t *testing.T) {
	root := newRoot(t)
	var told []string
	data := stream(t, dir("dev"), char("dev/null", 1, 3), ent{typ: tar.TypeBlock, name: "dev/sda", major: 8}, file("dev/kept", ""))
	err := unpackWith(t.Context(), root, bytes.NewReader(data), UnpackOptions{Warn: func(name, what string) { told = append(told, name) }})
	must(t, err)
	if got := kinds(t, root); got != "dev/ dev/kept" {
		t.Errorf("tree: %s", got)
	}
	if len(told) != 2 {
		t.Errorf("told: %q", told)
	}
	if _, err := hostile(t, []ent{char("etc", 0, 0)}); err == nil {
		t.Error("a device 0:0 was accepted: it would hide the base's /etc")
	}
}

func TestAttributesThatSteerTheStoreAreStripped(t *testing.T) {
	e := dir("d")
	e.pax = map[string]string{}
	for _, name := range []string{"user.overlay.opaque", "user.overlay.redirect", "user.overlay.whiteout", "user.overlay.overlay.opaque",
		"trusted.overlay.opaque", "user.rootlesscontainers", "security.selinux"} {
		e.pax[paxXattr+name] = "y"
	}
	e.pax[paxXattr+"user.mine"] = "kept"
	f := file("f", "")
	f.pax = e.pax
	root, err := hostile(t, []ent{e, f})
	must(t, err)
	for _, name := range []string{"d", "f"} {
		if got := describe(t, filepath.Join(root, name), name); strings.Contains(got, "overlay") || strings.Contains(got, "rootless") || !strings.Contains(got, "user.mine") {
			t.Errorf("a stranger's layer set %s", got)
		}
	}
}

// GHSA-2q3f-q5pq-g8wv: one name twice, every ordered pair of types, in one layer and in two.
func TestEveryPairOfTypesUnderOneName(t *testing.T) {
	types := []struct {
		name string
		make func() ent
		kind string
	}{
		{"dir", func() ent { return dir("p") }, "/"},
		{"file", func() ent { return file("p", "1") }, ""},
		{"symlink", func() ent { return symlink("p", "../sentinels") }, "@"},
		{"hardlink", func() ent { return link("p", "ok") }, ""},
		{"fifo", func() ent { return fifo("p") }, "|"},
		{"device", func() ent { return char("p", 1, 3) }, "-"},
		{"whiteout", func() ent { return wh("p") }, "#"},
		{"opaque", func() ent { return opq("p") }, "/!"},
	}
	for _, one := range types {
		for _, two := range types {
			for _, layers := range []int{1, 2} {
				t.Run(fmt.Sprint(one.name, " ", two.name, " ", layers), func(t *testing.T) {
					split := [][]ent{{file("ok", "1"), one.make(), two.make()}}
					if layers == 2 {
						split = [][]ent{split[0][:2], split[0][2:]}
					}
					root, err := hostile(t, split...)
					throughLink := two.name == "opaque" && (one.name == "symlink" || one.name == "file" || one.name == "hardlink" || one.name == "fifo")
					if throughLink {
						return // an error, or a directory of the link's name inside; the sentinels are what matters
					}
					must(t, err)
					want := two.kind
					if layers == 1 && two.name == "whiteout" && one.name != "device" {
						want = one.kind // a whiteout spares its own layer
						if one.name == "dir" {
							want = "/!"
						}
					}
					replaced := one.kind != "/" && one.kind != "/!" && one.kind != "-"
					if two.name == "dir" && (replaced || one.name == "opaque") {
						want = "/!" // what was replaced hid everything below
					}
					got := "-"
					if _, err := os.Lstat(filepath.Join(root, "p")); err == nil {
						got = kind(t, filepath.Join(root, "p"))
					}
					if got != want {
						t.Errorf("p is %q, want %q", got, want)
					}
				})
			}
		}
	}
}

func TestLimitsHold(t *testing.T) {
	small := UnpackOptions{MaxBytes: 100, MaxEntries: 3}
	for name, entries := range map[string][]ent{
		"bytes":   {file("a", strings.Repeat("x", 60)), file("b", strings.Repeat("x", 60))},
		"entries": {dir("a"), dir("b"), dir("c"), dir("d")},
	} {
		root := newRoot(t)
		if err := unpackWith(t.Context(), root, bytes.NewReader(stream(t, entries...)), small); err == nil || !strings.Contains(err.Error(), "more than") {
			t.Errorf("%s: %v", name, err)
		}
	}
	many := map[string]string{}
	for i := range maxXattrs + 1 {
		many[fmt.Sprintf("%suser.x%d", paxXattr, i)] = "1"
	}
	e := file("f", "")
	e.pax = many
	if _, err := hostile(t, []ent{e}); err == nil {
		t.Error("too many attributes were accepted")
	}
	e.pax = map[string]string{paxXattr + "user.x": strings.Repeat("x", maxXattrSize+1)}
	if _, err := hostile(t, []ent{e}); err == nil {
		t.Error("a huge attribute was accepted")
	}
	e.pax, e.uid = nil, 1<<32-1
	if _, err := hostile(t, []ent{e}); err == nil {
		t.Error("uid -1 was accepted: the file would keep its owner")
	}
}

func TestATruncatedStreamIsAnError(t *testing.T) {
	data := stream(t, dir("d"), file("d/a", strings.Repeat("x", 3000)), symlink("d/s", "a"), file("d/b", strings.Repeat("y", 700)))
	for n := 1; n < len(data)-1024; n += 61 {
		if n%512 == 0 || n > 4024 && n < 4096 || n > 5820 {
			continue // only padding is missing; the digest tells
		}
		root := newRoot(t)
		before := sentinels(t, root)
		err := unpackInto(t, root, data[:n])
		if err == nil {
			t.Errorf("a stream cut at %d of %d was accepted", n, len(data))
		}
		if sentinels(t, root) != before {
			t.Error("sentinels changed")
		}
	}
}

func TestOwnersOutsideTheMapAreNamed(t *testing.T) {
	e := file("f", "")
	e.uid, e.gid = 4e9, 4e9
	_, err := hostile(t, []ent{e})
	if nstest.Single() {
		must(t, err)
		return
	}
	if err != nil && !strings.Contains(err.Error(), "4000000000:4000000000") {
		t.Errorf("error does not name the owner: %v", err)
	}
}

func TestDeepTreesCanBeRemoved(t *testing.T) {
	root := newRoot(t)
	at, err := unix.Open(root, openDirectory, 0)
	must(t, err)
	for range 6000 {
		must(t, unix.Mkdirat(at, "d", 0o755))
		must(t, unix.Mknodat(at, "f", unix.S_IFREG, 0))
		next, err := unix.Openat(at, "d", openDirectory, 0)
		must(t, err)
		closeFD(at)
		at = next
	}
	closeFD(at)
	var limit unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 64, Max: limit.Max}))
	err = RemoveAll(filepath.Join(root, "d"))
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
	must(t, err)
	must(t, os.Remove(filepath.Join(root, "f")))
	if got := kinds(t, root); got != "" {
		t.Errorf("left: %s", got)
	}
}
