// Package sandbox runs one process in a root directory, isolated, and reports
// how it ended.
//
// Run is called by the root of a user namespace (package userns) and starts a
// container without a further one: its own pid, mount, ipc, uts,
// cgroup, time and, if asked, network namespace, few capabilities, a seccomp filter
// and a fresh /proc and /dev. Only a process that is to be Insecure gets a
// further user namespace, so that it can do to itself what it must not do to
// its builder. What Run knows about images, stores and Dockerfiles is nothing:
// a directory goes in, an exit status comes out, and the directory holds what
// the process wrote and no trace of the sandbox.
//
// What makes a process a container is one list of system calls, in container.go,
// which package first has the process make. Where no namespace can be made it
// is a chroot, with a list of its own in chroot.go.
package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/egress"
)

// Network says what the process can reach.
type Network int

const (
	// Host shares the network of the caller.
	Host Network = iota
	// None has a loopback interface and nothing else.
	None
	// Private has a loopback interface of its own, and TCP and DNS through the
	// caller's process, as Spec.Egress says.
	Private
)

// Spec says what to run and in which surroundings. Root, Args and StateDir
// must be set; the zero value of everything else works.
type Spec struct {
	Root string   // the root directory, an absolute path without symbolic links
	Args []string // the command; Args[0] is looked up in the PATH of Env, inside Root
	Env  []string // the whole environment; HOME is added from Root's passwd if missing
	Dir  string   // working directory inside Root, / if empty; made if missing

	UID, GID uint32
	Groups   []uint32 // all supplementary groups

	// RealIDs keeps from a process in a user namespace of a single id the emulation of the others (package rootemu).
	// Then it can be root only, and no file can have another owner.
	RealIDs bool

	Hostname string // BuildKit's "buildkitsandbox" if empty
	Hosts    []HostEntry
	ShmSize  int64 // bytes of /dev/shm, 64 MiB if 0
	Network  Network
	Mounts   []Mount // in this order, so that a later one may lie in an earlier one

	// Egress is for the network Private. Without Resolvers, those of the
	// machine's resolv.conf are asked, and its search domains apply. Hosts is
	// completed with those above, and Note is the one below if it is nil.
	Egress egress.Options

	NoNewPrivs bool // setuid programs gain nothing

	// Insecure drops what keeps the process from the kernel and from its own
	// surroundings: it has all capabilities in a further user namespace, of the
	// same ids, with nothing filtered, masked or read-only. It can mount, and
	// make namespaces. It still reaches nothing outside Root and Mounts, unless
	// root of the machine runs it.
	Insecure bool

	// Chroot runs the process without any namespace, where none can be made: in a chroot, on the network of the caller. Package chroot
	// says what keeps it there. The caller must be root. RealIDs means nothing then, and NoNewPrivs is always set.
	Chroot bool

	Ulimits []Ulimit

	// Limits are kept by a control group of the process's own where one can be
	// had, else by looking at what it uses, and Note is told so.
	Limits Limits

	// CgroupParent is a control group below which the process runs: from the
	// root of the hierarchy if it begins with a slash, else from the topmost
	// that is delegated to the user. It must exist.
	CgroupParent string

	Stdout, Stderr io.Writer // nil discards; equal writers keep the order of the output

	// Note, if set, is called when the machine forced Run to something weaker
	// than promised, with a sentence for people.
	Note func(string)

	// StateDir is a private directory for the generated files, on a file system
	// with programs. Run leaves nothing in it.
	StateDir string

	network *egress.Network // open while Run runs, if Network is Private
}

// HostEntry is a line of /etc/hosts.
type HostEntry struct{ Name, IP string }

// MountKind says where a mount's content comes from.
type MountKind int

const (
	// Bind shows the directory, file or socket Source.
	Bind MountKind = iota
	// Tmpfs is empty, lives in memory and vanishes with the process.
	Tmpfs
)

// Mount is one mount inside the root directory.
type Mount struct {
	Kind   MountKind
	Source string // for Bind, a directory, file or socket: an absolute path that no sandboxed process can change
	// Select is a path within Source, resolved beneath it whatever symbolic
	// links say, also while another process changes them. Empty is Source itself.
	Select   string
	Target   string // inside the root; made for the time of the run if missing
	ReadOnly bool
	Size     int64       // for Tmpfs, in bytes; 0 is the kernel's default
	Mode     os.FileMode // for Tmpfs, permission of its root; 0 is 01777
}

// ExitError reports that the process started and did not end with status 0.
type ExitError struct {
	Code   int    // exit status, 128+n if signal n ended it
	Signal string // name of the signal that ended it, or empty
	// OOM is set if the process was killed while the kernel was killing for
	// lack of memory. Without a control group of our own that is an informed guess.
	OOM bool
}

func (e *ExitError) Error() string {
	switch {
	case e.OOM:
		return "killed, because the machine ran out of memory"
	case e.Signal != "":
		return "killed by " + e.Signal
	}
	return fmt.Sprintf("exit code %d", e.Code)
}

// hinted is an error with a next step for people.
type hinted struct {
	error
	hint string
}

func (h *hinted) Hint() string  { return h.hint }
func (h *hinted) Unwrap() error { return h.error }

// Run runs the process and waits for it. A nil error means that it ended with
// status 0; an *ExitError that it ended otherwise. When Run returns, no process
// of the sandbox is left, what the process wrote is in Root, and the mount
// points made for it are gone. The end of ctx kills everything inside, and Run
// returns its cause.
func Run(ctx context.Context, s Spec) (err error) {
	if err := s.validate(); err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if s.Chroot {
		return runInChroot(ctx, s)
	}
	scratch, err := os.MkdirTemp(s.StateDir, "run-")
	if err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	defer func() { err = join(err, os.RemoveAll(scratch)) }()

	network := sync.OnceValues(func() (*egress.Network, error) { return openEgress(ctx, s) })
	go network()
	defer func() {
		if n, _ := network(); n != nil {
			err = join(err, n.Close())
		}
	}()
	r, err := openRootfs(s.Root)
	if err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	defer func() {
		if restoreErr := r.restore(); restoreErr != nil {
			err = join(err, fmt.Errorf("sandbox: %w", restoreErr))
		}
	}()
	if err := prepare(r, &s, scratch); err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	if s.network, err = network(); err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	return contain(ctx, s, scratch)
}

// prepare puts into the root all that can be mounted before the process's
// namespaces exist.
func prepare(r *rootfs, s *Spec, scratch string) error {
	proc, err := r.system("proc") // a fresh one takes the namespaces of the container
	if err != nil {
		return err
	}
	unix.Close(proc)
	if err := errors.Join(r.mountDev(s), r.mountSys()); err != nil {
		return err
	}
	files, err := generateFiles(*s, scratch)
	if err != nil {
		return err
	}
	for _, m := range slices.Concat(files, s.Mounts) {
		if inDev(m.Target) {
			continue
		}
		if err := r.mount(m); err != nil {
			return fmt.Errorf("mount %s: %w", m.Target, err)
		}
	}
	if err := r.workDir(s.Dir); err != nil {
		return fmt.Errorf("working directory %s: %w", s.Dir, err)
	}
	return nil
}

// defaultShmSize is Docker's.
const defaultShmSize = 64 << 20

func (s *Spec) validate() error {
	if len(s.Args) == 0 || s.Args[0] == "" {
		return errors.New("no command given")
	}
	if !filepath.IsAbs(s.Root) || !filepath.IsAbs(s.StateDir) {
		return fmt.Errorf("root %q and state directory %q must be absolute paths", s.Root, s.StateDir)
	}
	if s.Dir == "" {
		s.Dir = "/"
	}
	if !filepath.IsAbs(s.Dir) {
		return fmt.Errorf("working directory %q is not absolute", s.Dir)
	}
	if s.Hostname == "" {
		s.Hostname = "buildkitsandbox"
	}
	if s.ShmSize == 0 {
		s.ShmSize = defaultShmSize
	}
	if s.ShmSize < 0 {
		return fmt.Errorf("size of /dev/shm %d is negative", s.ShmSize)
	}
	for _, h := range s.Hosts {
		if _, err := netip.ParseAddr(h.IP); err != nil {
			return fmt.Errorf("host entry %s: %w", h.Name, err)
		}
		if h.Name == "" || strings.ContainsAny(h.Name, " \t\n\r#") {
			return fmt.Errorf("host entry %q is not a host name", h.Name)
		}
	}
	if _, err := ulimits(s.Ulimits, hardLimit); err != nil {
		return err
	}
	if err := s.Limits.validate(); err != nil {
		return err
	}
	s.boundMemoryFiles()
	for _, m := range s.Mounts {
		if err := m.validate(); err != nil {
			return fmt.Errorf("mount %s: %w", m.Target, err)
		}
	}
	return checkIDs(s)
}

// boundMemoryFiles keeps files in memory from holding more than the process may use.
func (s *Spec) boundMemoryFiles() {
	most := s.Limits.Memory
	if most == 0 {
		return
	}
	s.ShmSize = min(s.ShmSize, most)
	s.Mounts = slices.Clone(s.Mounts)
	for i, m := range s.Mounts {
		if m.Kind == Tmpfs && (m.Size == 0 || m.Size > most) {
			s.Mounts[i].Size = most
		}
	}
}

func (m Mount) validate() error {
	if !filepath.IsAbs(m.Target) {
		return errors.New("target is not absolute")
	}
	switch m.Kind {
	case Bind:
		if !filepath.IsAbs(m.Source) {
			return fmt.Errorf("source %q is not absolute", m.Source)
		}
	case Tmpfs:
		if m.Size < 0 {
			return fmt.Errorf("size %d is negative", m.Size)
		}
	default:
		return fmt.Errorf("unknown kind %d", m.Kind)
	}
	return nil
}
