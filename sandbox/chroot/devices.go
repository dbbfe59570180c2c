package chroot

import (
	"bytes"
	"os"
	"path"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/notify"
)

// Device is a node that every command finds in /dev.
type Device struct {
	Name         string
	Major, Minor uint32
}

// Devices are those of every container. None of them says anything of the machine or can be changed.
func Devices() []Device {
	return []Device{{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}}
}

// standard are the other names that a command opens its own descriptors by. They are links into /proc elsewhere.
var standard = map[string]int{"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}

// opening are the calls that open a file by its name.
func opening() []call {
	return append(oldOpening(),
		call{"openat", unix.SYS_OPENAT, func(s *supervisor, n *notify.Call) notify.Answer {
			return s.open(n, int(int32(n.Args[0])), n.Args[1], n.Args[2])
		}},
		call{"fchmodat", unix.SYS_FCHMODAT, func(s *supervisor, n *notify.Call) notify.Answer {
			return s.changeMode(n, int(int32(n.Args[0])), n.Args[1], n.Args[2])
		}},
		call{"openat2", unix.SYS_OPENAT2, func(s *supervisor, n *notify.Call) notify.Answer {
			var how unix.OpenHow
			if s.peek(n, n.Args[2], unsafe.Slice((*byte)(unsafe.Pointer(&how)), unsafe.Sizeof(how.Flags))) != nil {
				return notify.Pass
			}
			return s.open(n, int(int32(n.Args[0])), n.Args[1], how.Flags)
		}},
	)
}

// looking are the calls that look at a file by its name. They are asked about where no node can be made.
func looking() []call {
	return append(oldLooking(),
		call{"statx", unix.SYS_STATX, func(s *supervisor, n *notify.Call) notify.Answer {
			name, ok := s.device(n, int(int32(n.Args[0])), n.Args[1])
			if !ok {
				return notify.Pass
			}
			var st unix.Statx_t
			if err := unix.Statx(unix.AT_FDCWD, name, 0, unix.STATX_BASIC_STATS, &st); err != nil {
				return notify.Pass
			}
			return s.poke(n, n.Args[4], unsafe.Slice((*byte)(unsafe.Pointer(&st)), unsafe.Sizeof(st)))
		}})
}

// changeMode answers a call that names an open file by its descriptor: C libraries do so for a file that may be a link.
func (s *supervisor) changeMode(n *notify.Call, dir int, address, mode uint64) notify.Answer {
	name, ok := s.named(n, dir, address)
	if !ok {
		return notify.Pass
	}
	fd, ok := descriptor(name)
	if !ok {
		return notify.Pass
	}
	err := as(n.PID, func() error { return unix.Chmod(theirs(n.PID, "fd/"+strconv.Itoa(fd)), uint32(mode)) })
	if err != nil {
		return notify.Refuse(err)
	}
	return notify.Answer{}
}

// stat answers a call that fills a struct stat.
func (s *supervisor) stat(n *notify.Call, dir int, address, into uint64) notify.Answer {
	name, ok := s.device(n, dir, address)
	if !ok {
		return notify.Pass
	}
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		return notify.Pass
	}
	return s.poke(n, into, unsafe.Slice((*byte)(unsafe.Pointer(&st)), unsafe.Sizeof(st)))
}

// open gives a process one of the devices, or another descriptor of a file that it has open. Whatever is in the path by the time
// that it is read, nothing else is ever given.
func (s *supervisor) open(n *notify.Call, dir int, address, flags uint64) notify.Answer {
	name, ok := s.named(n, dir, address)
	if !ok || flags&unix.O_PATH != 0 {
		return notify.Pass
	}
	if fd, ok := descriptor(name); ok {
		return s.again(n, fd, flags)
	}
	device, ok := lookUp(name)
	switch {
	case !ok, s.nodes: // its own, which it may change
		return notify.Pass
	case flags&(unix.O_CREAT|unix.O_EXCL) == unix.O_CREAT|unix.O_EXCL:
		return notify.Answer{Errno: unix.EEXIST}
	case flags&unix.O_DIRECTORY != 0:
		return notify.Answer{Errno: unix.ENOTDIR}
	case device.Name == "tty":
		return notify.Answer{Errno: unix.ENXIO} // ours is the builder's, and the command has none
	}
	file, err := os.OpenFile(name, int(flags&(unix.O_ACCMODE|unix.O_NONBLOCK|unix.O_APPEND)), 0)
	if err != nil {
		return notify.Pass
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(device.Major, device.Minor) {
		file.Close()
		return notify.Pass
	}
	return notify.Answer{File: file, Flags: uint32(flags & unix.O_CLOEXEC)}
}

// again opens a file anew that a process has open, as that process.
func (s *supervisor) again(n *notify.Call, fd int, flags uint64) notify.Answer {
	var file *os.File
	err := as(n.PID, func() error {
		name := theirs(n.PID, "fd/"+strconv.Itoa(fd))
		got, err := unix.Open(name, int(flags)&^(unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW)|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
		if err == nil {
			file = os.NewFile(uintptr(got), name)
		}
		return err
	})
	if err != nil {
		return notify.Refuse(err)
	}
	return notify.Answer{File: file, Flags: uint32(flags & unix.O_CLOEXEC)}
}

// naming answers a call that asks for the name of the machine: without a namespace it is that of others.
func naming(name string) func(*supervisor, *notify.Call) notify.Answer {
	return func(s *supervisor, n *notify.Call) notify.Answer {
		var all unix.Utsname
		if err := unix.Uname(&all); err != nil || len(name) >= len(all.Nodename) {
			return notify.Pass
		}
		all.Nodename = [len(all.Nodename)]byte{}
		copy(all.Nodename[:], name)
		return s.poke(n, n.Args[0], unsafe.Slice((*byte)(unsafe.Pointer(&all)), unsafe.Sizeof(all)))
	}
}

// device returns the name of the device that a path means.
func (s *supervisor) device(n *notify.Call, dir int, address uint64) (string, bool) {
	name, ok := s.named(n, dir, address)
	if !ok {
		return "", false
	}
	_, ok = lookUp(name)
	return name, ok
}

func lookUp(name string) (Device, bool) {
	for _, d := range Devices() {
		if name == "/dev/"+d.Name {
			return d, true
		}
	}
	return Device{}, false
}

// descriptor recognises the names of a process's own descriptors.
func descriptor(name string) (int, bool) {
	if fd, ok := standard[name]; ok {
		return fd, true
	}
	for _, prefix := range []string{"/dev/fd/", "/proc/self/fd/", "/proc/thread-self/fd/"} {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			fd, err := strconv.ParseUint(rest, 10, 31)
			return int(fd), err == nil
		}
	}
	return 0, false
}

// named reads a path, if its last name is one that matters, and makes it absolute. Links are not followed: whoever comes by another
// way finds what lies in their place.
func (s *supervisor) named(n *notify.Call, dir int, address uint64) (string, bool) {
	name, ok := s.text(n, address)
	if !ok || !candidate(path.Base(name)) {
		return "", false
	}
	if path.IsAbs(name) {
		return path.Clean(name), true
	}
	at := "cwd"
	if dir != unix.AT_FDCWD {
		at = "fd/" + strconv.Itoa(dir)
	}
	var from string
	err := as(n.PID, func() (err error) {
		from, err = os.Readlink(theirs(n.PID, at))
		return err
	})
	below, ok := strings.CutPrefix(from, s.root)
	if err != nil || !ok {
		return "", false
	}
	return path.Join("/", below, name), true
}

func candidate(base string) bool {
	_, isDevice := lookUp("/dev/" + base)
	_, isStandard := standard["/dev/"+base]
	return isDevice || isStandard || base != "" && base[0] >= '0' && base[0] <= '9'
}

// longest is that of a path that can mean something here.
const longest = 256

// text reads a string that is short enough to matter.
func (s *supervisor) text(n *notify.Call, address uint64) (string, bool) {
	var buffer [longest]byte
	page := uint64(os.Getpagesize())
	first := buffer[:min(longest, page-address%page)] // what follows may not be there
	if s.peek(n, address, first) != nil {
		return "", false
	}
	end := bytes.IndexByte(first, 0)
	if end < 0 && len(first) < longest {
		if s.peek(n, address+uint64(len(first)), buffer[len(first):]) != nil {
			return "", false
		}
		end = bytes.IndexByte(buffer[:], 0)
	}
	if end < 0 {
		return "", false
	}
	return string(buffer[:end]), true
}

// peek reads the memory of a process.
func (s *supervisor) peek(n *notify.Call, address uint64, b []byte) error {
	local := []unix.Iovec{{Base: &b[0]}}
	local[0].SetLen(len(b))
	if got, err := unix.ProcessVMReadv(int(n.PID), local, []unix.RemoteIovec{{Base: uintptr(address), Len: len(b)}}, 0); err == nil && got == len(b) {
		return nil
	}
	return memory(n.PID, unix.O_RDONLY, func(fd int) error { return whole(unix.Pread(fd, b, int64(address)))(len(b)) })
}

// poke writes to the memory of a process, and lets its call succeed.
func (s *supervisor) poke(n *notify.Call, address uint64, b []byte) notify.Answer {
	err := memory(n.PID, unix.O_WRONLY, func(fd int) error {
		if !s.Valid(n) {
			return unix.ESRCH // it is gone, and another may have its number
		}
		return whole(unix.Pwrite(fd, b, int64(address)))(len(b))
	})
	if err != nil {
		return notify.Pass
	}
	return notify.Answer{}
}

func whole(n int, err error) func(int) error {
	return func(want int) error {
		if err == nil && n != want {
			return unix.EFAULT
		}
		return err
	}
}

func memory(pid uint32, flags int, use func(fd int) error) error {
	return as(pid, func() error {
		fd, err := unix.Open(theirs(pid, "mem"), flags|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return use(fd)
	})
}

func theirs(pid uint32, name string) string {
	return "/proc/" + strconv.FormatUint(uint64(pid), 10) + "/" + name
}
