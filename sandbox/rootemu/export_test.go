package rootemu

import "golang.org/x/sys/unix"

// Change is what the model says about a call: set, setre, setres or setfs.
func Change(call string, state [4]uint32, a [3]uint32, privileged bool) (after [4]uint32, errno unix.Errno) {
	f := four{state[0], state[1], state[2], state[3]}
	switch call {
	case "set":
		f, errno = f.set(a[0], privileged)
	case "setre":
		f, errno = f.setTwo(a[0], a[1], privileged)
	case "setres":
		f, errno = f.setThree(a[0], a[1], a[2], privileged)
	case "setfs":
		f = f.setFiles(a[0], privileged)
	}
	return [4]uint32{f.real, f.effective, f.saved, f.files}, errno
}
