package userns

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/chroot"
)

// facts is everything decide needs to know about the machine and the caller.
type facts struct {
	UID, GID uint32
	User     string // login name, empty when the machine knows none

	MaxNamespaces    int    // /proc/sys/user/max_user_namespaces, -1 when unreadable
	CloneForbidden   bool   // Debian's kernel.unprivileged_userns_clone is 0
	AppArmorRestrict bool   // kernel.apparmor_restrict_unprivileged_userns is 1
	Confined         bool   // an AppArmor profile applies to us, and it may allow user namespaces
	NoNewPrivs       bool   // setuid programs gain nothing
	Filtered         bool   // a seccomp filter applies to us, as it does in containers
	Refused          bool   // that filter refuses to make a user namespace
	CanMount         bool   // we may mount without being root of a user namespace of ours
	NoChroot         string // why no command can run in a chroot, or empty

	SubUIDs, SubGIDs     []Range // Outside and Count only
	Newuidmap, Newgidmap helper
	OuterUIDs, OuterGIDs []Range // the map of the namespace we start in
}

// helper is what was found of newuidmap or newgidmap.
type helper struct {
	Path       string // empty when there is none
	Privileged bool   // setuid root or with file capabilities, on a mount that honours them
}

// helperDirs are searched instead of PATH: a program that is trusted to write
// our id map is not to be picked from a directory the caller's shell names.
var helperDirs = [...]string{"/usr/bin", "/bin", "/usr/sbin", "/usr/local/bin", "/run/wrappers/bin"}

func gather() (facts, error) {
	f := facts{
		UID:              uint32(os.Geteuid()),
		GID:              uint32(os.Getegid()),
		MaxNamespaces:    sysctl("user/max_user_namespaces"),
		CloneForbidden:   sysctl("kernel/unprivileged_userns_clone") == 0,
		AppArmorRestrict: sysctl("kernel/apparmor_restrict_unprivileged_userns") == 1,
		Confined:         confined(),
		Newuidmap:        findHelper("newuidmap"),
		Newgidmap:        findHelper("newgidmap"),
	}
	set, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	f.NoNewPrivs = err == nil && set == 1
	mode, err := unix.PrctlRetInt(unix.PR_GET_SECCOMP, 0, 0, 0, 0)
	f.Filtered = err == nil && mode == unix.SECCOMP_MODE_FILTER
	// The kernel knows no such flag, and says so before it looks at anything else. A filter does not get that far.
	f.Refused = errors.Is(unix.Unshare(unix.CLONE_NEWUSER|1), unix.EPERM)
	f.CanMount = chroot.Capable(unix.CAP_SYS_ADMIN)
	f.NoChroot = chroot.Impossible()
	if u, err := user.LookupId(strconv.Itoa(int(f.UID))); err == nil {
		f.User = u.Username
	}
	if f.SubUIDs, err = readSubordinate("/etc/subuid", f.User, f.UID); err != nil {
		return facts{}, err
	}
	// gids too are granted to a user, by its name or uid
	if f.SubGIDs, err = readSubordinate("/etc/subgid", f.User, f.UID); err != nil {
		return facts{}, err
	}
	if f.OuterUIDs, err = readMap("/proc/self/uid_map"); err != nil {
		return facts{}, err
	}
	if f.OuterGIDs, err = readMap("/proc/self/gid_map"); err != nil {
		return facts{}, err
	}
	return f, nil
}

func sysctl(name string) int {
	b, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return -1
	}
	n, err := strconv.Atoi(string(bytes.TrimSpace(b)))
	if err != nil {
		return -1
	}
	return n
}

func confined() bool {
	b, err := os.ReadFile("/proc/self/attr/current")
	label := strings.TrimRight(string(b), "\n\x00")
	return err == nil && label != "" && label != "unconfined"
}

func findHelper(name string) helper {
	for _, dir := range helperDirs {
		path := dir + "/" + name
		var st unix.Stat_t
		if unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		return helper{Path: path, Privileged: privileged(path, st)}
	}
	return helper{}
}

func privileged(path string, st unix.Stat_t) bool {
	var fsStat unix.Statfs_t
	if unix.Statfs(path, &fsStat) != nil || fsStat.Flags&unix.ST_NOSUID != 0 {
		return false
	}
	if st.Mode&unix.S_ISUID != 0 && st.Uid == 0 {
		return true
	}
	size, err := unix.Getxattr(path, "security.capability", nil)
	return err == nil && size > 0
}

func readMap(path string) ([]Range, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read id map: %w", err)
	}
	return parseMap(string(b))
}

func readSubordinate(path, name string, id uint32) ([]Range, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read subordinate ids: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 16<<20))
	if err != nil {
		return nil, fmt.Errorf("read subordinate ids: %w", err)
	}
	return parseSubordinate(string(b), name, id), nil
}

// parseSubordinate returns the ranges of /etc/subuid that belong to the user,
// in the order of the file. Lines that newuidmap would not understand are no
// concern of ours.
func parseSubordinate(text, name string, id uint32) []Range {
	var ranges []Range
	for line := range strings.Lines(text) {
		owner, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		if owner == "" || (owner != name && owner != strconv.Itoa(int(id))) {
			continue
		}
		first, count, _ := strings.Cut(rest, ":")
		start, err1 := strconv.ParseUint(first, 10, 32)
		n, err2 := strconv.ParseUint(count, 10, 32)
		if err1 != nil || err2 != nil || n == 0 || start+n > 1<<32-1 {
			continue
		}
		ranges = append(ranges, Range{Outside: uint32(start), Count: uint32(n)})
	}
	return ranges
}
