package sandbox

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// pin gives a process that has not executed its command yet cpus of the processors of this one, if that is not 0. Only the filter keeps
// a command from taking more of them.
func pin(pid int, cpus float64, unfiltered bool) error {
	if cpus == 0 {
		return nil
	}
	if unfiltered {
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
	return os.NewSyscallError("sched_setaffinity", unix.SchedSetaffinity(pid, &set))
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
