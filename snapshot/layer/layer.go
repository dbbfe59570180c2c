// Package layer turns an OCI layer, a tar stream, into a directory and back.
//
// The directory is the upper directory of an overlay mounted with userxattr: a deleted name is a
// character device 0:0, a directory that hides everything below it carries user.overlay.opaque=y.
// Unpack applies a stream to such a directory, Diff writes the stream that makes it.
//
// Streams come from strangers. Unpack therefore never hands the kernel a path that it has not taken
// apart itself: parents are opened beneath the root with openat2, and everything else happens to one
// name in an open directory. Nothing is ever written through a name that existed before.
//
// The package knows nothing of images, digests, registries or snapshots, and never looks above the
// directory it was given.
package layer

import (
	"fmt"
	"strings"
)

const (
	whiteoutPrefix = ".wh."
	// metaPrefix begins names which aufs kept for itself. Only the opaque marker means something.
	metaPrefix   = whiteoutPrefix + whiteoutPrefix
	opaqueMarker = metaPrefix + ".opq"

	xattrOpaque = "user.overlay.opaque"

	maxName      = 4096
	maxComponent = 255
	maxLinks     = 255 // symlinks followed for one parent, as containerd and umoci
	maxXattrs    = 256
	maxXattrSize = 64 << 10
	maxID        = 1<<32 - 2 // 2^32-1 means "no id" to the kernel
)

// splitName takes an entry's name apart. An absolute name is taken relative to the root, as docker
// does; "." and doubled slashes vanish. No components means the root itself.
func splitName(name string) ([]string, error) {
	switch {
	case name == "":
		return nil, fmt.Errorf("the name is empty")
	case len(name) > maxName:
		return nil, fmt.Errorf("the name is longer than %d bytes", maxName)
	case strings.ContainsRune(name, 0):
		return nil, fmt.Errorf("the name holds a NUL byte")
	}
	var parts []string
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "" || part == ".":
		case part == "..":
			return nil, fmt.Errorf("the name leaves the root by \"..\"")
		case len(part) > maxComponent:
			return nil, fmt.Errorf("a component of the name is longer than %d bytes", maxComponent)
		default:
			parts = append(parts, part)
		}
	}
	return parts, nil
}

// shown makes a name from a stream fit for an error message.
func shown(name string) string {
	const most = 128
	if len(name) > most {
		name = name[:most] + "..."
	}
	return fmt.Sprintf("%q", name)
}
