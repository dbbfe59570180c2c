package sandbox

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// pin gives a process that has not executed its command yet the processors of
// this one, or cpus of them if that is not 0. libcontainer gives it all of the
// machine's. Only the filter keeps a command from taking more of them.
func pin(pid int, cpus float64, unfiltered bool) error {
	if cpus != 0 && unfiltered {
		return &hinted{errors.New("--cpus takes a control group for a RUN that is insecure, and none is delegated to this build"), delegateHint}
	}
	var ours unix.CPUSet
	if err := unix.SchedGetaffinity(0, &ours); err != nil {
		return os.NewSyscallError("sched_getaffinity", err)
	}
	set, err := choose(ours, cpus)
	if err != nil {
		return err
	}
	// Threads that begin meanwhile have what the thread that made them has: after the second time, all have it.
	for range 2 {
		tasks, err := os.ReadDir("/proc/" + strconv.Itoa(pid) + "/task")
		if err != nil {
			return err
		}
		for _, task := range tasks {
			tid, err := strconv.Atoi(task.Name())
			if err != nil {
				return err
			}
			if err := unix.SchedSetaffinity(tid, &set); err != nil && !errors.Is(err, unix.ESRCH) {
				return os.NewSyscallError("sched_setaffinity", err)
			}
		}
	}
	return nil
}

// choose returns the first so many processors of a set.
func choose(all unix.CPUSet, cpus float64) (unix.CPUSet, error) {
	if cpus == 0 || cpus >= float64(all.Count()) {
		return all, nil
	}
	if cpus != float64(int(cpus)) {
		return all, &hinted{
			error: fmt.Errorf("--cpus %s: a part of a processor takes a control group, and none is delegated to this build", cpuText(cpus)),
			hint:  "give a whole number, or " + delegateHint,
		}
	}
	var some unix.CPUSet
	for i := 0; some.Count() < int(cpus); i++ {
		if all.IsSet(i) {
			some.Set(i)
		}
	}
	return some, nil
}
