package ocidiff

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
)

// Lines renders entries for people and for recordings, sorted by path, one to a line: type, mode, owner, size and the
// first digits of the content's sha256, path, where a link leads, attributes.
func Lines(entries map[string]Entry) []string {
	out := make([]string, 0, len(entries))
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		out = append(out, line(name, entries[name]))
	}
	return out
}

func line(name string, e Entry) string {
	if hidden, ok := strings.CutPrefix(path.Base(name), ".wh."); ok && e.Type == "file" && e.Size == 0 {
		e.Type = "whiteout"
		if hidden == ".wh..opq" {
			e.Type = "opaque"
		}
	}
	var b strings.Builder
	b.WriteString(e.Type)
	switch e.Type {
	case "whiteout", "opaque", "hardlink":
	case "symlink":
		fmt.Fprintf(&b, " %d:%d", e.UID, e.GID)
	case "file":
		fmt.Fprintf(&b, " %04o %d:%d %d %.12s", e.Mode, e.UID, e.GID, e.Size, e.Content)
	default:
		fmt.Fprintf(&b, " %04o %d:%d", e.Mode, e.UID, e.GID)
	}
	if e.Device != "" {
		b.WriteString(" " + e.Device)
	}
	b.WriteString(" " + quoted(name))
	if e.Link != "" {
		b.WriteString(" -> " + quoted(e.Link))
	}
	for _, k := range slices.Sorted(maps.Keys(e.Xattrs)) {
		b.WriteString(" " + k + "=" + e.Xattrs[k])
	}
	return b.String()
}

// quoted leaves ordinary names as they are.
func quoted(name string) string {
	if q := strconv.QuoteToASCII(name); q[1:len(q)-1] != name || strings.Contains(name, " ") {
		return q
	}
	return name
}
