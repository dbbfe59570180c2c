package policy

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/opencontainers/go-digest"
)

const maxPolicyFile = 1 << 20

// Parse reads a policy file; name is what errors call it. The file starts from the profile that it names, from
// default when it names none, and replaces the rules that it lists. Unknown keys, rules and parameters are errors
// with their line: a misspelt rule must not look like a rule that passes.
func Parse(yaml []byte, name string) (*Policy, error) {
	return parse(yaml, name, nil)
}

// parse starts from the rules, or from the file's profile when they are nil.
func parse(text []byte, name string, rules map[string]rule) (*Policy, error) {
	if len(text) > maxPolicyFile {
		return nil, fmt.Errorf("policy %s: larger than %d bytes", name, maxPolicyFile)
	}
	f, err := parser.ParseBytes(text, 0)
	if err != nil {
		var at yaml.Error
		if errors.As(err, &at) && at.GetToken() != nil {
			return nil, fmt.Errorf("policy %s: line %d: %s", name, at.GetToken().Position.Line, at.GetMessage())
		}
		return nil, fmt.Errorf("policy %s: %w", name, err)
	}
	p := &Policy{name: name, digest: digest.FromBytes(text), rules: rules}
	d := decoder{policy: p}
	if len(f.Docs) > 1 {
		return nil, fmt.Errorf("policy %s: more than one YAML document", name)
	}
	var body ast.Node
	if len(f.Docs) == 1 {
		body = f.Docs[0].Body
	}
	if err := d.file(body); err != nil {
		return nil, wrapNode(name, err)
	}
	return p, nil
}

// nodeError is an error at a place in the file.
type nodeError struct {
	line int
	msg  string
	hint string
}

func (e *nodeError) Error() string { return fmt.Sprintf("line %d: %s", e.line, e.msg) }

// Hint is the next step.
func (e *nodeError) Hint() string { return e.hint }

func at(n ast.Node, format string, args ...any) *nodeError {
	line := 0
	if n != nil && n.GetToken() != nil {
		line = n.GetToken().Position.Line
	}
	return &nodeError{line: line, msg: fmt.Sprintf(format, args...)}
}

func wrapNode(name string, err error) error {
	wrapped := fmt.Errorf("policy %s: %w", name, err)
	var n *nodeError
	if errors.As(err, &n) && n.hint != "" {
		return hinted{wrapped, n.hint}
	}
	return wrapped
}

// decoder reads the syntax tree itself, because every error has to name its line.
type decoder struct {
	policy *Policy
}

// field is one key of a mapping.
type field struct {
	key   string
	node  ast.Node // the key's
	value ast.Node
}

// fields returns the keys of a mapping in order and refuses any that is not known. An absent node has none.
func fields(n ast.Node, what string, known ...string) ([]field, error) {
	var pairs []*ast.MappingValueNode
	switch n := n.(type) {
	case nil, *ast.NullNode:
		return nil, nil
	case *ast.MappingNode:
		pairs = n.Values
	case *ast.MappingValueNode:
		pairs = []*ast.MappingValueNode{n}
	default:
		return nil, at(n, "%s is not a mapping", what)
	}
	var all []field
	for _, v := range pairs {
		key, ok := v.Key.(*ast.StringNode)
		if !ok {
			return nil, at(v.Key, "%s: a key that is not a plain string", what)
		}
		if len(known) > 0 && !slices.Contains(known, key.Value) {
			return nil, at(v.Key, "%s: unknown key %q; known are %s", what, key.Value, strings.Join(known, ", "))
		}
		if slices.ContainsFunc(all, func(f field) bool { return f.key == key.Value }) {
			return nil, at(v.Key, "%s: %q is given twice", what, key.Value)
		}
		all = append(all, field{key.Value, v.Key, v.Value})
	}
	return all, nil
}

func (d decoder) file(body ast.Node) error {
	top, err := fields(body, "the policy", "profile", "rules", "waivers", "no-new-privileges", "egress")
	if err != nil {
		return err
	}
	if d.policy.rules == nil {
		if err := d.profile(top); err != nil {
			return err
		}
	}
	for _, f := range top {
		switch f.key {
		case "rules":
			err = d.ruleTable(f.value)
		case "waivers":
			err = d.waiverList(f.value)
		case "no-new-privileges":
			on, ok := f.value.(*ast.BoolNode)
			if !ok {
				return at(f.value, "no-new-privileges is not true or false")
			}
			d.policy.noNewPrivileges = on.Value
		case "egress":
			err = d.egressList(f)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// egressList reads "egress: {allow: [...]}". An empty list is one: nothing may leave.
func (d decoder) egressList(f field) error {
	parts, err := fields(f.value, "egress", "allow")
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		e := at(f.node, "egress has no allow")
		e.hint = "egress: {allow: []} lets nothing out; without the key the policy bounds nothing"
		return e
	}
	nodes, err := list(parts[0].value, "egress: allow")
	if err != nil {
		return err
	}
	rules := []EgressRule{}
	for _, n := range nodes {
		s, err := text(n, "egress: allow: a rule")
		if err != nil {
			return err
		}
		rules = append(rules, EgressRule{Text: s, Line: at(n, "").line})
	}
	d.policy.egress = &rules
	return nil
}

// profile sets the rules that the file starts from.
func (d decoder) profile(top []field) error {
	name, node := "default", ast.Node(nil)
	for _, f := range top {
		if f.key != "profile" {
			continue
		}
		s, err := text(f.value, "profile")
		if err != nil {
			return err
		}
		name, node = s, f.value
	}
	p, err := Profile(name)
	if err != nil {
		return at(node, "%v", err)
	}
	d.policy.rules, d.policy.noNewPrivileges = maps.Clone(p.rules), p.noNewPrivileges
	return nil
}

var ruleID = regexp.MustCompile(`^P(0[1-9]|[1-5][0-9]|6[0-6])$`)

func checkRule(n ast.Node, id string) error {
	if slices.Contains(implemented, id) {
		return nil
	}
	e := at(n, "there is no rule %q", id)
	if ruleID.MatchString(id) {
		e = at(n, "rule %s is in the catalogue, but this version does not check it", id)
	}
	e.hint = "the rules that are checked: " + strings.Join(implemented, ", ")
	return e
}

func (d decoder) ruleTable(n ast.Node) error {
	rules, err := fields(n, "rules")
	if err != nil {
		return err
	}
	for _, f := range rules {
		if err := checkRule(f.node, f.key); err != nil {
			return err
		}
		if err := d.rule(f); err != nil {
			return err
		}
	}
	return nil
}

// parameters are the keys that each rule has besides level.
func parameters(id string) []string {
	switch id {
	case "P01":
		return []string{"uid", "gid"}
	case "P09", "P11":
		return []string{"allow"}
	case "P10":
		return []string{"names"}
	case "P12":
		return []string{"allow", "kinds"}
	}
	return nil
}

// rule reads "P09: deny" and "P09: {level: deny, allow: [...]}". What is not given stays as the profile has it.
func (d decoder) rule(f field) error {
	r := d.policy.rules[f.key]
	where := "rule " + f.key
	if _, scalar := f.value.(*ast.StringNode); scalar {
		level, err := levelOf(f.value, where)
		if err != nil {
			return err
		}
		r.Level = level
		if level == Off {
			r.Names = Off
		}
		return d.setRule(f, r)
	}
	if _, null := f.value.(*ast.NullNode); null {
		return at(f.node, "%s has no level", where)
	}
	params, err := fields(f.value, where, append([]string{"level"}, parameters(f.key)...)...)
	if err != nil {
		return err
	}
	for _, p := range params {
		what := where + ": " + p.key
		switch p.key {
		case "level":
			r.Level, err = levelOf(p.value, what)
		case "names":
			if r.Names, err = levelOf(p.value, what); err == nil && r.Names == Fix {
				err = at(p.value, "%s: a name cannot be fixed; use deny, warn or off", what)
			}
		case "uid":
			r.UID, err = id(p.value, what, 1)
		case "gid":
			var g int64
			g, err = id(p.value, what, 0)
			r.GID = &g
		case "allow":
			r.Allow, err = paths(p.value, what)
		case "kinds":
			r.Kinds, err = kinds(p.value, what)
		}
		if err != nil {
			return err
		}
	}
	return d.setRule(f, r)
}

func (d decoder) setRule(f field, r rule) error {
	if f.key == "P01" && r.Level == Fix && r.UID == 0 {
		e := at(f.node, "rule P01: level fix needs the uid that the image is to run as")
		e.hint = "for example P01: {level: fix, uid: 65532}"
		return e
	}
	d.policy.rules[f.key] = r
	return nil
}

func levelOf(n ast.Node, what string) (Level, error) {
	// YAML 1.1 readers take off for false; here it is a word.
	s, err := text(n, what)
	if err != nil {
		return "", err
	}
	switch l := Level(s); l {
	case Deny, Fix, Warn, Off:
		return l, nil
	}
	return "", at(n, "%s: no level %q; levels are deny, fix, warn, off", what, s)
}

func text(n ast.Node, what string) (string, error) {
	s, ok := n.(*ast.StringNode)
	if !ok {
		return "", at(n, "%s is not a string", what)
	}
	return s.Value, nil
}

func id(n ast.Node, what string, lowest int64) (int64, error) {
	i, ok := n.(*ast.IntegerNode)
	if ok {
		if v, plain := plainNumber(i.GetToken().Value); plain && v >= lowest && v <= maxUID {
			return v, nil
		}
	}
	return 0, at(n, "%s is not a number from %d to %d", what, lowest, int64(maxUID))
}

func list(n ast.Node, what string) ([]ast.Node, error) {
	s, ok := n.(*ast.SequenceNode)
	if !ok {
		return nil, at(n, "%s is not a list", what)
	}
	return s.Values, nil
}

func paths(n ast.Node, what string) ([]string, error) {
	nodes, err := list(n, what)
	if err != nil {
		return nil, err
	}
	var all []string
	for _, n := range nodes {
		p, err := pathPattern(n, what)
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}

// pathPattern reads one path pattern, see allowed.
func pathPattern(n ast.Node, what string) (string, error) {
	s, err := text(n, what)
	if err != nil {
		return "", err
	}
	if !strings.HasPrefix(s, "/") || path.Clean(s) != s {
		return "", at(n, "%s: %q is not a clean absolute path", what, s)
	}
	if _, err := path.Match(s, ""); err != nil {
		return "", at(n, "%s: %q: %v", what, s, err)
	}
	if i := strings.Index(s, "**"); i >= 0 && (i != len(s)-2 || !strings.HasSuffix(s, "/**") || strings.ContainsAny(s[:i], `*?[\`)) {
		return "", at(n, "%s: %q: ** stands only as the last element, after plain ones", what, s)
	}
	return s, nil
}

func kinds(n ast.Node, what string) ([]string, error) {
	nodes, err := list(n, what)
	if err != nil {
		return nil, err
	}
	var all []string
	for _, n := range nodes {
		s, err := text(n, what)
		if err != nil {
			return nil, err
		}
		if !extraKind(s) {
			return nil, at(n, "%s: no kind %q; kinds are dotenv, keystore", what, s)
		}
		all = append(all, s)
	}
	return all, nil
}

func (d decoder) waiverList(n ast.Node) error {
	if _, null := n.(*ast.NullNode); null {
		return nil
	}
	nodes, err := list(n, "waivers")
	if err != nil {
		return err
	}
	for _, n := range nodes {
		w, err := readWaiver(n)
		if err != nil {
			return err
		}
		d.policy.waivers = append(d.policy.waivers, w)
	}
	return nil
}

func readWaiver(n ast.Node) (waiver, error) {
	parts, err := fields(n, "a waiver", "rule", "path", "reason", "expires")
	if err != nil {
		return waiver{}, err
	}
	w := waiver{Line: at(n, "").line}
	for i, f := range parts {
		if i == 0 {
			w.Line = at(f.node, "").line
		}
		switch f.key {
		case "rule":
			if w.Rule, err = text(f.value, "a waiver's rule"); err == nil {
				err = checkRule(f.value, w.Rule)
			}
		case "path":
			w.Path, err = pathPattern(f.value, "a waiver's path")
		case "reason":
			w.Reason, err = text(f.value, "a waiver's reason")
		case "expires":
			w.Expires, err = date(f.value)
		}
		if err != nil {
			return waiver{}, err
		}
	}
	return w, w.check(n)
}

func (w waiver) check(n ast.Node) error {
	switch {
	case w.Rule == "":
		return at(n, "a waiver without a rule")
	case strings.TrimSpace(w.Reason) == "":
		return at(n, "a waiver without a reason")
	case w.Expires.IsZero():
		return at(n, "a waiver without an expiry date")
	case w.Path == "" && slices.Contains([]string{"P09", "P11", "P12"}, w.Rule):
		e := at(n, "a waiver of %s without a path would switch the rule off", w.Rule)
		e.hint = "name the path, or say level: off"
		return e
	case w.Path != "" && w.Rule == "P01":
		return at(n, "a waiver of %s has no path: the rule is not about a file", w.Rule)
	}
	return nil
}

func date(n ast.Node) (time.Time, error) {
	t, err := time.Parse("2006-01-02", n.GetToken().Value)
	if err != nil {
		return t, at(n, "a waiver's expiry date %q is not of the form 2027-01-31", n.GetToken().Value)
	}
	return t, nil
}
