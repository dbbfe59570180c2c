//go:build ladder

package ladder

import (
	"slices"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// A place is a container as a pod would have it. The zero value is root in a container with containerd's defaults.
type place struct {
	name string
	uid  uint32
	// noNewPrivs is allowPrivilegeEscalation: false.
	noNewPrivs bool
	// capabilities are those of the process, or of its bounding set if it is not root; nil is containerd's default.
	capabilities []string
	// unconfined is seccompProfile: {type: Unconfined}, profiled one of type Localhost with docs/seccomp.json.
	unconfined, profiled bool
	// userNamespace is hostUsers: false.
	userNamespace bool
	// unmasked is procMount: Unmasked.
	unmasked bool
	// fileCaps gives newuidmap and newgidmap file capabilities, setuid the bit that Debian gives them.
	fileCaps, setuid bool
	// readOnly is readOnlyRootFilesystem: true.
	readOnly bool
	// bare has no control groups mounted and no more in /dev than the runtime makes, as no pod has.
	bare bool
	// env replaces HOME, if it is not nil.
	env []string

	// differs names images that are others here, and why that cannot be helped.
	differs map[string]string
	// packages builds the images that take long, too: one place of each rung does.
	packages bool
	// What must come of it. Where nothing fails, the images have the digests that they have everywhere else.
	rung  string // of the doctor's first line
	fails string // what the error and hint of every build have
	// homeFails is the same for a build whose store is where it is if nobody says where.
	homeFails string
	// insecureFails is the same for a RUN --security=insecure.
	insecureFails string
}

// seesProc reports whether a RUN has the container's own /proc there.
func (p place) seesProc() bool { return !p.unmasked && p.rung != "rung 5" }

// containerd's defaults.
var (
	defaultCapabilities = []string{
		"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP",
		"CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
	}
	maskedPaths = []string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
		"/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
	}
	readOnlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// firstID is what root of a pod's user namespace is outside.
const firstID = 1_000_000

// spec is the OCI runtime's configuration of a place. rootfs is the container's root, work a directory that is its volume.
func (p place) spec(rootfs, work string, mounts []specs.Mount, args []string) *specs.Spec {
	have := p.capabilities
	if have == nil {
		have = defaultCapabilities
	}
	capabilities := &specs.LinuxCapabilities{Bounding: have}
	if p.uid == 0 {
		capabilities.Permitted, capabilities.Effective = have, have
	}
	env := p.env
	if env == nil {
		env = []string{"HOME=/volume/home"}
	}
	s := &specs.Spec{
		Version:  specs.Version,
		Hostname: "pod",
		Root:     &specs.Root{Path: rootfs, Readonly: p.readOnly},
		Process: &specs.Process{
			Args:            args,
			Cwd:             "/",
			Env:             append(slices.Clone(env), "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "SOURCE_DATE_EPOCH=1700000000", "CANARY=secret-of-the-builder"),
			User:            specs.User{UID: p.uid, GID: p.uid},
			Capabilities:    capabilities,
			NoNewPrivileges: p.noNewPrivs,
		},
		Mounts: slices.Concat([]specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup2", Source: "cgroup2", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/volume", Type: "bind", Source: work, Options: []string{"rbind", "rw"}},
		}, mounts),
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
				{Type: specs.MountNamespace}, {Type: specs.NetworkNamespace}, {Type: specs.CgroupNamespace},
			},
			Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}},
		},
	}
	if p.bare {
		s.Mounts = slices.DeleteFunc(s.Mounts, func(m specs.Mount) bool {
			return m.Type == "cgroup2" || m.Destination == "/dev/shm" || m.Destination == "/dev/mqueue" || m.Destination == "/dev/pts"
		})
	}
	if !p.unmasked {
		s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = maskedPaths, readOnlyPaths
	}
	if p.userNamespace {
		ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: firstID, Size: 65536}}
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		s.Linux.UIDMappings, s.Linux.GIDMappings = ids, ids
	}
	switch {
	case p.profiled:
		s.Linux.Seccomp = profile()
	case !p.unconfined:
		s.Linux.Seccomp = seccomp.DefaultProfile(s) // looks at the capabilities
	}
	return s
}

// profile is containerd's for a container without capabilities, and what it takes to make a user namespace and to be root of it.
func profile() *specs.LinuxSeccomp {
	p := seccomp.DefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{}}})
	p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{
		Action: specs.ActAllow,
		Names: []string{
			"chroot", "clone", "fsconfig", "fsmount", "fsopen", "keyctl", "mount", "mount_setattr", "move_mount", "open_tree", "pidfd_getfd",
			"pivot_root", "setdomainname", "sethostname", "setns", "umount", "umount2", "unshare",
		},
	})
	return p
}

// everything is what a privileged container has.
var everything = append(slices.Clone(defaultCapabilities),
	"CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_NET_ADMIN", "CAP_SYS_RESOURCE", "CAP_DAC_READ_SEARCH", "CAP_LINUX_IMMUTABLE", "CAP_NET_BROADCAST",
	"CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_PACCT", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_TIME",
	"CAP_SYS_TTY_CONFIG", "CAP_LEASE", "CAP_AUDIT_CONTROL", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM",
	"CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ")

const builder = 1000 // has an entry in passwd and ranges in subuid; others have neither

const (
	noNamespace = "hint: give the container a seccomp profile that allows it"
	noStore     = "hint: choose a directory that you can write to with --root"
)

// hardLinks are the images that write to one of several names that a file has in a lower layer. An overlay makes two files of it
// then, and a copied tree cannot (docs/decisions/chroot.md).
var hardLinks = map[string]string{
	"capabilities": "changes the owner of a file that has a second name since an earlier step",
	"links":        "appends to, and gives away, files that have a second name since an earlier step",
}

var places = []place{
	{
		name: "a: restricted", uid: 12345, noNewPrivs: true, capabilities: []string{},
		rung: "No build can run here", fails: noNamespace,
	},
	{
		name: "a with a Localhost profile", uid: 12345, noNewPrivs: true, capabilities: []string{}, profiled: true, readOnly: true, env: []string{},
		rung: "rung 3", homeFails: noStore,
	},
	{
		name: "b: no_new_privs, seccomp unconfined", uid: 12345, noNewPrivs: true, capabilities: []string{}, unconfined: true, packages: true,
		rung: "rung 3",
	},
	{
		name: "b with a read-only root and no HOME", uid: 12345, noNewPrivs: true, capabilities: []string{}, unconfined: true,
		readOnly: true, env: []string{},
		rung: "rung 3", homeFails: noStore,
	},
	{
		name: "b without control groups", uid: 12345, noNewPrivs: true, capabilities: []string{}, unconfined: true, bare: true,
		rung: "rung 3",
	},
	{
		name: "b' newuidmap is setuid", uid: builder, unconfined: true, setuid: true,
		rung: "rung 3",
	},
	{
		name: "b'' newuidmap has file capabilities", uid: builder, unconfined: true, fileCaps: true, packages: true,
		rung: "rung 2",
	},
	{
		name: "b'' with a Localhost profile", uid: builder, profiled: true, fileCaps: true,
		rung: "rung 2",
	},
	{name: "c: root", rung: "rung 5", insecureFails: "cannot be had in a chroot", differs: hardLinks},
	{
		name: "c2: root, seccomp unconfined, no volume for HOME", unconfined: true, env: []string{"HOME=/root"},
		rung: "rung 1", homeFails: "it lies on an overlay, which cannot hold the layers of another\nhint: choose a directory on a local file system",
	},
	{name: "d: hostUsers false, root", userNamespace: true, rung: "rung 5", insecureFails: "cannot be had in a chroot", differs: hardLinks},
	{name: "d with a Localhost profile", userNamespace: true, profiled: true, rung: "rung 1"},
	{name: "d2: hostUsers false, root, seccomp unconfined", userNamespace: true, unconfined: true, packages: true, rung: "rung 1"},
	{
		name: "e: hostUsers false, root, all capabilities", userNamespace: true, capabilities: everything,
		rung: "rung 1", insecureFails: "refuses pivot_root",
	},
	{name: "f: hostUsers false, privileged", userNamespace: true, capabilities: everything, unconfined: true, unmasked: true, rung: "rung 1"},
}
