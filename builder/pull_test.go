package builder

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/sandbox/userns"
	"github.com/cooper-build/cooper/snapshot"
	"github.com/cooper-build/cooper/snapshot/layer"
)

// A pullBase is an image in a layout, and what it is made of.
type pullBase struct {
	dir    string
	diffs  []digest.Digest
	layers []ocispec.Descriptor
}

// tarOf makes a layer of files, "name=content".
func tarOf(t *testing.T, files ...string) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		name, content, _ := strings.Cut(f, "=")
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content))})
		if err == nil {
			_, err = io.WriteString(w, content)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// newPullBase writes an image of the given layers. claim may change what the config says of them.
func newPullBase(t *testing.T, tars [][]byte, claim func([]digest.Digest)) *pullBase {
	t.Helper()
	p := &pullBase{dir: filepath.Join(t.TempDir(), "base")}
	l, err := image.CreateLayout(p.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	write := func(mediaType string, v any) ocispec.Descriptor {
		t.Helper()
		text, ok := v.([]byte)
		if !ok {
			if text, err = json.Marshal(v); err != nil {
				t.Fatal(err)
			}
		}
		d, err := l.WriteBlob(mediaType, text)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	for i, data := range tars {
		c := layer.Compression{Codec: []layer.Codec{layer.Gzip, layer.Zstd, layer.None}[i%3]}
		var packed bytes.Buffer
		w, err := layer.Compress(&packed, c)
		if err == nil {
			_, err = w.Write(data)
		}
		if err = errors.Join(err, w.Close()); err != nil {
			t.Fatal(err)
		}
		p.layers = append(p.layers, write(c.MediaType(), packed.Bytes()))
		p.diffs = append(p.diffs, digest.FromBytes(data))
	}
	said := slices.Clone(p.diffs)
	if claim != nil {
		claim(said)
	}
	platform := ocispec.Platform{OS: "linux", Architecture: "amd64"}
	m := write(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: p.layers,
		Config: write(ocispec.MediaTypeImageConfig, ocispec.Image{Platform: platform, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: said}}),
	})
	if err := l.Tag("latest", m); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *pullBase) pull(t *testing.T, root string, jobs int) (*build, value, error) {
	t.Helper()
	b, err := open(Request{Root: root, Jobs: jobs, Registry: image.ClientOptions{Layouts: map[string]string{"base": p.dir + ":latest"}}})
	if err != nil {
		t.Fatal(err)
	}
	op := plan.Image{Ref: "oci-layout://base", Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}}
	v, _, err := b.pull(t.Context(), plan.Step{}, op)
	t.Cleanup(func() { b.close() })
	return b, v, err
}

func storeDir(t *testing.T) string {
	root := filepath.Join(t.TempDir(), "store")
	t.Cleanup(func() { layer.RemoveAll(root) })
	return root
}

// shownFiles lists what a tree holds, "name=content".
func shownFiles(t *testing.T, b *build, id snapshot.ID) []string {
	t.Helper()
	view, err := b.store.View(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer view.Close()
	entries, err := os.ReadDir(view.Dir())
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(view.Dir(), e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, e.Name()+"="+string(text))
	}
	return all
}

func TestLayersPulledAtOnceStackInTheirOrder(t *testing.T) {
	for _, jobs := range []int{1, 8} {
		t.Run(fmt.Sprint(jobs, " jobs"), func(t *testing.T) {
			var tars [][]byte
			for i := range 12 {
				of := []string{fmt.Sprintf("last=%d", i), fmt.Sprintf("f%02d=%s", i, strings.Repeat("x", 1000*(12-i)))}
				if i == 6 {
					of = append(of, ".wh.f03=")
				}
				tars = append(tars, tarOf(t, of...))
			}
			tars = append(tars, tars[0]) // the same blob twice
			p := newPullBase(t, tars, nil)
			b, v, err := p.pull(t, storeDir(t), jobs)
			if err != nil {
				t.Fatal(err)
			}
			var want snapshot.ID
			for _, d := range p.diffs {
				want = snapshot.ChainID(want, d)
			}
			got := shownFiles(t, b, v.id)
			if v.id != want || len(got) != 12 || !slices.Contains(got, "last=0") || slices.ContainsFunc(got, func(f string) bool { return strings.HasPrefix(f, "f03=") }) {
				t.Errorf("the chain is %s, want %s, and shows %.300q", v.id, want, got)
			}
		})
	}
}

func TestABadLayerLeavesNothing(t *testing.T) {
	large := make([]byte, 4<<20) // more than is read ahead
	random := rand.New(rand.NewPCG(1, 1))
	for i := range large {
		large[i] = byte(random.Uint32())
	}
	good := [][]byte{tarOf(t, "a=1"), tarOf(t, "b="+string(large)), tarOf(t, "c=3")}
	spoil := func(change func([]byte) []byte) func(*testing.T, *pullBase) {
		return func(t *testing.T, p *pullBase) {
			name := filepath.Join(p.dir, "blobs/sha256", p.layers[1].Digest.Encoded())
			data, err := os.ReadFile(name)
			if err == nil {
				err = os.Remove(name)
			}
			if err == nil {
				err = os.WriteFile(name, change(data), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, tt := range []struct {
		name  string
		tars  [][]byte
		claim func([]digest.Digest)
		spoil func(*testing.T, *pullBase)
		want  string
	}{
		{name: "a wrong DiffID", claim: func(d []digest.Digest) { d[1] = digest.FromString("x") }, want: "the image promised"},
		{name: "a flipped bit", spoil: spoil(func(b []byte) []byte { b[len(b)/2] ^= 1; return b }), want: "the bytes have digest"},
		{name: "a broken head", spoil: spoil(func(b []byte) []byte { b[0] ^= 1; return b }), want: "the bytes have digest"},
		{name: "a cut blob", spoil: spoil(func(b []byte) []byte { return b[:len(b)/2] }), want: "bytes"},
		{name: "no blob", spoil: func(t *testing.T, p *pullBase) {
			if err := os.Remove(filepath.Join(p.dir, "blobs/sha256", p.layers[1].Digest.Encoded())); err != nil {
				t.Fatal(err)
			}
		}, want: "not found"},
		{name: "a hostile archive", tars: [][]byte{good[0], tarOf(t, "../b=2"), good[2]}, want: `leaves the root`},
		{name: "a cut archive", tars: [][]byte{good[0], good[1][:len(good[1])/2], good[2]}, want: "unexpected EOF"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tars := tt.tars
			if tars == nil {
				tars = good
			}
			p := newPullBase(t, tars, tt.claim)
			if tt.spoil != nil {
				tt.spoil(t, p)
			}
			root := storeDir(t)
			b, _, err := p.pull(t, root, 4)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "layer 2 of oci-layout://base") {
				t.Errorf("the error is %v, want %q", err, tt.want)
			}
			if b.content.Has(p.layers[1]) {
				t.Error("the store kept the blob: the next build takes it for good")
			}
			var chain snapshot.ID
			for i, d := range p.diffs {
				if chain = snapshot.ChainID(chain, d); i > 0 && b.store.Has(chain) {
					t.Errorf("the store has layer %d, which was never whole or stands on what was not", i+1)
				}
			}
			left, err := os.ReadDir(filepath.Join(root, "tmp"))
			if err != nil || len(left) > 0 {
				t.Errorf("left in tmp: %v %v", left, err)
			}
			temporary, err := filepath.Glob(filepath.Join(root, "content", ".cooper-*"))
			if err != nil || len(temporary) > 0 {
				t.Errorf("left in content: %v %v", temporary, err)
			}
		})
	}
}

// A tree that is there, or a blob that is there, is not brought again.
func TestWhatIsThereIsNotPulledAgain(t *testing.T) {
	p := newPullBase(t, [][]byte{tarOf(t, "a=1"), tarOf(t, "b=2")}, nil)
	root := storeDir(t)
	if _, _, err := p.pull(t, root, 2); err != nil {
		t.Fatal(err)
	}
	for _, l := range p.layers {
		if err := os.Remove(filepath.Join(p.dir, "blobs/sha256", l.Digest.Encoded())); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := p.pull(t, root, 2); err != nil {
		t.Errorf("a pull of what is there asked for the layers: %v", err)
	}
	m, _ := userns.Inside()
	if err := layer.RemoveAll(filepath.Join(root, "snapshots", m.String())); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(root, "snapshots", m.String()), 0o700); err != nil {
		t.Fatal(err)
	}
	b, v, err := p.pull(t, root, 2)
	if err != nil {
		t.Fatalf("the blobs are there, and yet the layers were asked for: %v", err)
	}
	if got := shownFiles(t, b, v.id); !slices.Equal(got, []string{"a=1", "b=2"}) {
		t.Errorf("the tree made again from its blobs shows %q", got)
	}
}
