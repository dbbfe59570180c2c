package builder

import "time"

// An EventKind says what an [Event] reports.
type EventKind int

// The life of a step: Started, any number of Logs, then exactly one of Cached, Done or Failed.
const (
	Started EventKind = iota
	Log
	Cached
	Done
	Failed
	Warned
	Explained // once for every step, if the request asks for it
)

// An Event is one thing that happened in a build. Events of one step arrive in order; steps interleave.
type Event struct {
	Kind EventKind
	Step string // identifies the step within the build; empty for a warning about the Dockerfile as a whole
	Name string // what the user calls the step, as BuildKit prints it: "[build 2/3] RUN make"
	Time time.Time

	Stderr bool   // Log: which stream
	Data   []byte // Log: whole lines
	Err    error  // Failed

	Warning     *Warning     // Warned
	Explanation *Explanation // Explained
}

// A Warning is advice about the Dockerfile that does not stop the build.
type Warning struct {
	Rule, Message, URL string
	File               string
	Line               int
}
