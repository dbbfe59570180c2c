package ahead

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

func TestReadingAheadChangesNothing(t *testing.T) {
	data := make([]byte, 3<<20+17)
	random := rand.New(rand.NewPCG(1, 1))
	for i := range data {
		data[i] = byte(random.Uint32())
	}
	broken := errors.New("broken")
	for name, r := range map[string]io.Reader{
		"whole":  bytes.NewReader(data),
		"halves": iotest.HalfReader(bytes.NewReader(data)),
		"early":  iotest.DataErrReader(bytes.NewReader(data)),
	} {
		a := New(io.MultiReader(r, iotest.ErrReader(broken)))
		got, err := io.ReadAll(iotest.HalfReader(a))
		if !errors.Is(err, broken) || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes of %d, error %v", name, len(got), len(data), err)
		}
		a.Close()
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
