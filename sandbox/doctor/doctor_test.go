package doctor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/cooper-build/cooper/sandbox/userns"
)

// laptop is where everything is there.
func laptop() Facts {
	return Facts{
		Kernel:   "6.18.1",
		Map:      userns.Map{Kind: userns.Many, UIDs: []userns.Range{{Inside: 0, Outside: 1000, Count: 1}, {Inside: 1, Outside: 100000, Count: 65536}}},
		Landlock: 7,
		Qemu:     []string{"aarch64"},
		Store:    Store{Dir: "/home/u/.local/share/cooper", FileSystem: "ext4", Free: 50 << 30, FreeFiles: 1 << 20},
	}
}

func TestDiagnosis(t *testing.T) {
	for _, c := range []struct {
		name    string
		change  func(*Facts)
		build   bool
		rung    int
		probe   string
		status  Status
		contain string // in found, costs or fix of the probe
	}{
		{"all is well", func(*Facts) {}, true, 2, "ids", OK, "65537"},
		{"root", func(f *Facts) {
			f.Map = userns.Map{Kind: userns.Nested, UIDs: []userns.Range{{Count: 65536}}}
		}, true, 1, "ids", OK, "65536"},
		{"one id", single, true, 3, "ids", Degraded, "usermod --add-subuids"},
		{"one id in a pod", func(f *Facts) { single(f); f.Container = true }, true, 3, "ids", Degraded, "hostUsers: false"},
		{"few ids", func(f *Facts) { f.Map.UIDs = f.Map.UIDs[:1]; f.Map.UIDs[0].Count = 1000 }, true, 2, "ids", Degraded, "from 1000 on"},
		{"no namespace, by a switch", func(f *Facts) {
			f.Entered = &userns.Error{Problem: "user.max_user_namespaces is 0", Advice: "sysctl user.max_user_namespaces=15000"}
		}, false, 0, "user namespace", Missing, "sysctl user.max_user_namespaces=15000"},
		{"no namespace, by the filter of a pod", func(f *Facts) {
			f.Entered = &userns.Error{Problem: "refused", Err: syscall.EPERM}
			f.Container, f.Filtered = true, true
		}, false, 0, "user namespace", Missing, "seccompProfile: {type: Unconfined}"},
		{"no namespace, for root that needs none", kaniko, true, 5, "user namespace", Degraded, "build only what you trust"},
		{"no listener in a chroot", func(f *Facts) { kaniko(f); f.Notify = syscall.EPERM }, false, 0, "seccomp", Missing, "answers for its devices"},
		{"no namespace, by AppArmor", func(f *Facts) {
			f.Entered = &userns.Error{Problem: "refused", Err: syscall.EACCES}
			f.Container, f.AppArmor = true, "cri-containerd.apparmor.d (enforce)"
		}, false, 0, "user namespace", Missing, "under the AppArmor profile cri-containerd"},
		{"covered proc", func(f *Facts) { f.Proc = syscall.EPERM }, true, 2, "/proc", Degraded, "cannot signal, trace, read or change"},
		{"covered proc in a pod", func(f *Facts) { f.Proc, f.Container = syscall.EPERM, true }, true, 2, "/proc", Degraded, "procMount: Unmasked"},
		{"store on an overlay", func(f *Facts) { f.Store.FileSystem, f.Store.Overlay = "overlay", syscall.EINVAL }, false, 0, "overlay", Missing, "emptyDir"},
		{"store on vfat", func(f *Facts) { f.Store.FileSystem, f.Store.Overlay = "vfat", syscall.EINVAL }, false, 0, "overlay", Missing, "--root"},
		{"no store", func(f *Facts) { f.Store.Err = syscall.EROFS }, false, 0, "store", Missing, "XDG_DATA_HOME"},
		{"no space", func(f *Facts) { f.Store.Free = 1 << 20 }, false, 0, "space", Missing, "larger file system"},
		{"little space", func(f *Facts) { f.Store.Free = 1 << 30 }, true, 2, "space", Degraded, "can fill it"},
		{"no inodes", func(f *Facts) { f.Store.FreeFiles = 5 }, false, 0, "space", Missing, "room for 5 files"},
		{"no listener", func(f *Facts) { f.Notify = syscall.EBUSY }, true, 2, "seccomp", Degraded, "emulated"},
		{"no listener for one id", func(f *Facts) { single(f); f.Notify = syscall.EPERM }, false, 0, "seccomp", Missing, "emulated"},
		{"no network", func(f *Facts) { f.Network = syscall.ENOSPC }, true, 2, "network", Missing, "max_net_namespaces"},
		{"no nftables", func(f *Facts) { f.NetworkNotes = []string{"no packet filter"} }, true, 2, "network", Degraded, "nf_tables"},
		{"no qemu", func(f *Facts) { f.Qemu = nil }, true, 2, "other architectures", Degraded, "apt-get install"},
		{"no binfmt_misc", func(f *Facts) { f.Binfmt = syscall.EPERM }, true, 2, "other architectures", Degraded, "6.7"},
		{"no delegation", func(f *Facts) { f.Cgroup = syscall.EACCES }, true, 2, "control group", Degraded, "systemd-run"},
		{"no Landlock", func(f *Facts) { f.Landlock = 0 }, true, 2, "landlock", Degraded, "lsm="},
		{"old kernel", func(f *Facts) { f.Kernel = "5.10.0-21" }, true, 2, "kernel", Degraded, "newer"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := laptop()
			c.change(&f)
			r := Diagnose(f)
			if r.CanBuild != c.build || r.Rung != c.rung {
				t.Errorf("can build %v on rung %d, want %v on %d", r.CanBuild, r.Rung, c.build, c.rung)
			}
			if r.Why == "" || r.Name == "" {
				t.Errorf("the report does not say why: %+v", r)
			}
			for _, p := range r.Probes {
				if p.Status != OK && (p.Cost == "" || p.Fix == "" && p.Found != "unknown without a store" && p.Found != "could not be tried without a store" && p.Name != "ids") {
					t.Errorf("%s is %s, and nobody learns what that costs or how to change it: %+v", p.Name, p.Status, p)
				}
				if p.Name != c.probe {
					if p.Status != OK && c.build {
						t.Errorf("%s is %s as well: %s", p.Name, p.Status, p.Found)
					}
					continue
				}
				if text := p.Found + p.Cost + p.Fix; p.Status != c.status || !strings.Contains(text, c.contain) {
					t.Errorf("%s is %s: %q; want %s and %q", p.Name, p.Status, text, c.status, c.contain)
				}
			}
		})
	}
}

func kaniko(f *Facts) {
	f.Map = userns.Map{Kind: userns.Chroot, Why: "the filter refuses a new one", UIDs: []userns.Range{{Count: 1<<32 - 1}}}
	f.Container, f.Filtered = true, true
}

func single(f *Facts) {
	f.Map = userns.Map{Kind: userns.Single, Why: "no ranges", UIDs: []userns.Range{{Outside: 1000, Count: 1}}}
}

func TestLookingAtTheStoreLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	s := lookAt(filepath.Join(dir, "a", "b", "store"), false)
	if s.Err != nil || s.Free == 0 || s.FileSystem == "" {
		t.Errorf("found %+v", s)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if s := lookAt(filepath.Join(dir, "file", "store"), false); !errors.Is(s.Err, syscall.ENOTDIR) {
		t.Errorf("a store below a file: %v", s.Err)
	}
}

func TestCoveredProcIsMoreWithoutLandlock(t *testing.T) {
	for version, more := range map[int]bool{0: true, 1: true, 2: false, 7: false} {
		if cost := proc(Facts{Proc: syscall.EPERM, Landlock: version}).Cost; strings.Contains(cost, "what another RUN does") != more {
			t.Errorf("with Landlock %d: %s", version, cost)
		}
	}
}
