// Package filter makes seccomp programs of rules with the names of system calls (seccomp(2), libseccomp).
package filter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	libseccomp "github.com/seccomp/libseccomp-golang"
	"golang.org/x/sys/unix"
)

// A Rule says what happens to a call. Several rules for one name are alternatives.
type Rule struct {
	Name   string // of the call; one that the architecture does not have is left out
	Action Action
	Errno  unix.Errno  // for Refuse, EPERM if 0
	Args   []Condition // all of them hold
}

// Action is what happens to a call.
type Action int

const (
	Allow Action = iota
	Refuse
	Ask // the supervisor behind the filter's listener
)

// Condition is one on an argument, each of a call's at most once.
type Condition struct {
	Index uint
	Is    Comparison
	Value uint64
	Mask  uint64 // for Masked: what is left of the argument is Value
}

// Comparison is that of an argument with a value.
type Comparison int

const (
	Equal Comparison = iota
	NotEqual
	Less
	LessOrEqual
	Greater
	GreaterOrEqual
	Masked
)

var comparisons = map[Comparison]libseccomp.ScmpCompareOp{
	Equal: libseccomp.CompareEqual, NotEqual: libseccomp.CompareNotEqual,
	Less: libseccomp.CompareLess, LessOrEqual: libseccomp.CompareLessOrEqual,
	Greater: libseccomp.CompareGreater, GreaterOrEqual: libseccomp.CompareGreaterEqual,
	Masked: libseccomp.CompareMaskedEqual,
}

// Compile makes a program of rules. A call of which no rule speaks gets EPERM, or, if it is newer than all of which one does, ENOSYS,
// for which programs are prepared. A call by the numbers of another architecture kills.
func Compile(rules []Rule) ([]unix.SockFilter, error) {
	program, err := compile(rules)
	if err != nil {
		return nil, fmt.Errorf("seccomp filter: %w", err)
	}
	return program, nil
}

func compile(rules []Rule) ([]unix.SockFilter, error) {
	f, err := libseccomp.NewFilter(errno(unix.EPERM))
	if err != nil {
		return nil, err
	}
	defer f.Release()
	const binaryTree = 2
	if err := f.SetOptimize(binaryTree); err != nil {
		return nil, err
	}
	var newest libseccomp.ScmpSyscall
	for _, r := range rules {
		call, err := libseccomp.GetSyscallFromName(r.Name)
		if errors.Is(err, libseccomp.ErrSyscallDoesNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", r.Name, err)
		}
		newest = max(newest, call)
		if err := add(f, call, r); err != nil {
			return nil, fmt.Errorf("%s: %w", r.Name, err)
		}
	}
	program, err := export(f)
	if err != nil {
		return nil, err
	}
	arch, ok := architectures[runtime.GOARCH]
	if !ok {
		return nil, fmt.Errorf("architecture %s is unknown", runtime.GOARCH)
	}
	return append(absent(arch, uint32(newest)), program...), nil
}

func errno(e unix.Errno) libseccomp.ScmpAction { return libseccomp.ActErrno.SetReturnCode(int16(e)) }

func add(f *libseccomp.ScmpFilter, call libseccomp.ScmpSyscall, r Rule) error {
	action := libseccomp.ActAllow
	switch r.Action {
	case Ask:
		action = libseccomp.ActNotify
	case Refuse:
		if r.Errno == 0 || r.Errno == unix.EPERM {
			return nil // as without a rule
		}
		action = errno(r.Errno)
	}
	var conditions []libseccomp.ScmpCondition
	for _, c := range r.Args {
		values := []uint64{c.Value}
		if c.Is == Masked {
			values = []uint64{c.Mask, c.Value}
		}
		condition, err := libseccomp.MakeCondition(c.Index, comparisons[c.Is], values...)
		if err != nil {
			return err
		}
		conditions = append(conditions, condition)
	}
	if len(conditions) == 0 {
		return f.AddRule(call, action)
	}
	return f.AddRuleConditional(call, action, conditions)
}

// export returns the program of a filter.
func export(f *libseccomp.ScmpFilter) ([]unix.SockFilter, error) {
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer read.Close()
	err = f.ExportBPF(write) // the largest that the kernel takes fits into a pipe
	if err = errors.Join(err, write.Close()); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(read)
	if err != nil {
		return nil, err
	}
	var program []unix.SockFilter
	for ; len(b) >= unix.SizeofSockFilter; b = b[unix.SizeofSockFilter:] {
		program = append(program, unix.SockFilter{Code: binary.NativeEndian.Uint16(b), Jt: b[2], Jf: b[3], K: binary.NativeEndian.Uint32(b[4:])})
	}
	return program, nil
}

var architectures = map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}

// absent begins a program with what answers ENOSYS to calls that are newer than all it knows. C libraries then use an older one.
// Those of other architectures, and of x32, go on to what follows.
func absent(arch, newest uint32) []unix.SockFilter {
	const (
		offsetOfCall, offsetOfArch = 0, 4 // struct seccomp_data
		x32                        = 1 << 30
		load                       = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		jump                       = unix.BPF_JMP | unix.BPF_K
	)
	return []unix.SockFilter{
		{Code: load, K: offsetOfArch},
		{Code: jump | unix.BPF_JEQ, K: arch, Jf: 4},
		{Code: load, K: offsetOfCall},
		{Code: jump | unix.BPF_JSET, K: x32, Jt: 2},
		{Code: jump | unix.BPF_JGT, K: newest, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
	}
}
