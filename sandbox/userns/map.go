package userns

import (
	"crypto/sha256"
	"fmt"
	"strings"
)

// Kind says how a map came about, and with that what it can do.
type Kind int

const (
	// Many: the caller's id is root and the user's subordinate ids follow,
	// written by newuidmap and newgidmap.
	Many Kind = iota + 1
	// Single: the caller's id is root and there is no other id; setgroups is denied.
	Single
	// Nested: started as root, every id that exists outside is itself inside.
	Nested
	// Chroot: there is no user namespace. Started as root, with the ids that exist there.
	Chroot
)

// names are what people call the kinds, from the strongest walls to the weakest.
var names = []struct {
	kind Kind
	name string
}{{Nested, "root"}, {Many, "subids"}, {Single, "single"}, {Chroot, "chroot"}}

// Name is what people call the kind.
func (k Kind) Name() string {
	for _, n := range names {
		if n.kind == k {
			return n.name
		}
	}
	return "unknown"
}

// ParseKind is the inverse of Name.
func ParseKind(name string) (Kind, bool) {
	for _, n := range names {
		if n.name == name {
			return n.kind, true
		}
	}
	return 0, false
}

// String returns the word that names the kind in a Map's String.
func (k Kind) String() string {
	switch k {
	case Many:
		return "many"
	case Single:
		return "single"
	case Nested:
		return "nested"
	case Chroot:
		return "chroot"
	}
	return "unknown"
}

// Range maps Count ids from Inside on to as many from Outside on.
type Range struct{ Inside, Outside, Count uint32 }

// Map says which ids exist in the namespace and who they are outside.
type Map struct {
	Kind Kind
	UIDs []Range
	GIDs []Range
	// Why says for people why Many was impossible; empty unless Single. For Chroot, why there is no user namespace.
	Why string
}

// maxName keeps String usable as a file name, whatever /etc/subuid holds.
const maxName = 120

// String returns a short name that is equal for equal maps and for nothing
// else: files written under one map mean other owners under another, so the
// store keeps them apart by this name. It holds no slash.
func (m Map) String() string {
	uids, gids := rangesName(m.UIDs), rangesName(m.GIDs)
	name := uids
	if gids != uids {
		name += ";" + gids
	}
	if len(name) > maxName {
		name = fmt.Sprintf("%x", sha256.Sum256([]byte(name)))[:32]
	}
	return m.Kind.String() + ":" + name
}

func rangesName(ranges []Range) string {
	names := make([]string, len(ranges))
	for i, r := range ranges {
		names[i] = fmt.Sprintf("%d-%d-%d", r.Inside, r.Outside, r.Count)
	}
	return strings.Join(names, ",")
}

// parseMap reads the format of /proc/PID/uid_map.
func parseMap(text string) ([]Range, error) {
	var ranges []Range
	for line := range strings.Lines(text) {
		var r Range
		if _, err := fmt.Sscan(line, &r.Inside, &r.Outside, &r.Count); err != nil {
			return nil, fmt.Errorf("parse id map line %q: %w", line, err)
		}
		ranges = append(ranges, r)
	}
	return ranges, nil
}

// formatMap writes the format that the kernel and newuidmap read.
func formatMap(ranges []Range) string {
	var b strings.Builder
	for _, r := range ranges {
		fmt.Fprintf(&b, "%d %d %d\n", r.Inside, r.Outside, r.Count)
	}
	return b.String()
}
