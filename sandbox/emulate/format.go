package emulate

import (
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// format is how the kernel recognises the programs of an architecture, and who
// runs them.
type format struct {
	qemu    string // as in qemu-NAME-static
	class   elf.Class
	data    elf.Data
	machine elf.Machine
}

// formats by GOARCH.
var formats = map[string]format{
	"386":      {"i386", elf.ELFCLASS32, elf.ELFDATA2LSB, elf.EM_386},
	"amd64":    {"x86_64", elf.ELFCLASS64, elf.ELFDATA2LSB, elf.EM_X86_64},
	"arm":      {"arm", elf.ELFCLASS32, elf.ELFDATA2LSB, elf.EM_ARM},
	"arm64":    {"aarch64", elf.ELFCLASS64, elf.ELFDATA2LSB, elf.EM_AARCH64},
	"loong64":  {"loongarch64", elf.ELFCLASS64, elf.ELFDATA2LSB, elf.EM_LOONGARCH},
	"mips64le": {"mips64el", elf.ELFCLASS64, elf.ELFDATA2LSB, elf.EM_MIPS},
	"ppc64le":  {"ppc64le", elf.ELFCLASS64, elf.ELFDATA2LSB, elf.EM_PPC64},
	"riscv64":  {"riscv64", elf.ELFCLASS64, elf.ELFDATA2LSB, elf.EM_RISCV},
	"s390x":    {"s390x", elf.ELFCLASS64, elf.ELFDATA2MSB, elf.EM_S390},
}

func known() string { return strings.Join(slices.Sorted(maps.Keys(formats)), ", ") }

// headerSize is how much of a program the kernel compares: up to e_machine.
const headerSize = 20

// header is the beginning of an executable of the format.
func (f format) header() []byte {
	h := make([]byte, headerSize)
	copy(h, elf.ELFMAG)
	h[elf.EI_CLASS], h[elf.EI_DATA], h[elf.EI_VERSION] = byte(f.class), byte(f.data), byte(elf.EV_CURRENT)
	f.order().PutUint16(h[16:], uint16(elf.ET_EXEC))
	f.order().PutUint16(h[18:], uint16(f.machine))
	return h
}

// mask says which bits of header must match. The ABI and its version may be any,
// and ET_EXEC and ET_DYN differ in the last bit.
func (f format) mask() []byte {
	m := make([]byte, headerSize)
	for _, i := range []int{0, 1, 2, 3, elf.EI_CLASS, elf.EI_DATA, elf.EI_VERSION} {
		m[i] = 0xff
	}
	f.order().PutUint16(m[16:], 0xfffe)
	f.order().PutUint16(m[18:], 0xffff)
	return m
}

func (f format) order() binary.ByteOrder {
	if f.data == elf.ELFDATA2MSB {
		return binary.BigEndian
	}
	return binary.LittleEndian
}

// line is what is written to binfmt_misc's register file. The flags are
// Debian's:
//
//	F  the kernel opens qemu now, as the builder: no image needs to hold it
//	P  the program gets the argv[0] that it was called with; busybox and login
//	   shells decide by it what they are
//	O  the kernel opens the program: one that may be executed but not read works
//	C  rights come from the program and not from qemu: setuid programs (su, sudo)
//	   work, within the user namespace, as they do without emulation
func (f format) line(name, qemu string) string {
	return strings.Join([]string{"", name, "M", "0", escaped(f.header()), escaped(f.mask()), qemu, "OCPF"}, delimiter)
}

// delimiter separates the fields: something that no path to qemu contains.
const delimiter = "\x1f"

func escaped(b []byte) string {
	var s strings.Builder
	for _, c := range b {
		fmt.Fprintf(&s, `\x%02x`, c)
	}
	return s.String()
}

// servedBy reports whether an entry of binfmt_misc, as the kernel shows it, is in
// force, is opened already (flag F) and recognises the format.
func (f format) servedBy(entry string) bool {
	fields := map[string]string{}
	enabled := false
	for line := range strings.Lines(entry) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		fields[strings.TrimSuffix(name, ":")] = value
		enabled = enabled || line == "enabled\n"
	}
	magic, err1 := hex.DecodeString(fields["magic"])
	mask, err2 := hex.DecodeString(fields["mask"])
	if !enabled || !strings.Contains(fields["flags"], "F") || fields["offset"] != "0" || err1 != nil || err2 != nil ||
		len(magic) != headerSize || (len(mask) != 0 && len(mask) != headerSize) {
		return false
	}
	header := f.header()
	for i := range magic {
		bits := byte(0xff)
		if len(mask) != 0 {
			bits = mask[i]
		}
		if (magic[i]^header[i])&bits != 0 {
			return false
		}
	}
	return true
}

// hasNoInterpreter reports whether an ELF file needs no dynamic linker.
func hasNoInterpreter(r io.ReaderAt) (bool, error) {
	f, err := elf.NewFile(r)
	if err != nil {
		return false, fmt.Errorf("it is no ELF program: %w", err)
	}
	return !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }), nil
}
