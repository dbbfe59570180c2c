package sandbox

import (
	"fmt"
	"os"
	"strings"
)

// checkIDs refuses ids that do not exist in this user namespace, before
// libcontainer fails on them in the middle of its work.
func checkIDs(s *Spec) error {
	uids, err := readIDMap("/proc/self/uid_map")
	if err != nil {
		return err
	}
	gids, err := readIDMap("/proc/self/gid_map")
	if err != nil {
		return err
	}
	if !uids.has(s.UID) {
		return unmapped("user", s.UID)
	}
	for _, g := range append([]uint32{s.GID}, s.Groups...) {
		if !gids.has(g) {
			return unmapped("group", g)
		}
	}
	return nil
}

func unmapped(what string, id uint32) error {
	return &hinted{
		error: fmt.Errorf("%s id %d does not exist in this user namespace", what, id),
		hint:  "only user and group 0 exist without subordinate ids; an administrator can add them with: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER, and install the package uidmap",
	}
}

// idMap holds the ranges of ids that exist here: first id and count.
type idMap [][2]uint32

func (m idMap) has(id uint32) bool {
	for _, r := range m {
		if id >= r[0] && id-r[0] < r[1] {
			return true
		}
	}
	return false
}

func readIDMap(path string) (idMap, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var m idMap
	for line := range strings.Lines(string(b)) {
		var inside, outside, count uint32
		if _, err := fmt.Sscan(line, &inside, &outside, &count); err != nil {
			return nil, fmt.Errorf("parse %s: %w", path, err)
		}
		m = append(m, [2]uint32{inside, count})
	}
	return m, nil
}
