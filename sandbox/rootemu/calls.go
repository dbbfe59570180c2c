package rootemu

import "golang.org/x/sys/unix"

// A Call is a system call that the filter has to send to the supervisor.
type Call struct {
	Name string
	// Only says which calls of this name: all of them, or those with one of Bits in argument Arg, or those whose
	// argument Arg is Value.
	Only  Condition
	Arg   uint
	Bits  []uint64
	Value uint64

	number uintptr
	handle handler
}

// Condition selects calls by an argument.
type Condition int

const (
	Always Condition = iota
	AnyBit
	Equal
)

// Calls lists what the filter has to send. Everything else is none of the supervisor's business.
func Calls() []Call { return calls() }

func calls() []Call {
	return append(oldCalls(), []Call{
		{Name: "setuid", number: unix.SYS_SETUID, handle: setID(user())},
		{Name: "setgid", number: unix.SYS_SETGID, handle: setID(group())},
		{Name: "setreuid", number: unix.SYS_SETREUID, handle: setReID(user())},
		{Name: "setregid", number: unix.SYS_SETREGID, handle: setReID(group())},
		{Name: "setresuid", number: unix.SYS_SETRESUID, handle: setResID(user())},
		{Name: "setresgid", number: unix.SYS_SETRESGID, handle: setResID(group())},
		{Name: "setfsuid", number: unix.SYS_SETFSUID, handle: setFSID(user())},
		{Name: "setfsgid", number: unix.SYS_SETFSGID, handle: setFSID(group())},
		{Name: "setgroups", number: unix.SYS_SETGROUPS, handle: setgroups},
		{Name: "getuid", number: unix.SYS_GETUID, handle: getReal(user())},
		{Name: "getgid", number: unix.SYS_GETGID, handle: getReal(group())},
		{Name: "geteuid", number: unix.SYS_GETEUID, handle: getEffective(user())},
		{Name: "getegid", number: unix.SYS_GETEGID, handle: getEffective(group())},
		{Name: "getresuid", number: unix.SYS_GETRESUID, handle: getThree(user())},
		{Name: "getresgid", number: unix.SYS_GETRESGID, handle: getThree(group())},
		{Name: "getgroups", number: unix.SYS_GETGROUPS, handle: getgroups},

		{Name: "fchown", number: unix.SYS_FCHOWN, handle: fchown},
		{Name: "fchownat", number: unix.SYS_FCHOWNAT, handle: fchownat},
		{Name: "fstat", number: unix.SYS_FSTAT, handle: fstat},
		{Name: "statx", number: unix.SYS_STATX, handle: statx},

		{Name: "openat", number: unix.SYS_OPENAT, handle: openat, Only: AnyBit, Arg: 2, Bits: toWrite()},
		{Name: "openat2", number: unix.SYS_OPENAT2, handle: openHow},
		{Name: "mkdirat", number: unix.SYS_MKDIRAT, handle: makes(0, 1)},
		{Name: "mknodat", number: unix.SYS_MKNODAT, handle: makes(0, 1)},
		{Name: "symlinkat", number: unix.SYS_SYMLINKAT, handle: makes(1, 2)},
		{Name: "linkat", number: unix.SYS_LINKAT, handle: linkat},
		{Name: "renameat2", number: unix.SYS_RENAMEAT2, handle: renames(0, 1, 2, 3)},
		{Name: "bind", number: unix.SYS_BIND, handle: bind},
		{Name: "faccessat", number: unix.SYS_FACCESSAT, handle: faccessat},
		{Name: "faccessat2", number: unix.SYS_FACCESSAT2, handle: faccessat2},

		{Name: "setxattr", number: unix.SYS_SETXATTR, handle: xattrs(setting, 0)},
		{Name: "lsetxattr", number: unix.SYS_LSETXATTR, handle: xattrs(setting, unix.AT_SYMLINK_NOFOLLOW)},
		{Name: "fsetxattr", number: unix.SYS_FSETXATTR, handle: fxattrs(setting)},
		{Name: "getxattr", number: unix.SYS_GETXATTR, handle: xattrs(getting, 0)},
		{Name: "lgetxattr", number: unix.SYS_LGETXATTR, handle: xattrs(getting, unix.AT_SYMLINK_NOFOLLOW)},
		{Name: "fgetxattr", number: unix.SYS_FGETXATTR, handle: fxattrs(getting)},
		{Name: "removexattr", number: unix.SYS_REMOVEXATTR, handle: xattrs(removing, 0)},
		{Name: "lremovexattr", number: unix.SYS_LREMOVEXATTR, handle: xattrs(removing, unix.AT_SYMLINK_NOFOLLOW)},
		{Name: "fremovexattr", number: unix.SYS_FREMOVEXATTR, handle: fxattrs(removing)},
		{Name: "listxattr", number: unix.SYS_LISTXATTR, handle: listxattr(0)},
		{Name: "llistxattr", number: unix.SYS_LLISTXATTR, handle: listxattr(unix.AT_SYMLINK_NOFOLLOW)},
		{Name: "flistxattr", number: unix.SYS_FLISTXATTR, handle: flistxattr},

		{Name: "execve", number: unix.SYS_EXECVE, handle: execve},
		{Name: "execveat", number: unix.SYS_EXECVEAT, handle: execveat},
		{Name: "chroot", number: unix.SYS_CHROOT, handle: chroot},
		{Name: "getsockopt", number: unix.SYS_GETSOCKOPT, handle: getsockopt, Only: Equal, Arg: 2, Value: unix.SO_PEERCRED},
		{Name: "prctl", number: unix.SYS_PRCTL, handle: keepCaps, Only: Equal, Arg: 0, Value: unix.PR_SET_KEEPCAPS},
		{Name: "prlimit64", number: unix.SYS_PRLIMIT64, handle: limit(3), Only: Equal, Arg: 1, Value: markLimit},
	}...)
}

// toWrite are the flags of an open that makes or changes something.
func toWrite() []uint64 { return []uint64{unix.O_CREAT, unix.O_WRONLY, unix.O_RDWR} }
