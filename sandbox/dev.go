package sandbox

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"
)

// ownDev are the names in /dev that the sandbox, libcontainer included, fills itself.
var ownDev = []string{
	"null", "zero", "full", "random", "urandom", "tty", "console", "ptmx", "pts", "shm", "mqueue",
	"fd", "core", "stdin", "stdout", "stderr", "fuse", "net",
}

// inDev reports whether a mount goes to a place of its own in /dev, as the script of a RUN that begins with #! does. /dev
// is a file system that the process's namespaces begin with, so there is nothing of the image in it, such as a link. Deeper
// places are refused, because a mount that lies there already may bring one.
func inDev(target string) bool {
	parts := strings.Split(strings.Trim(path.Clean(target), "/"), "/")
	return len(parts) == 2 && parts[0] == "dev" && !slices.Contains(ownDev, parts[1])
}

// stage attaches a mount in the scratch directory and returns how the container shows it in its /dev.
func (r *rootfs) stage(m Mount, scratch string) (*configs.Mount, error) {
	tree, isDir, err := m.open()
	if err != nil {
		return nil, err
	}
	at := filepath.Join(scratch, "dev-"+strconv.Itoa(len(r.mounts)))
	point, err := makeStage(at, isDir)
	if err != nil {
		unix.Close(tree)
		return nil, err
	}
	defer point.Close()
	if err := unix.MoveMount(tree, "", int(point.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		unix.Close(tree)
		return nil, os.NewSyscallError("move_mount", err)
	}
	r.mounts = append(r.mounts, tree)
	// The flags of the tree, such as read-only, come along.
	return &configs.Mount{Source: at, Destination: path.Clean(m.Target), Device: "bind", Flags: unix.MS_BIND | unix.MS_REC}, nil
}

func makeStage(at string, isDir bool) (*os.File, error) {
	if !isDir {
		return os.OpenFile(at, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	}
	if err := os.Mkdir(at, 0o700); err != nil {
		return nil, err
	}
	return os.Open(at)
}

// mountAll lays the mounts of a Spec over the root, and notes those that have to wait for /dev.
func (r *rootfs) mountAll(s *Spec, scratch string) error {
	for _, m := range s.Mounts {
		if inDev(m.Target) {
			staged, err := r.stage(m, scratch)
			if err != nil {
				return fmt.Errorf("mount %s: %w", m.Target, err)
			}
			s.staged = append(s.staged, staged)
			continue
		}
		if err := r.mount(m); err != nil {
			return fmt.Errorf("mount %s: %w", m.Target, err)
		}
	}
	return nil
}
