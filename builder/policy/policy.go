// Package policy judges plain facts about a finished image and returns findings.
//
// It knows rules and facts. It refuses to know where the facts come from: it opens no file, asks no registry,
// reads no clock and never sees a store. [ScanLayer] and [ScanConfig] turn bytes into facts once, when the bytes
// stream past; facts are plain JSON, never hold the value of a secret, and may be remembered per layer.
// [Policy.Evaluate] is a pure function from facts to findings, and [Policy.Fixes] says what a builder has to
// change so that the findings of level fix go away.
package policy

import (
	_ "embed"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// ScannerVersion changes whenever [ScanLayer] finds something that it did not find before. Whoever remembers
// facts puts it into the key.
const ScannerVersion = "1"

// A Level says what becomes of a finding.
type Level string

const (
	// Deny refuses the image.
	Deny Level = "deny"
	// Fix asks the builder to change the image so that the finding goes away.
	Fix Level = "fix"
	// Warn reports and lets pass.
	Warn Level = "warn"
	// Waived marks a finding that a waiver of the policy lets pass.
	Waived Level = "waived"
	// Off switches a rule off. No finding has this level.
	Off Level = "off"
)

// severity orders findings: what stops a build comes first.
func (l Level) severity() int {
	return slices.Index([]Level{Deny, Fix, Warn, Waived, Off}, l)
}

// A Policy is a set of rules with levels and parameters. It does not change after it was made.
type Policy struct {
	name    string
	digest  digest.Digest
	rules   map[string]rule
	waivers []waiver

	noNewPrivileges bool
	egress          *[]EgressRule
}

// An EgressRule is what a RUN may connect to, as it is written in the policy. What it means is not this package's to know.
type EgressRule struct {
	Text string
	Line int
}

// rule is one rule's setting. A parameter that the rule does not have keeps its zero value.
type rule struct {
	Level Level
	UID   int64    // P01: what fix makes of the user
	GID   *int64   // P01: and of the group; nil: not stated in USER
	Allow []string // P09, P11, P12: paths that may
	Names Level    // P10: level of a variable that is only named like a secret
	Kinds []string // P12: kinds of credential file looked for besides the usual ones
}

type waiver struct {
	Rule    string
	Path    string
	Reason  string
	Expires time.Time // the last day on which it holds, at 00:00 UTC
	Line    int
}

//go:embed default.yaml
var defaultYAML []byte

//go:embed strict.yaml
var strictYAML []byte

//go:embed none.yaml
var noneYAML []byte

// Profile returns a built-in policy: none, default or strict.
func Profile(name string) (*Policy, error) {
	text, ok := profileText(name)
	if !ok {
		return nil, hinted{
			err:  fmt.Errorf("no policy profile %q", name),
			hint: "the profiles are none, default and strict; anything else must be a policy file",
		}
	}
	return parse(text, "profile "+name, empty())
}

func profileText(name string) ([]byte, bool) {
	switch name {
	case "none":
		return noneYAML, true
	case "default":
		return defaultYAML, true
	case "strict":
		return strictYAML, true
	}
	return nil, false
}

func empty() map[string]rule {
	rules := make(map[string]rule, len(implemented))
	for _, id := range implemented {
		rules[id] = rule{Level: Off, Names: Off}
	}
	return rules
}

// Name is what the policy is called: its profile or its file.
func (p *Policy) Name() string { return p.name }

// Digest identifies the policy's text: the SHA-256 of the file, or of the profile as docs/policy.md shows it.
func (p *Policy) Digest() digest.Digest { return p.digest }

// ForbidsNothing says that no rule is on, so that nobody needs to scan anything for this policy.
func (p *Policy) ForbidsNothing() bool {
	for _, r := range p.rules {
		if r.Level != Off || r.Names != Off {
			return false
		}
	}
	return true
}

// NoNewPrivileges says that no program of a RUN may gain privileges by being executed: setuid and setgid bits and
// file capabilities have no effect. It is about how an image is made, not about what is found in it.
func (p *Policy) NoNewPrivileges() bool { return p.noNewPrivileges }

// Egress is what a RUN may connect to at most; bounded says that there is such a list, which may be empty. As
// [Policy.NoNewPrivileges], it is about how an image is made.
func (p *Policy) Egress() (rules []EgressRule, bounded bool) {
	if p.egress == nil {
		return nil, false
	}
	return *p.egress, true
}

// A Finding is one thing that a rule has to say about an image.
type Finding struct {
	Rule    string `json:"rule"`
	Level   Level  `json:"level"`
	Message string `json:"message"`
	Path    string `json:"path,omitempty"` // absolute, in the image
	Link    string `json:"link,omitempty"` // the file that Path is a hard link to
	Hint    string `json:"hint,omitempty"`
	Layer   int    `json:"layer"`          // index of the layer in Input.Layers, -1 when it is not about a layer
	Line    int    `json:"line,omitempty"` // in the Dockerfile, 0 when unknown
	Step    string `json:"step,omitempty"`
	History bool   `json:"history,omitempty"` // it is about the image's history alone
}

// Denied says whether a finding refuses the image.
func Denied(findings []Finding) bool {
	return slices.ContainsFunc(findings, func(f Finding) bool { return f.Level == Deny })
}

// Fixes is what a builder has to change so that the findings of level fix go away. After changing it, the builder
// collects the facts again and evaluates them with Input.Fixed set.
type Fixes struct {
	// StripPrivilege names, per index into Input.Layers, the files whose setuid and setgid bits and file
	// capabilities have to go, as paths relative to the root of the image without a leading slash. With Squash
	// all of them stand under 0, the one layer that is left.
	StripPrivilege map[int]map[string]bool
	// ForceUser replaces the user of the image's config when it is not empty.
	ForceUser string
	// Squash asks to make our layers one, so that no blob holds what a later layer deleted, and to rewrite
	// their history without the command lines.
	Squash bool
}

// None says that there is nothing to change.
func (f Fixes) None() bool {
	return len(f.StripPrivilege) == 0 && f.ForceUser == "" && !f.Squash
}

// Fixes derives the changes from the findings of an evaluation by the same policy.
func (p *Policy) Fixes(findings []Finding) Fixes {
	var f Fixes
	for _, v := range findings {
		if v.Level != Fix {
			continue
		}
		switch v.Rule {
		case "P01":
			f.ForceUser = p.rules["P01"].user()
		case "P09":
			f.strip(v.Layer, v.Path)
			// A hard link shares its inode: the bits go from all names or from none.
			f.strip(v.Layer, v.Link)
		default:
			f.Squash = true
		}
	}
	if f.Squash {
		f.mergeStrips()
	}
	return f
}

func (f *Fixes) mergeStrips() {
	layers := f.StripPrivilege
	f.StripPrivilege = nil
	for _, paths := range layers {
		for p := range paths {
			f.strip(0, p)
		}
	}
}

func (f *Fixes) strip(layer int, path string) {
	if path == "" {
		return
	}
	if f.StripPrivilege == nil {
		f.StripPrivilege = make(map[int]map[string]bool)
	}
	if f.StripPrivilege[layer] == nil {
		f.StripPrivilege[layer] = make(map[string]bool)
	}
	f.StripPrivilege[layer][strings.TrimPrefix(path, "/")] = true
}

func (r rule) user() string {
	if r.GID == nil {
		return fmt.Sprint(r.UID)
	}
	return fmt.Sprintf("%d:%d", r.UID, *r.GID)
}

// hinted is an error with one next step.
type hinted struct {
	err  error
	hint string
}

func (h hinted) Error() string { return h.err.Error() }
func (h hinted) Unwrap() error { return h.err }

// Hint is the next step.
func (h hinted) Hint() string { return h.hint }
