//go:build !amd64

package rootemu

import "golang.org/x/sys/unix"

func oldCalls() []Call {
	return []Call{
		{Name: "newfstatat", number: unix.SYS_FSTATAT, handle: fstatat},
		{Name: "renameat", number: unix.SYS_RENAMEAT, handle: renames(0, 1, 2, 3)},
		{Name: "setrlimit", number: unix.SYS_SETRLIMIT, handle: limit(-1), Only: Equal, Arg: 0, Value: markLimit},
		{Name: "getrlimit", number: unix.SYS_GETRLIMIT, handle: limit(1), Only: Equal, Arg: 0, Value: markLimit},
	}
}
