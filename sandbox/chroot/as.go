package chroot

import (
	"errors"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// as does something with the user and group of a process. Root of a container may not look into a process of another user, and the
// user itself may; and a file is to be opened with no more rights than the process has. It is called on a thread of its own.
func as(pid uint32, do func() error) error {
	uid, gid, err := idsOf(pid)
	if err != nil {
		return err
	}
	if uid == 0 && gid == 0 {
		return do()
	}
	setGroup(gid)
	setUser(uid)
	defer setGroup(0)
	defer setUser(0)
	return do()
}

// These two cannot fail for root, and do not say so if they did. Then the kernel judges us as who we still are.
func setUser(id int)  { unix.RawSyscall(unix.SYS_SETFSUID, uintptr(id), 0, 0) }
func setGroup(id int) { unix.RawSyscall(unix.SYS_SETFSGID, uintptr(id), 0, 0) }

// idsOf reads the user and group that a process opens files as.
func idsOf(pid uint32) (uid, gid int, err error) {
	b, err := os.ReadFile(theirs(pid, "status"))
	if err != nil {
		return 0, 0, err
	}
	uid, gid = -1, -1
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) != 5 {
			continue
		}
		switch fields[0] {
		case "Uid:":
			uid, err = strconv.Atoi(fields[4])
		case "Gid:":
			gid, err = strconv.Atoi(fields[4])
		}
		if err != nil {
			return 0, 0, err
		}
	}
	if uid < 0 || gid < 0 {
		return 0, 0, errors.New("the kernel does not say whose process it is")
	}
	return uid, gid, nil
}
