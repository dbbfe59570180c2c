package rootemu

import "golang.org/x/sys/unix"

// oldCalls are those that newer architectures have no number for, and those with a name of their own here.
func oldCalls() []Call {
	return []Call{
		{Name: "newfstatat", number: unix.SYS_NEWFSTATAT, handle: fstatat},
		{Name: "chown", number: unix.SYS_CHOWN, handle: chownAt(0)},
		{Name: "lchown", number: unix.SYS_LCHOWN, handle: chownAt(unix.AT_SYMLINK_NOFOLLOW)},
		{Name: "stat", number: unix.SYS_STAT, handle: statAt(0)},
		{Name: "lstat", number: unix.SYS_LSTAT, handle: statAt(unix.AT_SYMLINK_NOFOLLOW)},
		{Name: "open", number: unix.SYS_OPEN, handle: open, Only: AnyBit, Arg: 1, Bits: toWrite()},
		{Name: "creat", number: unix.SYS_CREAT, handle: creat},
		{Name: "mkdir", number: unix.SYS_MKDIR, handle: makes(cwd, 0)},
		{Name: "mknod", number: unix.SYS_MKNOD, handle: makes(cwd, 0)},
		{Name: "symlink", number: unix.SYS_SYMLINK, handle: makes(cwd, 1)},
		{Name: "link", number: unix.SYS_LINK, handle: link},
		{Name: "rename", number: unix.SYS_RENAME, handle: renames(cwd, 0, cwd, 1)},
		{Name: "renameat", number: unix.SYS_RENAMEAT, handle: renames(0, 1, 2, 3)},
		{Name: "access", number: unix.SYS_ACCESS, handle: access},
		{Name: "setrlimit", number: unix.SYS_SETRLIMIT, handle: limit(-1), Only: Equal, Arg: 0, Value: markLimit},
		{Name: "getrlimit", number: unix.SYS_GETRLIMIT, handle: limit(1), Only: Equal, Arg: 0, Value: markLimit},
	}
}
