package main

import (
	"fmt"
	"slices"
	"time"
)

func wall(f figure) time.Duration { return f.Wall }
func cpu(f figure) time.Duration  { return f.CPU }

// median is that of what is taken of the figures; of an even number, the mean of the two in the middle.
func median(figures []figure, of func(figure) time.Duration) time.Duration {
	v := sorted(figures, of)
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2
}

func sorted(figures []figure, of func(figure) time.Duration) []time.Duration {
	v := make([]time.Duration, len(figures))
	for i, f := range figures {
		v[i] = of(f)
	}
	slices.Sort(v)
	return v
}

// peak is the largest of all runs, in MB.
func (r result) peak() float64 {
	var peak int64
	for _, f := range r.Figures {
		peak = max(peak, f.PeakRSS)
	}
	return float64(peak) / 1e6
}

// withBefore adds to each run the build before it.
func (r result) withBefore() []figure {
	sums := slices.Clone(r.Figures)
	for i, f := range r.Before {
		sums[i].Wall += f.Wall
		sums[i].CPU += f.CPU
		sums[i].PeakRSS = max(sums[i].PeakRSS, f.PeakRSS)
	}
	return sums
}

func (r result) summary() string {
	if r.Failure != "" {
		return "failed: " + r.Failure
	}
	return fmt.Sprintf("%s (%s), cpu %s", seconds(median(r.Figures, wall)), r.spread(), seconds(median(r.Figures, cpu)))
}

// spread is the shortest and the longest run.
func (r result) spread() string {
	v := sorted(r.Figures, wall)
	return seconds(v[0]) + "–" + seconds(v[len(v)-1])
}

// seconds prints three digits that mean something.
func seconds(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%.3g ms", float64(d.Microseconds())/1e3)
	case d < 10*time.Second:
		return fmt.Sprintf("%.2f s", d.Seconds())
	default:
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
}
