// Package userns enters a user and mount namespace once, with the best id map
// the caller can have, or says exactly why not. To root of a container that can
// have none it gives the last resort, the same ids without a namespace.
//
// Enter starts the same program again inside the namespace and waits for it;
// the started program recognises itself with Inside. What the program then
// does as the root of its namespace is not known here, and neither are images,
// stores or containers. The environment is not read: callers pass it.
package userns

/*
#include "enter.h"
*/
import "C"

import (
	"cmp"
	"encoding/json"
	"slices"
)

// Options narrow what Enter may choose. The zero value means the best map.
type Options struct {
	// Only is the one kind that will do; 0 is the best.
	Only Kind
}

// Error says why there is no user namespace, with one next step.
type Error struct {
	What    string // what failed; empty for a user namespace
	Problem string
	Advice  string
	Err     error // what the kernel said, if it was asked
}

func (e *Error) Error() string {
	text := cmp.Or(e.What, "enter user namespace") + ": " + e.Problem
	if e.Err != nil {
		text += ": " + e.Err.Error()
	}
	return text
}

// Unwrap returns what the kernel said.
func (e *Error) Unwrap() error { return e.Err }

// Hint returns the next step.
func (e *Error) Hint() string { return e.Advice }

// Plan returns the map that Enter will try first. A nil error means that
// nothing known speaks against it; only entering proves it.
func Plan(o Options) (Map, error) {
	f, err := gather()
	if err != nil {
		return Map{}, err
	}
	return decide(f, o)
}

// Inside returns the map of this process and true if Enter started it and the
// kernel confirms the map. It is false in everything that such a process
// starts in turn, unless that went through Enter again.
func Inside() (Map, bool) {
	text := C.GoString(C.cooper_userns_entered())
	if text == "" {
		return Map{}, false
	}
	var m Map
	if json.Unmarshal([]byte(text), &m) != nil {
		return Map{}, false
	}
	uids, err := readMap("/proc/self/uid_map")
	if err != nil || !slices.Equal(uids, m.UIDs) {
		return Map{}, false
	}
	gids, err := readMap("/proc/self/gid_map")
	if err != nil || !slices.Equal(gids, m.GIDs) {
		return Map{}, false
	}
	return m, true
}
