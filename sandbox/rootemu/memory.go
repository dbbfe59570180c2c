package rootemu

import (
	"bytes"
	"os"

	"golang.org/x/sys/unix"
)

// peek fills b from the memory of a process.
func peek(r *request, address uint64, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	local := []unix.Iovec{{Base: &b[0]}}
	local[0].SetLen(len(b))
	n, err := unix.ProcessVMReadv(r.pid, local, []unix.RemoteIovec{{Base: uintptr(address), Len: len(b)}}, 0)
	if err == nil && n != len(b) {
		err = unix.EFAULT
	}
	return err
}

// poke writes b into the memory of a process.
func poke(r *request, address uint64, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	local := []unix.Iovec{{Base: &b[0]}}
	local[0].SetLen(len(b))
	n, err := unix.ProcessVMWritev(r.pid, local, []unix.RemoteIovec{{Base: uintptr(address), Len: len(b)}}, 0)
	if err == nil && n != len(b) {
		err = unix.EFAULT
	}
	return err
}

// text reads a string that ends with a NUL. It asks page by page, because what follows may not be there, and for a
// little at first, because most are short.
func (s *Supervisor) text(r *request, address uint64) (string, error) {
	if address == 0 {
		return "", unix.EFAULT
	}
	page := uint64(os.Getpagesize())
	for have, piece := 0, uint64(256); have < len(s.buffer); piece = page {
		at := address + uint64(have)
		n := int(min(piece, page-at%page, uint64(len(s.buffer)-have)))
		if err := peek(r, at, s.buffer[have:have+n]); err != nil {
			return "", err
		}
		if end := bytes.IndexByte(s.buffer[have:have+n], 0); end >= 0 {
			return string(s.buffer[:have+end]), nil
		}
		have += n
	}
	return "", unix.ENAMETOOLONG
}
