package policy

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func profile(t testing.TB, name string) *Policy {
	t.Helper()
	p, err := Profile(name)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func parsed(t testing.TB, text string) *Policy {
	t.Helper()
	p, err := Parse([]byte(text), "p.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// brief is a finding without its words.
func brief(findings []Finding) []string {
	var all []string
	for _, f := range findings {
		all = append(all, strings.TrimSpace(fmt.Sprintf("%s %s %d %s", f.Level, f.Rule, f.Layer, f.Path)))
	}
	return all
}

var day = time.Date(2026, 11, 23, 18, 0, 0, 0, time.UTC)

func nonRoot() ConfigFacts { return ConfigFacts{User: "65532", UIDs: []int64{65532}} }

func everything() Input {
	return Input{
		Now:    day,
		Config: ConfigFacts{Names: []NameFact{{In: "env", Name: "API_KEY"}}, Secrets: []ConfigSecret{{Secret: "s", In: "config.Env[0]", Form: "plain"}, {Secret: "s", In: "history[3].created_by", Form: "plain", History: true}}},
		Layers: []LayerFacts{
			{Privileged: []PrivilegedFile{{Path: "bin/x", Mode: 0o4755}}, Secrets: []SecretHit{{Path: "f", Secret: "s", Form: "hex"}}},
			{Keys: []KeyHit{{Path: "k", Kind: "PRIVATE KEY"}}, Credentials: []Credential{{Path: ".netrc", Kind: "netrc"}, {Path: ".env", Kind: "dotenv"}}, Line: 7, Step: "COPY . ."},
		},
	}
}

func TestProfilesJudgeAsDocumented(t *testing.T) {
	for name, want := range map[string][]string{
		"none": nil,
		"default": {
			"deny P09 0 /bin/x", "deny P10 -1", "deny P10 -1", "deny P11 1 /k", "deny P12 1 /.netrc", "deny P13 0 /f",
			"warn P01 -1", "warn P10 -1",
		},
		"strict": {
			"deny P01 -1", "deny P09 0 /bin/x", "deny P10 -1", "deny P10 -1", "deny P10 -1", "deny P11 1 /k", "deny P12 1 /.env",
			"deny P12 1 /.netrc", "deny P13 0 /f",
		},
	} {
		p := profile(t, name)
		got := p.Evaluate(everything())
		if d := cmp.Diff(want, brief(got)); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
		if Denied(got) != (name != "none") || p.ForbidsNothing() != (name == "none") {
			t.Errorf("%s: Denied %v, ForbidsNothing %v", name, Denied(got), p.ForbidsNothing())
		}
	}
	if _, err := Profile("lax"); err == nil {
		t.Error("an unknown profile passes")
	}
}

func TestEvaluateIsPureAndItsOrderIsTheInputsOwn(t *testing.T) {
	p, in := profile(t, "strict"), everything()
	before, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	first := p.Evaluate(in)
	for i := range in.Layers {
		slices.Reverse(in.Layers[i].Credentials)
	}
	slices.Reverse(in.Config.Secrets)
	if d := cmp.Diff(first, p.Evaluate(in)); d != "" {
		t.Errorf("order of facts changes the findings:\n%s", d)
	}
	for i := range in.Layers {
		slices.Reverse(in.Layers[i].Credentials)
	}
	slices.Reverse(in.Config.Secrets)
	if after, err := json.Marshal(in); err != nil || string(after) != string(before) {
		t.Errorf("evaluation changed its input: %v\n%s\n%s", err, before, after)
	}
}

func TestFactsSurviveJSON(t *testing.T) {
	in := everything()
	b, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	var back Input
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(in, back); d != "" {
		t.Errorf("facts that are remembered come back different:\n%s", d)
	}
}

func TestPrivilegeOfTheBaseIsNoFinding(t *testing.T) {
	su := PrivilegedFile{Path: "bin/su", Mode: 0o4755, Digest: "sha256:a"}
	change := func(f func(*PrivilegedFile)) PrivilegedFile {
		c := su
		f(&c)
		return c
	}
	in := Input{Now: day, Config: nonRoot(), Base: BaseFacts{Layers: []LayerFacts{{Light: true, Privileged: []PrivilegedFile{su}}}}}
	for name, c := range map[string]struct {
		file  PrivilegedFile
		found bool
	}{
		"the same file":    {su, false},
		"other content":    {change(func(f *PrivilegedFile) { f.Digest = "sha256:b" }), true},
		"other mode":       {change(func(f *PrivilegedFile) { f.Mode = 0o4777 }), true},
		"other owner":      {change(func(f *PrivilegedFile) { f.UID = 1000 }), true},
		"new capabilities": {change(func(f *PrivilegedFile) { f.Caps = "01" }), true},
		"another path":     {change(func(f *PrivilegedFile) { f.Path = "bin/su2" }), true},
		"a hard link":      {change(func(f *PrivilegedFile) { f.Path, f.Link = "bin/su2", "bin/su" }), true},
	} {
		in.Layers = []LayerFacts{{Privileged: []PrivilegedFile{c.file}}, {}}
		got := profile(t, "default").Evaluate(in)
		if (len(got) == 1) != c.found {
			t.Errorf("%s: a user of the image would gain root unseen, or the base is blamed: %+v", name, got)
		}
	}
}

func TestAllowListsKnowStars(t *testing.T) {
	p := parsed(t, "rules:\n  P09: {level: deny, allow: [/usr/bin/sudo, /opt/*/helper, /srv/**]}\n  P01: off\n")
	in := Input{Now: day}
	for path, found := range map[string]bool{
		"usr/bin/sudo": false, "usr/bin/sudo2": true, "opt/a/helper": false, "opt/a/b/helper": true, "srv/x/y": false, "srv": true, "srvx/y": true,
	} {
		in.Layers = []LayerFacts{{Privileged: []PrivilegedFile{{Path: path, Mode: 0o4755}}}}
		if got := p.Evaluate(in); (len(got) == 1) != found {
			t.Errorf("%s: %+v", path, got)
		}
	}
}

func TestPublishedKeysOfDistributionsAreNoFinding(t *testing.T) {
	in := Input{Now: day, Config: nonRoot()}
	for path, found := range map[string]bool{
		"usr/lib/x86_64-linux-gnu/libgnutls.so.30.34.3": false, "usr/share/doc/libnet-ssleay-perl/examples/server_key.pem": false,
		"usr/share/doc": true, "usr/lib/app/key.pem": true, "app/libgnutls.so": true, "usr/lib/a/b/libgnutls.so": true,
	} {
		in.Layers = []LayerFacts{{Keys: []KeyHit{{Path: path, Kind: "PRIVATE KEY"}}}}
		if got := profile(t, "default").Evaluate(in); Denied(got) != found {
			t.Errorf("%s: denied %v, want %v", path, !found, found)
		}
	}
}

const evilPasswd = "root:x:0:0:root:/root:/bin/sh\ntoor:x:0:0::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n" +
	"1234:x:0:0:a name that is a number:/:/bin/sh\ntwice:x:5:5::/:\ntwice:x:0:0::/:\nodd:x:00x:0::/:\nneg:x:-1:0::/:\nbig:x:4294967296:0::/:"

func TestUserThatAnyRuntimeTakesForRootIsFound(t *testing.T) {
	for user, root := range map[string]bool{
		"": true, "root": true, "toor": true, "0": true, "00": true, "+0": true, "-1": true, "4294967296": true, "2147483648": true,
		"0x0": true, " root": true, "root ": true, "root:0": true, ":0": true, ":": true, "0:1000": true, "٠": true, "1234": true,
		"1234:5": true, "twice": true, "odd": true, "neg": true, "big": true, "nobody-there": true, "\troot": true, "-0": true, "1e3": true,
		"1_000": true, "0\n": true, "01000": true,
		"user": false, "user:0": false, "1000": false, "1000:0": false, "65532:65532": false, "2147483647": false,
	} {
		ids, err := userIDs(user, []byte(evilPasswd))
		if err != nil {
			t.Fatal(err)
		}
		got := profile(t, "strict").Evaluate(Input{Now: day, Config: ConfigFacts{User: user, UIDs: ids}})
		if Denied(got) != root {
			t.Errorf("user %q, ids %v: denied %v, want %v: %+v", user, ids, !root, root, got)
		}
	}
}

// The image's own passwd may give a number's odd spelling an ordinary id, for the runtimes that look there first.
func TestOddSpellingOfANumberIsRefusedWhateverPasswdSays(t *testing.T) {
	for _, user := range []string{"+0", "00", "0x0", " root", "-0", "٠", "4294967296"} {
		if got := profile(t, "strict").Evaluate(Input{Now: day, Config: ConfigFacts{User: user, UIDs: []int64{5}}}); !Denied(got) {
			t.Errorf("user %q passes; docker would look at passwd, others would run root", user)
		}
	}
}

func TestFixesNameWhatToChange(t *testing.T) {
	p := parsed(t, `
rules:
  P01: {level: fix, uid: 65532, gid: 0}
  P09: fix
  P11: fix
`)
	in := Input{Now: day, Layers: []LayerFacts{
		{}, {Privileged: []PrivilegedFile{{Path: "bin/x", Mode: 0o4755}, {Path: "bin/y", Mode: 0o4755, Link: "bin/z"}}, Keys: []KeyHit{{Path: "k"}}},
	}}
	got := p.Fixes(p.Evaluate(in))
	all := map[string]bool{"bin/x": true, "bin/y": true, "bin/z": true}
	want := Fixes{ForceUser: "65532:0", Squash: true, StripPrivilege: map[int]map[string]bool{0: all}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	in.Layers[1].Keys = nil
	want = Fixes{ForceUser: "65532:0", StripPrivilege: map[int]map[string]bool{1: all}}
	if d := cmp.Diff(want, p.Fixes(p.Evaluate(in))); d != "" {
		t.Errorf("without squash (-want +got):\n%s", d)
	}
	if got.None() || !p.Fixes(nil).None() {
		t.Error("None is wrong")
	}
	if f := parsed(t, "rules: {P01: {level: fix, uid: 7}}").Fixes([]Finding{{Rule: "P01", Level: Fix}}); f.ForceUser != "7" {
		t.Errorf("user %q", f.ForceUser)
	}
}

func TestWhatAFixLeavesBehindIsDenied(t *testing.T) {
	p := parsed(t, "rules: {P01: off, P09: fix, P13: fix}")
	in := Input{Now: day, Layers: []LayerFacts{{Secrets: []SecretHit{{Path: "f", Secret: "s"}}}}}
	if got := p.Evaluate(in); Denied(got) || got[0].Level != Fix {
		t.Fatalf("before the fix: %+v", got)
	}
	in.Fixed = true
	got := p.Evaluate(in)
	if !Denied(got) || !strings.Contains(got[0].Hint, "still there") {
		t.Errorf("a secret in the final file system would be published: %+v", got)
	}
}

func TestSecretInConfigCannotBeFixedButHistoryCan(t *testing.T) {
	p := parsed(t, "rules: {P01: off, P10: fix}")
	in := Input{Now: day, Config: ConfigFacts{Secrets: []ConfigSecret{{Secret: "s", In: "config.Env[1]"}}}}
	if got := p.Evaluate(in); !Denied(got) {
		t.Errorf("ENV: %+v", got)
	}
	in.Config.Secrets = []ConfigSecret{{Secret: "s", In: "history[1].created_by", History: true}}
	got := p.Evaluate(in)
	if Denied(got) || !p.Fixes(got).Squash {
		t.Errorf("history: %+v", got)
	}
}

func TestWaiversHoldUntilTheirDay(t *testing.T) {
	p := parsed(t, `
rules: {P01: deny}
waivers:
  - {rule: P09, path: /bin/x, reason: ticket 12, expires: 2026-11-23}
  - rule: P01
    reason: legacy
    expires: 2026-12-31
`)
	in := Input{Now: day, Layers: []LayerFacts{{Privileged: []PrivilegedFile{{Path: "bin/x", Mode: 0o4755}, {Path: "bin/y", Mode: 0o4755}}}}}
	got := p.Evaluate(in)
	if d := cmp.Diff([]string{"deny P09 0 /bin/y", "waived P01 -1", "waived P09 0 /bin/x"}, brief(got)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if !strings.Contains(got[2].Hint, "ticket 12") {
		t.Errorf("a waived finding does not say why: %+v", got[2])
	}
	in.Now = day.AddDate(0, 0, 1)
	got = p.Evaluate(in)
	want := []string{"deny P09 0 /bin/x", "deny P09 0 /bin/y", "warn P09 -1 /bin/x", "waived P01 -1"}
	if d := cmp.Diff(want, brief(got)); d != "" {
		t.Errorf("after the day (-want +got):\n%s", d)
	}
	if !strings.Contains(got[2].Message, "line 4") || !strings.Contains(got[2].Message, "expired on 2026-11-23") {
		t.Errorf("%+v", got[2])
	}
}

func TestPolicyFileErrorsNameTheLine(t *testing.T) {
	for text, want := range map[string]string{
		"no-new-privileges: maybe":                                                `line 1: no-new-privileges is not true or false`,
		"rulez: {}":                                                               `line 1: the policy: unknown key "rulez"`,
		"rules:\n  P99: deny":                                                     `line 2: there is no rule "P99"`,
		"rules:\n  p09: deny":                                                     `line 2: there is no rule "p09"`,
		"rules:\n  P03: deny":                                                     "line 2: rule P03 is in the catalogue, but this version does not check it",
		"rules:\n  P09: denied":                                                   `line 2: rule P09: no level "denied"`,
		"rules:\n  P09: true":                                                     "line 2: rule P09 is not a mapping",
		"rules:\n  P09:":                                                          "line 2: rule P09 has no level",
		"rules:\n  P09:\n    level: deny\n    uid: 3":                             `line 4: rule P09: unknown key "uid"`,
		"rules:\n  P09: deny\n  P09: off":                                         "line 3",
		"rules:\n  P01: fix":                                                      "line 2: rule P01: level fix needs the uid",
		"rules:\n  P01: {level: fix, uid: 0}":                                     "line 2: rule P01: uid is not a number from 1",
		"rules:\n  P01: {level: fix, uid: 0x10}":                                  "line 2: rule P01: uid is not a number",
		"rules:\n  P01: {level: fix, uid: 4294967296}":                            "line 2: rule P01: uid is not a number",
		"rules:\n  P09: {level: deny, allow: [usr/bin]}":                          "clean absolute path",
		"rules:\n  P09: {level: deny, allow: [/a/../b]}":                          "clean absolute path",
		"rules:\n  P09: {level: deny, allow: ['/a[']}":                            "syntax error in pattern",
		"rules:\n  P09: {level: deny, allow: [/a/**/b]}":                          "** stands only as the last",
		"rules:\n  P10: {level: deny, names: fix}":                                "a name cannot be fixed",
		"rules:\n  P12: {kinds: [foo]}":                                           `no kind "foo"`,
		"profile: lax":                                                            `line 1: no policy profile "lax"`,
		"waivers:\n- {rule: P09, path: /x, reason: y}":                            "line 2: a waiver without an expiry date",
		"waivers:\n- {rule: P09, path: /x, expires: 2026-01-01}":                  "line 2: a waiver without a reason",
		"waivers:\n- {rule: P09, reason: y, expires: 2026-01-01}":                 "would switch the rule off",
		"waivers:\n- {rule: P01, path: /x, reason: y, expires: 2026-01-01}":       "has no path",
		"waivers:\n- {rule: P77, path: /x, reason: y, expires: 2026-01-01}":       `no rule "P77"`,
		"waivers:\n- {rule: P09, path: /x, reason: y, expires: soon}":             `"soon" is not of the form`,
		"waivers:\n- {rule: P09, path: /x, reason: y, expires: 2026-01-01, a: b}": `unknown key "a"`,
		"rules: [P09]":                                                            "rules is not a mapping",
		"rules: {P09: [deny]}":                                                    "rule P09 is not a mapping",
		"rules: {P09: deny":                                                       "line 1",
		"a: &x b\nrules: *x":                                                      "line 1",
		"profile: none\n---\nrules: {}":                                           "more than one YAML document",
		"egress:":                                                                 "line 1: egress has no allow",
		"egress: {}":                                                              "line 1: egress has no allow",
		"egress: [a.example]":                                                     "line 1: egress is not a mapping",
		"egress: {deny: [a]}":                                                     `line 1: egress: unknown key "deny"`,
		"egress:\n  allow: a.example":                                             "line 2: egress: allow is not a list",
		"egress:\n  allow:\n  - a\n  - 1":                                         "line 4: egress: allow: a rule is not a string",
		"just text":                                                               "the policy is not a mapping",
	} {
		_, err := Parse([]byte(text), "p.yaml")
		if err == nil || !strings.HasPrefix(err.Error(), "policy p.yaml: ") || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %s", text, err, want)
		}
	}
	_, err := Parse([]byte("rules: {P03: deny}"), "p.yaml")
	if h, ok := err.(interface{ Hint() string }); !ok || !strings.Contains(h.Hint(), "P09") {
		t.Errorf("no hint: %v", err)
	}
	if _, err := Parse(make([]byte, maxPolicyFile+1), "big"); err == nil {
		t.Error("an endless policy file is read")
	}
}

func TestPrivilegesMayBeGainedUnlessThePolicySaysNo(t *testing.T) {
	for text, want := range map[string]bool{
		"":                        false,
		"profile: strict":         true,
		"profile: none":           false,
		"profile: default":        false,
		"no-new-privileges: true": true,
		"no-new-privileges: false\nprofile: strict": false,
	} {
		p, err := Parse([]byte(text), "p")
		if err != nil {
			t.Fatal(err)
		}
		if got := p.NoNewPrivileges(); got != want {
			t.Errorf("%q: no new privileges is %v, want %v", text, got, want)
		}
	}
}

func TestEgressIsBoundedOnlyByAPolicyThatSaysSo(t *testing.T) {
	for text, want := range map[string]struct {
		rules   []EgressRule
		bounded bool
	}{
		"":                    {nil, false},
		"profile: strict":     {nil, false},
		"egress: {allow: []}": {[]EgressRule{}, true},
		"egress:\n  allow:\n  - a.example:443\n  - '*.b.example'": {[]EgressRule{{"a.example:443", 3}, {"*.b.example", 4}}, true},
		"egress: {allow: [\"[2001:db8::1]:443\"]}":                {[]EgressRule{{"[2001:db8::1]:443", 1}}, true},
	} {
		rules, bounded := parsed(t, text).Egress()
		if d := cmp.Diff(want.rules, rules); d != "" || bounded != want.bounded {
			t.Errorf("%q: bounded %v, want %v; what a policy closes is open (-want +got):\n%s", text, bounded, want.bounded, d)
		}
	}
}

func TestPolicyFileStartsFromItsProfile(t *testing.T) {
	for text, want := range map[string][]string{
		"":                                  {"deny P09 0 /bin/x", "warn P01 -1"},
		"# nothing\n":                       {"deny P09 0 /bin/x", "warn P01 -1"},
		"rules: {P09: warn}":                {"warn P01 -1", "warn P09 0 /bin/x"},
		"rules: {P09: off}":                 {"warn P01 -1"},
		"profile: strict":                   {"deny P01 -1", "deny P09 0 /bin/x"},
		"profile: none":                     nil,
		"profile: none\nrules: {P01: deny}": {"deny P01 -1"},
		"rules: {P09: {allow: [/bin/x]}}":   {"warn P01 -1"},
	} {
		p := parsed(t, text)
		got := p.Evaluate(Input{Now: day, Layers: []LayerFacts{{Privileged: []PrivilegedFile{{Path: "bin/x", Mode: 0o4755}}}}})
		if d := cmp.Diff(want, brief(got)); d != "" {
			t.Errorf("%q (-want +got):\n%s", text, d)
		}
	}
	a, b := parsed(t, "rules: {P09: warn}"), parsed(t, "rules: {P09: deny}")
	if a.Digest() == b.Digest() || a.Name() != "p.yaml" {
		t.Errorf("policies %s and %s cannot be told apart", a.Digest(), b.Digest())
	}
}

func FuzzParseNeverPanics(f *testing.F) {
	f.Add("rules: {P09: {level: deny, allow: [/a]}}\nwaivers:\n- {rule: P01, reason: x, expires: 2026-01-01}")
	f.Add("a: &a [*a]\n? b\n: c")
	f.Fuzz(func(t *testing.T, text string) {
		if p, err := Parse([]byte(text), "f"); err == nil {
			p.Evaluate(everything())
		}
	})
}

func TestFindingsForPeopleAreSafeForATerminal(t *testing.T) {
	in := Input{Now: day, Config: nonRoot(), Layers: []LayerFacts{{Line: 3, Step: "RUN x", Privileged: []PrivilegedFile{
		{Path: "bin/\x1b]0;owned\x07\nok", Mode: 0o6755, UID: 1}, {Path: "bin/ping", Mode: 0o755, Caps: "01002000000000000000000000000000ff"},
	}}}}
	var text, asJSON strings.Builder
	findings := profile(t, "default").Evaluate(in)
	if err := WriteText(&text, findings); err != nil {
		t.Fatal(err)
	}
	want := `deny   P09 Dockerfile:3 /bin/\u001b]0;owned\u0007\u000aok: setuid and setgid file (mode 06755, owner 1:0); the base did not bring it`
	if got := strings.Split(text.String(), "\n")[0]; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if err := WriteJSON(&asJSON, findings); err != nil {
		t.Fatal(err)
	}
	var back []Finding
	if err := json.Unmarshal([]byte(asJSON.String()), &back); err != nil || cmp.Diff(findings, back) != "" {
		t.Errorf("%v %s", err, cmp.Diff(findings, back))
	}
	asJSON.Reset()
	if err := WriteJSON(&asJSON, nil); err != nil || asJSON.String() != "[]\n" {
		t.Errorf("no findings are %q", asJSON.String())
	}
}

func TestCapabilitiesHaveNames(t *testing.T) {
	caps, err := fileCaps(netRaw)
	if err != nil || capNames(caps) != "cap_net_raw" {
		t.Errorf("%s %v", capNames(caps), err)
	}
	high := netRaw[:4] + strings.Repeat("\x00", 8) + "\x80\x02\x00\x00" + "\x00\x00\x00\x00"
	caps, err = fileCaps(high)
	if err != nil || capNames(caps) != "cap_bpf,41" {
		t.Errorf("%s %v", capNames(caps), err)
	}
}
