package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ownDev are the names in /dev that the sandbox fills itself.
var ownDev = []string{
	"null", "zero", "full", "random", "urandom", "tty", "console", "ptmx", "pts", "shm", "mqueue",
	"fd", "core", "stdin", "stdout", "stderr", "fuse", "net",
}

// inDev reports whether a mount goes to a place of its own in /dev, as the script of a RUN that begins with #! does. /dev
// is a file system that is made for the run, so there is nothing of the image in it, such as a link. Deeper places are refused,
// because a mount that lies there already may bring one.
func inDev(target string) bool {
	parts := strings.Split(strings.Trim(path.Clean(target), "/"), "/")
	return len(parts) == 2 && parts[0] == "dev" && !slices.Contains(ownDev, parts[1])
}

// mountDev lays a /dev with everything in it over the root; mqueue, which takes the namespaces of the process, has its mount point.
func (r *rootfs) mountDev(s *Spec) error {
	dev, err := newFileSystem("tmpfs", [][2]string{{"mode", "755"}, {"size", "64m"}}, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_STRICTATIME)
	if err != nil {
		return err
	}
	if err := r.cover("dev", dev); err != nil {
		return err
	}
	const safe = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	pts, err := newFileSystem("devpts", [][2]string{{"ptmxmode", "0666"}, {"mode", "0620"}}, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC)
	if err := attach(pts, err, dev, "pts", true); err != nil {
		return err
	}
	shm, err := newFileSystem("tmpfs", [][2]string{{"mode", "1777"}, {"size", strconv.FormatInt(s.ShmSize, 10)}}, safe)
	if err := attach(shm, err, dev, "shm", true); err != nil {
		return err
	}
	for _, name := range []string{"null", "zero", "full", "random", "urandom", "tty"} {
		node, err := machineNode(name)
		if err := attach(node, err, dev, name, false); err != nil {
			return err
		}
	}
	for _, link := range [][2]string{
		{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"}, {"/proc/self/fd/2", "stderr"},
		{"pts/ptmx", "ptmx"},
	} {
		if err := unix.Symlinkat(link[0], dev, link[1]); err != nil {
			return &os.PathError{Op: "symlink", Path: "/dev/" + link[1], Err: err}
		}
	}
	if err := unix.Mkdirat(dev, "mqueue", 0o755); err != nil {
		return &os.PathError{Op: "mkdir", Path: "/dev/mqueue", Err: err}
	}
	if s.Insecure {
		if err := mountUserDevices(dev); err != nil {
			return err
		}
	}
	for _, m := range s.Mounts {
		if !inDev(m.Target) {
			continue
		}
		tree, isDir, err := m.open()
		if err := attach(tree, err, dev, path.Base(m.Target), isDir); err != nil {
			return fmt.Errorf("mount %s: %w", m.Target, err)
		}
	}
	return nil
}

// mountUserDevices adds what devices the machine has that were made for user namespaces.
func mountUserDevices(dev int) error {
	fuse, err := machineNode("fuse")
	if err := attach(fuse, err, dev, "fuse", false); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	tun, err := machineNode("net/tun")
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err == nil {
		err = unix.Mkdirat(dev, "net", 0o755)
	}
	return attach(tun, err, dev, "net/tun", false)
}

// machineNode is a mount of one of the machine's own device nodes, as no user namespace can make any.
// Read-only keeps their mode and owner from a command that is root on the
// machine too; it does not keep anybody from writing to the device.
func machineNode(name string) (int, error) {
	tree, err := unix.OpenTree(unix.AT_FDCWD, "/dev/"+name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return -1, &os.PathError{Op: "open_tree", Path: "/dev/" + name, Err: err}
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		unix.Close(tree)
		return -1, os.NewSyscallError("mount_setattr", err)
	}
	return tree, nil
}

// attach mounts tree at a new place in a directory that only we know, and closes it. An error of its making is passed on.
func attach(tree int, err error, dir int, name string, isDir bool) error {
	if tree >= 0 {
		defer unix.Close(tree)
	}
	if err != nil {
		return err
	}
	if isDir {
		err = unix.Mkdirat(dir, name, 0o755)
	} else {
		err = unix.Mknodat(dir, name, unix.S_IFREG|0o644, 0)
	}
	if err != nil {
		return &os.PathError{Op: "make mount point", Path: "/dev/" + name, Err: err}
	}
	return os.NewSyscallError("move_mount", unix.MoveMount(tree, "", dir, name, unix.MOVE_MOUNT_F_EMPTY_PATH))
}

// mountSys covers what the image has in /sys: every build sees the same.
func (r *rootfs) mountSys() error {
	const attributes = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC | unix.MOUNT_ATTR_RDONLY
	sys, err := newFileSystem("tmpfs", [][2]string{{"mode", "555"}, {"size", "4k"}, {"nr_inodes", "2"}}, attributes)
	if err != nil {
		return err
	}
	return r.cover("sys", sys)
}

// cover mounts tree over one of the directories whose content is ours.
func (r *rootfs) cover(name string, tree int) error {
	target, err := r.system(name)
	if err != nil {
		unix.Close(tree)
		return err
	}
	defer unix.Close(target)
	return r.lay(tree, target)
}

// lay mounts tree over target until restore.
func (r *rootfs) lay(tree, target int) error {
	if err := unix.MoveMount(tree, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		unix.Close(tree)
		return os.NewSyscallError("move_mount", err)
	}
	r.mounts = append(r.mounts, tree)
	return nil
}
