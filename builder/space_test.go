package builder

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox"
	"github.com/cooper-build/cooper/snapshot"
)

// smallDisk mounts a file system of its own.
func smallDisk(t *testing.T, options string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// Somebody who prunes a store because a stick is full loses his caches for nothing.
func TestTheHintNamesTheFileSystemThatIsFull(t *testing.T) {
	shelf := newShelf(t)
	for name, id := range map[string]snapshot.ID{"docker.io/library/big:1": "tagged", "": "untagged"} {
		shelf.step(id, "")
		blob, err := shelf.content.WriteBlob(ocispec.MediaTypeImageLayer, bytes.Repeat([]byte(id), 1<<18))
		shelf.must(err)
		shelf.image(name, id, blob)
	}
	shelf.fill()
	empty := newShelf(t)
	shelf.must(empty.close())
	roomy := filepath.Join(smallDisk(t, "size=16m,nr_inodes=200"), "store")
	stick, outOfInodes := smallDisk(t, "size=1m"), filepath.Join(smallDisk(t, "size=16m,nr_inodes=40"), "store")
	exit := func(dir string) error { return aboutRoom(dir, fmt.Errorf("RUN x: %w", &sandbox.ExitError{Code: 1})) }
	for _, tt := range []struct {
		name string
		root string
		err  error
		want []string
		not  string
	}{
		{"the output's", shelf.root, &outputError{unix.ENOSPC, stick + "/new/x.tar"}, []string{"the file system of " + stick + "/new/x.tar has 1 MB free", "choose another place"}, "cooper prune"},
		{"the output's, which is the store's", shelf.root, &outputError{unix.ENOSPC, filepath.Dir(shelf.root)}, []string{"of the store " + shelf.root, "'cooper prune' ("}, ""},
		{"a pipe's", shelf.root, &outputError{unix.ENOSPC, ""}, []string{"redirected"}, "cooper prune"},
		{"the store's, when the output has room", outOfInodes, &outputError{unix.ENOSPC, shelf.root}, []string{"of the store", "inodes left"}, ""},
		{"an output that is read-only", shelf.root, &outputError{unix.EROFS, "/ro/x.tar"}, []string{"/ro/x.tar cannot be written to"}, "store"},
		{"a store that is read-only", shelf.root, unix.EROFS, []string{"must be writable", "--root"}, ""},
		{"the store's", shelf.root, unix.ENOSPC, []string{"'cooper prune' (", "'cooper prune --all' ("}, ""},
		{"an empty store's", empty.root, unix.EDQUOT, []string{"quota", "nothing to remove", "--root"}, "--all"},
		{"that of a step whose files are gone", roomy, unix.ENOSPC, []string{"has 16 MB and 1", " inodes free, which was not enough"}, ""},
		{"that of a RUN", stick, exit(stick), []string{"of the store", "had 1 MB free when the RUN ended"}, ""},
		{"that of a RUN without inodes", outOfInodes, exit(filepath.Dir(outOfInodes)), []string{"inodes left when the RUN ended"}, "MB free"},
		{"none", shelf.root, exit(shelf.root), nil, "file system"},
		{"none that is full", shelf.root, &outputError{unix.EACCES, stick}, nil, "file system"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := &build{Request: Request{Root: tt.root}}
			if err := os.MkdirAll(tt.root, 0o700); err != nil {
				t.Fatal(err)
			}
			err := b.aboutSpace(t.Context(), tt.err)
			if !errors.Is(err, tt.err) && err != tt.err {
				t.Errorf("the cause is lost: %v", err)
			}
			var hint interface{ Hint() string }
			got := ""
			if errors.As(err, &hint) {
				got = hint.Hint()
			}
			for _, w := range tt.want {
				if !strings.Contains(got, w) {
					t.Errorf("hint %q, want %q in it", got, w)
				}
			}
			if tt.not != "" && strings.Contains(got, tt.not) {
				t.Errorf("hint %q", got)
			}
		})
	}
}
