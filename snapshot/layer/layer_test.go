package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	umoci "github.com/opencontainers/umoci/oci/layer"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/nstest"
)

func diff(t testing.TB, root string, o DiffOptions) []byte {
	t.Helper()
	o.Single = nstest.Single()
	var buf bytes.Buffer
	must(t, Diff(t.Context(), root, &buf, o))
	return buf.Bytes()
}

func headers(t testing.TB, data []byte) []*tar.Header {
	t.Helper()
	var found []*tar.Header
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return found
		}
		must(t, err)
		found = append(found, h)
	}
}

// randomLayer makes a benign layer: every directory has an entry before its contents.
func randomLayer(r *rand.Rand) []ent {
	entries := []ent{dir("./")}
	dirs := []string{"."}
	var files []string
	base := []time.Time{time.Unix(1e9, 123456789), time.Unix(0, 0), time.Unix(1<<31+5, 1), time.Unix(1234567890, 0)}
	for i := range 5 + r.IntN(40) {
		name := path.Join(dirs[r.IntN(len(dirs))], fmt.Sprintf("%c%d%s", 'a'+r.IntN(26), i, []string{"", "é\n", strings.Repeat("n", 150)}[r.IntN(3)]))
		var e ent
		switch r.IntN(9) {
		case 0, 1:
			e = dir(name)
			e.mode = []int64{0o755, 0o1777, 0o2755, 0o700, 0o000}[r.IntN(5)]
			dirs = append(dirs, name)
		case 2:
			e = symlink(name, []string{"/etc/passwd", "..", "x", strings.Repeat("long/", 60)}[r.IntN(4)])
		case 3:
			if len(files) == 0 {
				continue
			}
			e = link(name, files[r.IntN(len(files))])
		case 4:
			e = fifo(name)
		case 5:
			if d := path.Dir(name); d != "." && r.IntN(3) == 0 && !hasOpaque(entries, d) {
				e = opq(d)
			} else if !hasOpaque(entries, d) {
				e = wh(name)
			} else {
				continue
			}
			e.mtime = time.Time{}
			entries = append(entries, e)
			continue
		default:
			e = file(name, strings.Repeat(name, r.IntN(200)))
			e.mode = []int64{0o644, 0o755, 0o4755, 0o2755, 0o400}[r.IntN(5)]
			files = append(files, name)
			if r.IntN(3) == 0 {
				e.pax = map[string]string{paxXattr + "user.one": "1", paxXattr + "user.bin": "\x00\xff="}
			}
			if r.IntN(4) == 0 {
				if e.pax == nil {
					e.pax = map[string]string{}
				}
				e.pax[paxXattr+xattrCapability] = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
			}
		}
		e.mtime = base[r.IntN(len(base))]
		if e.typ == tar.TypeReg || e.typ == tar.TypeDir || e.typ != tar.TypeLink && !nstest.Single() { // umoci records no others
			e.uid, e.gid = r.IntN(3)*1000, r.IntN(2)*42
		}
		entries = append(entries, e)
	}
	return entries
}

// hasOpaque keeps the random layers to what both unpackers must agree on: no whiteout near an opaque
// mark, where ours leaves out what overlay would list.
func hasOpaque(entries []ent, d string) bool {
	return slices.ContainsFunc(entries, func(e ent) bool {
		at := path.Dir(e.name)
		return strings.HasPrefix(path.Base(e.name), ".wh.") && (at == d || strings.HasPrefix(at, d+"/") || strings.HasPrefix(d, at+"/"))
	})
}

func TestRandomLayersUnpackAsUmociUnpacksThemAndComeBackEqual(t *testing.T) {
	for seed := range uint64(60) {
		entries := randomLayer(rand.New(rand.NewPCG(seed, 7)))
		data := stream(t, entries...)
		ours, theirs := newRoot(t), newRoot(t)
		must(t, unpackInto(t, ours, data))
		format := umoci.OverlayfsRootfs{MapOptions: umoci.MapOptions{Rootless: nstest.Single()}, UserXattr: true}
		must(t, umoci.UnpackLayer(theirs, bytes.NewReader(data), &umoci.UnpackOptions{OnDiskFormat: format}))
		if d := cmp.Diff(comparable(tree(t, theirs)), comparable(tree(t, ours))); d != "" {
			t.Fatalf("seed %d: trees differ (-umoci +ours):\n%s", seed, d)
		}
		written := diff(t, ours, DiffOptions{})
		if d := cmp.Diff(headers(t, diff(t, theirs, DiffOptions{})), headers(t, written)); d != "" {
			t.Errorf("seed %d: layers differ (-umoci +ours):\n%s", seed, d)
		}
		again := newRoot(t)
		must(t, unpackInto(t, again, written))
		if rewritten := diff(t, again, DiffOptions{}); !bytes.Equal(written, rewritten) {
			t.Errorf("seed %d: a layer that was unpacked and written again has other bytes:\n%s", seed,
				cmp.Diff(headers(t, written), headers(t, rewritten)))
		}
	}
}

// umoci's owners of links, pipes and other names of files are not those that are recorded, and it keeps what steers the overlay.
func TestRandomDirectoriesAreWrittenAsUmociWritesThem(t *testing.T) {
	for seed := range uint64(60) {
		root := newRoot(t)
		must(t, unpackInto(t, root, stream(t, randomLayer(rand.New(rand.NewPCG(seed, 8)))...)))
		format := umoci.OverlayfsRootfs{MapOptions: umoci.MapOptions{Rootless: nstest.Single()}, UserXattr: true}
		theirs, err := io.ReadAll(umoci.GenerateInsertLayer(root, ".", false, &umoci.RepackOptions{OnDiskFormat: format}))
		must(t, err)
		if d := cmp.Diff(said(t, theirs), said(t, diff(t, root, DiffOptions{}))); d != "" {
			t.Errorf("seed %d: layers differ (-umoci +ours):\n%s", seed, d)
		}
	}
}

// said are the entries of a layer with their contents, apart from the root, in which two programs must agree.
func said(t testing.TB, data []byte) []string {
	t.Helper()
	var entries []string
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return entries
		}
		must(t, err)
		if path.Clean(h.Name) == "." {
			continue
		}
		content, err := io.ReadAll(r)
		must(t, err)
		entry := fmt.Sprintf("%c %s -> %q mode=%o %d,%d at %d: %d bytes %x", h.Typeflag, h.Name, h.Linkname, h.Mode&0o7777, h.Devmajor, h.Devminor, h.ModTime.Unix(),
			h.Size, sha256.Sum256(content))
		if h.Typeflag == tar.TypeReg || h.Typeflag == tar.TypeDir {
			entry += fmt.Sprintf(" owner=%d:%d", h.Uid, h.Gid)
			for _, record := range slices.Sorted(maps.Keys(h.PAXRecords)) {
				if name, ok := strings.CutPrefix(record, paxXattr); ok && !ours(name) {
					entry += fmt.Sprintf(" %s=%q", name, h.PAXRecords[record])
				}
			}
		}
		entries = append(entries, entry)
	}
}

// comparable drops what is not part of a layer: a whiteout's own mode and time.
func comparable(lines []string) []string {
	for i, line := range lines {
		if j := strings.Index(line, " mode=20"); j >= 0 && strings.Contains(line, " dev=0") {
			lines[i] = line[:j] + " whiteout"
		}
	}
	return lines
}

func TestUnpackKeepsEverything(t *testing.T) {
	f := file("usr/bin/su", "program")
	f.mode, f.uid, f.gid, f.mtime = 0o6755, 0, 42, time.Unix(1e9, 123456789)
	f.pax = map[string]string{paxXattr + "user.note": "hello"}
	d := dir("var/mail")
	d.mode, d.gid, d.mtime = 0o3777, 8, time.Unix(1e9, 5)
	root := newRoot(t)
	must(t, unpackInto(t, root, stream(t, f, d, file("var/mail/root", "late"), fifo("var/pipe"), symlink("var/l", "/absolute"))))
	want := []string{
		"usr mode=40755 owner=0:0 mtime=0.000000000",
		"usr/bin mode=40755 owner=0:0 mtime=0.000000000",
		"var mode=40755 owner=0:0 mtime=0.000000000",
		"var/l mode=120777 owner=0:0 mtime=1000000000.000000000 target=/absolute",
		"var/pipe mode=10600 owner=0:0 mtime=1000000000.000000000",
	}
	got := tree(t, root)
	for _, line := range want {
		if !slices.Contains(got, line) {
			t.Errorf("no %q in\n%s", line, strings.Join(got, "\n"))
		}
	}
	owner := func(gid int) string {
		if nstest.Single() {
			return "owner=0:0"
		}
		return fmt.Sprintf("owner=0:%d", gid)
	}
	for _, prefix := range []string{
		"usr/bin/su mode=106755 " + owner(42) + " mtime=1000000000.123456789",
		"var/mail mode=43777 " + owner(8) + " mtime=1000000000.000000005",
	} {
		if !slices.ContainsFunc(got, func(line string) bool { return strings.HasPrefix(line, prefix) }) {
			t.Errorf("no %q in\n%s", prefix, strings.Join(got, "\n"))
		}
	}
	for _, h := range headers(t, diff(t, root, DiffOptions{})) {
		if h.Name == "usr/bin/su" && (h.Gid != 42 || h.Mode != 0o6755 || h.PAXRecords[paxXattr+"user.note"] != "hello" || len(h.PAXRecords) != 1) {
			t.Errorf("the layer has %+v", h)
		}
		if h.Name == "var/mail/" && (h.Gid != 8 || h.Mode != 0o3777) {
			t.Errorf("the layer has %+v", h)
		}
	}
}

func TestRecordedOwnersFollowTheSharedFormat(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	must(t, err)
	defer f.Close()
	must(t, SetOwner(f, 0, 42, true))
	value := make([]byte, 64)
	n, err := unix.Fgetxattr(int(f.Fd()), "user.rootlesscontainers", value)
	must(t, err)
	if got, want := value[:n], []byte("\x08\xff\xff\xff\xff\x0f\x10*"); !bytes.Equal(got, want) {
		t.Errorf("0:42 is recorded as %x, umoci writes %x", got, want)
	}
	must(t, SetOwner(f, 0, 0, true))
	if _, err := unix.Fgetxattr(int(f.Fd()), "user.rootlesscontainers", value); err != unix.ENODATA {
		t.Errorf("0:0 is recorded: %v", err)
	}
	var bad *OwnerError
	if err := SetOwner(f, -1, 0, false); !errors.As(err, &bad) || bad.Hint() == "" {
		t.Errorf("owner -1: %v", err)
	}
}

// TestLinksAndPipesKeepTheirOwners with one id as with many.
func TestLinksAndPipesKeepTheirOwners(t *testing.T) {
	var in bytes.Buffer
	w := tar.NewWriter(&in)
	want := map[string][2]int{"link": {33, 34}, "pipe": {0, 42}, "root": {0, 0}, "twin": {33, 34}}
	for _, h := range []*tar.Header{
		{Typeflag: tar.TypeSymlink, Name: "link", Linkname: "/x", Uid: 33, Gid: 34, PAXRecords: map[string]string{paxXattr + xattrCapability: "a forged record"}},
		{Typeflag: tar.TypeFifo, Name: "pipe", Mode: 0o640, Gid: 42},
		{Typeflag: tar.TypeSymlink, Name: "root", Linkname: "/x"},
		{Typeflag: tar.TypeLink, Name: "twin", Linkname: "link"},
	} {
		must(t, w.WriteHeader(h))
	}
	must(t, w.Close())
	dir := t.TempDir()
	must(t, unpackWith(t.Context(), dir, &in, UnpackOptions{Single: nstest.Single()}))
	var out bytes.Buffer
	must(t, Diff(t.Context(), dir, &out, DiffOptions{Single: nstest.Single(), Base: dir}))
	r := tar.NewReader(&out)
	for range want {
		h, err := r.Next()
		must(t, err)
		if got := [2]int{h.Uid, h.Gid}; got != want[h.Name] || len(h.PAXRecords) > 0 {
			t.Errorf("%s belongs to %v, want %v, and has %q", h.Name, got, want[h.Name], h.PAXRecords)
		}
	}
}

func TestAccessListsKeepWhomTheyName(t *testing.T) {
	const acl = "\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x04\x00\x05\x00\xff\xff\xff\xff\x08\x00\x05\x00\x04\x00\x00\x00\x10\x00\x05\x00\xff\xff\xff\xff\x20\x00\x05\x00\xff\xff\xff\xff"
	want := map[string]string{paxXattr + "system.posix_acl_access": acl, paxXattr + "system.posix_acl_default": acl}
	d := dir("journal")
	d.mode, d.pax = 0o2755, want
	root := newRoot(t)
	must(t, unpackInto(t, root, stream(t, d)))
	h, err := tar.NewReader(bytes.NewReader(diff(t, root, DiffOptions{}))).Next()
	must(t, err)
	if d := cmp.Diff(want, h.PAXRecords); d != "" || h.Mode != 0o2755 {
		t.Errorf("mode %o, attributes (-want +got):\n%s", h.Mode, d)
	}
}

func TestWhiteoutsHideEarlierLayersOnly(t *testing.T) {
	cases := []struct {
		name   string
		layers [][]ent
		want   string
	}{
		{"later layer", [][]ent{{file("a", "1"), dir("d"), file("d/x", "1")}, {wh("a"), wh("d")}}, "a# d#"},
		{"own layer, before", [][]ent{{file("x", "1")}, {wh("x"), file("x", "2")}}, "x"},
		{"own layer, after", [][]ent{{file("x", "1")}, {file("x", "2"), wh("x")}}, "x"},
		{"own directory, before", [][]ent{{dir("d"), file("d/old", "1")}, {wh("d"), dir("d"), file("d/new", "1")}}, "d/! d/new"},
		{"own directory, after", [][]ent{{dir("d"), file("d/old", "1")}, {dir("d"), file("d/new", "1"), wh("d")}}, "d/! d/new"},
		{"opaque first", [][]ent{{dir("d"), file("d/old", "1")}, {opq("d"), file("d/new", "1")}}, "d/! d/new"},
		{"opaque last", [][]ent{{dir("d"), dir("d/s"), file("d/s/old", "1"), file("d/old", "1")}, {file("d/s/new", "1"), opq("d")}}, "d/! d/s/ d/s/new"},
		{"whiteout below opaque", [][]ent{{opq("d"), wh("d/x"), dir("d/e"), wh("d/e/y")}}, "d/! d/e/"},
		{"whiteout before opaque", [][]ent{{dir("d"), wh("d/x"), opq("d")}}, "d/!"},
		{"implied below whiteout", [][]ent{{wh("d")}, {file("d/x", "1")}}, "d/! d/x"},
		{"whiteout of nothing", [][]ent{{wh("never")}}, "never#"},
		{"aufs leftovers", [][]ent{{dir(".wh..wh.plnk"), file(".wh..wh.plnk/1.2", ""), file(".wh..wh.aufs", "")}}, ""},
		{"whiteout as a hard link", [][]ent{{wh("a"), link(".wh.b", ".wh.a")}}, "a# b#"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			root := newRoot(t)
			for _, entries := range c.layers {
				must(t, unpackInto(t, root, stream(t, entries...)))
			}
			if got := kinds(t, root); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestApplyingALayerKeepsTheTimesOfDirectoriesItDoesNotDescribe(t *testing.T) {
	root := newRoot(t)
	must(t, unpackInto(t, root, stream(t, dir("./"), dir("d"), dir("d/e"), file("d/e/f", "1"), dir("r"), file("r/x", ""))))
	must(t, unpackInto(t, root, stream(t, file("d/e/g", "1"), wh("r/x"), dir("d/e"), opq("d"))))
	for _, line := range tree(t, root) {
		if strings.Contains(line, " mode=4") && !strings.Contains(line, "mtime=1000000000.000000000") {
			t.Errorf("time changed: %s", line)
		}
	}
}

func TestParentSymlinksAreFollowedInsideTheRoot(t *testing.T) {
	root := newRoot(t)
	must(t, unpackInto(t, root, stream(t, symlink("lib", "usr/lib"), file("lib/a", "1"), symlink("abs", "/usr/../../lib"), file("abs/b", "1"))))
	if got, want := kinds(t, root), "abs@ lib@ usr/ usr/lib/ usr/lib/a usr/lib/b"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	root = newRoot(t)
	must(t, unpackInto(t, root, stream(t, symlink("l", "."), file("l/l/x", "1"), dir("l/l"), file("l/y", "1"))))
	if got, want := kinds(t, root), "l/! l/y x"; got != want {
		t.Errorf("a replaced symlink is still followed: got %q, want %q", got, want)
	}
}

func TestImpliedParentsInheritWhatTheyCover(t *testing.T) {
	below, hidden := newRoot(t), newRoot(t)
	tmp := dir("tmp")
	tmp.mode = 0o1777
	must(t, unpackInto(t, below, stream(t, tmp, dir("tmp/d"), dir("gone"), file("file", ""))))
	must(t, os.Chmod(filepath.Join(below, "gone"), 0o700))
	must(t, unpackInto(t, hidden, stream(t, wh("gone"))))
	root := newRoot(t)
	data := stream(t, file("tmp/d/x", ""), file("gone/x", ""), file("file/x", ""), file("new/x", ""))
	implied, err := Unpack(t.Context(), root, bytes.NewReader(data), UnpackOptions{})
	must(t, err)
	must(t, implied.Inherit([]string{hidden, below}))
	var got []string
	for _, line := range tree(t, root) {
		if name, rest, _ := strings.Cut(line, " mode=4"); rest != "" {
			got = append(got, name+" "+strings.Fields(rest)[0])
		}
	}
	sort.Strings(got)
	want := []string{". 0755", "file 0755", "gone 0755", "new 0755", "tmp 1777", "tmp/d 0755"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("modes (-want +got):\n%s", d)
	}
}

func TestDiffIsDeterministicAndClamped(t *testing.T) {
	root, copied := newRoot(t), newRoot(t)
	f := file("f", "1")
	f.mtime = time.Unix(2e9, 5)
	f.pax = map[string]string{paxXattr + "user.b": "2", paxXattr + "user.a": "1", paxXattr + "user.c": "3"}
	old := file("old", "1")
	old.mtime = time.Unix(1000, 999)
	data := stream(t, f, old, wh("gone"), dir("d"), opq("d"))
	must(t, unpackInto(t, root, data))
	must(t, unpackInto(t, copied, data))
	epoch := time.Unix(1e9, 0)
	one, two := diff(t, root, DiffOptions{Epoch: &epoch}), diff(t, copied, DiffOptions{Epoch: &epoch})
	if !bytes.Equal(one, two) {
		t.Error("the same change set gave other bytes")
	}
	for _, h := range headers(t, one) {
		if h.ModTime.After(epoch) || h.ModTime.Nanosecond() != 0 || h.Uname != "" {
			t.Errorf("%s: %v %q", h.Name, h.ModTime, h.Uname)
		}
		if h.Name == "old" && h.ModTime.Unix() != 1000 {
			t.Errorf("a time before the epoch changed to %v", h.ModTime)
		}
	}
	if empty := diff(t, newRoot(t), DiffOptions{}); !bytes.Equal(empty, make([]byte, 1024)) {
		t.Errorf("an empty directory gives %d bytes", len(empty))
	}
}

func TestStrippedFilesLosePrivilegeUnderAllTheirNames(t *testing.T) {
	su := file("bin/su", "program")
	su.mode = 0o6755
	su.pax = map[string]string{paxXattr + xattrCapability: "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"}
	other := su
	other.name = "bin/other"
	root := newRoot(t)
	must(t, unpackInto(t, root, stream(t, su, link("a", "bin/su"), link("z/z", "bin/su"), other)))
	for _, h := range headers(t, diff(t, root, DiffOptions{StripPrivilege: map[string]bool{"/z/z": true}})) {
		has := h.Mode&0o6000 != 0 || h.PAXRecords[paxXattr+xattrCapability] != ""
		if want := h.Name == "bin/other"; h.Typeflag != tar.TypeDir && has != want {
			t.Errorf("%s has privilege: %v; it would survive under another name", h.Name, has)
		}
	}
}

func TestDiffEndsWhenItsReaderDoes(t *testing.T) {
	root := newRoot(t)
	must(t, unpackInto(t, root, stream(t, file("big", strings.Repeat("x", 4<<20)))))
	r, w := io.Pipe()
	r.Close()
	if err := Diff(t.Context(), root, w, DiffOptions{}); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("err = %v", err)
	}
	cause := errors.New("cancelled")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if err := Diff(ctx, root, io.Discard, DiffOptions{}); !errors.Is(err, cause) {
		t.Errorf("err = %v", err)
	}
	if err := unpackWith(ctx, root, bytes.NewReader(nil), UnpackOptions{}); !errors.Is(err, cause) {
		t.Errorf("err = %v", err)
	}
}

func TestCompressionIsFoundOut(t *testing.T) {
	data := stream(t, file("a", strings.Repeat("hello ", 1e5)))
	for _, c := range []Compression{{Codec: None}, {Codec: Gzip}, {Codec: Zstd}} {
		var one, two bytes.Buffer
		for _, buf := range []*bytes.Buffer{&one, &two} {
			w, err := Compress(buf, c)
			must(t, err)
			_, err = w.Write(data)
			must(t, err)
			must(t, w.Close())
		}
		if !bytes.Equal(one.Bytes(), two.Bytes()) {
			t.Errorf("%s: other bytes the second time", c)
		}
		r, err := Decompress(&one)
		must(t, err)
		got, err := io.ReadAll(r)
		must(t, err)
		must(t, r.Close())
		if !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes came back of %d", c, len(got), len(data))
		}
		cut, err := Decompress(bytes.NewReader(two.Bytes()[:two.Len()/2]))
		must(t, err)
		if got, err := io.ReadAll(cut); c.Codec != None && err == nil {
			t.Errorf("%s: a stream cut in half gave %d bytes and no error", c, len(got))
		}
	}
	if r, err := Decompress(bytes.NewReader(nil)); err != nil {
		t.Error(err)
	} else if got, err := io.ReadAll(r); len(got) != 0 || err != nil {
		t.Errorf("nothing gives %q %v", got, err)
	}
	if _, err := Decompress(strings.NewReader("BZh91AY")); err == nil {
		t.Error("bzip2 was taken for plain")
	}
}

func TestCompressedBytesDependOnNeitherCoresNorWrites(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	data := make([]byte, 0, 9<<20)
	for len(data) < 9<<20-77 {
		data = fmt.Appendf(data, "%d line %x\n", random.IntN(1000), random.Uint64()>>random.IntN(64))
	}
	low, high := 1, 9
	for _, c := range []Compression{{}, {Codec: Gzip, Level: &low}, {Codec: Gzip, Level: &high}, {Codec: Zstd}, {Codec: Zstd, Level: &low}, {Codec: Zstd, Level: &high}} {
		t.Run(c.String(), func(t *testing.T) {
			var want []byte
			for _, cores := range []int{1, 2, 7} {
				for _, step := range []int{1 << 12, 1<<20 - 1, len(data)} {
					got := compressed(t, data, c, cores, step)
					if want == nil {
						want = got
					}
					if !bytes.Equal(got, want) {
						t.Fatalf("other bytes with %d cores and writes of %d bytes: the digest of an image would be that of the machine", cores, step)
					}
				}
			}
		})
	}
}

func compressed(t *testing.T, data []byte, c Compression, cores, step int) []byte {
	t.Helper()
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(cores))
	var buf bytes.Buffer
	w, err := Compress(&buf, c)
	must(t, err)
	for part := range slices.Chunk(data, step) {
		_, err := w.Write(part)
		must(t, err)
	}
	must(t, w.Close())
	return buf.Bytes()
}

func TestCompressionsThatDoNotExistAreRefused(t *testing.T) {
	ten, minus := 10, -1
	for _, c := range []Compression{{Codec: "xz"}, {Level: &ten}, {Level: &minus}, {Codec: None, Level: &ten}} {
		if w, err := Compress(io.Discard, c); err == nil {
			w.Close()
			t.Errorf("%s was taken", c)
		}
	}
}

func TestAHugeZstdWindowIsRefused(t *testing.T) {
	var buf bytes.Buffer
	w, err := zstd.NewWriter(&buf, zstd.WithWindowSize(zstd.MaxWindowSize), zstd.WithSingleSegment(false))
	must(t, err)
	_, err = w.Write(make([]byte, 1<<20))
	must(t, err)
	must(t, w.Flush())
	must(t, w.Close())
	r, err := Decompress(&buf)
	if err == nil {
		_, err = io.Copy(io.Discard, r)
	}
	if err == nil {
		t.Errorf("a stream that wants %d bytes of memory was accepted", zstd.MaxWindowSize)
	}
}

func FuzzUnpack(f *testing.F) {
	f.Add(stream(f, dir("d"), file("d/f", "1"), symlink("s", "../sentinels"), file("s/f", "evil"), link("h", "d/f")))
	f.Add(stream(f, symlink("s", ".."), wh("s/sentinel"), opq("s"), wh("d")))
	f.Add(stream(f, link("h", "../sentinel"), file("h", "evil")))
	f.Add(stream(f, fifo("p"), dir("p"), opq("p"), symlink("p", "/"), file("p/p/p", "x")))
	for seed := range uint64(3) {
		f.Add(stream(f, randomLayer(rand.New(rand.NewPCG(seed, 1)))...))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		root := newRoot(t)
		before := sentinels(t, root)
		o := UnpackOptions{Single: nstest.Single(), MaxBytes: 1 << 20, MaxEntries: 1000}
		err := unpackWith(t.Context(), root, bytes.NewReader(data), o)
		if after := sentinels(t, root); after != before {
			t.Fatalf("files outside changed\n%s\n%s", before, after)
		}
		if err != nil {
			return
		}
		if err := Diff(t.Context(), root, io.Discard, DiffOptions{Single: nstest.Single()}); err != nil {
			t.Fatalf("what was unpacked cannot be written: %v", err)
		}
	})
}

// A layer that ends where umoci gave up would look complete: what follows is lost without a word.
func TestLayerThatCannotBeWrittenWholeIsAnError(t *testing.T) {
	upper := t.TempDir()
	for _, name := range []string{"a", ".wh.b", "c"} {
		if err := os.WriteFile(filepath.Join(upper, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	err := Diff(t.Context(), upper, io.Discard, DiffOptions{})
	var hinted interface{ Hint() string }
	if err == nil || !strings.Contains(err.Error(), ".wh.b") || !errors.As(err, &hinted) {
		t.Errorf("error is %v: the layer lacks files and nobody is told", err)
	}
}
