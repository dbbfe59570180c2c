package sandbox

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Ulimit is a limit on what the process and its children may use, with the
// names and units of docker's --ulimit. -1 is no limit.
type Ulimit struct {
	Name       string
	Soft, Hard int64
}

// rlimits are the limits by the names that docker gives them.
var rlimits = map[string]int{
	"core": unix.RLIMIT_CORE, "cpu": unix.RLIMIT_CPU, "data": unix.RLIMIT_DATA, "fsize": unix.RLIMIT_FSIZE,
	"locks": unix.RLIMIT_LOCKS, "memlock": unix.RLIMIT_MEMLOCK, "msgqueue": unix.RLIMIT_MSGQUEUE,
	"nice": unix.RLIMIT_NICE, "nofile": unix.RLIMIT_NOFILE, "nproc": unix.RLIMIT_NPROC, "rss": unix.RLIMIT_RSS,
	"rtprio": unix.RLIMIT_RTPRIO, "rttime": unix.RLIMIT_RTTIME, "sigpending": unix.RLIMIT_SIGPENDING, "stack": unix.RLIMIT_STACK,
}

// rlimit is a limit in the kernel's form.
type rlimit struct {
	resource   int
	soft, hard uint64
}

// ulimits turns the limits that were asked for into the kernel's. A later one
// of the same name wins. Core dumps stay off unless they are asked for: where
// the machine collects them, they leave the sandbox.
//
// hard returns the hard limit that holds for this process. No user namespace
// gives the right to raise it, so what is above it is refused, never lowered.
func ulimits(asked []Ulimit, hard func(resource int) (uint64, error)) ([]rlimit, error) {
	chosen := map[int]rlimit{unix.RLIMIT_CORE: {resource: unix.RLIMIT_CORE}}
	for _, u := range asked {
		resource, ok := rlimits[u.Name]
		if !ok {
			return nil, &hinted{
				error: fmt.Errorf("ulimit %q is not a limit", u.Name),
				hint:  "the limits are " + strings.Join(slices.Sorted(maps.Keys(rlimits)), ", "),
			}
		}
		if u.Soft < -1 || u.Hard < -1 {
			return nil, fmt.Errorf("ulimit %s=%d:%d is negative", u.Name, u.Soft, u.Hard)
		}
		l := rlimit{resource, uint64(u.Soft), uint64(u.Hard)} // -1 is RLIM_INFINITY
		if l.soft > l.hard {
			return nil, fmt.Errorf("ulimit %s=%d:%d has a soft limit above its hard one", u.Name, u.Soft, u.Hard)
		}
		current, err := hard(resource)
		if err != nil {
			return nil, fmt.Errorf("ulimit %s: %w", u.Name, err)
		}
		if l.hard > current {
			return nil, &hinted{
				error: fmt.Errorf("ulimit %s=%s is above the hard limit of this user, %s", u.Name, limitText(l.hard), limitText(current)),
				hint: fmt.Sprintf("ask for %s=%s or less, or have an administrator raise the user's hard limit (/etc/security/limits.conf, or Limit%s= of the service)",
					u.Name, limitText(current), strings.ToUpper(u.Name)),
			}
		}
		chosen[resource] = l
	}
	limits := make([]rlimit, 0, len(chosen))
	for _, resource := range slices.Sorted(maps.Keys(chosen)) {
		limits = append(limits, chosen[resource])
	}
	return limits, nil
}

// rlimits are those that the process of s gets.
func (s Spec) rlimits() ([]rlimit, error) {
	asked, err := withBackstop(s.Ulimits, s.Limits)
	if err != nil {
		return nil, err
	}
	return ulimits(asked, hardLimit)
}

// withBackstop adds a limit to those that are asked for, where the watchdog may have to keep the number of processes: what doubles
// between two of its looks would else take all the process numbers of the machine, and the processor time to look again. It is
// no replacement, for it counts what else the user has in this user namespace, the RUNs beside this one first of all; hence the room.
func withBackstop(asked []Ulimit, limits Limits) ([]Ulimit, error) {
	if limits.Processes == 0 {
		return asked, nil
	}
	most, err := hardLimit(unix.RLIMIT_NPROC)
	if err != nil {
		return nil, err
	}
	n := int64(min(most, 2048+16*uint64(limits.Processes), math.MaxInt64))
	return append([]Ulimit{{Name: "nproc", Soft: n, Hard: n}}, asked...), nil // a later one wins
}

func limitText(n uint64) string {
	if n == unix.RLIM_INFINITY {
		return "unlimited"
	}
	return strconv.FormatUint(n, 10)
}

// hardLimit returns the hard limit of this process.
func hardLimit(resource int) (uint64, error) {
	var limit unix.Rlimit
	err := unix.Getrlimit(resource, &limit)
	return limit.Max, err
}
