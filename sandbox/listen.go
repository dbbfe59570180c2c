package sandbox

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/owner"
)

// Listen makes a unix socket called name in dir and listens on it, to be shown
// to the process by a Mount of kind Bind. The path may be of any length. dir
// must be private to the caller: until the socket has its owner and mode,
// nobody else may reach it. Closing the listener leaves the socket's name,
// which goes with dir.
func Listen(dir, name string, uid, gid uint32, mode os.FileMode) (*net.UnixListener, error) {
	l, err := listen(dir, name, uid, gid, mode)
	if err != nil {
		return nil, fmt.Errorf("listen on socket %s/%s: %w", dir, name, err)
	}
	return l, nil
}

func listen(dir, name string, uid, gid uint32, mode os.FileMode) (_ *net.UnixListener, err error) {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return nil, errors.New("this is no file name")
	}
	ids, err := readIDs()
	if err != nil {
		return nil, err
	}
	if !ids.single() {
		if err := ids.check(uid, gid); err != nil {
			return nil, err
		}
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	// sun_path holds 108 bytes, and a directory in a user's home may be longer
	short := "/proc/self/fd/" + strconv.Itoa(fd) + "/" + name
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: short, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // by then the descriptor is another one
	err = errors.Join(
		giveTo(fd, name, owner.IDs{UID: uid, GID: gid}, ids.single()),
		os.NewSyscallError("fchmodat", unix.Fchmodat(fd, name, uint32(mode.Perm()), 0)))
	if err != nil {
		return nil, errors.Join(err, l.Close(), unix.Unlinkat(fd, name, 0))
	}
	return l, nil
}

// giveTo makes somebody the owner of a socket that was just made. With a single
// id that is only recorded.
func giveTo(dir int, name string, to owner.IDs, single bool) error {
	if !single {
		return os.NewSyscallError("fchownat", unix.Fchownat(dir, name, int(to.UID), int(to.GID), unix.AT_SYMLINK_NOFOLLOW))
	}
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("openat", err)
	}
	defer unix.Close(fd)
	return owner.Record("/proc/self/fd/"+strconv.Itoa(fd), unix.S_IFSOCK, to)
}
