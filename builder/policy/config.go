package policy

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ConfigOptions is what [ScanConfig] needs besides the config.
type ConfigOptions struct {
	Base    []byte // the base image's config JSON; empty for scratch
	Passwd  []byte // etc/passwd of the final tree; nil when there is none
	Secrets []Secret
	// Lines are the Dockerfile lines of the entries of the config's history, 0 where unknown; may be shorter.
	Lines []int
}

// ScanConfig collects the facts of an image config. Values of secrets are looked for in every string of it.
func ScanConfig(config []byte, o ConfigOptions) (ConfigFacts, error) {
	img, err := decodeConfig(config)
	if err != nil {
		return ConfigFacts{}, fmt.Errorf("scan config: %w", err)
	}
	var base ocispec.Image
	if len(o.Base) > 0 {
		if base, err = decodeConfig(o.Base); err != nil {
			return ConfigFacts{}, fmt.Errorf("scan config of the base: %w", err)
		}
	}
	var facts ConfigFacts
	h := history{img.History, o.Lines}
	facts.User = img.Config.User
	facts.UserLine = h.line("USER ")
	if facts.UIDs, err = userIDs(img.Config.User, o.Passwd); err != nil {
		return ConfigFacts{}, fmt.Errorf("scan config: %w", err)
	}
	facts.Names = h.secretNames(img, base)

	m, unsearched := newMatcher(o.Secrets, false)
	facts.Unsearched = unsearched
	w := configWalk{m: m, history: h}
	var document any
	if err := json.Unmarshal(config, &document); err != nil {
		return ConfigFacts{}, fmt.Errorf("scan config: %w", err)
	}
	w.walk("", document)
	facts.Secrets = w.found
	return facts, nil
}

func decodeConfig(b []byte) (ocispec.Image, error) {
	var img ocispec.Image
	err := json.Unmarshal(b, &img)
	return img, err
}

// history finds the Dockerfile lines of what instructions left in the config.
type history struct {
	entries []ocispec.History
	lines   []int
}

func (h history) lineOf(i int) int {
	if i < 0 || i >= len(h.lines) {
		return 0
	}
	return h.lines[i]
}

// line is the line of the last instruction that starts with the text.
func (h history) line(instruction string) int {
	for i := len(h.entries) - 1; i >= 0; i-- {
		if strings.HasPrefix(h.entries[i].CreatedBy, instruction) {
			return h.lineOf(i)
		}
	}
	return 0
}

var (
	secretWord = regexp.MustCompile(`(?i)(^|[_.-])(apikey|auth|credentials?|key|password|pword|passwd|secret|token)([_.-]|$)`)
	publicWord = regexp.MustCompile(`(?i)(^|[_.-])(public|file|path|dir|url)([_.-]|$)`)
	runArgs    = regexp.MustCompile(`^(?:RUN )?\|\d+ (.*)`)
	argEntry   = regexp.MustCompile(`^ARG ([^\s=]+)=.`)
	assignment = regexp.MustCompile(`(?:^|\s)([A-Za-z_]\w*)=\S`)
)

// NamedLikeSecret reports whether the name of a variable promises a secret.
func NamedLikeSecret(name string) bool {
	return secretWord.MatchString(name) && !publicWord.MatchString(name)
}

// secretNames lists our variables and build arguments that have a value and are named like a secret.
func (h history) secretNames(img, base ocispec.Image) []NameFact {
	var facts []NameFact
	add := func(f NameFact) {
		same := func(o NameFact) bool { return o.In == f.In && o.Name == f.Name }
		if NamedLikeSecret(f.Name) && !slices.ContainsFunc(facts, same) {
			facts = append(facts, f)
		}
	}
	for _, env := range img.Config.Env {
		name, value, _ := strings.Cut(env, "=")
		if value != "" && !slices.Contains(base.Config.Env, env) {
			add(NameFact{In: "env", Name: name, Line: h.envLine(name)})
		}
	}
	for i, e := range h.entries[min(len(base.History), len(h.entries)):] {
		line := h.lineOf(i + len(base.History))
		if m := argEntry.FindStringSubmatch(e.CreatedBy); m != nil {
			add(NameFact{In: "arg", Name: m[1], Line: line})
		}
		if m := runArgs.FindStringSubmatch(e.CreatedBy); m != nil {
			args, _, _ := strings.Cut(m[1], " /bin/sh -c ")
			for _, a := range assignment.FindAllStringSubmatch(args, -1) {
				add(NameFact{In: "arg", Name: a[1], Line: line})
			}
		}
	}
	slices.SortFunc(facts, func(a, b NameFact) int { return strings.Compare(a.In+"\x00"+a.Name, b.In+"\x00"+b.Name) })
	return facts
}

func (h history) envLine(name string) int {
	for i := len(h.entries) - 1; i >= 0; i-- {
		by := h.entries[i].CreatedBy
		if strings.HasPrefix(by, "ENV ") && (strings.Contains(by, " "+name+"=") || strings.Contains(by, " "+name+" ")) {
			return h.lineOf(i)
		}
	}
	return 0
}

// configWalk looks for secrets in every string of a JSON document, in a stable order.
type configWalk struct {
	m       *matcher
	history history
	found   []ConfigSecret
}

func (w *configWalk) walk(at string, v any) {
	switch v := v.(type) {
	case string:
		w.text(at, v)
	case []any:
		for i, e := range v {
			w.walk(fmt.Sprintf("%s[%d]", at, i), e)
		}
	case map[string]any:
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		for i, k := range keys {
			where := strings.TrimPrefix(at+"."+k, ".")
			if w.text(at+" (a key)", k) {
				where = fmt.Sprintf("%s.(key %d)", at, i) // the key must not be told
			}
			w.walk(where, v[k])
		}
	}
}

func (w *configWalk) text(at, s string) (hit bool) {
	before := len(w.found)
	for _, h := range w.m.find([]byte(s)) {
		f := ConfigSecret{Secret: w.m.ids[h.pattern.secret], In: at, Form: h.pattern.form}
		var i int
		if n, _ := fmt.Sscanf(at, "history[%d]", &i); n == 1 {
			f.History, f.Line = true, w.history.lineOf(i)
		} else {
			f.Line = w.line(at, s)
		}
		w.found = append(w.found, f)
	}
	return len(w.found) > before
}

// line finds the instruction that put the string into the config.
func (w *configWalk) line(at, s string) int {
	switch {
	case strings.HasPrefix(at, "config.Env["):
		name, _, _ := strings.Cut(s, "=")
		return w.history.envLine(name)
	case strings.HasPrefix(at, "config.Labels"):
		return w.history.line("LABEL ")
	case strings.HasPrefix(at, "config.Cmd"):
		return w.history.line("CMD ")
	case strings.HasPrefix(at, "config.Entrypoint"):
		return w.history.line("ENTRYPOINT ")
	case strings.HasPrefix(at, "config.Healthcheck"):
		return w.history.line("HEALTHCHECK ")
	}
	return 0
}

// maxUID is the largest id that no runtime takes for a negative number.
const maxUID = 1<<31 - 1

// userName is what every runtime takes for a name. Anything else that is not a plain number is read
// differently by different runtimes: "+0" and "00" are root for some and an unknown name for others.
var userName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]*\$?$`)

// plainNumber parses a decimal number written the one way.
func plainNumber(s string) (int64, bool) {
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil && n >= 0 && strconv.FormatInt(n, 10) == s
}

// userIDs lists every id that a runtime can make of the config's user: docker looks a number up as a name first,
// others never do.
func userIDs(user string, passwd []byte) ([]int64, error) {
	name, _, _ := strings.Cut(user, ":")
	if name == "" {
		return []int64{0}, nil
	}
	var ids []int64
	if n, ok := plainNumber(name); ok {
		ids = append(ids, n)
	}
	lines := bufio.NewReader(bytes.NewReader(passwd))
	for {
		line, err := lines.ReadString('\n')
		fields := strings.Split(strings.TrimSpace(line), ":")
		if len(fields) >= 3 && fields[0] == name {
			n, err := strconv.ParseInt(fields[2], 10, 64)
			if err != nil {
				n = 0 // what cannot be read must not pass for an ordinary user
			}
			ids = append(ids, n)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}
