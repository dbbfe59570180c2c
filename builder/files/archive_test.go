package files

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/go-archive"
	"github.com/moby/go-archive/chrootarchive"
	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/snapshot/layer"
)

func header(kind byte, name string, change ...func(*tar.Header)) tar.Header {
	h := tar.Header{Typeflag: kind, Name: name, Mode: 0o644, ModTime: planted, Format: tar.FormatPAX}
	if kind == tar.TypeDir {
		h.Mode = 0o755
	}
	for _, c := range change {
		c(&h)
	}
	return h
}

func to(target string) func(*tar.Header) { return func(h *tar.Header) { h.Linkname = target } }
func mode_(m int64) func(*tar.Header)    { return func(h *tar.Header) { h.Mode = m } }
func at(t time.Time) func(*tar.Header)   { return func(h *tar.Header) { h.ModTime = t } }

func by(uid, gid int) func(*tar.Header) {
	return func(h *tar.Header) {
		if !singleID() {
			h.Uid, h.Gid = uid, gid
		}
	}
}

func attr(name, value string) func(*tar.Header) {
	return func(h *tar.Header) { h.PAXRecords = map[string]string{"SCHILY.xattr." + name: value} }
}

// pack makes an archive; a file contains its name.
func pack(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(h.Name))
		}
		must(t, w.WriteHeader(&h))
		if h.Typeflag == tar.TypeReg {
			_, err := io.WriteString(w, h.Name)
			must(t, err)
		}
	}
	must(t, w.Close())
	return b.Bytes()
}

func add(src, dst string) plan.Copy {
	return with(dockerfile(src, dst), func(c *plan.Copy) { c.Unpack = true })
}

const (
	reg, dir, sym, lnk, fifo = tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeFifo
)

// TestAddUnpacksAsBuildKitDoes compares with the library and the options that BuildKit uses for local archives.
func TestAddUnpacksAsBuildKitDoes(t *testing.T) {
	archives := map[string][]tar.Header{
		"tree": {
			header(dir, "./", mode_(0o700), by(77, 88)), header(dir, "d", mode_(0o2750), by(77, 88)), header(reg, "d/f", mode_(0o4755), by(77, 88)),
			header(sym, "d/l", to("f"), by(77, 88)), header(lnk, "d/h", to("d/f"), mode_(0o4755), by(77, 88)), header(fifo, "d/p", mode_(0o600)),
			header(reg, "implied/above/f", by(5, 5)), header(dir, "late", at(planted.Add(time.Hour))), header(reg, "late/x"),
		},
		"names":        {header(reg, ".wh.deleted"), header(reg, ".wh..wh..opq"), header(reg, "/absolute"), header(reg, "./a/../b"), header(reg, "sp ace")},
		"over file":    {header(dir, "file"), header(reg, "file/in")},
		"over dir":     {header(reg, "full")},
		"merge dir":    {header(dir, "full", mode_(0o711)), header(reg, "full/new")},
		"twice":        {header(reg, "x", mode_(0o600)), header(reg, "x", mode_(0o755)), header(sym, "x", to("y"))},
		"through link": {header(reg, "link/new"), header(reg, "abslink/new2")},
		"over link":    {header(dir, "link"), header(reg, "link/in")},
		"own link":     {header(sym, "s", to("/full")), header(reg, "s/in")},
		"links":        {header(sym, "s", to("nowhere")), header(lnk, "h", to("s")), header(sym, "abs", to("/etc/passwd")), header(reg, "hard"), header(lnk, "sub/h2", to("/hard"))},
		"attributes":   {header(reg, "x", attr("user.note", "hi")), header(dir, "y", attr("user.colour", "red"))},
		"root slash":   {header(dir, "/", mode_(0o711), by(3, 4))},
		"old":          {header(reg, "old", at(time.Unix(-5, 0))), header(reg, "nano", at(planted.Add(123456789)))},
		"link missing": {header(lnk, "h", to("missing"))},
		"leads out":    {header(reg, "../out")},
		"leads out 2":  {header(reg, "a/../../out")},
		"only dots":    {header(dir, "..")},
		"device":       {header(tar.TypeChar, "null", func(h *tar.Header) { h.Devmajor, h.Devminor = 1, 3 })},
		"odd type":     {header('9', "odd")},
		"global":       {{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}, header(reg, "x")},
	}
	existing := []string{"f file", "f full/old", "l link full", "l abslink /full", "d app", "f app/file", "d app/full", "l app/abslink /full", "l app/link ../../full"}
	// BuildKit takes a leading ".." off, and it fails at a link to a directory that is not there, which we make.
	deliberate := map[string]bool{"leads out": true, "leads out 2": true, "only dots": true, "own link": true}
	fresh := newForest(t)
	for name, headers := range archives {
		src := plant(t, fresh.dir())
		must(t, os.WriteFile(filepath.Join(src, "a.tar"), pack(t, headers...), 0o644))
		for _, dst := range []string{"/", "/new/er", "/app/"} {
			for _, owner := range []*plan.Owner{nil, {}} {
				want, got := plant(t, fresh.dir(), existing...), plant(t, fresh.dir(), existing...)
				wantErr := referenceUnpack(t, filepath.Join(src, "a.tar"), filepath.Join(want, dst), owner)
				c := with(add("/a.tar", dst), func(c *plan.Copy) { c.Owner = owner })
				gotErr := Apply(t.Context(), got, []plan.Action{c}, func(plan.Ref) (Tree, error) { return Tree{Dir: src}, nil }, Options{Single: singleID()})
				if (wantErr == nil) != (gotErr == nil) {
					if !deliberate[name] {
						t.Errorf("%s to %s: got error %v, BuildKit %v", name, dst, gotErr, wantErr)
					}
					continue
				}
				if gotErr != nil {
					continue
				}
				// Its way into the chroot changes the time of the destination; that is no part of the meaning.
				for _, root := range []string{want, got} {
					must(t, lutime(filepath.Join(root, dst), planted))
				}
				if d := cmp.Diff(take(t, want, true), take(t, got, true)); d != "" {
					t.Errorf("%s to %s: differs from BuildKit (-want +got):\n%s", name, dst, d)
				}
			}
		}
	}
}

func referenceUnpack(t *testing.T, file, dst string, owner *plan.Owner) error {
	t.Helper()
	mask := unix.Umask(0)
	defer unix.Umask(mask)
	must(t, os.MkdirAll(dst, 0o755))
	f, err := os.Open(file)
	must(t, err)
	defer f.Close()
	o := &archive.TarOptions{BestEffortXattrs: true}
	if owner != nil {
		o.ChownOpts = &archive.ChownOpts{UID: owner.UID, GID: owner.GID}
	}
	return chrootarchive.Untar(f, dst, o)
}

func compressed(t testing.TB, plain []byte, with func(io.Writer) (io.WriteCloser, error)) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := with(&b)
	must(t, err)
	_, err = w.Write(plain)
	must(t, err)
	must(t, w.Close())
	return b.Bytes()
}

// bz2 is an archive of the file bz.txt; the standard library only reads bzip2.
const bz2 = "QlpoOTFBWSZTWeYAh2cAAHv7kMkQAEBAAX8AABBwAJ5QBAAACCAAdQ1NHqTQY1G1DTIJJR6IyAGTQVPmk96EEYCEjJn0YrtDGKBDI8uD3VxAxVHBiHt03EEjBZBDGRo8WmouPa0wRbF/szzVyQfi7kinChIcwBDs4A=="

// A descriptor that is closed by mistake is somebody else's the next time a file is opened.
func TestUnpackingAnArchiveClosesOnlyWhatItOpened(t *testing.T) {
	var before, after unix.Stat_t
	if err := unix.Fstat(0, &before); err != nil {
		t.Fatal(err)
	}
	src, root := t.TempDir(), t.TempDir()
	must(t, os.WriteFile(filepath.Join(src, "a.tar"), pack(t, header(reg, "x")), 0o644))
	err := Apply(t.Context(), root, []plan.Action{add("/a.tar", "/")}, func(plan.Ref) (Tree, error) { return Tree{Dir: src}, nil }, Options{Single: singleID()})
	must(t, err)
	if err := unix.Fstat(0, &after); err != nil || before.Ino != after.Ino || before.Dev != after.Dev {
		t.Fatalf("descriptor 0 was closed (%v): a later step would read or write another file through it", err)
	}
}

func TestAddKnowsArchivesByTheirContent(t *testing.T) {
	plain := pack(t, header(reg, "inside"))
	bz, err := base64.StdEncoding.DecodeString(bz2)
	must(t, err)
	xzip := func(w io.Writer) (io.WriteCloser, error) { return xz.NewWriter(w) }
	gz := compressed(t, plain, func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil })
	xzed := compressed(t, plain, xzip)
	for name, tt := range map[string]struct {
		content []byte
		want    string // "" if it is no archive
	}{
		"plain":       {plain, "inside"},
		"gzip":        {gz, "inside"},
		"bzip2":       {bz, "bz.txt"},
		"xz":          {xzed, "inside"},
		"xz streams":  {append(compressed(t, plain[:512], xzip), append(make([]byte, 8), compressed(t, plain[512:], xzip)...)...), "inside"},
		"xz no check": {compressed(t, plain, func(w io.Writer) (io.WriteCloser, error) { return xz.WriterConfig{NoCheckSum: true}.NewWriter(w) }), "inside"},
		"xz sha256": {compressed(t, plain, func(w io.Writer) (io.WriteCloser, error) {
			return xz.WriterConfig{CheckSum: xz.SHA256, BlockSize: 700}.NewWriter(w)
		}), "inside"},
		"zstd":          {zstd(t, plain), "inside"},
		"text":          {[]byte("hello"), ""},
		"empty":         {nil, ""},
		"empty archive": {pack(t), ""},
		"gzip of text":  {compressed(t, []byte("hello"), func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil }), ""},
		"cut gzip":      {gz[:20], ""},
		"cut xz":        {xzed[:40], ""},
		"zeros":         {make([]byte, 4096), ""},
	} {
		p := newPrison(t, nil, nil)
		must(t, os.WriteFile(filepath.Join(p.src, "a"), tt.content, 0o644))
		if err := p.apply(t, add("/a", "/x/")); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		want := tt.want
		if want == "" {
			want = "a"
		}
		if _, err := os.Lstat(filepath.Join(p.root, "x", want)); err != nil {
			t.Errorf("%s: no file %q but %q", name, want, take(t, p.root, false))
		}
	}
}

func zstd(t testing.TB, plain []byte) []byte {
	return compressed(t, plain, func(w io.Writer) (io.WriteCloser, error) {
		return layer.Compress(w, layer.Compression{Codec: layer.Zstd})
	})
}

// wantsMemory changes the size of the dictionary in the first block of an xz file, which is not what its sum says.
func wantsMemory(xz []byte, bits byte) []byte {
	b := bytes.Clone(xz)
	b[12+4] = bits
	return b
}

func TestAnXZFileThatNeedsMuchMemoryIsRefused(t *testing.T) {
	good := compressed(t, []byte(strings.Repeat("hello", 1000)), func(w io.Writer) (io.WriteCloser, error) { return xz.NewWriter(w) })
	if err := checkXZ(bytes.NewReader(good)); err != nil {
		t.Fatal(err)
	}
	if err := checkXZ(bytes.NewReader(wantsMemory(good, 30))); err != nil {
		t.Errorf("128 MiB: %v", err)
	}
	for bits := byte(31); bits <= 64; bits++ {
		err := checkXZ(bytes.NewReader(wantsMemory(good, bits)))
		if err == nil || !strings.Contains(err.Error(), "memory") {
			t.Errorf("dictionary %d: %v: the decoder allocates up to 4 GiB", bits, err)
		}
	}
	p := newPrison(t, nil, nil)
	must(t, os.WriteFile(filepath.Join(p.src, "a.tar.xz"), wantsMemory(good, 38), 0o644))
	if err := p.apply(t, add("/a.tar.xz", "/x/")); err == nil || err.Error() != "unpack /a.tar.xz: decompressing it takes 2048 MiB of memory, and 128 are allowed" {
		t.Errorf("got %v: an archive must not be copied as a file because it is large", err)
	}
	second := append(bytes.Clone(good), wantsMemory(good, 40)...)
	if err := checkXZ(bytes.NewReader(second)); err == nil {
		t.Error("the second stream may take 4 GiB")
	}
}

func FuzzXZ(f *testing.F) {
	for _, plain := range []string{"", "hello", strings.Repeat("abc", 50000)} {
		f.Add(compressed(f, []byte(plain), func(w io.Writer) (io.WriteCloser, error) { return xz.NewWriter(w) }))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		// What the decoder accepts the scanner must have understood, or its limit means nothing.
		checked := checkXZ(bytes.NewReader(b))
		if checked == nil || strings.Contains(checked.Error(), "memory") {
			return
		}
		r, err := xz.NewReader(bytes.NewReader(b))
		if err != nil {
			return
		}
		// At the end of a file that is cut after its header the decoder has no complaint, and no content.
		if n, err := io.Copy(io.Discard, r); err == nil && n > 0 {
			t.Errorf("the decoder reads what the scanner does not: %v", checked)
		}
	})
}

func TestHostileArchivesStayInTheirDirectory(t *testing.T) {
	out := strings.Repeat("../", 30)
	for name, headers := range map[string][]tar.Header{
		"climb":              {header(reg, out+"secret")},
		"climb inside":       {header(reg, "a/"+out+"secret")},
		"link then file":     {header(sym, "l", to("OUTSIDE")), header(reg, "l/secret")},
		"climbing link":      {header(sym, "l", to("CLIMB")), header(reg, "l/secret")},
		"link over the file": {header(sym, "l", to("OUTSIDE/secret")), header(reg, "l")},
		"hard link out":      {header(lnk, "h", to("OUTSIDE/secret")), header(reg, "h")},
		"hard link climbs":   {header(lnk, "h", to("CLIMB/secret"))},
		"hard through link":  {header(sym, "l", to("OUTSIDE")), header(lnk, "h", to("l/secret"), mode_(0o777))},
		"dir through link":   {header(sym, "l", to("OUTSIDE")), header(dir, "l/home", mode_(0o777))},
		"dir over link":      {header(sym, "l", to("OUTSIDE")), header(dir, "l", mode_(0o777)), header(reg, "l/secret")},
		"link chain":         {header(sym, "a", to("b")), header(sym, "b", to("c/..")), header(sym, "c", to("OUTSIDE/home")), header(reg, "a/secret")},
		"proc":               {header(sym, "l", to("/proc/self/root/OUTSIDE")), header(reg, "l/secret")},
		"late dir time":      {header(dir, "d", at(time.Unix(1, 0))), header(sym, "d", to("OUTSIDE"))},
		"overlay attributes": {header(dir, "d", attr("user.overlay.opaque", "y")), header(reg, "f", attr("user.rootlesscontainers", "x"))},
	} {
		for _, dst := range []string{"/", "/sub/", "/link/"} {
			p := newPrison(t, []string{"d sub", "l link OUTSIDE", "l sub/l OUTSIDE"}, nil)
			for i := range headers {
				for _, s := range []*string{&headers[i].Name, &headers[i].Linkname} {
					*s = strings.NewReplacer("OUTSIDE", p.outside, "CLIMB", out+p.outside[1:]).Replace(*s)
				}
			}
			must(t, os.WriteFile(filepath.Join(p.src, "a.tar"), pack(t, headers...), 0o644))
			_ = p.apply(t, add("/a.tar", dst))
			p.check(t)
			for _, line := range take(t, p.root, false) {
				if strings.Contains(line, "user.overlay") || strings.Contains(line, "rootlesscontainers") {
					t.Errorf("%s: the archive steers the snapshot: %s", name, line)
				}
			}
		}
	}
}
