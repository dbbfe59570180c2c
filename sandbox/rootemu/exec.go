package rootemu

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/notify"
)

// An execution is one that the kernel was told to go on with and that changes who the process is, if it succeeds.
type execution struct {
	dev, ino uint64
	becomes  creds
}

// maxExecutions is reached only when that many executions failed in processes that called nothing afterwards.
const maxExecutions = 1024

func execve(s *Supervisor, r *request) notify.Answer {
	return s.executes(r, unix.AT_FDCWD, r.Args[0], 0)
}

func execveat(s *Supervisor, r *request) notify.Answer {
	return s.executes(r, dirArg(r.Args[0]), r.Args[1], r.Args[4])
}

// executes finds out what the bits of a program make of the process. Whether the kernel executes it is known at the next
// call only.
func (s *Supervisor) executes(r *request, dir int, address, flags uint64) notify.Answer {
	f, err := s.subject(r, dir, address, flags)
	if err != nil {
		return notify.Pass
	}
	defer f.close()
	c := r.who
	bits := f.st.Mode & (unix.S_ISUID | unix.S_ISGID)
	if bits != 0 && !f.foreign() && f.st.Mode&unix.S_IFMT == unix.S_IFREG && gainsPrivilege(r, f.name) {
		if bits&unix.S_ISUID != 0 {
			c.user.effective = f.own.UID
		}
		if bits&unix.S_ISGID != 0 && f.st.Mode&unix.S_IXGRP != 0 {
			c.group.effective = f.own.GID
		}
	}
	c.user.saved, c.user.files = c.user.effective, c.user.effective
	c.group.saved, c.group.files = c.group.effective, c.group.effective
	c.keeps, c.kept = false, false
	if c == r.who {
		return notify.Pass
	}
	pid, err := leader(r.pid)
	if err != nil {
		return notify.Pass
	}
	if len(s.execs) == maxExecutions {
		clear(s.execs)
	}
	s.execs[pid] = execution{uint64(f.st.Dev), f.st.Ino, c}
	return notify.Pass
}

// gainsPrivilege reports whether neither the process nor the mount gave that up.
func gainsPrivilege(r *request, name string) bool {
	var st unix.Statfs_t
	if err := unix.Statfs(name, &st); err != nil || int64(st.Flags)&unix.ST_NOSUID != 0 {
		return false
	}
	text, err := readSmall(theirs(r, "status"))
	if err != nil {
		return false
	}
	none, err := field(text, "NoNewPrivs:")
	return err == nil && none == "0"
}

// finishExec looks whether the process is the program by now. A script never is, and its bits count for nothing.
func (s *Supervisor) finishExec(r *request) {
	e, ok := s.execs[r.pid]
	if !ok {
		return
	}
	delete(s.execs, r.pid)
	var st unix.Stat_t
	if err := unix.Stat(theirs(r, "exe"), &st); err != nil || uint64(st.Dev) != e.dev || st.Ino != e.ino {
		return
	}
	if s.become(r, e.becomes) == 0 {
		r.who = e.becomes
	}
}

// leader is the process that a thread belongs to. It has that number after an execution.
func leader(tid int) (int, error) {
	text, err := readSmall("/proc/" + strconv.Itoa(tid) + "/status")
	if err != nil {
		return 0, err
	}
	value, err := field(text, "Tgid:")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(value)
}

func readSmall(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b := make([]byte, 4096)
	n, err := f.Read(b)
	return string(b[:max(n, 0)]), err
}

// field finds "name value" in the text of a file of /proc.
func field(text, name string) (string, error) {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, name); ok {
			return strings.TrimSpace(value), nil
		}
	}
	return "", unix.ENOENT
}

func octalField(text, name string) (uint64, error) {
	value, err := field(text, name)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(value, 8, 64)
}
