package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// cgroup is a control group for one process. The zero value is none: the
// process stays in the builder's.
type cgroup struct {
	parent *os.File
	name   string
}

// newCgroup makes a control group below the one that parent names, which keeps
// its limits for all below it. Nothing is made for an empty parent.
func newCgroup(parent, name string) (_ *cgroup, err error) {
	if parent == "" {
		return &cgroup{}, nil
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("cgroup parent %s: %w", parent, err)
		}
	}()
	root, err := writableCgroups()
	if err != nil {
		return nil, err
	}
	if root != nil {
		defer root.Close()
	}
	facts, err := cgroupFactsOf(root)
	if err != nil {
		return nil, err
	}
	at, err := decideCgroup(facts, parent)
	if err != nil {
		return nil, err
	}
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	fd, err := unix.Openat2(int(root.Fd()), "."+at, &how)
	if errors.Is(err, unix.ENOENT) {
		return nil, &hinted{error: err, hint: "make it, with the limits it is to have: mkdir " + cgroupRoot + at}
	}
	if err != nil {
		return nil, err
	}
	g := &cgroup{parent: os.NewFile(uintptr(fd), cgroupRoot+at), name: name}
	if err := unix.Mkdirat(fd, name, 0o755); err != nil {
		g.parent.Close()
		return nil, &os.PathError{Op: "mkdir", Path: cgroupRoot + path.Join(at, name), Err: err}
	}
	return g, nil
}

// add puts a process that has not executed its command yet into the group.
func (g *cgroup) add(process *libcontainer.Process) error {
	if g.parent == nil {
		return nil
	}
	pid, err := process.Pid()
	if err != nil {
		return err
	}
	procs := g.name + "/cgroup.procs"
	fd, err := unix.Openat(int(g.parent.Fd()), procs, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: g.parent.Name() + "/" + procs, Err: err}
	}
	f := os.NewFile(uintptr(fd), g.parent.Name()+"/"+procs)
	_, err = f.WriteString(strconv.Itoa(pid))
	return errors.Join(err, f.Close())
}

// remove takes the group away once its process has ended.
func (g *cgroup) remove() error {
	if g.parent == nil {
		return nil
	}
	defer g.parent.Close()
	for try := 0; ; try++ {
		err := unix.Unlinkat(int(g.parent.Fd()), g.name, unix.AT_REMOVEDIR)
		if !errors.Is(err, unix.EBUSY) || try == 100 {
			if err != nil {
				return fmt.Errorf("sandbox: remove control group %s/%s: %w", g.parent.Name(), g.name, err)
			}
			return nil
		}
		time.Sleep(10 * time.Millisecond) // until the kernel has forgotten the last process
	}
}

// cgroupFacts is what decideCgroup needs to know about the machine.
type cgroupFacts struct {
	Unified bool // /sys/fs/cgroup is control groups version 2 and nothing else
	// Own is the group of this process, from the root of the hierarchy.
	Own string
	// Delegated is the topmost of Own and the groups above it in which this
	// user may make groups and move processes; empty if it may in none.
	Delegated string
}

// decideCgroup returns the path, from the root of the hierarchy, of the group
// that parent names. The kernel lets a user move processes only below a group
// that was delegated to it and that it is in.
func decideCgroup(f cgroupFacts, parent string) (string, error) {
	switch {
	case !f.Unified:
		return "", &hinted{
			error: errors.New("this machine has control groups of version 1, which nobody can delegate to a user safely"),
			hint:  "build without --cgroup-parent, or start the machine with version 2 (kernel parameter systemd.unified_cgroup_hierarchy=1)",
		}
	case f.Delegated == "":
		return "", &hinted{
			error: fmt.Errorf("the control group of this process, %s, is not delegated to this user", f.Own),
			hint:  "start the build in a group of its own (systemd-run --user --scope -p Delegate=yes cooper build ...), or build without --cgroup-parent",
		}
	}
	at := path.Clean("/" + parent)
	if !path.IsAbs(parent) {
		at = path.Join(f.Delegated, at)
	}
	if !isBelow(at, f.Delegated) {
		return "", &hinted{
			error: fmt.Errorf("it is not below %s, which is what is delegated to this user", f.Delegated),
			hint:  "name a group below " + f.Delegated + "; a name without a leading slash is taken from there",
		}
	}
	return at, nil
}

func isBelow(name, dir string) bool {
	return name == dir || dir == "/" || strings.HasPrefix(name, dir+"/")
}

// writableCgroups returns the hierarchy of version 2 without the read-only that
// stayInCgroup put on it, or nil where there is none.
func writableCgroups() (*os.File, error) {
	var st unix.Statfs_t
	err := unix.Statfs(cgroupRoot, &st)
	if errors.Is(err, unix.ENOENT) || (err == nil && st.Type != unix.CGROUP2_SUPER_MAGIC) {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "statfs", Path: cgroupRoot, Err: err}
	}
	// The whole tree, because the kernel does not part what a mount of the namespace above covers.
	tree, err := unix.OpenTree(unix.AT_FDCWD, cgroupRoot, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return nil, os.NewSyscallError("open_tree", err)
	}
	// Refused where the machine mounts it read-only. Then nothing counts as delegated.
	_ = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY})
	return os.NewFile(uintptr(tree), cgroupRoot), nil
}

// cgroupFactsOf looks at the hierarchy root, which is nil if there is none.
func cgroupFactsOf(root *os.File) (cgroupFacts, error) {
	if root == nil {
		return cgroupFacts{}, nil
	}
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return cgroupFacts{}, err
	}
	f := cgroupFacts{Unified: true}
	for line := range strings.Lines(string(b)) {
		if own, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			f.Own = own
		}
	}
	if !path.IsAbs(f.Own) || strings.HasPrefix(f.Own+"/", "/../") {
		return f, nil // of a group outside of this namespace nothing can be delegated
	}
	for at := f.Own; mayMove(root, at); at = path.Dir(at) {
		f.Delegated = at
		if at == "/" {
			break
		}
	}
	return f, nil
}

func mayMove(root *os.File, group string) bool {
	dir := "." + group
	return unix.Faccessat(int(root.Fd()), dir, unix.W_OK, unix.AT_EACCESS) == nil &&
		unix.Faccessat(int(root.Fd()), dir+"/cgroup.procs", unix.W_OK, unix.AT_EACCESS) == nil
}
