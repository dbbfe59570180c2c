package plan

import (
	"errors"
	"fmt"
	"strings"
)

// Range is a run of lines, both ends included, counted from 1.
type Range struct{ Start, End int }

// Location is an instruction in a Dockerfile.
type Location struct {
	// File is the name as the frontend knows it: without its directory.
	File string
	// Lines are in rising order and do not touch; empty if the line is unknown.
	Lines []Range
	// Source is the whole file.
	Source []byte
}

// String is "Dockerfile:3", or only the file if the line is unknown.
func (l Location) String() string {
	if len(l.Lines) == 0 {
		return l.File
	}
	return fmt.Sprintf("%s:%d", l.File, l.Lines[0].Start)
}

// Line is the first line, or 0 if it is unknown.
func (l Location) Line() int {
	if len(l.Lines) == 0 {
		return 0
	}
	return l.Lines[0].Start
}

// Text is the lines themselves, or nothing if they are unknown.
func (l Location) Text() string {
	all := strings.Split(string(l.Source), "\n")
	var text []string
	for _, r := range l.Lines {
		if r.Start >= 1 && r.Start <= r.End && r.End <= len(all) {
			text = append(text, all[r.Start-1:r.End]...)
		}
	}
	return strings.Join(text, "\n")
}

// Excerpt shows the lines marked with >>> and a few around them, as BuildKit
// does. It is empty when the line is unknown.
func (l Location) Excerpt() string {
	if len(l.Lines) == 0 {
		return ""
	}
	lines := strings.Split(string(l.Source), "\n")
	start, end := l.Lines[0].Start, min(l.Lines[len(l.Lines)-1].End, len(lines))
	if start < 1 || start > len(lines) {
		return ""
	}
	first, last := widen(start, end, len(lines))
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n--------------------\n", l)
	for i := first; i <= last; i++ {
		mark := "   "
		if l.marks(i) {
			mark = ">>>"
		}
		fmt.Fprintf(&b, " %3d | %s %s\n", i, mark, lines[i-1])
	}
	b.WriteString("--------------------\n")
	return b.String()
}

// widen adds lines before and after in BuildKit's proportion: a single line
// gets more company than a long instruction.
func widen(start, end, total int) (first, last int) {
	pad := 2
	if start == end {
		pad = 4
	}
	first, last = start, end
	for p := 0; p < pad; p++ {
		if first > 1 {
			first--
			p++
		}
		if last != total {
			last++
			p++
		}
	}
	return first, last
}

func (l Location) marks(line int) bool {
	for _, r := range l.Lines {
		if r.Start <= line && line <= r.End {
			return true
		}
	}
	return false
}

// Error is a build that cannot be planned, with the line that is the reason.
type Error struct {
	// Where may be zero, or have no lines, if no instruction is to blame.
	Where Location
	Err   error
	// Advice is one next step for the reader; it may be empty.
	Advice string
}

func (e *Error) Error() string {
	if at := e.Where.String(); at != "" {
		return at + ": " + e.Err.Error()
	}
	return e.Err.Error()
}

// Unwrap gives the cause without the place.
func (e *Error) Unwrap() error { return e.Err }

// Hint is Advice, or the hint of the cause if it has one.
func (e *Error) Hint() string {
	if e.Advice != "" {
		return e.Advice
	}
	var h interface{ Hint() string }
	if errors.As(e.Err, &h) {
		return h.Hint()
	}
	return ""
}

// Excerpt shows the blamed lines among their neighbours.
func (e *Error) Excerpt() string { return e.Where.Excerpt() }
