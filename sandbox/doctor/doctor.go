// Package doctor finds out what the machine lets a rootless builder do, and what would let it do more.
//
// Examine tries each thing for real, as root of a user namespace (package userns), and leaves nothing behind. Diagnose judges what
// was found and touches nothing: whether a build can run, on which rung of docs/sandbox.md, and for each thing that is missing
// what that costs and the command or pod field that brings it. What a build is, doctor does not know: it has a directory to keep a
// store in, and that is all.
package doctor

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/cooper-build/cooper/sandbox/userns"
)

// Status says how much of a thing there is.
type Status string

// A build cannot run where something Vital is Missing.
const (
	OK       Status = "ok"
	Degraded Status = "degraded" // there is a substitute, which costs something
	Missing  Status = "missing"
)

// A Probe is one thing that was looked for.
type Probe struct {
	Name   string `json:"name"`
	Status Status `json:"status"`
	Vital  bool   `json:"vital"`           // nothing can be built without
	Found  string `json:"found"`           // what was found
	Cost   string `json:"costs,omitempty"` // what one has to do without, unless Status is OK
	Fix    string `json:"fix,omitempty"`   // a command, or a part of a pod, that changes it
}

// A Report is the whole finding.
type Report struct {
	CanBuild bool    `json:"canBuild"`
	Rung     int     `json:"rung"` // of docs/sandbox.md; 0 if none
	Name     string  `json:"name"`
	Why      string  `json:"why"`
	Probes   []Probe `json:"probes"`
}

// Facts are what Diagnose judges. An error says why something is not there; nil that it was tried and works.
type Facts struct {
	Kernel    string // its release
	Container bool   // we are in a container, so fixes are fields of a pod
	Filtered  bool   // a seccomp filter applies to us
	AppArmor  string // the profile that applies to us, or empty

	Entered error      // a user namespace; the facts below, except the store's, count only if it is nil
	Map     userns.Map // of that namespace

	Proc         error // a fresh /proc
	Notify       error // a seccomp filter that asks a supervisor
	Network      error // a network namespace with a packet filter
	NetworkNotes []string
	Landlock     int   // version, 0 if there is none
	Binfmt       error // a binfmt_misc of the namespace
	Qemu         []string
	Cgroup       error // a delegated control group

	Store Store
}

// Store is what was found where the store is to be.
type Store struct {
	Dir        string
	FileSystem string // its type
	Err        error  // it cannot be written to
	Overlay    error  // an overlay with its upper directory there
	Free       uint64 // bytes
	FreeFiles  uint64 // inodes; 0 if the file system does not count them
}

// Diagnose judges the facts.
func Diagnose(f Facts) Report {
	probes := []Probe{kernel(f), namespaces(f)}
	inChroot := f.Map.Kind == userns.Chroot
	if f.Entered == nil {
		probes = append(probes, idMap(f))
	}
	if f.Entered == nil && !inChroot {
		probes = append(probes, overlay(f))
	}
	probes = append(probes, place(f), space(f))
	switch {
	case inChroot:
		probes = append(probes, notify(f), landlock(f))
	case f.Entered == nil:
		probes = append(probes, proc(f), notify(f), network(f), foreign(f), cgroups(f), landlock(f))
	}
	r := Report{CanBuild: true, Probes: probes}
	for _, p := range probes {
		if p.Vital && p.Status == Missing {
			r.CanBuild = false
			r.Why = p.Name + ": " + p.Found
			r.Name = "none"
			return r
		}
	}
	r.Rung, r.Name, r.Why = rung(f)
	return r
}

// rung says which of docs/sandbox.md this is.
func rung(f Facts) (number int, name, why string) {
	switch f.Map.Kind {
	case userns.Nested:
		number, name, why = 1, "root of a namespace", fmt.Sprintf("started as root, so the %d ids that exist here exist in a RUN", count(f.Map))
	case userns.Chroot:
		return 5, "a chroot without namespaces", f.Map.Why
	case userns.Many:
		number, name, why = 2, "subordinate ids", fmt.Sprintf("newuidmap gives %d ids to user %d", count(f.Map), f.Map.UIDs[0].Outside)
	default:
		number, name, why = 3, "a single id", f.Map.Why
	}
	if f.Proc != nil {
		name += ", under a covered /proc (rung 4)"
	}
	return number, name, why
}

func count(m userns.Map) uint64 {
	var n uint64
	for _, r := range m.UIDs {
		n += uint64(r.Count)
	}
	return n
}

func kernel(f Facts) Probe {
	p := Probe{Name: "kernel", Status: OK, Found: f.Kernel}
	if older(f.Kernel, 5, 12) {
		p.Status, p.Cost = Degraded, "Linux 5.12 is the oldest that has all that is used here"
		p.Fix = "boot a newer kernel"
	}
	return p
}

// older reports whether a release like 6.18.44-x is from before major.minor. An unreadable one is not.
func older(release string, major, minor int) bool {
	var a, b int
	if n, _ := fmt.Sscanf(release, "%d.%d", &a, &b); n != 2 {
		return false
	}
	return a < major || a == major && b < minor
}

const (
	unconfined = "in the container's securityContext:\n  seccompProfile: {type: Unconfined}    # or type: Localhost, with cooper's docs/seccomp.json on the node\n  appArmorProfile: {type: Unconfined}   # where the node has AppArmor"
	manyInPod  = "in the pod: hostUsers: false, and in the container's securityContext: {runAsUser: 0};\nor an image whose newuidmap and newgidmap have file capabilities (setcap cap_setuid=ep, cap_setgid=ep), with allowPrivilegeEscalation: true"
	volume     = "give the container a volume that is no part of its image, and keep the store there:\n  volumes: [{name: cooper, emptyDir: {}}]\n  volumeMounts: [{name: cooper, mountPath: /var/lib/cooper}]\n  cooper build --root /var/lib/cooper ..."
)

func namespaces(f Facts) Probe {
	p := Probe{Name: "user namespace", Vital: true, Status: OK, Found: "can be entered"}
	switch {
	case f.Entered == nil && f.Map.Kind == userns.Chroot:
		p.Status, p.Found = Degraded, f.Map.Why
		p.Cost = "a RUN has the network of the machine or container, and what else docs/sandbox.md has under rung 5; build only what you trust"
		if f.Container {
			p.Fix = unconfined
		}
		return p
	case f.Entered == nil:
		return p
	}
	p.Status, p.Found, p.Cost = Missing, problem(f.Entered), "nothing can be built"
	p.Fix = hint(f.Entered)
	if f.AppArmor != "" {
		p.Found += ", under the AppArmor profile " + f.AppArmor
	}
	if f.Container && (f.Filtered || f.AppArmor != "") {
		p.Fix = unconfined
	}
	return p
}

func problem(err error) string {
	var e *userns.Error
	if errors.As(err, &e) {
		if e.Err != nil {
			return e.Problem + ": " + e.Err.Error()
		}
		return e.Problem
	}
	return err.Error()
}

func hint(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}

func idMap(f Facts) Probe {
	p := Probe{Name: "ids", Status: OK, Found: fmt.Sprintf("%d", count(f.Map))}
	if f.Map.Kind != userns.Single {
		if n := count(f.Map); n < 65535 {
			p.Status, p.Cost = Degraded, "images with users or files of ids from "+fmt.Sprint(n)+" on cannot be built"
		}
		return p
	}
	p.Status, p.Found = Degraded, "one: "+f.Map.Why
	p.Cost = "the other ids are emulated: builds are slower, and the users of a RUN are not protected from each other"
	if f.Container {
		p.Fix = manyInPod
	} else {
		p.Fix = "usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER, and the package uidmap (Debian, Ubuntu) or shadow-utils (Fedora)"
	}
	return p
}

func overlay(f Facts) Probe {
	p := Probe{Name: "overlay", Vital: true, Status: OK, Found: "with userxattr, on the store's file system"}
	if f.Store.Err != nil {
		p.Status, p.Found = Degraded, "could not be tried without a store"
		p.Cost = "unknown"
		return p
	}
	if f.Store.Overlay == nil {
		return p
	}
	p.Status, p.Found, p.Cost = Missing, f.Store.Overlay.Error(), "nothing can be built in this store"
	switch {
	case f.Store.FileSystem == "overlay":
		p.Found = "the store lies on an overlay, which cannot hold the layers of another"
		fallthrough
	case f.Container:
		p.Fix = volume
	default:
		p.Fix = "name a directory on ext4, xfs, btrfs or tmpfs with --root"
	}
	return p
}

func place(f Facts) Probe {
	p := Probe{Name: "store", Vital: true, Status: OK, Found: f.Store.Dir + " on " + f.Store.FileSystem}
	if f.Store.Err == nil {
		return p
	}
	p.Status, p.Found, p.Cost = Missing, f.Store.Err.Error(), "nothing can be built"
	p.Fix = "name a directory that you can write to with --root, or set XDG_DATA_HOME"
	if f.Container {
		p.Fix = volume
	}
	return p
}

const (
	leastFree  = 100 << 20
	enoughFree = 5 << 30
	leastFiles = 10_000
)

func space(f Facts) Probe {
	p := Probe{Name: "space", Vital: true, Status: OK, Found: fmt.Sprintf("%.1f GiB free", float64(f.Store.Free)/(1<<30))}
	if f.Store.Err != nil {
		p.Status, p.Found, p.Cost = Degraded, "unknown without a store", "unknown"
		return p
	}
	few := f.Store.FreeFiles != 0 && f.Store.FreeFiles < leastFiles
	if few {
		p.Found += fmt.Sprintf(", and room for %d files", f.Store.FreeFiles)
	}
	switch {
	case f.Store.Free < leastFree || few:
		p.Status, p.Cost = Missing, "nothing but the smallest image can be built"
	case f.Store.Free < enoughFree:
		p.Status, p.Cost = Degraded, "a large image can fill it"
	default:
		return p
	}
	p.Fix = "name a directory on a larger file system with --root"
	if f.Container {
		p.Fix = "raise the volume's size or sizeLimit, and the limit of ephemeral-storage"
	}
	return p
}

func proc(f Facts) Probe {
	p := Probe{Name: "/proc", Status: OK, Found: "a RUN gets its own"}
	if f.Proc == nil {
		return p
	}
	p.Status = Degraded
	p.Found = "a fresh one is refused (" + f.Proc.Error() + "), because parts of the one here are covered"
	p.Cost = "a RUN sees which processes run beside it, and their arguments; it cannot signal, trace, read or change them, and its own /proc is read-only"
	if f.Landlock < 2 {
		p.Cost = "a RUN sees which processes run beside it, and their arguments; it cannot signal or trace them, nor read or change the builder, but without Landlock (Linux 5.19) what another RUN does at the same time it can; its own /proc is read-only"
	}
	p.Fix = "uncover what is mounted below /proc (/proc/self/mountinfo names it)"
	if f.Container {
		p.Fix = "in the pod: hostUsers: false, and in the container's securityContext: {procMount: Unmasked}"
	}
	return p
}

func notify(f Facts) Probe {
	p := Probe{Name: "seccomp", Status: OK, Found: "filters, also such that ask a supervisor"}
	if f.Notify == nil {
		return p
	}
	p.Status, p.Found = Degraded, f.Notify.Error()
	p.Cost = "no RUN with a single id, for which the others have to be emulated"
	if f.Map.Kind == userns.Chroot {
		p.Cost = "no RUN, as nothing answers for its devices"
	}
	p.Vital = f.Map.Kind == userns.Single || f.Map.Kind == userns.Chroot
	if p.Vital {
		p.Status = Missing
	}
	p.Fix = "boot a kernel from 5.9 on with CONFIG_SECCOMP_FILTER"
	if f.Container && f.Filtered {
		p.Fix = unconfined
	}
	return p
}

func network(f Facts) Probe {
	p := Probe{Name: "network", Status: OK, Found: "a RUN gets its own, and what leaves it is told"}
	switch {
	case f.Network != nil:
		p.Status, p.Found = Missing, f.Network.Error()
		p.Cost = "a RUN has the network of the machine (--network host --allow network.host) or none (--network none)"
		p.Fix = hint(f.Network)
		if p.Fix == "" {
			p.Fix = "sysctl user.max_net_namespaces=15000"
		}
	case len(f.NetworkNotes) > 0:
		p.Status, p.Found = Degraded, strings.Join(f.NetworkNotes, "; ")
		p.Cost = "as it says"
		p.Fix = "modprobe -a nf_tables nft_redir nfnetlink_log nft_log"
	}
	return p
}

func foreign(f Facts) Probe {
	p := Probe{Name: "other architectures", Status: OK, Found: fmt.Sprintf("a binfmt_misc of the build's own, %d of qemu's programs", len(f.Qemu))}
	switch {
	case f.Binfmt != nil:
		p.Status, p.Found = Degraded, "no binfmt_misc of the build's own: "+f.Binfmt.Error()
		p.Cost = "a RUN for another architecture needs qemu registered on the machine, with the flag F"
		p.Fix = "boot a kernel from 6.7 on with binfmt_misc (modprobe binfmt_misc), or as root: apt-get install qemu-user-binfmt"
	case len(f.Qemu) == 0:
		p.Status, p.Found = Degraded, "a binfmt_misc of the build's own, but no qemu on the PATH"
		p.Cost = "no RUN for another architecture"
		p.Fix = "apt-get install qemu-user-static"
		if f.Container {
			p.Fix += ", in the image of the container"
		}
	}
	return p
}

func cgroups(f Facts) Probe {
	p := Probe{Name: "control group", Status: OK, Found: "delegated"}
	if f.Cgroup == nil {
		return p
	}
	p.Status, p.Found = Degraded, f.Cgroup.Error()
	p.Cost = "no limits of memory and processes for a RUN alone; those of the builder hold for all"
	p.Fix = "systemd-run --user --scope -p Delegate=yes cooper build ..."
	if f.Container {
		p.Fix = "set resources.limits of the container, which hold for the builder with all its RUNs"
	}
	return p
}

func landlock(f Facts) Probe {
	p := Probe{Name: "landlock", Status: OK, Found: fmt.Sprintf("version %d", f.Landlock)}
	if f.Landlock == 0 {
		p.Status, p.Found = Degraded, "not in this kernel, or switched off"
		p.Cost = "nothing where namespaces can be made; without them nothing can be built"
		p.Fix = "boot with CONFIG_SECURITY_LANDLOCK and landlock in the kernel parameter lsm="
	}
	return p
}

// Text is the report for people.
func (r Report) Text() string {
	var b strings.Builder
	if r.CanBuild {
		fmt.Fprintf(&b, "A build can run here: rung %d, %s.\n  %s\n\n", r.Rung, r.Name, r.Why)
	} else {
		fmt.Fprintf(&b, "No build can run here.\n  %s\n\n", r.Why)
	}
	for _, p := range r.Probes {
		fmt.Fprintf(&b, "%-9s %-20s %s\n", p.Status, p.Name, p.Found)
		for _, part := range []struct{ label, text string }{{"costs", p.Cost}, {"fix", p.Fix}} {
			if part.text != "" {
				fmt.Fprintf(&b, "%-9s %-20s %s: %s\n", "", "", part.label, strings.ReplaceAll(part.text, "\n", "\n"+strings.Repeat(" ", 31)))
			}
		}
	}
	return b.String()
}

// JSON is the report for programs.
func (r Report) JSON() ([]byte, error) { return json.MarshalIndent(r, "", "  ") }
