package sandbox

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// census counts the processes of one pid namespace and what they use, from its own /proc: the number of a process
// there cannot become that of a process elsewhere.
type census struct {
	proc *os.File
	ns   string // if proc shows processes outside of the namespace, too: the link that those inside have

	above int // where there is no namespace: the process whose descendants are counted
}

// openCensus is for the first process of a pid namespace, before it executes
// anything: so far, what it has in /proc is the sandbox's.
func openCensus(pid int) (*census, error) {
	path := "/proc/" + strconv.Itoa(pid) + "/root/proc"
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	c := &census{proc: os.NewFile(uintptr(fd), path)}
	var inside, ours unix.Stat_t
	if err := errors.Join(unix.Fstat(fd, &inside), unix.Stat("/proc", &ours)); err != nil {
		c.close()
		return nil, err
	}
	if inside.Dev == ours.Dev {
		if c.ns, err = os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/pid"); err != nil {
			c.close()
			return nil, err
		}
	}
	return c, nil
}

// openCensusBelow is for what a process has started and for what that has started.
func openCensusBelow(pid int) (*census, error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	return &census{proc: proc, above: pid}, nil
}

func (c *census) close() { c.proc.Close() }

// processes lists the namespace, zombies included.
func (c *census) processes() ([]string, error) {
	if _, err := c.proc.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	names, err := c.proc.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	if c.above != 0 {
		return c.descendants(names), nil
	}
	pids := names[:0]
	for _, name := range names {
		if name[0] >= '1' && name[0] <= '9' && c.has(name) {
			pids = append(pids, name)
		}
	}
	return pids, nil
}

// descendants are those of names whose parents lead to the process above.
func (c *census) descendants(names []string) []string {
	children := map[string][]string{}
	for _, name := range names {
		if name[0] < '1' || name[0] > '9' {
			continue
		}
		stat := string(c.read(name + "/stat"))
		if fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:]); len(fields) > 1 {
			children[fields[1]] = append(children[fields[1]], name)
		}
	}
	var all []string
	for next := []string{strconv.Itoa(c.above)}; len(next) > 0; next = next[1:] {
		all = append(all, children[next[0]]...)
		next = append(next, children[next[0]]...)
	}
	return all
}

func (c *census) has(pid string) bool {
	if c.ns == "" {
		return true
	}
	link := make([]byte, 64)
	n, err := unix.Readlinkat(int(c.proc.Fd()), pid+"/ns/pid", link)
	return err == nil && string(link[:n]) == c.ns
}

// tasks counts processes and threads.
func (c *census) tasks(pids []string) int {
	n := 0
	for _, pid := range pids {
		var st unix.Stat_t
		if unix.Fstatat(int(c.proc.Fd()), pid+"/task", &st, 0) == nil && st.Nlink > 2 {
			n += int(st.Nlink) - 2 // as of any directory: "." and ".." count
		} else {
			n++
		}
	}
	return n
}

// resident is at least what the processes use and quickly read: what several
// of them share counts for each.
func (c *census) resident(pids []string) int64 {
	var pages int64
	for _, pid := range pids {
		fields := strings.Fields(string(c.read(pid + "/statm")))
		if len(fields) > 1 {
			n, _ := strconv.ParseInt(fields[1], 10, 64)
			pages += n
		}
	}
	return pages * int64(os.Getpagesize())
}

// memory is what the processes use and nobody could take from them: anonymous
// and shared memory, each page once, swapped out or not. The kernel can take
// back what is a copy of a file.
func (c *census) memory(pids []string) int64 {
	var kB int64
	for _, pid := range pids {
		lines := bufio.NewScanner(bytes.NewReader(c.read(pid + "/smaps_rollup")))
		for lines.Scan() {
			name, value, _ := strings.Cut(lines.Text(), ":")
			switch name {
			case "Pss_Anon", "Pss_Shmem", "SwapPss":
				var n int64
				fmt.Sscan(value, &n)
				kB += n
			}
		}
	}
	return kB << 10
}

// read returns nothing for a process that is gone.
func (c *census) read(name string) []byte {
	fd, err := unix.Openat(int(c.proc.Fd()), filepath.Clean(name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, 64<<10))
	return b
}
