package sandbox

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
)

// Limits bound what the process and all it starts may use together. The zero
// value of each is no limit. None of them changes a result: what goes beyond
// one is killed.
type Limits struct {
	Memory    int64   // bytes
	CPUs      float64 // processors' worth of time
	Processes int     // processes and threads at a time
	Time      time.Duration
}

func (l Limits) validate() error {
	if l.Memory < 0 || l.CPUs < 0 || l.Processes < 0 || l.Time < 0 || math.IsNaN(l.CPUs) || math.IsInf(l.CPUs, 0) {
		return fmt.Errorf("limits %+v: one is negative or no number", l)
	}
	return nil
}

// ofGroup are the limits that a control group can keep.
func (l Limits) ofGroup() Limits {
	l.Time = 0
	return l
}

// noteUnkept tells the user what is kept less exactly than promised.
func noteUnkept(l Limits, note func(string)) {
	var flags []string
	if l.Memory > 0 {
		flags = append(flags, "--memory")
	}
	if l.Processes > 0 {
		flags = append(flags, "--pids-limit")
	}
	if note == nil || len(flags) == 0 {
		return
	}
	note("no control group is delegated to this build, so " + strings.Join(flags, " and ") + " only bound what is seen " +
		strconv.Itoa(int(time.Second/lookAgain)) + " times a second: a RUN that uses more is killed then. For an exact limit, " + delegateHint)
}

// LimitError reports that the process was killed because it went beyond one of
// its Limits. It is an *ExitError as well.
type LimitError struct {
	Limit string // "memory", "pids" or "time"
	text  string
	hint  string
}

func (e *LimitError) Error() string { return e.text }
func (e *LimitError) Hint() string  { return e.hint }
func (e *LimitError) Unwrap() error {
	return &ExitError{Code: 137, Signal: "SIGKILL", OOM: e.Limit == "memory"}
}

func beyondMemory(limit int64) error {
	return &LimitError{"memory", "killed, because it used more memory than " + units.BytesSize(float64(limit)) + " (--memory)", "raise --memory"}
}

func beyondProcesses(limit int) error {
	return &LimitError{"pids", fmt.Sprintf("killed, because it had more than %d processes and threads (--pids-limit)", limit), "raise --pids-limit"}
}

func beyondTime(limit time.Duration) error {
	return &LimitError{"time", "killed, because it ran longer than " + limit.String() + " (--step-timeout)", "raise --step-timeout"}
}

// lookAgain is how long the watchdog waits at least between two looks. Between
// them, a command can go beyond its limits.
const lookAgain = 50 * time.Millisecond

// patience bounds what the watchdog costs: after a look it waits this many times as long as that took.
const patience = 20

// maxFailed is how often in a row a look may fail, as it does when the command has just ended. Nothing runs unwatched.
const maxFailed = 20

// a watchdog keeps limits that no control group keeps.
type watchdog struct {
	limits Limits // those that it keeps
	kill   context.CancelCauseFunc
	stop   context.CancelFunc
	ended  chan struct{}
}

// newWatchdog returns a context that ends as ctx does, and with a *LimitError
// when the process goes beyond one of the limits after watch was called.
func newWatchdog(ctx context.Context, limits Limits) (context.Context, *watchdog) {
	ctx, kill := context.WithCancelCause(ctx)
	return ctx, &watchdog{limits: limits, kill: kill, stop: func() {}}
}

// watch begins to watch the pid namespace of a process that is the first of it
// and has not executed its command yet.
func (w *watchdog) watch(ctx context.Context, pid int) error {
	return w.begin(ctx, func() (*census, error) { return openCensus(pid) })
}

// watchBelow does the same for all that a process has started, where there is no pid namespace.
func (w *watchdog) watchBelow(ctx context.Context, pid int) error {
	return w.begin(ctx, func() (*census, error) { return openCensusBelow(pid) })
}

func (w *watchdog) begin(ctx context.Context, open func() (*census, error)) error {
	if w.limits.Time > 0 {
		timer := time.AfterFunc(w.limits.Time, func() { w.kill(beyondTime(w.limits.Time)) })
		w.stop = func() { timer.Stop() }
	}
	if w.limits.Memory == 0 && w.limits.Processes == 0 {
		return nil
	}
	c, err := open()
	if err != nil {
		return fmt.Errorf("watch limits: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	stopTimer := w.stop
	w.stop = func() { stopTimer(); cancel() }
	w.ended = make(chan struct{})
	go func() {
		defer close(w.ended)
		defer c.close()
		if err := w.look(ctx, c); err != nil {
			w.kill(err)
		}
	}()
	return nil
}

// look looks until ctx ends or there is a reason to kill.
func (w *watchdog) look(ctx context.Context, c *census) error {
	failed := 0
	for {
		began := time.Now()
		pids, err := c.processes()
		if err == nil {
			failed = 0
		} else if failed++; failed == maxFailed {
			return fmt.Errorf("sandbox: watch limits: %w", err)
		}
		// Each process has a task: of a bomb that doubles there is no time to count them.
		if w.limits.Processes > 0 && (len(pids) > w.limits.Processes || c.tasks(pids) > w.limits.Processes) {
			return beyondProcesses(w.limits.Processes)
		}
		if w.limits.Memory > 0 && c.resident(pids) > w.limits.Memory && c.memory(pids) > w.limits.Memory {
			return beyondMemory(w.limits.Memory)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(max(lookAgain, patience*time.Since(began))):
		}
	}
}

// end stops watching and waits until nobody does.
func (w *watchdog) end() {
	w.stop()
	if w.ended != nil {
		<-w.ended
	}
	w.kill(nil)
}

// cpuText is how many processors are meant, as on a command line.
func cpuText(n float64) string { return strconv.FormatFloat(n, 'g', -1, 64) }
