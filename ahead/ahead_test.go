package ahead

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/iotest"
)

func noise(n int) []byte {
	data := make([]byte, n)
	random := rand.New(rand.NewPCG(1, 1))
	for i := range data {
		data[i] = byte(random.Uint32())
	}
	return data
}

func TestReadingAheadChangesNothing(t *testing.T) {
	data := noise(3<<20 + 17)
	broken := errors.New("broken")
	for name, r := range map[string]io.Reader{
		"whole":  bytes.NewReader(data),
		"halves": iotest.HalfReader(bytes.NewReader(data)),
		"early":  iotest.DataErrReader(bytes.NewReader(data)),
	} {
		a := New(io.MultiReader(r, iotest.ErrReader(broken)))
		begin := make([]byte, 1000)
		if _, err := io.ReadFull(iotest.HalfReader(a), begin); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		got := bytes.NewBuffer(begin)
		n, err := io.Copy(got, a)
		if !errors.Is(err, broken) || !bytes.Equal(got.Bytes(), data) || n != int64(len(data)-len(begin)) {
			t.Errorf("%s: %d bytes of %d, %d of them copied, error %v", name, got.Len(), len(data), n, err)
		}
		a.Close()

		a = New(bytes.NewReader(data))
		if got, err := io.ReadAll(iotest.HalfReader(a)); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: read %d bytes of %d, error %v", name, len(got), len(data), err)
		}
		if n, err := io.Copy(io.Discard, a); n != 0 || err != nil {
			t.Errorf("%s: after the end %d bytes, error %v", name, n, err)
		}
		a.Close()
	}
}

func TestWhatCannotBeWrittenEndsTheCopy(t *testing.T) {
	a := New(bytes.NewReader(make([]byte, 3<<20)))
	defer a.Close()
	r, w := io.Pipe()
	r.CloseWithError(io.ErrShortWrite)
	if n, err := io.Copy(w, a); n != 0 || !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("%d bytes, error %v", n, err)
	}
}

func TestWhoStopsReadingEndsTheReadingAhead(t *testing.T) {
	r, w := io.Pipe()
	defer w.Close()
	a := New(r)
	if _, err := w.Write(make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	closed := make(chan error)
	go func() { closed <- a.Close() }()
	for { // the read that goes on may end, and no other begins
		select {
		case err := <-closed:
			if err != nil {
				t.Error(err)
			}
			return
		default:
			w.CloseWithError(errors.New("hung up"))
		}
	}
}

func TestAPipeGivesWhatIsWritten(t *testing.T) {
	data := noise(3<<20 + 17)
	broken := errors.New("broken")
	for _, tc := range []struct {
		step      int
		end, want error
	}{{1 << 20, nil, nil}, {1000, nil, nil}, {bufferSize, broken, broken}, {len(data), broken, broken}} {
		r, w := Pipe()
		go func() {
			for part := range slices.Chunk(data, tc.step) {
				if n, err := w.Write(part); n != len(part) || err != nil {
					t.Errorf("steps of %d: wrote %d, error %v", tc.step, n, err)
				}
			}
			w.CloseWithError(tc.end)
		}()
		if got, err := io.ReadAll(iotest.HalfReader(r)); !errors.Is(err, tc.want) || !bytes.Equal(got, data) {
			t.Errorf("steps of %d: %d bytes of %d, error %v", tc.step, len(got), len(data), err)
		}
		r.Close()
	}
}

func TestAPipeOfWholeBuffersThatNobodyReadCloses(t *testing.T) {
	r, w := Pipe()
	if _, err := w.Write(make([]byte, buffers*bufferSize)); err != nil {
		t.Fatal(err)
	}
	w.CloseWithError(nil) // all buffers are full
	r.Close()
}

func TestWhoStopsReadingAPipeEndsTheWriting(t *testing.T) {
	r, w := Pipe()
	written := make(chan error)
	go func() {
		for {
			if _, err := w.Write(make([]byte, 1000)); err != nil {
				w.CloseWithError(err)
				written <- err
				return
			}
		}
	}()
	r.Close()
	if err := <-written; !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("error %v", err)
	}
}
