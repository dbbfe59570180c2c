package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/userns"
)

// withDisk runs a program in a namespace in which dir is an empty file system of the given size.
func withDisk(dir, size string, command []string) int {
	if _, inside := userns.Inside(); !inside {
		code, err := userns.Enter(context.Background(), os.Args, os.Environ(), userns.Options{})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		return code
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// TestADiskThatIsFullIsSaidAndTheStoreStaysValid fills the disk of the store from inside a RUN and from outside, and then builds
// on the same store what has room, twice: the second time everything must come from the cache. It ends with an output on a disk
// that is full, and one on a disk that is read-only.
func TestADiskThatIsFullIsSaidAndTheStoreStaysValid(t *testing.T) {
	work := t.TempDir()
	disk, full, big := filepath.Join(work, "disk"), filepath.Join(work, "full"), filepath.Join(work, "context", "big")
	for _, dir := range []string{disk, full, filepath.Dir(big)} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(big, make([]byte, 64<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatalf("this test needs the package busybox-static: %v", err)
	}
	// An image of root's files alone: there may be no other id.
	const base = "FROM scratch\nCOPY --from=machine --chmod=755 busybox /bin/busybox\nSHELL [\"/bin/busybox\", \"sh\", \"-c\"]\nRUN busybox seq 1 1000 > /kept\n"
	for name, text := range map[string]string{
		"bomb": base + "RUN busybox cat /dev/zero > /bomb",
		"copy": base + "COPY big /",
		"fine": base + "RUN busybox seq 1 100000 > /more",
	} {
		if err := os.WriteFile(filepath.Join(work, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	script := `
		build() { f=$1; shift; echo "== $f"; cooper --root ` + disk + `/store build --progress plain --policy none --build-context machine=` + filepath.Dir(busybox) + ` -t x:1 "$@" -f ` + work + `/$f ` + filepath.Dir(big) + ` 2>&1; echo "exit $?"; }
		build bomb; build copy; build fine; build fine
		mount -t tmpfs -o size=100k none ` + full + `; build fine -o type=oci,dest=` + full + `/x.tar
		mount -t tmpfs -o ro none ` + full + `; build fine -o type=oci,dest=` + full + `/x.tar; ls ` + disk + `/store/tmp | wc -l`
	out, err := exec.Command("with-disk", disk, "32m", "sh", "-c", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	parts := strings.Split(string(out), "== ")
	if len(parts) != 7 {
		t.Fatalf("output is\n%s", out)
	}
	for i, want := range [][]string{
		{"No space left on device", "hint: the file system of the store " + disk + "/store had 0 MB free when the RUN ended: make room", "exit 1\n"},
		{"no space left on device", "make room with 'cooper prune'", "exit 1\n"},
		{"/kept\n#2 CACHED", "/more\n#3 DONE", "exit 0\n"},
		{"/kept\n#2 CACHED", "/more\n#3 CACHED", "exit 0\n"},
		{"no space left on device", "hint: the file system of " + full + "/x.tar has 0 MB free: make room there", "exit 1\n"},
		{"read-only file system", "hint: " + full + "/x.tar cannot be written to: choose another place", "exit 1\n0\n"},
	} {
		for _, w := range want {
			if !strings.Contains(parts[i+1], w) {
				t.Errorf("build %d does not say %q:\n%s", i, w, parts[i+1])
			}
		}
	}
}
