// Package first makes this program the first process of a sandbox when libcontainer starts it as that.
//
// It is a package of its own because it acts before main: Go initialises a package as soon as those it imports are, and this one
// imports little. So the process does without the initialisation of the rest of the program, which takes longer, and
// touches more memory, than all that libcontainer does.
package first

import (
	"os"
	"runtime"

	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // its C constructor makes the namespaces
	"golang.org/x/sys/unix"
)

func init() {
	// Ties main's goroutine to the first thread, which the Go runtime promises only to those who ask before main begins: in the
	// builder, libcontainer sends a goroutine into the container's mount namespace on a thread that it then gives up. The first
	// thread of a process cannot be given up, so /proc/self would show, and keep alive, the container's mounts for good.
	runtime.LockOSThread()
	if _, ok := os.LookupEnv("_LIBCONTAINER_INITPIPE"); ok && len(os.Args) > 1 && os.Args[1] == "init" {
		become()
	}
}

// become never returns.
func become() {
	// libcontainer asks for the death signal for the first of the three
	// processes it starts, and a fork clears it. This is the last one, and the
	// thread that will execute the command. If Run's process is gone already,
	// the pipe that libcontainer reads next has ended.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		os.Exit(255)
	}
	libcontainer.Init()
}
