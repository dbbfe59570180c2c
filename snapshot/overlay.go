package snapshot

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

func opaqueRoot(dir string) bool {
	var value [2]byte
	n, err := unix.Getxattr(dir, "user.overlay.opaque", value[:])
	return err == nil && n == 1 && value[0] == 'y'
}

// overlay is a mount to be: lower directories topmost first; no upper means read-only.
type overlay struct {
	lower       []string
	upper, work string
	target      string
}

// mount mounts the overlay in this process's mount namespace. Directories are handed over as open
// files, so no character in a path can be taken for an option.
func (o overlay) mount() error {
	var fds []int
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	open := func(dir string) (string, error) {
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return "", &os.PathError{Op: "open", Path: dir, Err: err}
		}
		fds = append(fds, fd)
		return "/proc/self/fd/" + strconv.Itoa(fd), nil
	}
	opened := overlay{target: o.target}
	for _, dir := range o.lower {
		name, err := open(dir)
		if err != nil {
			return err
		}
		opened.lower = append(opened.lower, name)
	}
	if o.upper != "" {
		var err error
		if opened.upper, err = open(o.upper); err != nil {
			return err
		}
		if opened.work, err = open(o.work); err != nil {
			return err
		}
	}
	err := opened.mountByDescriptor()
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPERM) {
		// lowerdir+ came with Linux 6.7, and some seccomp filters know mount(2) only.
		err = opened.mountByString()
	}
	if err != nil {
		return fmt.Errorf("mount overlay: %w", err)
	}
	return nil
}

func (o overlay) mountByDescriptor() error {
	ctx, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(ctx)
	for _, dir := range o.lower {
		if err := unix.FsconfigSetString(ctx, "lowerdir+", dir); err != nil {
			return err
		}
	}
	if err := unix.FsconfigSetFlag(ctx, "userxattr"); err != nil {
		return err
	}
	attrs := unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV
	if o.upper != "" {
		attrs = 0
		if err := unix.FsconfigSetString(ctx, "upperdir", o.upper); err != nil {
			return err
		}
		if err := unix.FsconfigSetString(ctx, "workdir", o.work); err != nil {
			return err
		}
		// Unmounting must not wait for the upper directory to reach the disk.
		if err := unix.FsconfigSetFlag(ctx, "volatile"); err != nil {
			return err
		}
	}
	if err := unix.FsconfigCreate(ctx); err != nil {
		return err
	}
	mount, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return err
	}
	defer unix.Close(mount)
	return unix.MoveMount(mount, "", unix.AT_FDCWD, o.target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

func (o overlay) mountByString() error {
	options := "userxattr,lowerdir=" + strings.Join(o.lower, ":")
	flags := uintptr(unix.MS_RDONLY | unix.MS_NODEV)
	if o.upper != "" {
		flags = 0
		options += ",volatile,upperdir=" + o.upper + ",workdir=" + o.work
	}
	if len(options) >= os.Getpagesize() {
		return fmt.Errorf("%d layers are more than this kernel can stack", len(o.lower))
	}
	return unix.Mount("overlay", o.target, "overlay", flags, options)
}

// unmount takes the mount out of sight at once; it is gone when its last user is.
func unmount(target string) error {
	err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: not mounted
		return &os.PathError{Op: "unmount", Path: target, Err: err}
	}
	return nil
}

// unmount is for what may be mounted. Where nothing can be, nothing is, and to ask would be refused.
func (s *Store) unmount(target string) error {
	if s.copying {
		return nil
	}
	return unmount(target)
}
