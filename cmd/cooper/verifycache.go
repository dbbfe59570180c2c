package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/cooper-build/cooper/builder"
)

// printVerified says a line for each step that was made again, and one for each path that is not the same.
func printVerified(w io.Writer, all []builder.Verified) {
	fmt.Fprintln(w, "\nmade again:")
	if len(all) == 0 {
		fmt.Fprintln(w, "  nothing: the store answered no step")
	}
	for _, v := range all {
		fmt.Fprintf(w, "  %-7s  %s%s\n", verdict(v), stepTitle(v.Name), remark(v))
		for _, d := range v.Differences {
			fmt.Fprintf(w, "             %s: %s\n", oneLine(d.Path), d.What)
		}
		if v.More > 0 {
			fmt.Fprintf(w, "             and %d more\n", v.More)
		}
	}
}

func verdict(v builder.Verified) string {
	switch {
	case v.Same():
		return "same"
	case v.Unavailable:
		return "unknown"
	}
	return "differs"
}

func remark(v builder.Verified) string {
	var parts []string
	if v.Failed != nil {
		parts = append(parts, oneLine(v.Failed.Error()))
	}
	if v.Times > 0 {
		parts = append(parts, fmt.Sprintf("%d with other times only", v.Times))
	}
	if len(parts) == 0 {
		return ""
	}
	return ": " + strings.Join(parts, "; ")
}

// differing is the error of a build whose steps do not give what the store has.
func differing(all []builder.Verified) error {
	n := 0
	for _, v := range all {
		if verdict(v) == "differs" {
			n++
		}
	}
	if n == 0 {
		return nil
	}
	return differs{hinted{
		fmt.Errorf("%d of %d steps gave another result when they were made again", n, len(all)),
		"the image was built from what the store had. Look for the time, random numbers or the network in these steps; if there are none, see 'cooper store verify'",
	}}
}

// A verification is one step that was made again, for programs.
type verification struct {
	Step        string       `json:"step"`
	Verdict     string       `json:"verdict"` // same, differs or unknown
	Differences []difference `json:"differences,omitempty"`
	More        int          `json:"more,omitempty"`
	Times       int          `json:"times,omitempty"`
	Error       string       `json:"error,omitempty"`
}

type difference struct {
	Path string `json:"path"`
	What string `json:"what"`
}

func verifications(all []builder.Verified) []verification {
	out := make([]verification, 0, len(all))
	for _, v := range all {
		one := verification{Step: v.Name, Verdict: verdict(v), More: v.More, Times: v.Times}
		for _, d := range v.Differences {
			one.Differences = append(one.Differences, difference(d))
		}
		if v.Failed != nil {
			one.Error = v.Failed.Error()
		}
		out = append(out, one)
	}
	return out
}
