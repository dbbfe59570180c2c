package policy

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strings"
)

// implemented are the rules of the catalogue that Evaluate knows. The catalogue ends at P66; P67 is ours.
var implemented = []string{"P01", "P09", "P10", "P11", "P12", "P13", "P67"}

// Evaluate applies the rules to the facts. It is pure: equal input gives equal findings, in one order, what stops
// a build first. An empty result means that the image passes without remark.
func (p *Policy) Evaluate(in Input) []Finding {
	findings := slices.Concat(
		p.user(in),
		p.privilege(in),
		p.configSecrets(in),
		p.secretNames(in),
		p.keys(in),
		p.credentials(in),
		p.layerSecrets(in),
		p.unsearched(in),
		p.sandbox(in.Sandbox),
	)
	findings = slices.DeleteFunc(findings, func(f Finding) bool { return f.Level == Off })
	if in.Fixed {
		denyLeftovers(findings)
	}
	findings = p.waive(in, findings)
	slices.SortStableFunc(findings, compareFindings)
	return findings
}

func compareFindings(a, b Finding) int {
	return cmp.Or(
		cmp.Compare(a.Level.severity(), b.Level.severity()),
		cmp.Compare(a.Rule, b.Rule),
		cmp.Compare(a.Layer, b.Layer),
		cmp.Compare(a.Path, b.Path),
		cmp.Compare(a.Message, b.Message),
		cmp.Compare(a.Line, b.Line),
	)
}

// denyLeftovers refuses what a fix did not remove.
func denyLeftovers(findings []Finding) {
	for i := range findings {
		f := &findings[i]
		if f.Level != Fix {
			continue
		}
		f.Level = Deny
		switch f.Rule {
		case "P01":
			f.Hint = "the fix did not take: the user of the image is still root"
		case "P09":
			f.Hint = "the fix did not take: remove the file or its bits in the Dockerfile"
		default:
			f.Hint = "the layers were squashed and it is still there, because the final file system holds it: remove it in the Dockerfile"
		}
	}
}

// user is P01: the image does not run as root.
func (p *Policy) user(in Input) []Finding {
	c := in.Config
	f := Finding{
		Rule: "P01", Level: p.rules["P01"].Level, Layer: -1, Line: c.UserLine, Step: "USER",
		Hint: "end the Dockerfile with USER and a number that is not 0",
	}
	if c.UserLine == 0 {
		f.Step = ""
	}
	name, _, _ := strings.Cut(c.User, ":")
	number, isNumber := plainNumber(name)
	switch {
	case c.User == "":
		f.Message = "the image names no user, so it runs as root"
	case name == "":
		f.Message = fmt.Sprintf("user %q names only a group, so it runs as root", c.User)
	case !isNumber && !userName.MatchString(name):
		f.Message = fmt.Sprintf("user %q is neither a plain number nor a portable name; some runtimes take it for root", c.User)
	case isNumber && number > maxUID:
		f.Message = fmt.Sprintf("user %q is above %d and overflows to another id in some runtimes", c.User, int64(maxUID))
	case slices.Contains(c.UIDs, 0):
		f.Message = fmt.Sprintf("user %q is root", c.User)
	case slices.ContainsFunc(c.UIDs, func(id int64) bool { return id < 0 || id > maxUID }):
		f.Message = fmt.Sprintf("user %q has an id outside 1 to %d", c.User, int64(maxUID))
	case len(c.UIDs) == 0:
		f.Message = fmt.Sprintf("user %q is not in the image's /etc/passwd, so nobody can say that it is not root", c.User)
	default:
		return nil
	}
	return []Finding{f}
}

// EvaluateSandbox applies the rules that are about where commands run, so that a builder can ask before any does.
func (p *Policy) EvaluateSandbox(sandbox string) []Finding {
	return slices.DeleteFunc(p.sandbox(sandbox), func(f Finding) bool { return f.Level == Off })
}

// sandbox is P67: commands are kept in namespaces.
func (p *Policy) sandbox(sandbox string) []Finding {
	if sandbox != "chroot" {
		return nil
	}
	return []Finding{{
		Rule: "P67", Level: p.rules["P67"].Level, Layer: -1,
		Message: "the commands of this build have no namespaces, only a chroot, so they reach the network and the kernel objects of the builder's container",
		Hint:    "build where user namespaces can be made (cooper doctor says what that takes), or set P67 to warn",
	}}
}

// privilege is P09: no setuid, setgid or file capability that the base did not bring, in any layer, because a file
// that a later layer deletes is still in a blob.
func (p *Policy) privilege(in Input) []Finding {
	r := p.rules["P09"]
	base := make(map[string][]PrivilegedFile)
	for _, l := range in.Base.Layers {
		for _, f := range l.Privileged {
			base[f.Path] = append(base[f.Path], f)
		}
	}
	var all []Finding
	for i, l := range in.Layers {
		for _, f := range l.Privileged {
			if slices.ContainsFunc(base[f.Path], f.same) || allowed(r.Allow, f.Path) {
				continue
			}
			v := layerFinding("P09", r.Level, i, l, f.Path)
			v.Message = describePrivilege(f, len(base[f.Path]) > 0)
			v.Hint = "remove the bits in the step that makes the file, allow the path in the policy, or set P09 to fix"
			if f.Link != "" {
				v.Link = "/" + f.Link
			}
			all = append(all, v)
		}
	}
	return all
}

func describePrivilege(f PrivilegedFile, changed bool) string {
	var what []string
	if f.Mode&0o4000 != 0 {
		what = append(what, "setuid")
	}
	if f.Mode&0o2000 != 0 {
		what = append(what, "setgid")
	}
	text := strings.Join(what, " and ")
	if text != "" {
		text += fmt.Sprintf(" file (mode %05o, owner %d:%d)", f.Mode, f.UID, f.GID)
	}
	if f.Caps != "" {
		if text != "" {
			text += ", "
		}
		text += "file with capabilities " + capNames(f.Caps)
	}
	if f.Link != "" {
		text += ", a hard link to /" + f.Link
	}
	if changed {
		return text + "; the base brought it with other content, mode or owner"
	}
	return text + "; the base did not bring it"
}

// configSecrets is P10: no value of a build secret in the config or the history.
func (p *Policy) configSecrets(in Input) []Finding {
	level := p.rules["P10"].Level
	var all []Finding
	for _, s := range in.Config.Secrets {
		f := Finding{
			Rule: "P10", Level: level, Layer: -1, Line: s.Line, History: s.History,
			Message: fmt.Sprintf("the value of secret %q is in the image config at %s%s", s.Secret, s.In, formNote(s.Form)),
			Hint:    "use RUN --mount=type=secret and do not copy the value into an instruction",
		}
		if level == Fix && !s.History {
			f.Level = Deny
			f.Hint = "a fix can rewrite history but not what the image needs to run: remove the value from the Dockerfile"
		}
		all = append(all, f)
	}
	return all
}

// secretNames is the other half of P10: names that promise a secret.
func (p *Policy) secretNames(in Input) []Finding {
	var all []Finding
	for _, n := range in.Config.Names {
		what := "ENV"
		if n.In == "arg" {
			what = "ARG"
		}
		all = append(all, Finding{
			Rule: "P10", Level: p.rules["P10"].Names, Layer: -1, Line: n.Line, Step: what + " " + n.Name,
			Message: fmt.Sprintf("%s %s is named like a secret and its value is in the image", what, n.Name),
			Hint:    "pass secrets with --secret and RUN --mount=type=secret",
		})
	}
	return all
}

// keys is P11: no private key in any layer.
func (p *Policy) keys(in Input) []Finding {
	r := p.rules["P11"]
	var all []Finding
	for i, l := range in.Layers {
		for _, k := range l.Keys {
			if allowed(r.Allow, k.Path) {
				continue
			}
			f := layerFinding("P11", r.Level, i, l, k.Path)
			f.Message = "private key (" + k.Kind + ")" + nowhere(k.Path)
			f.Hint = "deleting it in a later step leaves it in this layer: keep it out with .dockerignore or RUN --mount=type=secret"
			all = append(all, f)
		}
	}
	return all
}

// credentials is P12: no credential file in any layer.
func (p *Policy) credentials(in Input) []Finding {
	r := p.rules["P12"]
	var all []Finding
	for i, l := range in.Layers {
		for _, c := range l.Credentials {
			if allowed(r.Allow, c.Path) || extraKind(c.Kind) && !slices.Contains(r.Kinds, c.Kind) {
				continue
			}
			f := layerFinding("P12", r.Level, i, l, c.Path)
			f.Message = "file with credentials (" + c.Kind + ")"
			f.Hint = "deleting it in a later step leaves it in this layer: keep it out with .dockerignore or RUN --mount=type=secret"
			all = append(all, f)
		}
	}
	return all
}

// layerSecrets is P13: no value of a build secret in any layer.
func (p *Policy) layerSecrets(in Input) []Finding {
	level := p.rules["P13"].Level
	var all []Finding
	for i, l := range in.Layers {
		for _, s := range l.Secrets {
			f := layerFinding("P13", level, i, l, s.Path)
			f.Message = fmt.Sprintf("the value of secret %q is in the layer%s%s", s.Secret, formNote(s.Form), nowhere(s.Path))
			f.Hint = "do not write the secret to a file outside its mount, or remove the file in the same step"
			all = append(all, f)
		}
	}
	return all
}

// unsearched says which secrets nobody could look for.
func (p *Policy) unsearched(in Input) []Finding {
	if p.rules["P13"].Level == Off && p.rules["P10"].Level == Off {
		return nil
	}
	ids := slices.Clone(in.Config.Unsearched)
	for _, l := range in.Layers {
		ids = append(ids, l.Unsearched...)
	}
	var all []Finding
	for _, id := range sortedUnique(ids) {
		all = append(all, Finding{
			Rule: "P13", Level: Warn, Layer: -1,
			Message: fmt.Sprintf("secret %q was not looked for: its value is not between %d and %d bytes long", id, minSecret, maxSecret),
			Hint:    "a shorter value stands in files by chance; use a longer one",
		})
	}
	return all
}

func layerFinding(id string, level Level, i int, l LayerFacts, path string) Finding {
	f := Finding{Rule: id, Level: level, Layer: i, Line: l.Line, Step: l.Step}
	if path != "" {
		f.Path = "/" + path
	}
	return f
}

func formNote(form string) string {
	if form == "plain" {
		return ""
	}
	return " (" + form + " encoded)"
}

func nowhere(path string) string {
	if path != "" {
		return ""
	}
	return ", outside any file"
}

// waive marks the findings that a waiver covers and reports the waivers that have run out.
func (p *Policy) waive(in Input, findings []Finding) []Finding {
	var expired []Finding
	for _, w := range p.waivers {
		if !in.Now.Before(w.Expires.AddDate(0, 0, 1)) {
			expired = append(expired, Finding{
				Rule: w.Rule, Level: Warn, Layer: -1, Path: w.Path,
				Message: fmt.Sprintf("the waiver in line %d of %s expired on %s and is ignored", w.Line, p.name, w.Expires.Format("2006-01-02")),
				Hint:    "solve what it waived, or renew it with a new reason: it said " + fmt.Sprintf("%q", w.Reason),
			})
			continue
		}
		for i := range findings {
			f := &findings[i]
			if f.Rule != w.Rule || f.Level == Waived || !w.covers(*f) {
				continue
			}
			f.Level = Waived
			f.Hint = fmt.Sprintf("waived until %s: %s", w.Expires.Format("2006-01-02"), w.Reason)
		}
	}
	return append(findings, expired...)
}

func (w waiver) covers(f Finding) bool {
	if w.Path == "" {
		return f.Path == ""
	}
	return f.Path != "" && allowed([]string{w.Path}, strings.TrimPrefix(f.Path, "/"))
}

// allowed matches a path without a leading slash against absolute patterns: "/**" at the end covers everything
// below, other stars stay within one element.
func allowed(patterns []string, name string) bool {
	name = "/" + name
	for _, p := range patterns {
		if dir, ok := strings.CutSuffix(p, "/**"); ok {
			if strings.HasPrefix(name, dir+"/") {
				return true
			}
			continue
		}
		if ok, err := path.Match(p, name); ok && err == nil {
			return true
		}
	}
	return false
}
