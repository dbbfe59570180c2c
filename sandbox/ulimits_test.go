package sandbox

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestUlimits(t *testing.T) {
	noCore := rlimit{resource: unix.RLIMIT_CORE}
	nofile := func(soft, hard uint64) rlimit {
		return rlimit{resource: unix.RLIMIT_NOFILE, soft: soft, hard: hard}
	}
	for _, c := range []struct {
		name        string
		asked       []Ulimit
		hard        uint64
		want        []rlimit
		fails, hint string
	}{
		{"none", nil, 10, []rlimit{noCore}, "", ""},
		{"below", []Ulimit{{"nofile", 5, 9}}, 10, []rlimit{noCore, nofile(5, 9)}, "", ""},
		{"equal", []Ulimit{{"nofile", 10, 10}}, 10, []rlimit{noCore, nofile(10, 10)}, "", ""},
		{"the last one wins", []Ulimit{{"nofile", 5, 5}, {"nofile", 7, 7}}, 10, []rlimit{noCore, nofile(7, 7)}, "", ""},
		{"core on request", []Ulimit{{"core", 1, 2}}, 10, []rlimit{{resource: unix.RLIMIT_CORE, soft: 1, hard: 2}}, "", ""},
		{"unlimited", []Ulimit{{"nofile", -1, -1}}, unix.RLIM_INFINITY, []rlimit{noCore, nofile(unix.RLIM_INFINITY, unix.RLIM_INFINITY)}, "", ""},
		{"above", []Ulimit{{"nofile", 5, 11}}, 10, nil, "nofile=11 is above the hard limit of this user, 10", "nofile=10 or less"},
		{"unlimited above", []Ulimit{{"nofile", 5, -1}}, 10, nil, "nofile=unlimited is above", "nofile=10 or less"},
		{"soft above hard", []Ulimit{{"nofile", 6, 5}}, 10, nil, "soft limit above", ""},
		{"soft unlimited", []Ulimit{{"nofile", -1, 5}}, 10, nil, "soft limit above", ""},
		{"negative", []Ulimit{{"nofile", -2, 5}}, 10, nil, "negative", ""},
		{"unknown", []Ulimit{{"as", 1, 1}}, 10, nil, `"as" is not a limit`, "memlock"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ulimits(c.asked, func(int) (uint64, error) { return c.hard, nil })
			if c.fails == "" {
				if err != nil {
					t.Fatal(err)
				}
				byType := cmp.Transformer("byType", func(l []rlimit) map[int]rlimit {
					m := map[int]rlimit{}
					for _, r := range l {
						m[r.resource] = r
					}
					return m
				})
				if diff := cmp.Diff(c.want, got, byType, cmp.AllowUnexported(rlimit{})); diff != "" {
					t.Errorf("limits (-want +got):\n%s", diff)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.fails) {
				t.Fatalf("error is %v, want it to say %q", err, c.fails)
			}
			var hint *hinted
			if c.hint != "" && (!errors.As(err, &hint) || !strings.Contains(hint.Hint(), c.hint)) {
				t.Errorf("error %v has no hint that says %q", err, c.hint)
			}
		})
	}
}

func TestCgroupParentIsDecided(t *testing.T) {
	const session = "/user.slice/user-1000.slice/user@1000.service"
	delegated := cgroupFacts{Unified: true, Own: session + "/app.slice/run-1.scope", Delegated: session}
	root := cgroupFacts{Unified: true, Own: "/", Delegated: "/"}
	for _, c := range []struct {
		name, parent string
		facts        cgroupFacts
		want         string
		fails, hint  string
	}{
		{"a name", "build.slice", delegated, session + "/build.slice", "", ""},
		{"a path below", session + "/a/b", delegated, session + "/a/b", "", ""},
		{"what is delegated itself", session + "/", delegated, session, "", ""},
		{"dots stay inside", "../../x", delegated, session + "/x", "", ""},
		{"anywhere for root", "/build", root, "/build", "", ""},
		{"a name for root", "build", root, "/build", "", ""},
		{"outside", "/system.slice", delegated, "", "not below " + session, "without a leading slash"},
		{"outside by dots", session + "/../x", delegated, "", "not below", "below"},
		{"sibling with the same beginning", session + "x", delegated, "", "not below", "below"},
		{"nothing delegated", "x", cgroupFacts{Unified: true, Own: "/user.slice/session-1.scope"}, "", "session-1.scope, is not delegated", "systemd-run --user --scope"},
		{"version 1", "x", cgroupFacts{}, "", "version 1", "unified_cgroup_hierarchy"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := decideCgroup(c.facts, c.parent)
			if got != c.want {
				t.Errorf("group is %q, %v; want %q", got, err, c.want)
			}
			if c.fails == "" {
				return
			}
			var hint *hinted
			if err == nil || !strings.Contains(err.Error(), c.fails) || !errors.As(err, &hint) || !strings.Contains(hint.Hint(), c.hint) {
				t.Errorf("error is %v with hint %v, want %q and %q", err, hint, c.fails, c.hint)
			}
		})
	}
}
