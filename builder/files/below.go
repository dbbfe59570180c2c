package files

import (
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// worthFinding is the size from which a file of an overlay is looked for in its layers, if that is worthAsking for each of them: on ext4, a
// file of 64 KB below 30 layers and one of 256 KB below 150 take as long either way.
const worthFinding, worthAsking = 64 << 10, 2 << 10

// layers are the directories that an overlay shows. They only make copying cheaper: what a tree has is what the overlay shows.
type layers struct {
	dirs []string

	once sync.Once
	fds  []int // of dirs, once they were asked for; all or none
}

// open opens for reading the file that lies in a layer and that the overlay shows as e. It returns nil when it is not sure, or the
// file is too small for that to be worth it.
func (l *layers) open(e *entry) *os.File {
	if len(l.dirs) == 0 || e.st.Size < int64(max(worthFinding, worthAsking*len(l.dirs))) {
		return nil
	}
	l.once.Do(l.openAll)
	for _, dir := range l.fds {
		// Not for reading yet: the same as in openRegular.
		fd, err := openBeneath(dir, e.path, unix.O_PATH|unix.O_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil // what lies on the way is no directory: a whiteout, which hides what is below
		}
		f := openShown(fd, e)
		unix.Close(fd)
		return f
	}
	return nil
}

// openShown opens a file of a layer if it is the one that the overlay shows, which gives it the layer's inode number. So nothing that
// a layer is made of can lead to another file.
func openShown(fd int, e *entry) *os.File {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG ||
		st.Ino != e.st.Ino || st.Mode != e.st.Mode || st.Size != e.st.Size || st.Mtim != e.st.Mtim {
		return nil
	}
	f, err := os.Open(fdPath(fd))
	if err != nil {
		return nil
	}
	return f
}

func (l *layers) openAll() {
	for _, dir := range l.dirs {
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			l.close()
			return
		}
		l.fds = append(l.fds, fd)
	}
}

func (l *layers) close() {
	for _, fd := range l.fds {
		unix.Close(fd)
	}
	l.fds = nil
}
