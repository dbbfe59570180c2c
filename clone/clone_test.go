package clone

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCopiesEveryByte(t *testing.T) {
	other := "/dev/shm" // another file system, where the kernel may refuse
	for _, size := range []int{0, 1, 4096, worth - 1, worth, worth + 1, buffer*2 + 7} {
		data := random(size)
		for _, dir := range []string{t.TempDir(), other} {
			from, to := files(t, data, dir)
			if err := File(t.Context(), to, from); err != nil {
				t.Errorf("%d bytes to %s: %v", size, dir, err)
				continue
			}
			if got := read(t, to.Name()); !bytes.Equal(got, data) {
				t.Errorf("%d bytes to %s: the copy has %d bytes and differs", size, dir, len(got))
			}
		}
	}
}

func TestCopiesThroughABufferWhatTheKernelRefuses(t *testing.T) {
	data := random(buffer*2 + 7)
	from, to := files(t, data, t.TempDir())
	c := copier{ctx: t.Context(), in: int(from.Fd()), out: int(to.Fd()), outside: true}
	if err := c.data(0, int64(len(data))); err != nil {
		t.Fatal(err)
	}
	if got := read(t, to.Name()); !bytes.Equal(got, data) {
		t.Error("the copy differs")
	}
}

func TestCopiesWhatHasNoSize(t *testing.T) {
	from, err := os.Open("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	_, to := files(t, nil, t.TempDir())
	if err := File(t.Context(), to, from); err != nil {
		t.Fatal(err)
	}
	if got := read(t, to.Name()); len(got) == 0 {
		t.Error("the copy of a file of /proc is empty")
	}
}

func TestHolesStayHoles(t *testing.T) {
	const size = 64 << 20
	from, to := files(t, nil, t.TempDir())
	w, err := os.OpenFile(from.Name(), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := w.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteAt([]byte("in the middle"), size/2); err != nil {
		t.Fatal(err)
	}
	if err := File(t.Context(), to, from); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(read(t, from.Name()), read(t, to.Name())) {
		t.Error("the copy differs")
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(to.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 > size/8 {
		t.Errorf("the copy of one block and two holes takes %d bytes of the disk", st.Blocks*512)
	}
}

func TestCopyEndsWithTheBuild(t *testing.T) {
	stop := errors.New("stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stop)
	from, to := files(t, random(1000), t.TempDir())
	if err := File(ctx, to, from); !errors.Is(err, stop) {
		t.Errorf("copy of a build that ended: %v, want %v", err, stop)
	}
}

func BenchmarkFile(b *testing.B) {
	for name, size := range map[string]int{"4K": 4 << 10, "64M": 64 << 20} {
		b.Run(name, func(b *testing.B) {
			from, _ := files(b, random(size), b.TempDir())
			b.SetBytes(int64(size))
			for b.Loop() {
				to, err := os.CreateTemp(b.TempDir(), "")
				if err != nil {
					b.Fatal(err)
				}
				if err := File(b.Context(), to, from); err != nil {
					b.Fatal(err)
				}
				to.Close()
				os.Remove(to.Name())
			}
		})
	}
}

func files(t testing.TB, data []byte, dir string) (from, to *os.File) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "from")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	from, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	if to, err = os.CreateTemp(dir, "clone"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		from.Close()
		to.Close()
		os.Remove(to.Name())
	})
	return from, to
}

func random(size int) []byte {
	data := make([]byte, size)
	r := rand.NewChaCha8([32]byte{})
	r.Read(data) //nolint:errcheck // never fails
	return data
}

func read(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
