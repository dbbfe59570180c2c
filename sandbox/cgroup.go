package sandbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// cgroup is a control group for one process. The zero value is none: the
// process stays in the builder's.
type cgroup struct {
	parent *os.File
	name   string
	kept   Limits // by the group
}

// newCgroup makes a control group with the limits of s, below the one that s
// names, which keeps its own limits for all below it, or else below the
// builder's. Nothing is made where nothing is asked for. Without a name, a
// machine that gives the builder no groups is no error; unkept then says what
// is left to keep.
func newCgroup(s Spec, name string) (_ *cgroup, err error) {
	if s.CgroupParent == "" && s.Limits.ofGroup() == (Limits{}) {
		return &cgroup{}, nil
	}
	defer func() {
		if err != nil && s.CgroupParent != "" {
			err = fmt.Errorf("cgroup parent %s: %w", s.CgroupParent, err)
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
	if s.CgroupParent == "" {
		at, ok := ownParent(root, facts, []int{os.Getpid(), os.Getppid()})
		if !ok {
			return &cgroup{}, nil
		}
		return makeCgroup(root, at, name, s.Limits)
	}
	at, err := decideCgroup(facts, s.CgroupParent)
	if err != nil {
		return nil, err
	}
	return makeCgroup(root, at, name, s.Limits)
}

// makeCgroup makes a group below at, with those of the limits that at hands down.
func makeCgroup(root *os.File, at, name string, limits Limits) (*cgroup, error) {
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
	g.limit(limits)
	return g, nil
}

// delegateHint says how a build gets control groups of its own.
const delegateHint = "build in a group of its own: systemd-run --user --scope -p Delegate=yes cooper build ..."

// builderGroup is where the builder goes in a group that it has for itself: a
// group hands limits down only when no process is in it.
const builderGroup = "cooper-builder"

// ownParent returns the group that RUNs get theirs below: the builder's, if
// nobody is in it but the builder, whose processes are ours.
func ownParent(root *os.File, f cgroupFacts, ours []int) (at string, ok bool) {
	if f.Delegated == "" {
		return "", false
	}
	if parent := path.Dir(f.Own); path.Base(f.Own) == builderGroup && isBelow(parent, f.Delegated) {
		return parent, true
	}
	b, err := readIn(root, "."+f.Own+"/cgroup.procs")
	if err != nil {
		return "", false
	}
	for _, pid := range strings.Fields(string(b)) {
		if n, err := strconv.Atoi(pid); err != nil || !slices.Contains(ours, n) {
			return "", false // of a shell, or what else is not ours to move
		}
	}
	builder := "." + path.Join(f.Own, builderGroup)
	if err := unix.Mkdirat(int(root.Fd()), builder, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return "", false
	}
	for _, pid := range ours {
		if err := writeIn(root, builder+"/cgroup.procs", strconv.Itoa(pid)); err != nil {
			return "", false
		}
	}
	for _, controller := range []string{"+memory", "+pids", "+cpu"} {
		_ = writeIn(root, "."+f.Own+"/cgroup.subtree_control", controller) // limit sees which of them are there
	}
	return f.Own, true
}

// cpuPeriod is the kernel's own, in microseconds.
const cpuPeriod = 100_000

// limit sets the limits for which the group has a controller.
func (g *cgroup) limit(l Limits) {
	set := func(file, value string) bool { return writeIn(g.parent, g.name+"/"+file, value) == nil }
	if l.Memory > 0 && set("memory.max", strconv.FormatInt(l.Memory, 10)) {
		g.kept.Memory = l.Memory
		set("memory.swap.max", "0")  // not there where there is no swap
		set("memory.oom.group", "1") // half a RUN is none
	}
	if l.Processes > 0 && set("pids.max", strconv.Itoa(l.Processes)) {
		g.kept.Processes = l.Processes
	}
	if l.CPUs > 0 && set("cpu.max", fmt.Sprintf("%d %d", max(1000, int64(l.CPUs*cpuPeriod)), cpuPeriod)) {
		g.kept.CPUs = l.CPUs
	}
}

// unkept are the limits that somebody else has to keep.
func (g *cgroup) unkept(l Limits) Limits {
	if g.kept.Memory > 0 {
		l.Memory = 0
	}
	if g.kept.Processes > 0 {
		l.Processes = 0
	}
	if g.kept.CPUs > 0 {
		l.CPUs = 0
	}
	return l
}

// outOfMemory reports whether the kernel killed in the group because of the group's limit.
func (g *cgroup) outOfMemory() bool {
	if g.kept.Memory == 0 {
		return false
	}
	b, err := readIn(g.parent, g.name+"/memory.events")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if n, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok {
			return n != "0"
		}
	}
	return false
}

func readIn(dir *os.File, name string) ([]byte, error) {
	f, err := openIn(dir, name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

func writeIn(dir *os.File, name, value string) error {
	f, err := openIn(dir, name, unix.O_WRONLY)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

func openIn(dir *os.File, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir.Name() + "/" + name, Err: err}
	}
	return os.NewFile(uintptr(fd), dir.Name()+"/"+name), nil
}

// add puts a process that has not executed its command yet into the group.
func (g *cgroup) add(pid int) error {
	if g.parent == nil {
		return nil
	}
	return writeIn(g.parent, g.name+"/cgroup.procs", strconv.Itoa(pid))
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
