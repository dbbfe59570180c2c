package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// storeImage stores an image of one layer under a name.
func storeImage(l *Layout, name, content string) (manifest, layer ocispec.Descriptor, err error) {
	layer, err = l.WriteBlob(ocispec.MediaTypeImageLayer, []byte(content))
	if err != nil {
		return
	}
	config, err := l.WriteBlob(ocispec.MediaTypeImageConfig, []byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}`))
	if err != nil {
		return
	}
	text := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[{"mediaType":%q,"digest":%q,"size":%d}]}`,
		ocispec.MediaTypeImageManifest, config.MediaType, config.Digest, config.Size, layer.MediaType, layer.Digest, layer.Size)
	if manifest, err = l.WriteBlob(ocispec.MediaTypeImageManifest, []byte(text)); err != nil {
		return
	}
	return manifest, layer, l.Tag(name, manifest)
}

// storeEverything takes every way on which a store's layout changes.
func storeEverything(dir string) error {
	l, err := CreateLayout(dir)
	if err != nil {
		return err
	}
	_, old, err := storeImage(l, "docker.io/library/a:latest", "old")
	if err == nil {
		_, _, err = storeImage(l, "docker.io/library/a:latest", "new")
	}
	if err == nil {
		err = l.Release()
	}
	if err == nil {
		_, err = l.Remover().Remove(old.Digest)
	}
	return errors.Join(err, l.Close())
}

func TestOnlyWhatNobodyNeedsIsRemoved(t *testing.T) {
	l := newLayout(t)
	_, old, err := storeImage(l, "docker.io/library/a:latest", "old")
	if err != nil {
		t.Fatal(err)
	}
	_, kept, err := storeImage(l, "docker.io/library/a:latest", "new")
	if err != nil {
		t.Fatal(err)
	}
	pruner, err := CreateLayout(l.dir)
	if err != nil {
		t.Fatal(err)
	}
	remove := func(d ocispec.Descriptor) bool {
		t.Helper()
		ok, err := pruner.Remover().Remove(d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		return ok
	}
	if remove(old) || !l.Has(old) {
		t.Error("a blob was removed under the hands of the process that wrote it: its image would lack a layer")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if remove(kept) {
		t.Error("a layer of a tagged image was removed")
	}
	if !remove(old) || pruner.Has(old) {
		t.Error("a blob that nobody needs stays")
	}
	if ok, err := pruner.Forget(kept.Digest); !ok || err != nil { // no image: nothing happens
		t.Errorf("forget = %v %v", ok, err)
	}
	if remove(kept) {
		t.Error("a layer of a tagged image was removed")
	}
	checkLayout(t, l.dir)
}

func TestAnImageThatGotATagMeanwhileIsNotForgotten(t *testing.T) {
	l := newLayout(t)
	tagged, _, err := storeImage(l, "docker.io/library/a:latest", "new")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
	if ok, err := l.ForgetUntagged(tagged.Digest); ok || err != nil {
		t.Errorf("forget = %v %v: the user's tag would be gone", ok, err)
	}
	if _, err := l.Resolve("docker.io/library/a:latest"); err != nil {
		t.Error(err)
	}
}

// An image of an index may be in index.json once more, without a name.
func TestWhatIsSaidAboutAPartOfAnotherImageStays(t *testing.T) {
	l := newLayout(t)
	part, layer, err := storeImage(l, "docker.io/library/part:1", "new")
	if err != nil {
		t.Fatal(err)
	}
	write := func(mediaType, text string) ocispec.Descriptor {
		t.Helper()
		d, err := l.WriteBlob(mediaType, []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	text := func(d ocispec.Descriptor) string {
		return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, d.MediaType, d.Digest, d.Size)
	}
	index := write(ocispec.MediaTypeImageIndex, fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, ocispec.MediaTypeImageIndex, text(part)))
	about := write(ocispec.MediaTypeImageManifest, fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"artifactType":"text/plain","config":%s,"layers":[%[2]s],"subject":%s}`,
		ocispec.MediaTypeImageManifest, text(layer), text(part)))
	about.ArtifactType = "text/plain"
	signature := write(ocispec.MediaTypeImageManifest, fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":[%[2]s]}`, ocispec.MediaTypeImageManifest, text(layer)))
	forget := func(d ocispec.Descriptor) {
		t.Helper()
		if err := l.Release(); err != nil {
			t.Fatal(err)
		}
		if ok, err := l.Forget(d.Digest); !ok || err != nil {
			t.Fatalf("forget = %v %v", ok, err)
		}
	}
	if err := l.Update(func(idx *ocispec.Index) error {
		idx.Manifests = append(idx.Manifests, about)
		setTag(idx, fallbackTag(part.Digest)+".sig", signature)
		setTag(idx, "docker.io/library/index:1", index)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	forget(part)
	if left, err := l.Artifacts(part.Digest); err != nil || len(left) != 2 {
		t.Errorf("the image of an index that has a tag lost its signature: %v %v", left, err)
	}
	led, err := l.Without(map[digest.Digest]bool{index.Digest: true})
	if err != nil || len(led) != 0 {
		t.Errorf("without the index something leads to %v, %v", led, err)
	}
	forget(index)
	if left, err := l.Artifacts(part.Digest); err != nil || len(left) != 0 {
		t.Errorf("left is %v, %v: signatures of what is gone would pile up", left, err)
	}
}

// wantWholeImages checks that everything that index.json leads to is there.
func wantWholeImages(t *testing.T, dir string) {
	t.Helper()
	l, err := OpenLayout(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	idx, err := l.Index()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.closure(idx.Manifests...); err != nil {
		t.Errorf("prune took what an image needs: %v", err)
	}
}

// TestABuildAndAPruneAtOnce tags images while another process removes whatever nobody needs.
func TestABuildAndAPruneAtOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "layout")
	l, err := CreateLayout(dir)
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	done := make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			blobs, err := l.Blobs()
			remover := l.Remover()
			for _, b := range blobs {
				if err == nil {
					_, err = remover.Remove(b.Digest)
				}
			}
			if err != nil {
				done <- err
				return
			}
		}
	}()
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end) && !t.Failed(); {
		for i := range 3 {
			b, err := CreateLayout(dir)
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := storeImage(b, fmt.Sprint("docker.io/library/a:", i), fmt.Sprint(time.Now().UnixNano())); err != nil {
				t.Fatal(err)
			}
			b.Close()
			wantWholeImages(t, dir)
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Errorf("prune: %v", err)
	}
}

func TestAFlippedBitInABlobIsFound(t *testing.T) {
	l := newLayout(t)
	content := bytes.Repeat([]byte("content "), 20)
	d, err := l.WriteBlob("", content)
	if err != nil {
		t.Fatal(err)
	}
	for i := range content {
		broken := bytes.Clone(content)
		broken[i] ^= 1 << (i % 8)
		if err := os.WriteFile(l.path(d.Digest), broken, 0o644); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			if l.Has(d) {
				t.Fatalf("byte %d: a blob with a flipped bit passes for the one that was asked for", i)
			}
		} else {
			r, err := l.Open(d)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadAll(r); err == nil {
				t.Fatalf("byte %d: a blob with a flipped bit is read without an error", i)
			}
			r.Close()
		}
		if _, err := os.Stat(l.path(d.Digest)); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("byte %d: the broken blob is still in its place: %v", i, err)
		}
		if again, err := l.WriteBlob("", content); err != nil || again.Digest != d.Digest || !l.Has(d) {
			t.Fatalf("byte %d: it cannot be written again: %v", i, err)
		}
	}
	broken, err := l.Quarantine()
	if err != nil || len(broken) != len(content) {
		t.Errorf("%d blobs in quarantine, want %d: %v", len(broken), len(content), err)
	}
	if err := l.EmptyQuarantine(); err != nil {
		t.Error(err)
	}
}

// TestAWrongDescriptorDoesNoHarm: a stranger's manifest may name a blob of ours with another size.
func TestAWrongDescriptorDoesNoHarm(t *testing.T) {
	l := newLayout(t)
	d, err := l.WriteBlob("", []byte("content"))
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{0, d.Size - 1, d.Size + 1} {
		wrong := d
		wrong.Size = size
		if l.Has(wrong) {
			t.Errorf("it has %d bytes", size)
		}
		if _, err := l.ReadAll(wrong, 100); err == nil {
			t.Errorf("%d bytes were read", size)
		}
	}
	if !l.Has(d) {
		t.Error("a stranger can make us throw a good blob away")
	}
}

func TestVerifyFindsAndRepairs(t *testing.T) {
	damage := map[string]func(t *testing.T, l *Layout, manifest, layer ocispec.Descriptor) error{
		"a blob with wrong bytes": func(t *testing.T, l *Layout, _, layer ocispec.Descriptor) error {
			return os.WriteFile(l.path(layer.Digest), []byte("nww"), 0o644)
		},
		"a missing blob": func(t *testing.T, l *Layout, _, layer ocispec.Descriptor) error {
			return os.Remove(l.path(layer.Digest))
		},
		"a file without a digest": func(t *testing.T, l *Layout, _, _ ocispec.Descriptor) error {
			return os.WriteFile(filepath.Join(l.dir, blobsDir, "x"), nil, 0o644)
		},
		"a link": func(t *testing.T, l *Layout, _, _ ocispec.Descriptor) error {
			return os.Symlink("/etc/passwd", l.path(digest.FromString("/etc/passwd")))
		},
		"index.json": func(t *testing.T, l *Layout, _, _ ocispec.Descriptor) error {
			return os.WriteFile(filepath.Join(l.dir, "index.json"), []byte("{"), 0o644)
		},
		"index.json and its copy": func(t *testing.T, l *Layout, _, _ ocispec.Descriptor) error {
			return errors.Join(os.WriteFile(filepath.Join(l.dir, "index.json"), []byte("{"), 0o644), os.Truncate(filepath.Join(l.dir, ".index"), 0))
		},
		"the copy of index.json": func(t *testing.T, l *Layout, _, _ ocispec.Descriptor) error {
			return os.Truncate(filepath.Join(l.dir, ".index"), 100)
		},
		"oci-layout": func(t *testing.T, l *Layout, _, _ ocispec.Descriptor) error {
			return os.WriteFile(filepath.Join(l.dir, "oci-layout"), []byte("{"), 0o644)
		},
	}
	verify := func(t *testing.T, dir string, repair bool) []Damage {
		t.Helper()
		found, err := RepairFrame(dir, repair)
		if err != nil {
			t.Fatal(err)
		}
		if len(found) > 0 && !repair {
			return found
		}
		l, err := CreateLayout(dir)
		if err != nil {
			t.Fatal(err)
		}
		more, err := l.Verify(t.Context(), repair)
		if err != nil {
			t.Fatal(err)
		}
		return append(found, more...)
	}
	for name, do := range damage {
		t.Run(name, func(t *testing.T) {
			l := newLayout(t)
			manifest, layer, err := storeImage(l, "docker.io/library/a:latest", "new")
			if err != nil {
				t.Fatal(err)
			}
			if found := verify(t, l.dir, false); len(found) != 0 {
				t.Fatalf("nothing happened, and verify finds %v", found)
			}
			if err := do(t, l, manifest, layer); err != nil {
				t.Fatal(err)
			}
			if found := verify(t, l.dir, false); len(found) == 0 {
				t.Error("verify finds nothing")
			}
			for _, d := range verify(t, l.dir, true) {
				if d.Repair == "" {
					t.Errorf("%s: %s: not repaired", d.Where, d.What)
				}
			}
			if found := verify(t, l.dir, false); len(found) != 0 {
				t.Errorf("after the repair: %v", found)
			}
			if err := storeEverything(l.dir); err != nil {
				t.Errorf("the next build fails: %v", err)
			}
			checkLayout(t, l.dir)
		})
	}
}

func TestADamagedIndexWithoutACopyIsToldWithTheNextStep(t *testing.T) {
	l := newLayout(t)
	if err := os.WriteFile(filepath.Join(l.dir, "index.json"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(l.dir, ".index")); err != nil {
		t.Fatal(err)
	}
	again, err := CreateLayout(l.dir)
	if err == nil {
		_, err = again.Index()
	}
	var damaged *DamagedError
	if !errors.As(err, &damaged) || !strings.Contains(err.Error(), "index.json") || !strings.Contains(damaged.Hint(), "store verify --repair") {
		t.Errorf("got %v", err)
	}
}

func TestWhatCannotBeReadIsNotTakenForNothing(t *testing.T) {
	l := newLayout(t)
	_, layer, err := storeImage(l, "docker.io/library/a:latest", "new")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := os.WriteFile(filepath.Join(l.dir, "index.json"), []byte(`{"schemaVersion":2,"manif`), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(l.dir, ".index")); err != nil {
		t.Fatal(err)
	}
	again, err := CreateLayout(l.dir)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := again.Remover().Remove(layer.Digest); ok || err == nil || !strings.Contains(err.Error(), "index.json") {
		t.Errorf("with an index.json that cannot be read, prune removes every blob: %v %v", ok, err)
	}
}
