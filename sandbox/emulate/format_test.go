package emulate

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// program is the beginning of an ELF file.
func program(class elf.Class, data elf.Data, kind elf.Type, machine elf.Machine, abi elf.OSABI) []byte {
	h := make([]byte, 128)
	copy(h, elf.ELFMAG)
	h[4], h[5], h[6], h[7] = byte(class), byte(data), 1, byte(abi)
	var order binary.ByteOrder = binary.LittleEndian
	if data == elf.ELFDATA2MSB {
		order = binary.BigEndian
	}
	order.PutUint16(h[16:], uint16(kind))
	order.PutUint16(h[18:], uint16(machine))
	return h
}

// matches is the kernel's comparison.
func matches(f format, header []byte) bool {
	for i, b := range f.header() {
		if (header[i]^b)&f.mask()[i] != 0 {
			return false
		}
	}
	return true
}

func TestEachProgramHasItsEmulatorAndNoOther(t *testing.T) {
	const le, be, c32, c64 = elf.ELFDATA2LSB, elf.ELFDATA2MSB, elf.ELFCLASS32, elf.ELFCLASS64
	for _, c := range []struct {
		arch    string // "" if nobody's
		class   elf.Class
		data    elf.Data
		machine elf.Machine
	}{
		{"386", c32, le, 3}, {"amd64", c64, le, 62}, {"arm", c32, le, 40}, {"arm64", c64, le, 183}, {"loong64", c64, le, 258},
		{"mips64le", c64, le, 8}, {"ppc64le", c64, le, 21}, {"riscv64", c64, le, 243}, {"s390x", c64, be, 22},
		{"", c64, be, 21}, {"", c64, be, 8}, {"", c32, le, 8}, {"", c32, le, 62}, {"", c32, le, 243}, {"", c64, be, 183}, {"", c32, be, 22}, {"", c64, le, 22},
	} {
		for _, kind := range []elf.Type{elf.ET_EXEC, elf.ET_DYN, elf.ET_REL, elf.ET_CORE} {
			for _, abi := range []elf.OSABI{elf.ELFOSABI_NONE, elf.ELFOSABI_LINUX} {
				var got []string
				for arch, f := range formats {
					if matches(f, program(c.class, c.data, kind, c.machine, abi)) {
						got = append(got, arch)
					}
				}
				want := c.arch
				if kind == elf.ET_REL || kind == elf.ET_CORE {
					want = ""
				}
				if strings.Join(got, " ") != want {
					t.Errorf("%v %v %v machine %d, ABI %v is emulated by %q, want %q", c.class, c.data, kind, c.machine, abi, got, want)
				}
			}
		}
	}
}

func TestLineOfTheRegistration(t *testing.T) {
	got := strings.ReplaceAll(formats["s390x"].line("cooper-s390x", "/opt/a:b/qemu-s390x-static"), delimiter, "|")
	want := `|cooper-s390x|M|0|\x7f\x45\x4c\x46\x02\x02\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x16` +
		`|\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xfe\xff\xff|/opt/a:b/qemu-s390x-static|OCPF`
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// entry is how the kernel shows Debian's registration of arm64.
const entry = `enabled
interpreter /usr/bin/qemu-aarch64-static
flags: OCPF
offset 0
magic 7f454c460201010000000000000000000200b700
mask ffffffffffffff00fffffffffffffffffeffffff
`

func TestMachinesTableIsRead(t *testing.T) {
	for _, c := range []struct {
		name, arch, status, entry string
		want                      bool
	}{
		{"of this architecture", "arm64", "enabled\n", entry, true},
		{"of another architecture", "arm", "enabled\n", entry, false},
		{"of the other byte order", "s390x", "enabled\n", entry, false},
		{"everything switched off", "arm64", "disabled\n", entry, false},
		{"switched off", "arm64", "enabled\n", strings.Replace(entry, "enabled", "disabled", 1), false},
		{"opened when it is needed, and then it is not in the image", "arm64", "enabled\n", strings.Replace(entry, "OCPF", "OCP", 1), false},
		{"by extension", "arm64", "enabled\n", "enabled\ninterpreter /usr/bin/python3\nflags: F\nextension .pyc\n", false},
		{"by a short magic", "arm64", "enabled\n", "enabled\ninterpreter /usr/bin/x\nflags: F\noffset 0\nmagic 4d5a\n", false},
		{"damaged", "arm64", "enabled\n", strings.Replace(entry, "7f45", "7x45", 1), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, content := range map[string]string{"status": c.status, "register": "", "qemu-aarch64": c.entry} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if got := registered(dir, formats[c.arch]); got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
	if registered(filepath.Join(t.TempDir(), "none"), formats["arm64"]) {
		t.Error("a table that is not there has an emulator")
	}
}

func TestQemuIsFound(t *testing.T) {
	static := program(elf.ELFCLASS64, elf.ELFDATA2LSB, elf.ET_EXEC, elf.EM_X86_64, 0)
	binary.LittleEndian.PutUint32(static[20:], 1)
	binary.LittleEndian.PutUint16(static[52:], 64) // size of the header
	dynamic := bytes.Clone(static)
	binary.LittleEndian.PutUint64(dynamic[32:], 64) // program headers begin behind it
	binary.LittleEndian.PutUint16(dynamic[54:], 56)
	binary.LittleEndian.PutUint16(dynamic[56:], 1)
	binary.LittleEndian.PutUint32(dynamic[64:], uint32(elf.PT_INTERP))
	arch, f := "arm64", formats["arm64"]
	if runtime.GOARCH == arch {
		arch, f = "amd64", formats["amd64"]
	}
	for _, c := range []struct {
		name        string
		files       map[string][]byte
		want, fails string
	}{
		{"static by its name", map[string][]byte{"a/qemu-X-static": static}, "a/qemu-X-static", ""},
		{"static by its content", map[string][]byte{"b/qemu-X": static}, "b/qemu-X", ""},
		{"the first directory", map[string][]byte{"a/qemu-X-static": static, "b/qemu-X-static": static}, "a/qemu-X-static", ""},
		{"a static one behind a dynamic one", map[string][]byte{"a/qemu-X": dynamic, "b/qemu-X": static}, "b/qemu-X", ""},
		{"dynamic", map[string][]byte{"a/qemu-X": dynamic}, "", "needs shared libraries"},
		{"no program", map[string][]byte{"a/qemu-X-static": []byte("#!/bin/sh\n")}, "", "no ELF program"},
		{"none", nil, "", "no qemu-X-static is in "},
	} {
		t.Run(c.name, func(t *testing.T) {
			top := t.TempDir()
			for name, content := range c.files {
				file := filepath.Join(top, strings.ReplaceAll(name, "X", f.qemu))
				if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, content, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			t.Chdir(filepath.Join(top))
			got, err := findQemu([]string{".", "a", top + "/a", top + "/b"}, arch, f)
			if c.fails != "" {
				hint, ok := err.(interface{ Hint() string })
				if !ok || hint.Hint() == "" || !strings.Contains(err.Error(), strings.ReplaceAll(c.fails, "X", f.qemu)) {
					t.Errorf("error is %v, want a hint and %q", err, c.fails)
				}
				return
			}
			if want := filepath.Join(top, strings.ReplaceAll(c.want, "X", f.qemu)); got != want {
				t.Errorf("found %q, %v; want %q", got, err, want)
			}
		})
	}
}

func TestUnknownArchitecture(t *testing.T) {
	err := New(nil).Enable("sparc")
	hint, ok := err.(interface{ Hint() string })
	if !ok || !strings.Contains(hint.Hint(), "riscv64") {
		t.Errorf("error is %v, want a hint that names what there is", err)
	}
	if err := New(nil).Enable(runtime.GOARCH); err != nil {
		t.Errorf("the machine's own architecture: %v", err)
	}
	if got := fmt.Sprint(known()); !strings.Contains(got, "arm64, loong64") {
		t.Errorf("known are %s", got)
	}
}
