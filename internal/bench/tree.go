package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// A process is what /proc tells of one.
type process struct {
	pid, parent int
	name        string
	cpu         time.Duration // its own, and that of the children it has waited for
}

// tick is the unit of times in /proc/PID/stat: USER_HZ, which is 100 on every architecture that Go runs on.
const tick = 10 * time.Millisecond

func processes() ([]process, error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	var all []process
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		p, err := parseStat(string(b))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		all = append(all, p)
	}
	return all, nil
}

// parseStat reads a line of /proc/PID/stat. The name is in parentheses and may hold anything, a parenthesis too.
func parseStat(line string) (process, error) {
	open, end := strings.IndexByte(line, '('), strings.LastIndexByte(line, ')')
	if open < 1 || end < open {
		return process{}, fmt.Errorf("no name in %q", line)
	}
	fields := strings.Fields(line[end+1:])
	if len(fields) < 15 {
		return process{}, fmt.Errorf("too short: %q", line)
	}
	numbers := []string{line[:open-1], fields[1], fields[11], fields[12], fields[13], fields[14]}
	var n [6]int64
	for i, s := range numbers {
		v, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return process{}, err
		}
		n[i] = v
	}
	return process{
		pid: int(n[0]), parent: int(n[1]), name: line[open+1 : end],
		cpu: time.Duration(n[2]+n[3]+n[4]+n[5]) * tick,
	}, nil
}

// descendants are the process with this pid and all beneath it.
func descendants(root int) ([]process, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	in := map[int]bool{root: true}
	for grown := true; grown; {
		grown = false
		for _, p := range all {
			if in[p.parent] && !in[p.pid] {
				in[p.pid], grown = true, true
			}
		}
	}
	var tree []process
	for _, p := range all {
		if in[p.pid] {
			tree = append(tree, p)
		}
	}
	return tree, nil
}

// treeCPU is what a process and all beneath it have used so far.
func treeCPU(root int) (time.Duration, error) {
	tree, err := descendants(root)
	var sum time.Duration
	for _, p := range tree {
		sum += p.cpu
	}
	return sum, err
}

// settledCPU is treeCPU once the processes have come to rest: a daemon answers before it has tidied up.
func settledCPU(root int) (time.Duration, error) {
	last, err := treeCPU(root)
	for range 20 {
		time.Sleep(50 * time.Millisecond)
		now, err2 := treeCPU(root)
		if err = err2; err != nil || now == last {
			break
		}
		last = now
	}
	return last, err
}

// resetPeaks makes VmHWM of a process and all beneath it begin anew.
func resetPeaks(root int) error {
	tree, err := descendants(root)
	if err != nil {
		return err
	}
	for _, p := range tree {
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.pid), []byte("5"), 0); err != nil {
			return err
		}
	}
	return nil
}

// peakRSS is the largest VmHWM of a process and those beneath it that are still alive.
func peakRSS(root int) (int64, error) {
	tree, err := descendants(root)
	if err != nil {
		return 0, err
	}
	var peak int64
	for _, p := range tree {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
		if err != nil {
			continue // it has ended
		}
		for line := range strings.Lines(string(b)) {
			if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
				kb, err := strconv.ParseInt(strings.Fields(v)[0], 10, 64)
				if err != nil {
					return 0, err
				}
				peak = max(peak, kb<<10)
			}
		}
	}
	return peak, nil
}
