package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/chroot"
	"github.com/cooper-build/cooper/sandbox/egress"
	"github.com/cooper-build/cooper/sandbox/userns"
)

// Options say what is asked about.
type Options struct {
	Store string   // the directory that the store is or is to be in
	Path  []string // where programs are looked for

	// TryProc are arguments, beginning with its name, with which this program does no more than to call TryProc and, if there is an
	// error, to print it on standard output and to fail.
	TryProc []string
}

// Outside gathers what can be known where there is no user namespace, because of refused.
func Outside(o Options, refused error) Facts {
	f := Facts{Entered: refused, Store: lookAt(o.Store, false)}
	f.surroundings()
	return f
}

// Examine gathers all facts. It is called by root of a user namespace that userns.Enter made, with the map of that.
func Examine(ctx context.Context, o Options, m userns.Map) Facts {
	if m.Kind == userns.Chroot {
		f := Facts{Map: m, Notify: onThread(askingFilter), Landlock: chroot.Landlock(), Store: lookAt(o.Store, false)}
		f.surroundings()
		return f
	}
	f := Facts{
		Map:      m,
		Proc:     freshProc(ctx, o.TryProc),
		Notify:   onThread(handedOver),
		Binfmt:   onThread(func() error { _, err := newMount("binfmt_misc"); return err }),
		Landlock: chroot.Landlock(),
		Qemu:     findQemu(o.Path),
		Cgroup:   delegated(),
		Store:    lookAt(o.Store, true),
	}
	f.surroundings()
	network, err := egress.Open(ctx, egress.Options{Note: func(s string) { f.NetworkNotes = append(f.NetworkNotes, s) }})
	if f.Network = err; err == nil {
		f.Network = network.Close()
	}
	return f
}

func (f *Facts) surroundings() {
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		f.Kernel = unix.ByteSliceToString(name.Release[:])
	}
	f.Container = inContainer()
	status, err := os.ReadFile("/proc/self/status")
	if err == nil {
		f.Filtered = bytes.Contains(status, []byte("\nSeccomp:\t2\n"))
	}
	label, err := os.ReadFile("/proc/self/attr/current")
	if text := strings.TrimRight(string(label), "\n\x00"); err == nil && text != "unconfined" {
		f.AppArmor = text
	}
}

// inContainer is a guess, and only chooses between two wordings.
func inContainer() bool {
	for _, file := range []string{"/.dockerenv", "/run/.containerenv", "/var/run/secrets/kubernetes.io"} {
		if _, err := os.Lstat(file); err == nil {
			return true
		}
	}
	var root unix.Statfs_t
	return unix.Statfs("/", &root) == nil && root.Type == unix.OVERLAYFS_SUPER_MAGIC
}

// onThread runs f on a thread that ends with it, because f leaves it changed.
func onThread(f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocks it
		result <- f()
	}()
	return <-result
}

// freshProc has a new pid namespace get a /proc. Only a process of that namespace may make it, so it takes another process.
func freshProc(ctx context.Context, args []string) error {
	child := exec.CommandContext(ctx, "/proc/self/exe", args[1:]...)
	child.Args[0] = args[0]
	child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	said, err := child.Output()
	if text := strings.TrimSpace(string(said)); err != nil && text != "" {
		return errors.New(text)
	}
	return err
}

// TryProc makes the /proc of this process's pid namespace, attached to nothing.
func TryProc() error {
	fd, err := newMount("proc")
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// newMount makes a mount without options, attached to nothing. The caller closes it, or its thread's namespaces end.
func newMount(kind string) (fd int, err error) {
	return configuredMount(kind, nil, nil)
}

func configuredMount(kind string, flags []string, options [][2]string) (int, error) {
	config, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, os.NewSyscallError("fsopen "+kind, err)
	}
	defer unix.Close(config)
	for _, name := range flags {
		if err := unix.FsconfigSetFlag(config, name); err != nil {
			return -1, fmt.Errorf("%s option %s: %w", kind, name, err)
		}
	}
	for _, o := range options {
		if err := unix.FsconfigSetString(config, o[0], o[1]); err != nil {
			return -1, fmt.Errorf("%s option %s: %w", kind, o[0], err)
		}
	}
	if err := unix.FsconfigCreate(config); err != nil {
		return -1, os.NewSyscallError("fsconfig "+kind, err)
	}
	fd, err := unix.Fsmount(config, unix.FSMOUNT_CLOEXEC, 0)
	return fd, os.NewSyscallError("fsmount "+kind, err)
}

// askingFilter installs a filter that allows everything and can ask a supervisor.
func askingFilter() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	program := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW}}
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&filter)))
	runtime.KeepAlive(program)
	if errno != 0 {
		return os.NewSyscallError("seccomp", errno)
	}
	return unix.Close(int(fd))
}

// handedOver is that, and handing it over.
func handedOver() error { return errors.Join(askingFilter(), handOver()) }

// handOver takes a descriptor out of a process, this one, as the supervisor gets the listener of a command's filter.
func handOver() error {
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(self)
	fd, err := unix.PidfdGetfd(self, self, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_getfd", err)
	}
	return unix.Close(fd)
}

func findQemu(path []string) []string {
	found := map[string]bool{}
	var names []string
	for _, dir := range path {
		for _, pattern := range []string{"qemu-*-static", "qemu-*"} {
			programs, _ := filepath.Glob(filepath.Join(dir, pattern)) // the pattern is well-formed
			for _, program := range programs {
				arch := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(program), "qemu-"), "-static")
				if !found[arch] && userProgram(arch) {
					found[arch] = true
					names = append(names, arch)
				}
			}
		}
	}
	return names
}

// userProgram tells qemu's programs that emulate a processor for one program from its other tools.
func userProgram(arch string) bool {
	switch arch {
	case "x86_64", "i386", "arm", "aarch64", "ppc64le", "s390x", "riscv64", "mips64el", "loongarch64":
		return true
	}
	return false
}

// delegated returns nil if this process may make control groups below its own.
func delegated() error {
	const root = "/sys/fs/cgroup"
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
		return errors.New("no control groups of version 2 at " + root)
	}
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	own, ok := strings.CutPrefix(strings.TrimSpace(string(b)), "0::")
	if !ok {
		return errors.New("this process is in no control group of version 2")
	}
	for _, name := range []string{"", "cgroup.procs", "cgroup.subtree_control"} {
		file := filepath.Join(root, own, name)
		if err := unix.Access(file, unix.W_OK); err != nil {
			return fmt.Errorf("%s is not delegated to this user: %w", filepath.Join(root, own), err)
		}
	}
	return nil
}

// lookAt looks at the place of the store. What it had to make for that is removed again.
func lookAt(dir string, tryOverlay bool) Store {
	s := Store{Dir: dir}
	made, err := makeDirs(dir)
	defer func() {
		for _, d := range made {
			_ = os.Remove(d) // another process may use it by now
		}
	}()
	if err == nil {
		err = s.stat()
	}
	var scratch string
	if err == nil {
		scratch, err = os.MkdirTemp(dir, ".doctor-")
	}
	if s.Err = err; err != nil {
		return s
	}
	defer os.RemoveAll(scratch)
	if tryOverlay {
		s.Overlay = overlayIn(scratch)
	}
	return s
}

// makeDirs makes a directory and returns what it made, innermost first.
func makeDirs(dir string) (made []string, err error) {
	var missing []string
	for d := filepath.Clean(dir); ; d = filepath.Dir(d) {
		if _, err := os.Stat(d); err == nil || !errors.Is(err, os.ErrNotExist) {
			break
		}
		missing = append(missing, d)
	}
	for i := len(missing) - 1; i >= 0; i-- {
		if err := os.Mkdir(missing[i], 0o700); err != nil {
			return made, err
		}
		made = append([]string{missing[i]}, made...)
	}
	return made, nil
}

func (s *Store) stat() error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.Dir, &st); err != nil {
		return &os.PathError{Op: "statfs", Path: s.Dir, Err: err}
	}
	s.FileSystem = fileSystem(int64(st.Type))
	s.Free, s.FreeFiles = st.Bavail*uint64(st.Bsize), st.Ffree
	return nil
}

func fileSystem(magic int64) string {
	for _, k := range []struct {
		magic int64
		name  string
	}{
		{unix.EXT4_SUPER_MAGIC, "ext4"}, {unix.XFS_SUPER_MAGIC, "xfs"}, {unix.BTRFS_SUPER_MAGIC, "btrfs"},
		{unix.TMPFS_MAGIC, "tmpfs"}, {unix.OVERLAYFS_SUPER_MAGIC, "overlay"}, {unix.NFS_SUPER_MAGIC, "nfs"},
		{unix.FUSE_SUPER_MAGIC, "fuse"}, {unix.V9FS_MAGIC, "9p"}, {unix.F2FS_SUPER_MAGIC, "f2fs"}, {unix.MSDOS_SUPER_MAGIC, "vfat"},
	} {
		if k.magic == magic {
			return k.name
		}
	}
	return fmt.Sprintf("a file system of type %#x", magic)
}

// overlayIn mounts an overlay, attached to nothing, and does with it what a build does: it adds a file and removes one.
func overlayIn(dir string) error {
	var options [][2]string
	for _, o := range [][2]string{{"lowerdir", "lower"}, {"upperdir", "upper"}, {"workdir", "work"}} {
		sub := filepath.Join(dir, o[1])
		if err := os.Mkdir(sub, 0o755); err != nil {
			return err
		}
		fd, err := unix.Open(sub, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: sub, Err: err}
		}
		defer unix.Close(fd)
		// The kernel takes strings of less than 256 bytes only.
		options = append(options, [2]string{o[0], fmt.Sprintf("/proc/self/fd/%d", fd)})
	}
	if err := os.WriteFile(filepath.Join(dir, "lower", "old"), nil, 0o644); err != nil {
		return err
	}
	mount, err := configuredMount("overlay", []string{"userxattr"}, options)
	if err != nil {
		return err
	}
	defer unix.Close(mount)
	fd, err := unix.Openat(mount, "new", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return fmt.Errorf("create a file on an overlay: %w", err)
	}
	unix.Close(fd)
	if err := unix.Unlinkat(mount, "old", 0); err != nil {
		return fmt.Errorf("remove a file of a layer below: %w", err)
	}
	var whiteout unix.Stat_t
	if err := unix.Lstat(filepath.Join(dir, "upper", "old"), &whiteout); err != nil || whiteout.Mode&unix.S_IFMT != unix.S_IFCHR {
		return errors.New("a removed file leaves no whiteout")
	}
	return nil
}
