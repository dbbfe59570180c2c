package sandbox

import (
	"fmt"
	"os"
	"strings"
	"syscall"
)

// checkIDs refuses ids that do not exist in this user namespace.
func checkIDs(s *Spec) error {
	ids, err := readIDs()
	if err != nil {
		return err
	}
	if emulated(s, ids) {
		return nil
	}
	if err := ids.check(s.UID, s.GID); err != nil {
		return err
	}
	for _, g := range s.Groups {
		if !ids.groups.has(g) {
			return unmapped("group", g)
		}
	}
	return nil
}

// emulated reports whether the process gets the ids that do not exist here from
// package rootemu.
func emulated(s *Spec, ids idMaps) bool { return ids.single() && !s.RealIDs && !s.Insecure }

// idMaps are the ids that exist in this user namespace.
type idMaps struct{ users, groups idMap }

func readIDs() (m idMaps, err error) {
	if m.users, err = readIDMap("/proc/self/uid_map"); err != nil {
		return m, err
	}
	m.groups, err = readIDMap("/proc/self/gid_map")
	return m, err
}

// single reports whether root is all there is.
func (m idMaps) single() bool { return m.users.single() && m.groups.single() }

// check refuses an owner that no file can have here.
func (m idMaps) check(uid, gid uint32) error {
	if !m.users.has(uid) {
		return unmapped("user", uid)
	}
	if !m.groups.has(gid) {
		return unmapped("group", gid)
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

func (m idMap) single() bool { return len(m) == 1 && m[0] == [2]uint32{0, 1} }

// identity maps every id of this user namespace to itself in a further one.
// The kernel wants each range to lie within one of the outer map.
func (m idMap) identity() []syscall.SysProcIDMap {
	same := make([]syscall.SysProcIDMap, len(m))
	for i, r := range m {
		same[i] = syscall.SysProcIDMap{ContainerID: int(r[0]), HostID: int(r[0]), Size: int(r[1])}
	}
	return same
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
