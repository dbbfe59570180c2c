package userns

import "fmt"

// needed is how many ids a map must have to hold any image: 0 to 65535.
const needed = 65536

// maxRanges is the kernel's limit for one id map (since Linux 4.15).
const maxRanges = 340

// decide picks the best map that the facts allow.
func decide(f facts, o Options) (Map, error) {
	refused := possible(f)
	switch {
	case o.Only == Chroot && f.NoChroot != "":
		return Map{}, unavailable(o.Only, f.NoChroot, "leave the choice to cooper, which takes the best that can be had; cooper doctor explains it")
	case o.Only == Chroot:
		return Map{Kind: Chroot, UIDs: f.OuterUIDs, GIDs: f.OuterGIDs, Why: "a chroot was asked for"}, nil
	case refused != nil && o.Only == 0 && f.NoChroot == "" && !f.CanMount:
		return Map{Kind: Chroot, UIDs: f.OuterUIDs, GIDs: f.OuterGIDs, Why: refused.Problem}, nil
	case refused != nil:
		return Map{}, refused
	case o.Only == Single:
		return single(f, "a single id was asked for"), nil
	case o.Only == Nested && f.UID != 0:
		return Map{}, unavailable(o.Only, "you are not root", "leave the choice to cooper: it needs no root")
	case f.UID == 0 && o.Only != Many:
		return Map{Kind: Nested, UIDs: identity(f.OuterUIDs), GIDs: identity(f.OuterGIDs)}, nil
	}
	why := whySingle(f)
	if why != "" && o.Only == Many {
		return Map{}, unavailable(o.Only, why, "leave the choice to cooper, which then builds with a single id")
	}
	if why != "" {
		return single(f, why), nil
	}
	return Map{Kind: Many, UIDs: many(f.UID, f.SubUIDs), GIDs: many(f.GID, f.SubGIDs)}, nil
}

// unavailable says why the one kind that was asked for cannot be had.
func unavailable(k Kind, why, advice string) error {
	return &Error{What: "the sandbox " + k.Name() + " cannot be had", Problem: why, Advice: advice}
}

// possible returns nil if this caller can have a user namespace at all.
func possible(f facts) *Error {
	switch {
	case f.Refused:
		return &Error{Problem: "the seccomp filter of this container refuses a new one", Advice: filterAdvice}
	case f.MaxNamespaces == 0:
		return &Error{
			Problem: "user namespaces are switched off on this machine (user.max_user_namespaces is 0)",
			Advice:  "ask the administrator to run: sysctl user.max_user_namespaces=15000",
		}
	case f.UID != 0 && f.CloneForbidden:
		return &Error{
			Problem: "user namespaces are reserved for root on this machine (kernel.unprivileged_userns_clone is 0)",
			Advice:  "ask the administrator to run: sysctl kernel.unprivileged_userns_clone=1",
		}
	case f.UID != 0 && f.AppArmorRestrict && !f.Confined:
		return &Error{
			Problem: "AppArmor takes the privileges of user namespaces from programs without a profile (kernel.apparmor_restrict_unprivileged_userns is 1)",
			Advice:  "ask the administrator for an AppArmor profile with the rule 'userns,' for this program, or to run: sysctl kernel.apparmor_restrict_unprivileged_userns=0",
		}
	}
	return nil
}

// whySingle returns why Many is impossible, with the next step, or "".
func whySingle(f facts) string {
	who := f.User
	if who == "" {
		who = fmt.Sprint(f.UID)
	}
	for _, s := range []struct {
		file   string
		ranges []Range
	}{{"/etc/subuid", f.SubUIDs}, {"/etc/subgid", f.SubGIDs}} {
		const advice = "an administrator can add them with: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 %s"
		n := total(s.ranges)
		if n == 0 {
			return fmt.Sprintf("%s has no range for %s; "+advice, s.file, who, who)
		}
		if n+1 < needed {
			return fmt.Sprintf("%s has only %d ids for %s and an image can use %d; "+advice, s.file, n, who, needed, who)
		}
	}
	for _, h := range []struct {
		name string
		helper
	}{{"newuidmap", f.Newuidmap}, {"newgidmap", f.Newgidmap}} {
		if h.Path == "" {
			return h.name + " is not installed; it is in the package uidmap (Debian, Ubuntu) or shadow-utils (Fedora)"
		}
		if !h.Privileged {
			return fmt.Sprintf("%s is neither setuid root nor has file capabilities that count; an administrator can reinstall its package or run: chmod u+s %s", h.Path, h.Path)
		}
	}
	if f.NoNewPrivs {
		return "no_new_privs is set on this process, so newuidmap gains no privilege; in Kubernetes that is allowPrivilegeEscalation: false, and hostUsers: false gives many ids without it"
	}
	return ""
}

func single(f facts, why string) Map {
	return Map{
		Kind: Single,
		UIDs: []Range{{Inside: 0, Outside: f.UID, Count: 1}},
		GIDs: []Range{{Inside: 0, Outside: f.GID, Count: 1}},
		Why:  why,
	}
}

// many puts the caller at 0 and the subordinate ranges after it, without gaps.
func many(self uint32, subordinate []Range) []Range {
	ranges := []Range{{Inside: 0, Outside: self, Count: 1}}
	next := uint64(1)
	for _, s := range subordinate[:min(len(subordinate), maxRanges-1)] {
		if next+uint64(s.Count) > 1<<32-1 {
			break
		}
		ranges = append(ranges, Range{Inside: uint32(next), Outside: s.Outside, Count: s.Count})
		next += uint64(s.Count)
	}
	return ranges
}

// identity maps each range of the outer namespace to itself. Neighbours stay
// apart: the kernel wants every range inside one range of the parent.
//
// One id is left out when the range holds all there are: programs take a full map for the sign of *no* user namespace and then try
// what only the machine's root may do.
func identity(outer []Range) []Range {
	const all = 1<<32 - 1
	ranges := make([]Range, len(outer))
	for i, r := range outer {
		ranges[i] = Range{Inside: r.Inside, Outside: r.Inside, Count: min(r.Count, all-1)}
	}
	return ranges
}

func total(ranges []Range) uint64 {
	var n uint64
	for _, r := range ranges {
		n += uint64(r.Count)
	}
	return n
}
