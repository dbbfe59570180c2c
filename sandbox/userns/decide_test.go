package userns

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func good() helper { return helper{Path: "/usr/bin/newuidmap", Privileged: true} }

func laptop() facts {
	return facts{
		UID: 1000, GID: 100, User: "ann", MaxNamespaces: 1000,
		SubUIDs:   []Range{{Outside: 100000, Count: 65536}},
		SubGIDs:   []Range{{Outside: 200000, Count: 65536}},
		Newuidmap: good(), Newgidmap: good(), NoChroot: "only root can",
		OuterUIDs: []Range{{0, 0, 4294967295}}, OuterGIDs: []Range{{0, 0, 4294967295}},
	}
}

// kaniko makes the facts those of root in a container with the runtime's default filter and capabilities.
func kaniko(f *facts) {
	f.UID, f.GID, f.User, f.Refused, f.Filtered, f.NoChroot = 0, 0, "root", true, true, ""
}

func TestDecideTakesTheBestMapTheFactsAllow(t *testing.T) {
	noNamespace := Map{Kind: Chroot, UIDs: []Range{{0, 0, 4294967295}}, GIDs: []Range{{0, 0, 4294967295}}}
	alone := Map{Kind: Single, UIDs: []Range{{0, 1000, 1}}, GIDs: []Range{{0, 100, 1}}}
	for _, c := range []struct {
		name    string
		change  func(*facts)
		options Options
		want    Map
		why     string // part of Why
	}{
		{
			name: "subordinate ids", change: func(*facts) {},
			want: Map{Kind: Many, UIDs: []Range{{0, 1000, 1}, {1, 100000, 65536}}, GIDs: []Range{{0, 100, 1}, {1, 200000, 65536}}},
		},
		{
			name:   "two ranges follow each other",
			change: func(f *facts) { f.SubUIDs = append(f.SubUIDs, Range{Outside: 300000, Count: 10}) },
			want:   Map{Kind: Many, UIDs: []Range{{0, 1000, 1}, {1, 100000, 65536}, {65537, 300000, 10}}, GIDs: []Range{{0, 100, 1}, {1, 200000, 65536}}},
		},
		{
			name:   "two small ranges are together enough",
			change: func(f *facts) { f.SubUIDs = []Range{{Outside: 5, Count: 35535}, {Outside: 50005, Count: 30000}} },
			want:   Map{Kind: Many, UIDs: []Range{{0, 1000, 1}, {1, 5, 35535}, {35536, 50005, 30000}}, GIDs: []Range{{0, 100, 1}, {1, 200000, 65536}}},
		},
		{
			name: "host root", change: func(f *facts) { f.UID, f.GID, f.User = 0, 0, "root" },
			want: Map{Kind: Nested, UIDs: []Range{{0, 0, 4294967294}}, GIDs: []Range{{0, 0, 4294967294}}},
		},
		{
			name: "root of an outer namespace",
			change: func(f *facts) {
				f.UID, f.GID = 0, 0
				f.OuterUIDs = []Range{{0, 1000, 1}, {1, 100000, 65536}}
				f.OuterGIDs = []Range{{0, 1000, 1}, {1, 100000, 65536}}
			},
			want: Map{Kind: Nested, UIDs: []Range{{0, 0, 1}, {1, 1, 65536}}, GIDs: []Range{{0, 0, 1}, {1, 1, 65536}}},
		},
		{
			name:   "root does not care about what is forbidden to others",
			change: func(f *facts) { f.UID, f.CloneForbidden, f.AppArmorRestrict, f.NoNewPrivs = 0, true, true, true },
			want:   Map{Kind: Nested, UIDs: []Range{{0, 0, 4294967294}}, GIDs: []Range{{0, 0, 4294967294}}},
		},
		{name: "asked for", change: func(*facts) {}, options: Options{Only: Single}, want: alone, why: "asked for"},
		{
			name: "subordinate ids for root, asked for", change: func(f *facts) { f.UID, f.GID = 0, 0 }, options: Options{Only: Many},
			want: Map{Kind: Many, UIDs: []Range{{0, 0, 1}, {1, 100000, 65536}}, GIDs: []Range{{0, 0, 1}, {1, 200000, 65536}}},
		},
		{name: "root of a container whose filter refuses", change: kaniko, want: noNamespace, why: "seccomp filter of this container"},
		{name: "a chroot, asked for", change: func(f *facts) { kaniko(f); f.Refused, f.CanMount = false, true }, options: Options{Only: Chroot}, want: noNamespace, why: "asked for"},
		{name: "no subuid", change: func(f *facts) { f.SubUIDs = nil }, want: alone, why: "/etc/subuid has no range for ann"},
		{name: "no subgid", change: func(f *facts) { f.SubGIDs = nil }, want: alone, why: "/etc/subgid has no range for ann"},
		{name: "nameless user", change: func(f *facts) { f.User, f.SubUIDs = "", nil }, want: alone, why: "no range for 1000"},
		{name: "too few", change: func(f *facts) { f.SubUIDs[0].Count = 1000 }, want: alone, why: "only 1000 ids"},
		{name: "no newuidmap", change: func(f *facts) { f.Newuidmap = helper{} }, want: alone, why: "newuidmap is not installed"},
		{name: "no newgidmap", change: func(f *facts) { f.Newgidmap = helper{} }, want: alone, why: "newgidmap is not installed"},
		{name: "newuidmap without setuid", change: func(f *facts) { f.Newuidmap.Privileged = false }, want: alone, why: "chmod u+s /usr/bin/newuidmap"},
		{name: "no new privileges", change: func(f *facts) { f.NoNewPrivs = true }, want: alone, why: "no_new_privs"},
		{
			name:   "AppArmor profile that may allow it",
			change: func(f *facts) { f.AppArmorRestrict, f.Confined, f.SubUIDs = true, true, nil },
			want:   alone, why: "/etc/subuid",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := laptop()
			c.change(&f)
			got, err := decide(f, c.options)
			if err != nil {
				t.Fatalf("decide: %v", err)
			}
			if !strings.Contains(got.Why, c.why) || (c.why == "") != (got.Why == "") {
				t.Errorf("Why is %q, want it to say %q", got.Why, c.why)
			}
			got.Why = ""
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("map (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecideRefusesWithTheNextStep(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*facts)
		only   Kind
		hint   string
	}{
		{"switched off", func(f *facts) { f.MaxNamespaces = 0 }, 0, "sysctl user.max_user_namespaces="},
		{"switched off for root too", func(f *facts) { f.UID, f.MaxNamespaces = 0, 0 }, 0, "sysctl user.max_user_namespaces="},
		{"Debian switch", func(f *facts) { f.CloneForbidden = true }, 0, "sysctl kernel.unprivileged_userns_clone=1"},
		{"Ubuntu switch", func(f *facts) { f.AppArmorRestrict = true }, 0, "userns,"},
		{"filter, for a user", func(f *facts) { f.Refused = true }, 0, "seccomp profile that allows it"},
		{"filter, for root that a command could kill", func(f *facts) { kaniko(f); f.NoChroot = "no Landlock" }, 0, "seccomp profile that allows it"},
		// Root that may mount is no root of an ordinary container. Not without being asked does it go without namespaces.
		{"filter, for root of a privileged container", func(f *facts) { kaniko(f); f.CanMount = true }, 0, "seccomp profile that allows it"},
		{"root, asked for by a user", func(*facts) {}, Nested, "leave the choice to cooper"},
		{"root, asked for where the filter refuses", kaniko, Nested, "seccomp profile that allows it"},
		{"single, asked for where the filter refuses", kaniko, Single, "seccomp profile that allows it"},
		{"subids, asked for without any", func(f *facts) { f.SubUIDs = nil }, Many, "leave the choice to cooper"},
		{"chroot, asked for by a user", func(*facts) {}, Chroot, "leave the choice to cooper"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := laptop()
			c.change(&f)
			m, err := decide(f, Options{Only: c.only})
			var refused *Error
			if !errors.As(err, &refused) {
				t.Fatalf("decide gave %v, %v; want an *Error", m, err)
			}
			if !strings.Contains(refused.Hint(), c.hint) {
				t.Errorf("hint is %q, want it to name %q", refused.Hint(), c.hint)
			}
		})
	}
}

func TestSubordinateRangesOfTheUserOnly(t *testing.T) {
	text := "bob:100000:65536\n# ann:1:2\nann:200000:65536\n\n1000:300000:10\n10:400000:5\nann:x:5\nann:5:0\nann:4294967290:65536\nann:7\nann:500000:3\n:600000:5\n"
	want := []Range{{0, 200000, 65536}, {0, 300000, 10}, {0, 500000, 3}}
	if diff := cmp.Diff(want, parseSubordinate(text, "ann", 1000)); diff != "" {
		t.Errorf("ranges, with other people's ids cooper could act as them (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]Range{{0, 300000, 10}}, parseSubordinate(text, "", 1000)); diff != "" {
		t.Errorf("ranges of a user without a name (-want +got):\n%s", diff)
	}
}

func TestMapNamesDifferWhenOwnersWould(t *testing.T) {
	base := Map{Kind: Many, UIDs: []Range{{0, 1000, 1}, {1, 100000, 65536}}, GIDs: []Range{{0, 1000, 1}, {1, 100000, 65536}}}
	if got, want := base.String(), "many:0-1000-1,1-100000-65536"; got != want {
		t.Errorf("name is %q, want %q", got, want)
	}
	otherGroups := base
	otherGroups.GIDs = []Range{{0, 1000, 1}}
	why := base
	why.Why = "words"
	if base.String() == otherGroups.String() {
		t.Errorf("maps with different groups share the name %q and would share files", base)
	}
	if base.String() != why.String() {
		t.Errorf("the explanation changed the name: %q, %q", base, why)
	}
	long := Map{Kind: Many, UIDs: make([]Range, 300), GIDs: make([]Range, 300)}
	if name := long.String(); len(name) > 200 || strings.Contains(name, "/") {
		t.Errorf("name of a long map is no file name: %q", name)
	}
}
