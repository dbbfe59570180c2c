package main

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
)

func TestAPolicyOfTheContextIsARegularFileInIt(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("profile: none\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		make func(path string) error
		want string
	}{
		"pipe":         {func(p string) error { return syscall.Mkfifo(p, 0o644) }, "not a regular file"},
		"directory":    {func(p string) error { return os.Mkdir(p, 0o755) }, "not a regular file"},
		"link outside": {func(p string) error { return os.Symlink(outside, p) }, "escapes"},
		"dead link":    {func(p string) error { return os.Symlink("nothing", p) }, "not there"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := c.make(filepath.Join(dir, contextPolicy)); err != nil {
				t.Fatal(err)
			}
			_, err := loadPolicy("", dir)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got error %v, want one with %q: the author of a context chose the policy from outside of it, or made the build wait for ever", err, c.want)
			}
		})
	}
}

func TestAHugePolicyIsNotReadIntoMemory(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, contextPolicy)
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = 64 << 20
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", file} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := loadPolicy(name, dir)
		runtime.ReadMemStats(&after)
		if err == nil || !strings.Contains(err.Error(), "larger than") {
			t.Errorf("got error %v, want that the policy is too large", err)
		}
		if used := after.TotalAlloc - before.TotalAlloc; used > size/2 {
			t.Errorf("%d bytes of memory for a policy of %d bytes that is refused: a sparse file of the context takes the whole machine down", used, size)
		}
	}
}

func TestAContextWithoutPolicyGetsTheDefault(t *testing.T) {
	p, err := loadPolicy("", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if got, want := p.Name(), "profile default"; got != want {
		t.Errorf("got policy %q, want %q", got, want)
	}
}
