package gunzip

import (
	"bytes"
	stdflate "compress/flate"
	stdgzip "compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/gzip"
)

// samples are contents of every kind that a coder treats in its own way.
func samples() map[string][]byte {
	random := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 400_000)
	for i := range noise {
		noise[i] = byte(random.Uint32())
	}
	words := strings.Fields("the layer of an image is a tar archive and this is what its text may look like in the end")
	var text bytes.Buffer
	for text.Len() < 1_500_000 {
		fmt.Fprint(&text, words[random.IntN(len(words))], " ", random.IntN(1000), "\n")
	}
	var periods bytes.Buffer // matches of every distance that is copied in a way of its own
	for back := 1; back < 40; back++ {
		periods.Write(bytes.Repeat(noise[back*100:back*100+back], 3000/back))
	}
	far := append(append(bytes.Clone(noise[:40_000]), noise[40_000-32_768:40_000]...), noise[:300]...)
	skewed := make([]byte, 300_000) // codes of up to 15 bits
	for i := range skewed {
		skewed[i] = byte(min(255, int(random.ExpFloat64()*12)))
	}
	return map[string][]byte{
		"nothing": nil, "a byte": []byte("x"), "noise": noise, "text": text.Bytes(), "zeros": make([]byte, 2_000_000), "periods": periods.Bytes(),
		"far matches": far, "long codes": skewed, "all": bytes.Join([][]byte{noise[:70_000], text.Bytes()[:200_000], make([]byte, 70_000), skewed}, nil),
	}
}

func zip(t testing.TB, content []byte, level int) []byte {
	t.Helper()
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, level)
	if err == nil {
		_, err = z.Write(content)
	}
	if err = errors.Join(err, z.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestWhatAnyLevelWroteIsReadBack(t *testing.T) {
	for name, content := range samples() {
		for _, level := range []int{gzip.HuffmanOnly, gzip.NoCompression, 1, 2, 5, 6, 7, 9} {
			stream := zip(t, content, level)
			for kind, src := range map[string]io.Reader{
				"at once": bytes.NewReader(stream), "in halves": iotest.HalfReader(bytes.NewReader(stream)),
				"with its end": iotest.DataErrReader(bytes.NewReader(stream)), "by bytes": iotest.OneByteReader(bytes.NewReader(stream)),
			} {
				got, err := io.ReadAll(NewReader(src))
				if err != nil || !bytes.Equal(got, content) {
					t.Errorf("%s, level %d, read %s: %d bytes instead of %d, %v", name, level, kind, len(got), len(content), err)
				}
			}
		}
	}
}

func TestMembersAreOneStream(t *testing.T) {
	text := samples()["text"]
	stream := append(append(zip(t, text, 6), zip(t, nil, 6)...), zip(t, text[:1000], 1)...)
	got, err := io.ReadAll(NewReader(bytes.NewReader(stream)))
	if want := append(bytes.Clone(text), text[:1000]...); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes instead of %d, %v", len(got), len(want), err)
	}
}

// A block with the fixed codes finds tables of its own, whatever the blocks before it had.
func TestBlocksOfEveryKindFollowEachOther(t *testing.T) {
	text := samples()["text"]
	kinds := [][]byte{zip(t, []byte("ab"), 6), zip(t, text[:5000], 9), zip(t, text[:100], 0), zip(t, text[:3000], gzip.HuffmanOnly)}
	random := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		var stream []byte
		for range 12 {
			stream = append(stream, kinds[random.IntN(len(kinds))]...)
		}
		compare(t, stream)
	}
	// 16,000 empty blocks of ten bits, behind each other and between others: 0b0_01 and seven zeros.
	blocks := append(bytes.Repeat([]byte{0x02, 0x08, 0x20, 0x80, 0x00}, 4000), 0x03, 0x00)
	empty := append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255}, blocks...)
	empty = append(empty, make([]byte, 8)...)
	if got, err := io.ReadAll(NewReader(bytes.NewReader(empty))); err != nil || len(got) != 0 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	compare(t, append(append(bytes.Clone(kinds[1]), empty...), kinds[0]...))
}

// A match that leads into the member before would be read otherwise by every other program.
func TestNoMemberReadsTheOneBefore(t *testing.T) {
	var deflated bytes.Buffer
	w, err := stdflate.NewWriterDict(&deflated, 9, []byte("what the member before ends with"))
	if err == nil {
		_, err = w.Write([]byte("what the member before ends with"))
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	stream := append(zip(t, []byte("what the member before ends with"), 6), 0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255)
	stream = append(stream, deflated.Bytes()...)
	stream = binary.LittleEndian.AppendUint32(stream, crc32.ChecksumIEEE([]byte("what the member before ends with")))
	stream = binary.LittleEndian.AppendUint32(stream, 32)
	if got, err := io.ReadAll(NewReader(bytes.NewReader(stream))); !errors.Is(err, ErrCorrupt) {
		t.Errorf("read %q, %v", got, err)
	}
}

func TestHeadersWithEverything(t *testing.T) {
	var b bytes.Buffer
	z := stdgzip.NewWriter(&b)
	z.Name, z.Comment, z.Extra = "a name", "a comment", []byte("extra")
	if _, err := z.Write([]byte("content")); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	plain := b.Bytes()
	header := 10 + 2 + len("extra") + len("a name\x00") + len("a comment\x00")
	summed := append([]byte(nil), plain[:header]...)
	summed[3] |= 1 << 1
	summed = append(binary.LittleEndian.AppendUint16(summed, uint16(crc32.ChecksumIEEE(summed))), plain[header:]...)
	for name, stream := range map[string][]byte{"plain": plain, "with a checksum": summed} {
		if got, err := io.ReadAll(NewReader(bytes.NewReader(stream))); err != nil || string(got) != "content" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	summed[header]++
	if _, err := io.ReadAll(NewReader(bytes.NewReader(summed))); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a wrong checksum of the header: %v", err)
	}
}

func TestAStreamThatEndsTooEarlySaysSo(t *testing.T) {
	all := samples()["all"]
	stream := zip(t, all, 6)
	refused := errors.New("the network is gone")
	for cut := 0; cut < len(stream); cut += 1 + cut/200 {
		got, err := io.ReadAll(NewReader(bytes.NewReader(stream[:cut])))
		if err != io.ErrUnexpectedEOF && cut > 0 || !bytes.HasPrefix(all, got) {
			t.Fatalf("cut at %d of %d: %d bytes, %v", cut, len(stream), len(got), err)
		}
		src := io.MultiReader(bytes.NewReader(stream[:cut]), iotest.ErrReader(refused))
		if got, err := io.ReadAll(NewReader(src)); !errors.Is(err, refused) || !bytes.HasPrefix(all, got) {
			t.Fatalf("refused at %d of %d: %d bytes, %v", cut, len(stream), len(got), err)
		}
	}
}

func TestWhatFollowsMustBeAMember(t *testing.T) {
	for _, tail := range []string{"\x00", "garbage that is longer than a header", "\x1f\x8b"} {
		_, err := io.ReadAll(NewReader(strings.NewReader(string(zip(t, []byte("x"), 6)) + tail)))
		if !errors.Is(err, ErrCorrupt) && err != io.ErrUnexpectedEOF {
			t.Errorf("%q after the stream: %v", tail, err)
		}
	}
}

// Every bit of a stream changed once: what other programs read from it is what is read, or it is refused.
func TestDamageIsSeen(t *testing.T) {
	stream := zip(t, samples()["text"][:3000], 6)
	for bit := range len(stream) * 8 {
		damaged := bytes.Clone(stream)
		damaged[bit/8] ^= 1 << (bit % 8)
		compare(t, damaged)
	}
}

// compare reads a stream with compress/gzip, too.
func compare(t *testing.T, stream []byte) {
	t.Helper()
	var want []byte
	z, wantErr := stdgzip.NewReader(bytes.NewReader(stream))
	if wantErr == nil {
		want, wantErr = io.ReadAll(io.LimitReader(z, 64<<20))
	}
	got, err := io.ReadAll(io.LimitReader(NewReader(bytes.NewReader(stream)), 64<<20))
	switch {
	case (err == nil) != (wantErr == nil):
		t.Fatalf("%x: an attacker has a layer that others read differently: %v, compress/gzip %v", stream, err, wantErr)
	case err == nil && !bytes.Equal(got, want):
		t.Fatalf("%x: an attacker has a layer that others read differently: %d bytes, compress/gzip %d", stream, len(got), len(want))
	case err != nil && !bytes.HasPrefix(want, got):
		t.Fatalf("%x: %d bytes before the error (%v) are none that compress/gzip gives", stream, len(got), err)
	}
}

func FuzzReader(f *testing.F) {
	for _, content := range samples() {
		for _, level := range []int{gzip.HuffmanOnly, 0, 1, 9} {
			f.Add(zip(f, content[:min(len(content), 2000)], level)[10:])
		}
	}
	f.Fuzz(func(t *testing.T, deflated []byte) {
		// The coder knows no checksums; a stream with the right ones reaches further.
		header := []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255}
		compare(t, append(bytes.Clone(header), deflated...))
		in := bytes.NewReader(deflated)
		content, err := io.ReadAll(io.LimitReader(stdflate.NewReader(in), 64<<20))
		stream := append(header, deflated[:len(deflated)-in.Len()]...)
		stream = binary.LittleEndian.AppendUint32(stream, crc32.ChecksumIEEE(content))
		stream = binary.LittleEndian.AppendUint32(stream, uint32(len(content)))
		if err == nil {
			compare(t, stream)
		}
	})
}

func BenchmarkReader(b *testing.B) {
	text := samples()["text"]
	stream := zip(b, text, 6)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		if _, err := io.Copy(io.Discard, NewReader(bytes.NewReader(stream))); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEmptyBlocks(b *testing.B) {
	stream := append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255}, bytes.Repeat([]byte{0x02, 0x08, 0x20, 0x80, 0x00}, 200_000)...)
	stream = append(append(stream, 0x03, 0x00), make([]byte, 8)...)
	b.SetBytes(int64(len(stream)))
	for b.Loop() {
		if _, err := io.Copy(io.Discard, NewReader(bytes.NewReader(stream))); err != nil {
			b.Fatal(err)
		}
	}
}
