package layer

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cooper-build/cooper/internal/nstest"
)

// benchLayer is a layer of files of one size, 50 to a directory, half of whose bytes are random.
func benchLayer(b *testing.B, files, size int) []byte {
	b.Helper()
	random := rand.New(rand.NewPCG(1, 2))
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	content := make([]byte, size)
	for i := range files {
		if i%50 == 0 {
			must(b, w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("d%d/", i/50), Mode: 0o755, ModTime: time.Unix(1e9, 0)}))
		}
		for j := range content {
			content[j] = byte(random.Uint32() % 16)
		}
		must(b, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("d%d/f%d", i/50, i), Mode: 0o644, Size: int64(size), ModTime: time.Unix(1e9, 0)}))
		_, err := w.Write(content)
		must(b, err)
	}
	must(b, w.Close())
	return buf.Bytes()
}

var benchLayers = []struct {
	name        string
	files, size int
}{{"small files", 2000, 2 << 10}, {"large files", 8, 8 << 20}}

func report(b *testing.B, files, bytes int) {
	b.SetBytes(int64(bytes))
	b.ReportMetric(float64(files)*float64(b.N)/b.Elapsed().Seconds(), "files/s")
}

func BenchmarkUnpack(b *testing.B) {
	for _, l := range benchLayers {
		b.Run(l.name, func(b *testing.B) {
			data := benchLayer(b, l.files, l.size)
			parent := b.TempDir()
			for i := 0; b.Loop(); i++ {
				dir := filepath.Join(parent, fmt.Sprint(i))
				must(b, os.Mkdir(dir, 0o755))
				must(b, unpackWith(b.Context(), dir, bytes.NewReader(data), UnpackOptions{Single: nstest.Single()}))
				b.StopTimer()
				must(b, RemoveAll(dir))
				b.StartTimer()
			}
			report(b, l.files, len(data))
		})
	}
}

func BenchmarkDiff(b *testing.B) {
	for _, l := range benchLayers {
		b.Run(l.name, func(b *testing.B) {
			data := benchLayer(b, l.files, l.size)
			dir := b.TempDir()
			must(b, unpackWith(b.Context(), dir, bytes.NewReader(data), UnpackOptions{Single: nstest.Single()}))
			for b.Loop() {
				must(b, Diff(b.Context(), dir, io.Discard, DiffOptions{Single: nstest.Single()}))
			}
			report(b, l.files, len(data))
		})
	}
}

func BenchmarkCompress(b *testing.B) {
	data := benchLayer(b, 8, 8<<20)
	for _, c := range []Compression{{Codec: Gzip}, {Codec: Zstd}, {Codec: None}} {
		b.Run(c.String(), func(b *testing.B) {
			for b.Loop() {
				w, err := Compress(io.Discard, c)
				must(b, err)
				_, err = w.Write(data)
				must(b, err)
				must(b, w.Close())
			}
			b.SetBytes(int64(len(data)))
		})
	}
}

func BenchmarkDecompress(b *testing.B) {
	data := benchLayer(b, 8, 8<<20)
	for _, c := range []Compression{{Codec: Gzip}, {Codec: Zstd}} {
		b.Run(c.String(), func(b *testing.B) {
			var packed bytes.Buffer
			w, err := Compress(&packed, c)
			must(b, err)
			_, err = w.Write(data)
			must(b, err)
			must(b, w.Close())
			for b.Loop() {
				r, err := Decompress(bytes.NewReader(packed.Bytes()))
				must(b, err)
				_, err = io.Copy(io.Discard, r)
				must(b, err)
				must(b, r.Close())
			}
			b.SetBytes(int64(len(data)))
		})
	}
}
