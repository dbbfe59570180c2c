package account

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	passwdFile = "etc/passwd"
	groupFile  = "etc/group"
	// maxFileSize is BuildKit's limit; a sparse 10 GiB file must not cost its reader 10 GiB (CVE-2026-47262).
	maxFileSize = 10 << 20
)

// errNoFile says that an image has no such file, which is an answer and no trouble.
var errNoFile = errors.New("no such file")

// columns is one more than any of the two files has, so that a line of ten million colons stays small.
const columns = 8

// eachLine calls f with the columns of every entry of a file until it says stop. The error is errNoFile when the
// file is not there.
func eachLine(root, name string, f func(fields []string) (stop bool, err error)) error {
	content, err := read(root, name)
	if err != nil {
		return err
	}
	for line := range bytes.Lines(content) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		stop, err := f(strings.SplitN(string(line), ":", columns))
		if err != nil {
			return fmt.Errorf("/%s: %w", name, err)
		}
		if stop {
			return nil
		}
	}
	return nil
}

func read(root, name string) ([]byte, error) {
	f, err := open(root, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxFileSize+1))
	if err != nil {
		return nil, fmt.Errorf("/%s: %w", name, bare(err))
	}
	if len(content) > maxFileSize {
		return nil, fmt.Errorf("/%s is larger than %d MiB", name, maxFileSize>>20)
	}
	return content, nil
}

// open opens a regular file beneath root. The file is pinned with O_PATH before it is judged, because opening a
// device is already a request to its driver and opening a FIFO may never return; then the very inode that was
// judged is reopened for reading.
func open(root, name string) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open the root directory: %w", err)
	}
	defer unix.Close(dir)
	how := &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	fd, err := unix.Openat2(dir, name, how)
	for errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) { // a link with "..", and a rename anywhere meanwhile
		fd, err = unix.Openat2(dir, name, how)
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, errNoFile
	}
	if err != nil {
		return nil, fmt.Errorf("/%s: %w", name, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("/%s: %w", name, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("/%s is not a regular file", name)
	}
	if st.Size > maxFileSize {
		return nil, fmt.Errorf("/%s is larger than %d MiB", name, maxFileSize>>20)
	}
	f, err := os.Open("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return nil, fmt.Errorf("/%s: %w", name, bare(err))
	}
	return f, nil
}

// bare drops the path of this machine from an error.
func bare(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}
