package main

import (
	"bufio"
	"bytes"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
)

// A source makes file contents that are the same in every run: three quarters are text that compresses to about a third, the rest cannot
// be compressed, as in programs and packages.
type source struct {
	rng          *rand.Rand
	text, random []byte
}

const poolSize = 8 << 20

func newSource(seed uint64) *source {
	rng := rand.New(rand.NewPCG(seed, 1))
	s := &source{rng: rng, random: make([]byte, poolSize)}
	for i := range s.random {
		s.random[i] = byte(rng.Uint32())
	}
	words := make([][]byte, 3000)
	for i := range words {
		words[i] = make([]byte, 2+rng.IntN(9))
		for j := range words[i] {
			words[i][j] = 'a' + byte(rng.IntN(26))
		}
	}
	var text bytes.Buffer
	for text.Len() < poolSize {
		// The square makes some words common, as in any text.
		text.Write(words[int(rng.Float64()*rng.Float64()*float64(len(words)))])
		text.WriteByte(" \n"[rng.IntN(10)/9])
	}
	s.text = text.Bytes()
	return s
}

// sizes are n file sizes that add up to total: many small ones, few large ones.
func (s *source) sizes(n int, total int64) []int64 {
	weights, sum := make([]float64, n), 0.0
	for i := range weights {
		weights[i] = math.Exp(1.7 * s.rng.NormFloat64())
		sum += weights[i]
	}
	sizes := make([]int64, n)
	for i, w := range weights {
		sizes[i] = int64(w / sum * float64(total))
	}
	return sizes
}

// content is a file of that size.
func (s *source) content(size int64) io.Reader {
	pool := s.text
	if s.rng.IntN(4) == 0 {
		pool = s.random
	}
	return io.LimitReader(&loop{pool: pool, at: s.rng.IntN(len(pool))}, size)
}

// loop reads a pool over and over. Its length is far beyond the window of gzip and of zstd's usual levels.
type loop struct {
	pool []byte
	at   int
}

func (l *loop) Read(p []byte) (int, error) {
	n := copy(p, l.pool[l.at:])
	l.at = (l.at + n) % len(l.pool)
	return n, nil
}

const filesInDirectory = 100

// writeTree makes n files of together total bytes, a hundred to a directory.
func writeTree(dir string, n int, total int64) error {
	s := newSource(2)
	for i, size := range s.sizes(n, total) {
		name := treeFile(dir, i)
		if i%filesInDirectory == 0 {
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				return err
			}
		}
		if err := writeFile(name, s.content(size)); err != nil {
			return err
		}
	}
	return nil
}

func treeFile(dir string, i int) string {
	return filepath.Join(dir, "d"+strconv.Itoa(i/filesInDirectory), "f"+strconv.Itoa(i))
}

// writeLarge makes one file, three quarters of it text.
func writeLarge(name string, size int64) error {
	s := newSource(3)
	var parts []io.Reader
	for rest := size; rest > 0; rest -= poolSize {
		parts = append(parts, s.content(min(rest, poolSize)))
	}
	return writeFile(name, io.MultiReader(parts...))
}

func writeFile(name string, content io.Reader) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	if _, err := io.Copy(w, content); err != nil {
		f.Close()
		return err
	}
	if err := w.Flush(); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}
