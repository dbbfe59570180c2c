package first

/*
#include "program.h"
*/
import "C"

import (
	"encoding/binary"
	"fmt"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Call is a system call that the process makes.
type Call struct {
	What   string // in the words of an error: "mount /proc"
	Number uintptr
	Args   []Arg
	Keep   *Result // if a later call needs what this one returns
	Least  int64   // the smallest result that is success
	// Tolerate are at most four errors after which the next call is made all the same.
	Tolerate []unix.Errno
	Skip     int // how many of the next calls are left out after one of them
}

// Arg is an argument of a call.
type Arg interface {
	// put writes down what the argument needs. The value is a number, or, as kind says, where the process finds it.
	put(*script) (value uint64, kind kind)
}

type kind int

const (
	number  kind = iota
	pointer      // the offset of what it points to
	result       // the offset of the number
)

// Int is a number, or a set of flags.
type Int int64

func (i Int) put(*script) (uint64, kind) { return uint64(i), number }

// Given is the number of a descriptor that the process was given, by its place among them.
func Given(n int) Int { return Int(C.GIVEN + n) }

// Text is a pointer to a string that ends with a zero.
type Text string

func (t Text) put(s *script) (uint64, kind) {
	if strings.Contains(string(t), "\x00") {
		s.err = fmt.Errorf("%.60q has a zero in it, which no string of the kernel can have", string(t))
	}
	return s.add(append([]byte(t), 0)), pointer
}

// Bytes is a pointer to data, or room for it.
type Bytes []byte

func (b Bytes) put(s *script) (uint64, kind) { return s.add(b), pointer }

// List is a pointer to an array of strings that ends with a null pointer, as execve takes them.
type List []string

func (l List) put(s *script) (uint64, kind) {
	texts := make([]uint64, len(l))
	for i, text := range l {
		texts[i], _ = Text(text).put(s)
	}
	at := s.add(make([]byte, 8*(len(l)+1)))
	for i, text := range texts {
		s.point(at+uint64(8*i), text)
	}
	return at, pointer
}

// Shared is an argument that several calls have. It is written down once.
type Shared struct{ Arg Arg }

func (a *Shared) put(s *script) (uint64, kind) {
	if w, ok := s.shared[a]; ok {
		return w.value, w.kind
	}
	value, kind := a.Arg.put(s)
	s.shared[a] = written{value, kind}
	return value, kind
}

// Filter is a pointer to a seccomp program, a struct sock_fprog.
type Filter []unix.SockFilter

func (f Filter) put(s *script) (uint64, kind) {
	var program []byte
	for _, i := range f {
		program = binary.NativeEndian.AppendUint16(program, i.Code)
		program = append(program, i.Jt, i.Jf)
		program = binary.NativeEndian.AppendUint32(program, i.K)
	}
	header := make([]byte, 16)
	binary.NativeEndian.PutUint16(header, uint16(len(f)))
	at := s.add(header)
	s.point(at+8, s.add(program))
	return at, pointer
}

// Result is what an earlier call returned.
type Result struct{ _ byte } // two of them have two addresses

func (r *Result) put(s *script) (uint64, kind) { return s.message(r) + resultInMessage, result }

// Descriptor is a pointer to a struct msghdr that carries a result, a descriptor, to the builder.
type Descriptor struct{ Result *Result }

func (d Descriptor) put(s *script) (uint64, kind) {
	data := s.add([]byte{0})
	vector := s.add(binary.NativeEndian.AppendUint64(make([]byte, 8), 1)) // of one byte
	s.point(vector, data)
	var header unix.Msghdr
	header.Iovlen = 1
	header.Controllen = messageSize
	at := s.add(unsafe.Slice((*byte)(unsafe.Pointer(&header)), unsafe.Sizeof(header)))
	s.point(at+uint64(unsafe.Offsetof(header.Iov)), vector)
	s.point(at+uint64(unsafe.Offsetof(header.Control)), s.message(d.Result))
	return at, pointer
}

// script is what the builder writes down, in the form of program.h.
type script struct {
	bytes    []byte
	pointers []uint64
	messages map[*Result]uint64
	shared   map[*Shared]written
	err      error
}

// written is where an argument was put.
type written struct {
	value uint64
	kind  kind
}

// maxScript is more than the kernel takes as arguments, and less than an offset can name.
const maxScript = 1 << 30

// add writes data down and returns where. No two of them share a word, as the kernel may write there.
func (s *script) add(data []byte) uint64 {
	at := len(s.bytes)
	s.bytes = append(s.bytes, data...)
	s.bytes = append(s.bytes, make([]byte, -len(s.bytes)&7)...)
	return uint64(at)
}

// point makes the word at an offset a pointer.
func (s *script) point(at, to uint64) {
	binary.NativeEndian.PutUint64(s.bytes[at:], to)
	s.pointers = append(s.pointers, at)
}

// A result lies in a control message that carries one descriptor, so that it can be sent.
var (
	messageSize     = uint64(unix.CmsgSpace(4))
	resultInMessage = uint64(unix.CmsgLen(0))
)

func (s *script) message(r *Result) uint64 {
	if at, ok := s.messages[r]; ok {
		return at
	}
	message := make([]byte, messageSize)
	header := (*unix.Cmsghdr)(unsafe.Pointer(&message[0]))
	header.Level, header.Type = unix.SOL_SOCKET, unix.SCM_RIGHTS
	header.SetLen(unix.CmsgLen(4))
	s.messages[r] = s.add(message)
	return s.messages[r]
}

// write writes down calls.
func write(calls []Call, given int) ([]byte, error) {
	head := int(unsafe.Sizeof(C.struct_calls{}))
	size := int(unsafe.Sizeof(C.struct_call{}))
	s := &script{bytes: make([]byte, head+size*len(calls)), messages: map[*Result]uint64{}, shared: map[*Shared]written{}}
	for i, call := range calls {
		c := C.struct_call{number: C.long(call.Number), least: C.long(call.Least), skip: C.uint(call.Skip)}
		if len(call.Args) > len(c.args) || len(call.Tolerate) > len(c.tolerated) {
			return nil, fmt.Errorf("%s: %d arguments and %d errors to tolerate are too many", call.What, len(call.Args), len(call.Tolerate))
		}
		at := head + size*i
		for n, arg := range call.Args {
			value, kind := arg.put(s)
			c.args[n] = C.ulong(value)
			switch kind {
			case pointer:
				s.pointers = append(s.pointers, uint64(at)+uint64(unsafe.Offsetof(c.args))+uint64(8*n))
			case result:
				c.loads |= 1 << n
			}
		}
		for n, errno := range call.Tolerate {
			c.tolerated[n] = C.int(errno)
		}
		if call.Keep != nil {
			c.keep = C.uint(s.message(call.Keep) + resultInMessage)
		}
		copy(s.bytes[at:], unsafe.Slice((*byte)(unsafe.Pointer(&c)), size))
	}
	if s.err != nil {
		return nil, s.err
	}
	if len(s.bytes) > maxScript {
		return nil, fmt.Errorf("the arguments and the environment have %d bytes, which is more than a process can get", len(s.bytes))
	}
	var pointers []byte
	for _, at := range s.pointers {
		pointers = binary.NativeEndian.AppendUint64(pointers, at)
	}
	header := C.struct_calls{given: C.ulong(given), count: C.ulong(len(calls)), pointers: C.ulong(len(s.pointers)), pointers_at: C.ulong(s.add(pointers))}
	copy(s.bytes, unsafe.Slice((*byte)(unsafe.Pointer(&header)), head))
	return s.bytes, nil
}
