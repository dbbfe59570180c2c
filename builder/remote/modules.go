package remote

import (
	"errors"
	"fmt"
	"path"
	"strings"
)

// module is a section of .gitmodules.
type module struct{ name, path, url, update string }

const modulesLimit = 1 << 20

// readModules reads .gitmodules at the top of the tree. Only a plain file counts, as in git.
func (r *repository) readModules() ([]module, error) {
	entries, err := r.entries(r.tree)
	if err != nil {
		return nil, err
	}
	i := find(entries, ".gitmodules")
	if i < 0 {
		return nil, nil
	}
	if k := entries[i].kind; k != regular && k != executable {
		return nil, errors.New(".gitmodules is not a file")
	}
	if o, ok := r.pack.byID[entries[i].id]; ok && r.pack.packed[o].length > modulesLimit {
		return nil, errors.New(".gitmodules is too large")
	}
	text, err := r.pack.read(entries[i].id, blobObject)
	if err != nil {
		return nil, err
	}
	modules, err := parseModules(string(text))
	if err != nil {
		return nil, fmt.Errorf(".gitmodules: %w", err)
	}
	return modules, nil
}

// openModule fetches the commit of a submodule. It is nil where the repository says that it is not to be checked out.
func (k *checkout) openModule(parent *repository, at string, id oid) (*repository, error) {
	var m module
	for _, c := range parent.modules {
		if c.path == at {
			m = c
		}
	}
	if m.url == "" {
		return nil, withHint(errors.New("no url for it in .gitmodules"), "without submodules: ?submodules=false after the address")
	}
	if m.update == "none" {
		return nil, nil
	}
	if k.modules++; k.modules > k.limit.Modules {
		return nil, fmt.Errorf("more than %d submodules", k.limit.Modules)
	}
	r := &repository{nesting: parent.nesting + 1, work: path.Join(parent.work, at), place: path.Join(parent.place, "modules", m.name)}
	if r.nesting > k.limit.Nesting {
		return nil, fmt.Errorf("submodules in submodules, more than %d deep", k.limit.Nesting)
	}
	url, err := parent.at.join(m.url)
	if err != nil {
		return nil, fmt.Errorf("url %q: %w", redact(m.url), err)
	}
	if parent.git != nil {
		if r.git, err = parent.moduleGit(m); err != nil {
			return nil, err
		}
		m.url = url.String()
		parent.used = append(parent.used, m)
	}
	if err := k.open(url, id, r); err != nil {
		r.close()
		return nil, fmt.Errorf("%s: %w", url, err)
	}
	return r, nil
}

// parseModules reads the sections [submodule "name"] of a file in git's config syntax.
func parseModules(text string) ([]module, error) {
	p := &configParser{rest: strings.TrimPrefix(text, "\ufeff"), line: 1}
	var modules []module
	byName := map[string]int{}
	var current *module
	for {
		section, name, key, value, err := p.next()
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", p.line, err)
		}
		switch {
		case section == "" && key == "":
			return modules, nil
		case section != "":
			current = nil
			if section != "submodule" || name == "" {
				continue
			}
			if err := checkModuleName(name); err != nil {
				return nil, fmt.Errorf("line %d: %w", p.line, err)
			}
			if _, ok := byName[name]; !ok {
				byName[name] = len(modules)
				modules = append(modules, module{name: name})
			}
			current = &modules[byName[name]]
		case current == nil:
		case key == "path":
			current.path = strings.TrimSuffix(value, "/")
		case key == "url":
			current.url = strings.TrimSuffix(value, "/")
		case key == "update":
			current.update = value
		}
	}
}

// checkModuleName refuses names that would lead out of .git/modules, or make a .git in it.
func checkModuleName(name string) error {
	for part := range strings.SplitSeq(strings.ReplaceAll(name, `\`, "/"), "/") {
		if err := checkName(part); err != nil {
			return fmt.Errorf("a submodule is called %q", name)
		}
	}
	if strings.ContainsAny(name, "\n\r\x00") || strings.HasPrefix(name, "-") {
		return fmt.Errorf("a submodule is called %q", name)
	}
	return nil
}

// configParser reads git's config syntax one section header or one value at a time.
type configParser struct {
	rest string
	line int
}

var errConfig = errors.New("not a section or a value")

// next is the next header (section, and its name in quotes) or value (key and value). All are empty at the end.
func (p *configParser) next() (section, name, key, value string, err error) {
	for {
		p.rest = strings.TrimLeft(p.rest, " \t\r")
		switch {
		case p.rest == "":
			return "", "", "", "", nil
		case p.rest[0] == '\n':
			p.rest, p.line = p.rest[1:], p.line+1
		case p.rest[0] == '#' || p.rest[0] == ';':
			_, p.rest, _ = strings.Cut(p.rest, "\n")
			p.line++
		case p.rest[0] == '[':
			section, name, err = p.header()
			return section, name, "", "", err
		default:
			key, value, err = p.value()
			return "", "", key, value, err
		}
	}
}

func (p *configParser) header() (section, name string, err error) {
	end := strings.IndexAny(p.rest, " \t]\"\n")
	if end < 2 {
		return "", "", errConfig
	}
	section = strings.ToLower(p.rest[1:end])
	rest := strings.TrimLeft(p.rest[end:], " \t")
	if strings.HasPrefix(rest, `"`) {
		var b strings.Builder
		i := 1
		for ; i < len(rest) && rest[i] != '"'; i++ {
			if rest[i] == '\\' {
				i++
			}
			if i >= len(rest) || rest[i] == '\n' {
				return "", "", errConfig
			}
			b.WriteByte(rest[i])
		}
		if i >= len(rest) {
			return "", "", errConfig
		}
		name, rest = b.String(), rest[i+1:]
	}
	if !strings.HasPrefix(rest, "]") {
		return "", "", errConfig
	}
	p.rest = rest[1:]
	return section, name, nil
}

func (p *configParser) value() (key, value string, err error) {
	end := strings.IndexFunc(p.rest, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-'
	})
	if end < 0 {
		end = len(p.rest)
	}
	if end == 0 {
		return "", "", errConfig
	}
	key = strings.ToLower(p.rest[:end])
	p.rest = strings.TrimLeft(p.rest[end:], " \t")
	if !strings.HasPrefix(p.rest, "=") {
		if p.rest != "" && !strings.ContainsRune("\r\n#;", rune(p.rest[0])) {
			return "", "", errConfig
		}
		return key, "true", nil
	}
	p.rest = strings.TrimLeft(p.rest[1:], " \t")
	var b strings.Builder
	quoted, solid := false, 0 // solid: how much of b is not white space at the end
	for p.rest != "" {
		c := p.rest[0]
		p.rest = p.rest[1:]
		switch {
		case c == '\n':
			if quoted {
				return "", "", errConfig
			}
			p.line++
			return key, b.String()[:solid], nil
		case c == '"':
			quoted = !quoted
			solid = b.Len()
		case !quoted && (c == '#' || c == ';'):
			rest := ""
			if _, after, ok := strings.Cut(p.rest, "\n"); ok {
				rest = after
			}
			p.rest, p.line = rest, p.line+1
			return key, b.String()[:solid], nil
		case c == '\\':
			p.rest = strings.TrimPrefix(p.rest, "\r")
			if p.rest == "" {
				return "", "", errConfig
			}
			escaped := map[byte]string{'n': "\n", 't': "\t", 'b': "\b", '"': `"`, '\\': `\`, '\n': ""}
			s, ok := escaped[p.rest[0]]
			if !ok {
				return "", "", errConfig
			}
			if p.rest[0] == '\n' {
				p.line++
			}
			p.rest = p.rest[1:]
			b.WriteString(s)
			solid = b.Len()
		default:
			b.WriteByte(c)
			if quoted || (c != ' ' && c != '\t' && c != '\r') {
				solid = b.Len()
			}
		}
	}
	if quoted {
		return "", "", errConfig
	}
	return key, b.String()[:solid], nil
}
