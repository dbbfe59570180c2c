package image

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestMain lets the test binary be the other processes of a test.
func TestMain(m *testing.M) {
	switch os.Getenv("COOPER_TEST_CHILD") {
	case "tag":
		childTag(os.Args[1], os.Args[2])
	case "write":
		childWrite(os.Args[1])
	case "everything":
		if err := storeEverything(os.Args[1]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	case "full":
		childFull(os.Args[1])
	default:
		os.Exit(m.Run())
	}
}

func child(t *testing.T, mode string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), "COOPER_TEST_CHILD="+mode)
	cmd.Stderr = os.Stderr
	return cmd
}

func descriptorOf(mediaType string, b []byte) ocispec.Descriptor {
	sum := sha256.Sum256(b)
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.Digest("sha256:" + hex.EncodeToString(sum[:])), Size: int64(len(b))}
}

func newLayout(t *testing.T) *Layout {
	t.Helper()
	l, err := CreateLayout(filepath.Join(t.TempDir(), "layout"))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *Layout) path(d digest.Digest) string {
	return filepath.Join(l.dir, blobsDir, d.Encoded())
}

// checkLayout is the invariant: every file below blobs/ hashes to its name, index.json is valid and all it
// names is there.
func checkLayout(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(dir, blobsDir))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, blobsDir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if got := descriptorOf("", b).Digest.Encoded(); got != e.Name() {
			t.Errorf("blob %s has digest %s", e.Name(), got)
		}
	}
	l, err := OpenLayout(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	idx, err := l.Index()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range idx.Manifests {
		if !l.Has(d) {
			t.Errorf("index.json names %s, which is not there", d.Digest)
		}
	}
}

func noTemps(t *testing.T, dir string) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, tempPrefix+"*"))
	if err != nil || len(found) > 0 {
		t.Errorf("temporary files stay behind: %v %v", found, err)
	}
}

func TestBlobComesBackAsItWent(t *testing.T) {
	l := newLayout(t)
	want := []byte("a layer")
	d, err := l.WriteBlob("application/x", want)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(descriptorOf("application/x", want), d); diff != "" {
		t.Errorf("descriptor (-want +got):\n%s", diff)
	}
	got, err := l.ReadAll(d, 100)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	if err := l.Ingest(d, bytes.NewReader(want)); err != nil {
		t.Errorf("the same blob again: %v", err)
	}
	if _, err := l.ReadAll(d, 3); err == nil {
		t.Error("a document larger than allowed was read")
	}
	noTemps(t, l.dir)
	checkLayout(t, l.dir)
}

func TestBlobWriterDiscardLeavesNothing(t *testing.T) {
	l := newLayout(t)
	w, err := l.NewBlob()
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, "half")
	w.Discard()
	if _, err := w.Commit(""); err == nil {
		t.Error("a discarded blob was committed")
	}
	if l.Has(descriptorOf("", []byte("half"))) {
		t.Error("a discarded blob is there")
	}
	noTemps(t, l.dir)
}

func TestIngestRefusesWrongBytes(t *testing.T) {
	good := []byte("0123456789")
	for name, body := range map[string]string{
		"wrong": "0123456780", "short": "012345678", "long": "01234567890", "empty": "",
	} {
		t.Run(name, func(t *testing.T) {
			l := newLayout(t)
			d := descriptorOf("", good)
			var content *ContentError
			if err := l.Ingest(d, strings.NewReader(body)); !errors.As(err, &content) || content.Digest != d.Digest {
				t.Errorf("got %v, want a ContentError for %s", err, d.Digest)
			}
			if l.Has(d) {
				t.Error("a stranger's bytes are in the store under a trusted digest")
			}
			noTemps(t, l.dir)
			if err := l.Ingest(d, bytes.NewReader(good)); err != nil {
				t.Fatal(err)
			}
			if err := l.Ingest(d, strings.NewReader(body)); err == nil {
				t.Error("wrong bytes were accepted because the blob was there already")
			}
		})
	}
}

func TestCorruptBlobOfTheSameSizeIsFoundAndReplaced(t *testing.T) {
	for name, reopen := range map[string]bool{"same process": false, "next process": true} {
		t.Run(name, func(t *testing.T) {
			l := newLayout(t)
			good := bytes.Repeat([]byte("x"), 1000)
			d, err := l.WriteBlob("", good)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(l.path(d.Digest), make([]byte, 1000), 0o644); err != nil {
				t.Fatal(err)
			}
			if reopen {
				if l, err = CreateLayout(l.dir); err != nil {
					t.Fatal(err)
				}
			}
			if l.Has(d) {
				t.Fatal("a blob of zeros passes for the real one")
			}
			if _, err := l.ReadAll(d, 2000); err == nil {
				t.Error("a blob of zeros was read without an error")
			}
			if err := l.Ingest(d, bytes.NewReader(good)); err != nil {
				t.Fatal(err)
			}
			if !l.Has(d) {
				t.Error("the corrupt blob was not replaced")
			}
			checkLayout(t, l.dir)
		})
	}
}

func TestVerifiedMarkerIsBelievedOnlyForTheVerifiedFile(t *testing.T) {
	l := newLayout(t)
	d, err := l.WriteBlob("", []byte("content"))
	if err != nil {
		t.Fatal(err)
	}
	again, err := CreateLayout(l.dir)
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(l.path(d.Digest))
	if err != nil {
		t.Fatal(err)
	}
	if !again.wasVerified(d.Digest, stampOf(fi)) {
		t.Error("the marker of a good blob is not found, so every build hashes the whole store")
	}
	stranger, err := OpenLayout(l.dir)
	if err != nil {
		t.Fatal(err)
	}
	if stranger.wasVerified(d.Digest, stampOf(fi)) {
		t.Error("a marker in a stranger's layout is believed")
	}
	// Restoring mtime, as a careful vandal would, does not restore ctime.
	if err := os.WriteFile(l.path(d.Digest), []byte("CONTENT"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(l.path(d.Digest), time.Time{}, fi.ModTime()); err != nil {
		t.Fatal(err)
	}
	if again.Has(d) {
		t.Error("a changed blob is taken for verified")
	}
}

func TestDigestsThatAreNoDigestsReachNoPath(t *testing.T) {
	l := newLayout(t)
	secret := filepath.Join(filepath.Dir(l.dir), "secret")
	if err := os.WriteFile(secret, []byte("s"), 0o600); err != nil {
		t.Fatal(err)
	}
	hex64 := strings.Repeat("a", 64)
	for _, bad := range []string{
		"", "sha256:", "sha256:../../../secret", "sha256:" + hex64[:63], "sha256:" + hex64 + "a", "sha256:" + strings.ToUpper(hex64),
		"md5:" + hex64[:32], "sha512:" + hex64 + hex64, "SHA256:" + hex64, hex64, "sha256:" + hex64[:61] + "/..", "sha256:" + hex64[:63] + "\x00",
	} {
		d := ocispec.Descriptor{Digest: digest.Digest(bad), Size: 1}
		if l.Has(d) {
			t.Errorf("Has(%q)", bad)
		}
		if r, err := l.Open(d); err == nil {
			r.Close()
			t.Errorf("Open(%q) opened a file outside the blobs", bad)
		}
		if err := l.Ingest(d, strings.NewReader("s")); err == nil {
			t.Errorf("Ingest(%q) wrote a file", bad)
		}
		if err := l.Tag("x", d); err == nil {
			t.Errorf("Tag accepted %q", bad)
		}
		if _, err := l.Resolve(bad); err == nil {
			t.Errorf("Resolve(%q)", bad)
		}
	}
}

func TestBlobThatIsNoRegularFileIsRefused(t *testing.T) {
	for name, plant := range map[string]func(path, secret string) error{
		"symlink":          func(path, secret string) error { return os.Symlink(secret, path) },
		"relative symlink": func(path, secret string) error { return os.Symlink("../../../secret", path) },
		"fifo":             func(path, _ string) error { return syscall.Mkfifo(path, 0o644) },
		"directory":        func(path, _ string) error { return os.Mkdir(path, 0o755) },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLayout(t)
			b := []byte("the user's secret")
			d := descriptorOf("", b)
			secret := filepath.Join(filepath.Dir(l.dir), "secret")
			if err := os.WriteFile(secret, b, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := plant(l.path(d.Digest), secret); err != nil {
				t.Fatal(err)
			}
			if l.Has(d) {
				t.Error("a file outside the layout passes for a blob")
			}
			if r, err := l.Open(d); err == nil {
				r.Close()
				t.Error("a stranger's layout made us read the user's secret")
			}
		})
	}
}

func TestLayoutIsNotMadeAmongOtherFiles(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "thesis.tex"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	var not *NotLayoutError
	if _, err := CreateLayout(dir); !errors.As(err, &not) || not.Entry != "thesis.tex" || not.Hint() == "" {
		t.Errorf("got %v, want a NotLayoutError with a hint", err)
	}
	entries, _ := os.ReadDir(dir)
	if len(entries) != 1 {
		t.Errorf("the directory was changed: %v", entries)
	}
	if _, err := OpenLayout(dir); err == nil {
		t.Error("a directory without oci-layout was opened")
	}
	if err := os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"2.0.0"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := CreateLayout(dir); err == nil || !strings.Contains(err.Error(), "2.0.0") {
		t.Errorf("got %v, want a complaint about version 2.0.0", err)
	}
}

func TestTagMovesAndResolveFinds(t *testing.T) {
	l := newLayout(t)
	one, _ := l.WriteBlob(ocispec.MediaTypeImageManifest, []byte("1"))
	two, _ := l.WriteBlob(ocispec.MediaTypeImageManifest, []byte("2"))
	for _, step := range []struct {
		tag string
		d   ocispec.Descriptor
	}{{"a", one}, {"b", one}, {"a", two}, {"a", two}} {
		if err := l.Tag(step.tag, step.d); err != nil {
			t.Fatal(err)
		}
	}
	idx, err := l.Index()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range idx.Manifests {
		got = append(got, d.Annotations[ocispec.AnnotationRefName]+"="+d.Digest.String())
	}
	want := []string{"a=" + two.Digest.String(), "b=" + one.Digest.String()}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("index.json (-want +got):\n%s", diff)
	}
	if d, err := l.Resolve("a"); err != nil || d.Digest != two.Digest {
		t.Errorf("Resolve(a) = %s, %v", d.Digest, err)
	}
	if d, err := l.Resolve(one.Digest.String()); err != nil || d.Digest != one.Digest {
		t.Errorf("Resolve(digest) = %s, %v", d.Digest, err)
	}
	if _, err := l.Resolve("c"); !errors.Is(err, ErrNotFound) {
		t.Errorf("Resolve(c): got %v, want ErrNotFound", err)
	}
	if _, err := l.Resolve(""); !errors.Is(err, ErrNotFound) {
		t.Errorf("Resolve of no name: got %v, want ErrNotFound", err)
	}
}

func TestUpdateThatFailsChangesNothing(t *testing.T) {
	l := newLayout(t)
	before, _ := os.ReadFile(filepath.Join(l.dir, "index.json"))
	stop := errors.New("stop")
	err := l.Update(func(idx *ocispec.Index) error {
		idx.Manifests = append(idx.Manifests, descriptorOf("", nil))
		return stop
	})
	after, _ := os.ReadFile(filepath.Join(l.dir, "index.json"))
	if !errors.Is(err, stop) || !bytes.Equal(before, after) {
		t.Errorf("got %v, index.json %s -> %s", err, before, after)
	}
}

const tagsPerProcess = 25

func childTag(dir, prefix string) {
	l, err := CreateLayout(dir)
	for i := 0; err == nil && i < tagsPerProcess; i++ {
		var d ocispec.Descriptor
		if d, err = l.WriteBlob("", []byte(fmt.Sprint("same for all ", i))); err == nil {
			err = l.Tag(fmt.Sprint(prefix, i), d)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func TestProcessesTagAtOnceWithoutLosingAny(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "layout")
	var wg sync.WaitGroup
	for _, prefix := range []string{"a", "b", "c"} {
		wg.Go(func() {
			if out, err := child(t, "tag", dir, prefix).Output(); err != nil {
				t.Errorf("process %s: %v %s", prefix, err, out)
			}
		})
	}
	wg.Wait()
	l, err := OpenLayout(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, prefix := range []string{"a", "b", "c"} {
		for i := range tagsPerProcess {
			if _, err := l.Resolve(fmt.Sprint(prefix, i)); err != nil {
				t.Errorf("a tag that was set is lost: %v", err)
			}
		}
	}
	checkLayout(t, dir)
	noTemps(t, dir)
}

// childWrite writes and tags without end until it is killed.
func childWrite(dir string) {
	fmt.Println("go")
	for i := 0; ; i++ {
		l, err := CreateLayout(dir)
		var d ocispec.Descriptor
		if err == nil {
			d, err = l.WriteBlob("", bytes.Repeat([]byte{byte(i), byte(i >> 8)}, 50_000))
		}
		if err == nil {
			err = l.Tag(fmt.Sprint("tag", i%3), d)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		l.Close()
	}
}

func TestKilledWriterLeavesAValidLayout(t *testing.T) {
	for i := range 12 {
		dir := filepath.Join(t.TempDir(), "layout")
		cmd := child(t, "write", dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		io.ReadFull(out, make([]byte, 3))
		time.Sleep(time.Duration(i*i) * time.Millisecond / 2)
		cmd.Process.Kill()
		cmd.Wait()

		l, err := CreateLayout(dir) // what the next build does
		if err != nil {
			t.Fatalf("killed after %d ms: %v", i*i/2, err)
		}
		l.Close()
		checkLayout(t, dir)
		noTemps(t, dir)
	}
}

// childFull writes to a layout with a limit on the size of files, as a full disk has.
func childFull(dir string) {
	signal.Ignore(syscall.SIGXFSZ)
	limit := syscall.Rlimit{Cur: 20_000, Max: 20_000}
	l, err := CreateLayout(dir)
	if err == nil {
		err = syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	big := bytes.Repeat([]byte("x"), 30_000)
	_, err = l.WriteBlob("", big)
	fmt.Println("write:", err)
	fmt.Println("ingest:", l.Ingest(descriptorOf("", big), bytes.NewReader(big)))
	fmt.Println("index:", l.Update(func(idx *ocispec.Index) error {
		for i := range 200 {
			idx.Manifests = append(idx.Manifests, descriptorOf("", fmt.Append(nil, i)))
		}
		return nil
	}))
}

func TestFullDiskLeavesAValidLayoutAndIsReported(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "layout")
	out, err := child(t, "full", dir).Output()
	if err != nil {
		t.Fatal(err, string(out))
	}
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		if !strings.Contains(line, "file too large") || !strings.Contains(line, dir) {
			t.Errorf("got %q, want an error that names the layout and the reason", line)
		}
	}
	checkLayout(t, dir)
	noTemps(t, dir)
}

func TestSweepSparesFilesThatAreBeingWritten(t *testing.T) {
	l := newLayout(t)
	w, err := l.NewBlob()
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, "slow")
	stale := filepath.Join(l.dir, tempPrefix+"stale")
	if err := os.WriteFile(stale, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	other, err := CreateLayout(l.dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(stale); err == nil {
		t.Error("the file of a dead process was not removed")
	}
	d, err := w.Commit("")
	if err != nil {
		t.Fatalf("another process took away what we were writing: %v", err)
	}
	if !other.Has(d) {
		t.Error("the blob is not there")
	}
}

func TestConfusedDocumentsAreRefused(t *testing.T) {
	hex64 := strings.Repeat("a", 64)
	config := `"config":{"mediaType":"x","size":1,"digest":"sha256:` + hex64 + `"}`
	for name, c := range map[string]struct {
		doc    string
		claims []string
	}{
		"manifest and index":          {`{"schemaVersion":2,` + config + `,"layers":[],"manifests":[]}`, nil},
		"index with layers":           {`{"schemaVersion":2,"layers":[],"manifests":[]}`, nil},
		"neither":                     {`{"schemaVersion":2}`, nil},
		"index called manifest":       {`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","manifests":[]}`, nil},
		"manifest called index":       {`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `",` + config + `,"layers":[]}`, nil},
		"announced as another":        {`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":[]}`, []string{ocispec.MediaTypeImageManifest}},
		"served as another":           {`{"schemaVersion":2,"manifests":[]}`, []string{"", ocispec.MediaTypeImageManifest + "; charset=utf-8"}},
		"two claims":                  {`{"schemaVersion":2,"manifests":[]}`, []string{ocispec.MediaTypeImageIndex, dockerManifestList}},
		"field twice":                 {`{"schemaVersion":2,"manifests":[],"manifests":[{}]}`, nil},
		"field twice by case":         {`{"schemaVersion":2,"manifests":[],"Manifests":[{}]}`, nil},
		"field twice by unicode fold": {`{"schemaVersion":2,"manifests":[],"manifest\u017f":[{}]}`, nil},
		"schema 1":                    {`{"schemaVersion":1,"fsLayers":[]}`, nil},
		"more after it":               {`{"schemaVersion":2,"manifests":[]}{}`, nil},
		"array":                       {`[]`, nil},
		"media type of neither":       {`{"schemaVersion":2,"mediaType":"text/html","manifests":[]}`, nil},
		"empty":                       {``, nil},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := classify([]byte(c.doc), c.claims...); err == nil {
				t.Errorf("taken for %s; another tool may take it for something else and check another image than runs", got)
			}
		})
	}
	if got, err := classify([]byte(`{"schemaVersion":2,"manifests":[]}`), "application/octet-stream"); err != nil || got != ocispec.MediaTypeImageIndex {
		t.Errorf("a plain index: got %s, %v", got, err)
	}
}

// FuzzClassify checks that a document taken for one kind cannot be read as the other.
func FuzzClassify(f *testing.F) {
	for _, seed := range []string{
		`{"schemaVersion":2,"manifests":[]}`, `{"config":{},"layers":[]}`, `{"config":{},"layers":[],"Manifests":[{}]}`,
		`{"mediaType":"` + dockerManifest + `","config":{},"layers":[]}`, `{"manifests":[],"config":null}`, `[`, `{"a":1}{"b":2}`,
	} {
		f.Add([]byte(seed), ocispec.MediaTypeImageIndex)
	}
	f.Fuzz(func(t *testing.T, b []byte, claim string) {
		kind, err := classify(b, claim)
		if err != nil {
			return
		}
		var both struct {
			Config    json.RawMessage `json:"config"`
			Layers    json.RawMessage `json:"layers"`
			Manifests json.RawMessage `json:"manifests"`
		}
		if err := json.Unmarshal(b, &both); err != nil {
			t.Fatalf("%q is taken for %s and is not JSON: %v", b, kind, err)
		}
		manifest, index := both.Config != nil || both.Layers != nil, both.Manifests != nil
		if manifest == index || isIndex(kind) != index || isManifest(kind) != manifest {
			t.Errorf("%q is taken for %s; as a manifest: %v, as an index: %v", b, kind, manifest, index)
		}
		parseIndex(b)
		parseManifest(b)
	})
}
