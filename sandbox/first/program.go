package first

/*
#include "program.h"
*/
import "C"

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// program returns the file of the first process's program, which nobody can change any more. Where the kernel forbids executable
// memfds (vm.memfd_noexec=2) it is a file in dir without a name, and used for one process only.
func program(dir string) (*os.File, error) {
	// A process that is forked meanwhile would hold it open for writing, and then it cannot be executed.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	file, err := emptyProgram(dir)
	if err != nil {
		return nil, fmt.Errorf("program of the first process: %w", err)
	}
	defer file.Close()
	text, err := image()
	if err != nil {
		return nil, err
	}
	if _, err := file.Write(text); err != nil {
		return nil, err
	}
	_, _ = unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE)
	return os.Open("/proc/self/fd/" + strconv.Itoa(int(file.Fd()))) // what is open for writing cannot be executed
}

func emptyProgram(dir string) (*os.File, error) {
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("cooper-first", flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3 all were executable
		fd, err = unix.MemfdCreate("cooper-first", flags)
	}
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOSYS) {
		fd, err = unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o500)
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "first"), nil
}

// image is an ELF file with one segment, the code.
func image() ([]byte, error) {
	const base, page = 0x400000, 0x10000
	p := C.cooper_first_program()
	machine, ok := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[runtime.GOARCH]
	if !ok {
		return nil, fmt.Errorf("architecture %s is unknown", runtime.GOARCH)
	}
	const headers = uint64(unsafe.Sizeof(elf.Header64{}) + 2*unsafe.Sizeof(elf.Prog64{}))
	at := (headers + 63) &^ 63
	header := elf.Header64{
		Ident:     [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:      uint16(elf.ET_EXEC),
		Machine:   uint16(machine),
		Version:   uint32(elf.EV_CURRENT),
		Entry:     base + at + uint64(p.entry),
		Phoff:     uint64(unsafe.Sizeof(elf.Header64{})),
		Ehsize:    uint16(unsafe.Sizeof(elf.Header64{})),
		Phentsize: uint16(unsafe.Sizeof(elf.Prog64{})),
		Phnum:     2,
	}
	size := at + uint64(p.size)
	segment := elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Vaddr: base, Paddr: base, Filesz: size, Memsz: size, Align: page}
	stack := elf.Prog64{Type: uint32(elf.PT_GNU_STACK), Flags: uint32(elf.PF_R | elf.PF_W)} // not executable
	var b bytes.Buffer
	if err := errors.Join(binary.Write(&b, binary.LittleEndian, header), binary.Write(&b, binary.LittleEndian, segment), binary.Write(&b, binary.LittleEndian, stack)); err != nil {
		return nil, err
	}
	b.Write(make([]byte, at-headers))
	b.Write(C.GoBytes(p.code, C.int(p.size)))
	return b.Bytes(), nil
}
