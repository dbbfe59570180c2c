package snapshot

import (
	"fmt"
	"path/filepath"
	"testing"
)

// BenchmarkLookup is what it costs to learn that a step need not run: its cause is known and its snapshot is there.
func BenchmarkLookup(b *testing.B) {
	s, err := Open(filepath.Join(b.TempDir(), "store"), testOptions(false))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	const steps = 100
	for i := range steps {
		id := ID(fmt.Sprintf("step-%d", i))
		if err := commitOnce(s, id); err != nil {
			b.Fatal(err)
		}
		if err := s.Remember(Key(id), id); err != nil {
			b.Fatal(err)
		}
	}
	for i := 0; b.Loop(); i++ {
		k := Key(fmt.Sprintf("step-%d", i%steps))
		if _, ok, err := s.Lookup(k); !ok || err != nil {
			b.Fatal(k, ok, err)
		}
	}
}
