package builder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox"
)

// A room is what a file system has left for somebody without privilege.
type room struct {
	bytes  int64
	inodes uint64
	fs     unix.Fsid
	counts bool // it has a number of inodes at all
}

// nearlyFull is the room that a command can leave that found none for what it wanted to write.
const (
	nearlyFull        = 8 << 20
	nearlyFullOfFiles = 64
)

// roomAt asks the file system of a path, of which the end may not be there yet.
func roomAt(path string) (room, error) {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(path, &st)
		if err == nil {
			return room{int64(st.Bavail) * int64(st.Bsize), st.Ffree, st.Fsid, st.Files > 0}, nil
		}
		above := filepath.Dir(path)
		if above == path || !errors.Is(err, os.ErrNotExist) {
			return room{}, err
		}
		path = above
	}
}

func (r room) full() bool { return r.bytes < nearlyFull || r.counts && r.inodes < nearlyFullOfFiles }

func (r room) String() string {
	switch {
	case r.counts && r.inodes == 0:
		return "no inodes left"
	case r.counts && r.inodes < nearlyFullOfFiles:
		return fmt.Sprintf("%d inodes left", r.inodes)
	}
	return fmt.Sprintf("%d MB free", r.bytes>>20)
}

// afterwards says what is left where something found no room. What it had made is gone by then, so that may be much. How much of
// a quota is left, a file system does not say.
func (r room) afterwards(quota bool) string {
	switch {
	case quota:
		return "no room left within your quota"
	case !r.full() && r.counts:
		return fmt.Sprintf("%d MB and %d inodes free, which was not enough", r.bytes>>20, r.inodes)
	case !r.full():
		return fmt.Sprintf("%d MB free, which was not enough", r.bytes>>20)
	}
	return r.String()
}

// A crampedError is the failure of a RUN that left the file system of the store nearly full: its command may not have said that
// this was why.
type crampedError struct {
	error
	room room // by then; the RUN's files are gone since
}

func (e *crampedError) Unwrap() error { return e.error }

// aboutRoom notes with a RUN's failure that there was no room to write.
func aboutRoom(dir string, err error) error {
	var exit *sandbox.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	if r, statErr := roomAt(dir); statErr == nil && r.full() {
		return &crampedError{err, r}
	}
	return err
}

// An outputError is one of writing to an output. Its path is empty for a stream.
type outputError struct {
	error
	path string
}

func (e *outputError) Unwrap() error { return e.error }

// destinationOf is where an output goes.
func destinationOf(o Output) string {
	switch o := o.(type) {
	case Layout:
		return o.Dir
	case Archive:
		return o.File
	case DockerArchive:
		return o.File
	case Tree:
		return o.Dir
	case TreeTar:
		return o.File
	}
	return ""
}

// aboutSpace adds the next step to an error of a disk that cannot be written to.
func (b *build) aboutSpace(ctx context.Context, err error) error {
	var hint interface{ Hint() string }
	if errors.As(err, &hint) && hint.Hint() != "" {
		return err
	}
	var cramped *crampedError
	if errors.As(err, &cramped) {
		return hinted{err, b.makeRoom(ctx, "had "+cramped.room.String()+" when the RUN ended")}
	}
	full, readOnly := errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EROFS)
	if !full && !readOnly {
		return err
	}
	var out *outputError
	toOutput := errors.As(err, &out)
	if readOnly {
		if toOutput {
			return hinted{err, fmt.Sprintf("%s cannot be written to: choose another place", out.path)}
		}
		return hinted{err, fmt.Sprintf("the store %s must be writable when a step has to run: put it elsewhere with --root", b.Root)}
	}
	store, statErr := roomAt(b.Root)
	if statErr != nil {
		return err
	}
	quota := errors.Is(err, unix.EDQUOT)
	if toOutput {
		if advice := out.makeRoom(store, quota); advice != "" {
			return hinted{err, advice}
		}
	}
	return hinted{err, b.makeRoom(ctx, "has "+store.afterwards(quota))}
}

// makeRoom is the next step where an output found no room. It is empty when that is a matter of the store, whose leases an
// output writes, too.
func (e *outputError) makeRoom(store room, quota bool) string {
	if e.path == "" {
		if store.full() {
			return ""
		}
		return "there is no room where the output is redirected to: make some, or choose another place"
	}
	r, err := roomAt(e.path)
	if err != nil || r.fs == store.fs || !quota && store.full() && !r.full() {
		return ""
	}
	return fmt.Sprintf("the file system of %s has %s: make room there, or choose another place", e.path, r.afterwards(quota))
}

// makeRoom is the next step where the store found no room. It names what would give some.
func (b *build) makeRoom(ctx context.Context, state string) string {
	const worthIt = 1 << 20
	state = fmt.Sprintf("the file system of the store %s %s: ", b.Root, state)
	items, err := Usage(ctx, b.Root)
	if err != nil {
		return state + "make room with 'cooper prune', or put the store elsewhere with --root"
	}
	t := Sum(items)
	for _, i := range items {
		if i.InUse && i.Type != TypeImage {
			t.All -= i.Size.Disk
		}
	}
	size := func(n int64) string { return units.HumanSize(float64(n)) }
	switch {
	case t.All < worthIt:
		return state + "'cooper prune' has nothing to remove, so make room there, or put the store elsewhere with --root"
	case t.Reclaimable < worthIt:
		state += fmt.Sprintf("make room with 'cooper prune --all', which removes tagged images, too (%s)", size(t.All))
	case t.All-t.Reclaimable < worthIt:
		state += fmt.Sprintf("make room with 'cooper prune' (%s)", size(t.Reclaimable))
	default:
		state += fmt.Sprintf("make room with 'cooper prune' (%s) or 'cooper prune --all' (%s)", size(t.Reclaimable), size(t.All))
	}
	return state + ", or put the store elsewhere with --root"
}
