package userns

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// seals are what libcontainer wants to see on /proc/self/exe before it trusts
// it without making a copy.
const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// sealedSelf returns this program as a file that nobody can change any more.
// Where the kernel forbids executable memfds (vm.memfd_noexec=2) it is the
// program file as it is, and libcontainer protects it in its own, slower way.
func sealedSelf() (*os.File, error) {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	if got, err := unix.FcntlInt(self.Fd(), unix.F_GET_SEALS, 0); err == nil && got&seals == seals {
		return self, nil
	}
	memfd, err := executableMemfd()
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOSYS) {
		return self, nil
	}
	defer self.Close()
	if err != nil {
		return nil, err
	}
	if err := fill(memfd, self); err != nil {
		memfd.Close()
		return nil, fmt.Errorf("seal own program: %w", err)
	}
	return memfd, nil
}

func executableMemfd() (*os.File, error) {
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("cooper", flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3 all were executable
		fd, err = unix.MemfdCreate("cooper", flags)
	}
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	return os.NewFile(uintptr(fd), "memfd:cooper"), nil
}

func fill(memfd, program *os.File) error {
	if _, err := io.Copy(memfd, program); err != nil {
		return err
	}
	if err := memfd.Chmod(0o511); err != nil {
		return err
	}
	_, err := unix.FcntlInt(memfd.Fd(), unix.F_ADD_SEALS, seals)
	return os.NewSyscallError("fcntl(F_ADD_SEALS)", err)
}
