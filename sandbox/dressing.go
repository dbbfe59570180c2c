package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/chroot"
)

// dressing puts into a root directory, where nothing can be mounted, what a command is to find there: in place of what the image has,
// which lies aside meanwhile. restore changes everything back.
type dressing struct {
	root    *rootfs
	scratch string
	nodes   bool // the devices are nodes
	swaps   []swap
	n       int
}

// swap is one place where something of ours is.
type swap struct {
	target string // for people
	parent int    // O_PATH, so that it is found wherever the process moved it
	name   string
	aside  string   // where the image's own is
	back   string   // where ours goes
	ours   *os.File // O_PATH
	wipe   *os.File // the content that must not stay, if there is any
}

func openDressing(root, scratch string) (*dressing, error) {
	r, err := openRootfs(root)
	if err != nil {
		return nil, err
	}
	return &dressing{root: r, scratch: scratch}, nil
}

// dress makes the root what the command is to find.
func (d *dressing) dress(ctx context.Context, s Spec) error {
	dev, err := d.makeDev()
	if err != nil {
		return fmt.Errorf("/dev: %w", err)
	}
	var later []Mount
	for _, m := range s.Mounts {
		if !inDev(m.Target) {
			later = append(later, m)
			continue
		}
		if err := d.copyTo(ctx, m, filepath.Join(dev, path.Base(path.Clean(m.Target)))); err != nil {
			return fmt.Errorf("mount %s: %w", m.Target, err)
		}
	}
	for _, name := range []string{"proc", "sys", "dev"} {
		ours := dev
		if name != "dev" {
			if ours, err = d.makeDir(0o555); err != nil {
				return err
			}
		}
		theirs, err := d.root.system(name)
		if err != nil {
			return err
		}
		unix.Close(theirs)
		if err := d.swapAt(swap{target: "/" + name, name: name}, d.root.dir, ours); err != nil {
			return err
		}
	}
	files, err := generateFiles(s, d.scratch)
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := d.swapFor(f.Target, f.Source, "", false); err != nil {
			return fmt.Errorf("%s: %w", f.Target, err)
		}
	}
	for _, m := range later {
		if err := d.lay(ctx, m); err != nil {
			return fmt.Errorf("mount %s: %w", m.Target, err)
		}
	}
	if err := d.root.workDir(s.Dir); err != nil {
		return fmt.Errorf("working directory %s: %w", s.Dir, err)
	}
	return nil
}

// fresh is a name in the scratch directory.
func (d *dressing) fresh() string {
	d.n++
	return filepath.Join(d.scratch, "dress-"+strconv.Itoa(d.n))
}

func (d *dressing) makeDir(mode os.FileMode) (string, error) {
	dir := d.fresh()
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, mode)
}

// makeDev makes a /dev. Where no nodes can be made there are files in their place, for who asks whether there is something; who
// opens them gets the device.
func (d *dressing) makeDev() (string, error) {
	dev, err := d.makeDir(0o755)
	if err != nil {
		return "", err
	}
	d.nodes = true
	for _, device := range chroot.Devices() {
		file := filepath.Join(dev, device.Name)
		err := unix.Mknod(file, unix.S_IFCHR|0o666, int(unix.Mkdev(device.Major, device.Minor)))
		if errors.Is(err, unix.EPERM) {
			d.nodes = false
			err = os.WriteFile(file, nil, 0o666)
		}
		if err != nil {
			return "", err
		}
		if err := os.Chmod(file, 0o666); err != nil {
			return "", err
		}
	}
	for _, name := range []string{"stdin", "stdout", "stderr"} {
		file := filepath.Join(dev, name)
		if err := errors.Join(os.WriteFile(file, nil, 0o666), os.Chmod(file, 0o666)); err != nil {
			return "", err
		}
	}
	shm, fd := filepath.Join(dev, "shm"), filepath.Join(dev, "fd")
	return dev, errors.Join(os.Mkdir(shm, 0o700), os.Chmod(shm, os.ModeSticky|0o777), os.Mkdir(fd, 0o555))
}

// lay puts the content of a mount at its target: what is read-only as a copy, and what is written to itself, for the time of the run.
func (d *dressing) lay(ctx context.Context, m Mount) error {
	if m.Kind == Tmpfs {
		mode := m.Mode
		if mode == 0 {
			mode = os.ModeSticky | 0o777
		}
		dir, err := d.makeDir(mode)
		if err != nil {
			return err
		}
		return d.swapFor(m.Target, dir, "", true)
	}
	source, st, err := openSource(m)
	if err != nil {
		return err
	}
	defer source.Close()
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	if m.ReadOnly && st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		to := d.fresh()
		if err := copyTree(ctx, procPath(source), to); err != nil {
			return err
		}
		return d.swapFor(m.Target, to, "", isDir)
	}
	from, err := os.Readlink(procPath(source))
	if err != nil {
		return err
	}
	return d.swapFor(m.Target, from, from, isDir)
}

func (d *dressing) copyTo(ctx context.Context, m Mount, to string) error {
	if m.Kind != Bind {
		return errors.New("a tmpfs cannot lie in /dev")
	}
	source, _, err := openSource(m)
	if err != nil {
		return err
	}
	defer source.Close()
	return copyTree(ctx, procPath(source), to)
}

// openSource opens what a bind mount shows, O_PATH.
func openSource(m Mount) (*os.File, unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := unix.Open(m.Source, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, st, &os.PathError{Op: "open", Path: m.Source, Err: err}
	}
	if inside := strings.Trim(m.Select, "/"); inside != "" {
		selected, err := openInRoot(fd, inside)
		unix.Close(fd)
		if err != nil {
			return nil, st, &os.PathError{Op: "open", Path: m.Select, Err: err}
		}
		fd = selected
	}
	f := os.NewFile(uintptr(fd), m.Source)
	if err := unix.Fstat(fd, &st); err != nil {
		f.Close()
		return nil, st, err
	}
	return f, st, nil
}

func procPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// swapFor puts ours in place of target, which is made if it is missing. With an empty back, ours is thrown away afterwards.
func (d *dressing) swapFor(target, ours, back string, isDir bool) error {
	fd, err := d.root.locate(target, isDir)
	if err != nil {
		return err
	}
	at := os.NewFile(uintptr(fd), target)
	defer at.Close()
	// The kernel's name for it has no links, and nothing is renamed meanwhile: no process runs in the root.
	where, err := os.Readlink(procPath(at))
	if err != nil {
		return err
	}
	parent, err := unix.Open(filepath.Dir(where), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: filepath.Dir(where), Err: err}
	}
	defer unix.Close(parent)
	return d.swapAt(swap{target: target, name: filepath.Base(where), back: back}, parent, ours)
}

// swapAt puts ours in place of what has the swap's name in parent.
func (d *dressing) swapAt(s swap, parent int, ours string) (err error) {
	if s.back == "" {
		s.back = d.fresh()
	}
	s.aside = d.fresh()
	if s.parent, err = unix.FcntlInt(uintptr(parent), unix.F_DUPFD_CLOEXEC, 3); err != nil {
		return err
	}
	fd, err := unix.Open(ours, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		unix.Close(s.parent)
		return &os.PathError{Op: "open", Path: ours, Err: err}
	}
	s.ours = os.NewFile(uintptr(fd), ours)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG {
		s.wipe, err = os.OpenFile(ours, os.O_WRONLY, 0)
		if err != nil {
			unix.Close(s.parent)
			s.ours.Close()
			return err
		}
	}
	d.swaps = append(d.swaps, s) // from now on, restore knows of it
	return keepTimes(parent, func() error {
		if err := unix.Renameat(parent, s.name, unix.AT_FDCWD, s.aside); err != nil {
			return os.NewSyscallError("renameat", err)
		}
		return os.NewSyscallError("renameat", unix.Renameat(unix.AT_FDCWD, ours, parent, s.name))
	})
}

// restore changes everything back, and goes on after an error.
func (d *dressing) restore() error {
	var errs []error
	for i := len(d.swaps) - 1; i >= 0; i-- {
		if err := d.swaps[i].undo(); err != nil {
			errs = append(errs, fmt.Errorf("take %s away: %w", d.swaps[i].target, err))
		}
	}
	return errors.Join(append(errs, d.root.restore())...)
}

// undo takes ours away, and puts the image's own back whatever the command has put in its place. What is ours and was moved to
// another place is an error, so that nothing is made of this root.
func (s *swap) undo() error {
	defer unix.Close(s.parent)
	defer s.ours.Close()
	if s.wipe != nil {
		defer s.wipe.Close()
	}
	if _, err := os.Lstat(s.aside); errors.Is(err, os.ErrNotExist) {
		return nil // never swapped
	}
	return keepTimes(s.parent, func() error {
		err := s.takeOut()
		if backErr := unix.Renameat(unix.AT_FDCWD, s.aside, s.parent, s.name); backErr != nil && !errors.Is(backErr, unix.ENOENT) {
			err = errors.Join(err, os.NewSyscallError("renameat", backErr)) // ENOENT: the directory itself was removed
		}
		return err
	})
}

// takeOut moves what is in our place out of the root.
func (s *swap) takeOut() error {
	var there, ours unix.Stat_t
	if err := unix.Fstat(int(s.ours.Fd()), &ours); err != nil {
		return err
	}
	err := unix.Fstatat(s.parent, s.name, &there, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	isOurs := err == nil && there.Dev == ours.Dev && there.Ino == ours.Ino
	to := s.back
	if !isOurs {
		to = s.aside + "-theirs"
	}
	if err == nil {
		if err := unix.Renameat(s.parent, s.name, unix.AT_FDCWD, to); err != nil {
			return os.NewSyscallError("renameat", err)
		}
	}
	return s.checkGone(isOurs, ours)
}

// thrownAway reports whether ours goes with the scratch directory.
func (s *swap) thrownAway() bool { return strings.HasPrefix(s.back, filepath.Dir(s.aside)+"/") }

// checkGone makes sure that no other name of ours stays in the root. A file is emptied in any case: it may be a secret.
func (s *swap) checkGone(wasThere bool, ours unix.Stat_t) error {
	if s.wipe != nil && s.thrownAway() {
		if err := s.wipe.Truncate(0); err != nil {
			return err
		}
	}
	isDir := ours.Mode&unix.S_IFMT == unix.S_IFDIR
	if wasThere && isDir && !s.thrownAway() {
		if err := separate(s.back); err != nil {
			return err
		}
	}
	switch {
	case !wasThere && ours.Nlink > 0, wasThere && s.thrownAway() && !isDir && ours.Nlink > 1:
		return errMoved
	}
	return nil
}
