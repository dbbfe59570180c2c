// Package arch checks that the source keeps the shape docs/architecture.md draws: which package may import which, where each large
// dependency is at home, and that only commands print, exit or read the environment.
//
// It reads source files and nothing else: no build, no module cache, no network. So it sees every file whatever its build tags, runs
// under any account, and its findings cannot depend on the machine. It refuses to know style; gofmt, vet and staticcheck do that.
package arch

import (
	"cmp"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Rules say what Check enforces. Package names are relative to Module; a pattern is a name, or a name and "/..." for all beneath it.
type Rules struct {
	Module string

	// Own lists, for every package, the packages of this module that it may import. A package that is not listed is a finding:
	// whoever adds one decides where it stands.
	Own map[string][]string

	// Foreign gives dependencies a home. The longest matching import path decides; a dependency without a rule is free for all.
	Foreign []Foreign

	// Calls lists what only Callers may use.
	Calls   []Call
	Callers []string

	// Inits lets packages have a func init; each Function is "package.init".
	Inits []Except
}

// Foreign says which packages may import Path and everything beneath it, and why only they.
type Foreign struct {
	Path string
	Only []string
	Why  string
}

// Call forbids a name of a package of the standard library outside Rules.Callers. A builtin has an empty Package. A Name that ends in
// "*" is a prefix.
type Call struct {
	Package, Name string
	Why           string
	Except        []Except
}

// Except lets one function use a forbidden name, for a stated reason.
type Except struct {
	Function string // "package.Function" or "package.Type.Method"
	Reason   string
}

// Finding is one place where the source breaks a rule.
type Finding struct {
	Pos     token.Position
	Message string
}

func (f Finding) String() string {
	return fmt.Sprintf("%s:%d: %s", f.Pos.Filename, f.Pos.Line, f.Message)
}

// Check reads the module in dir and returns what breaks the rules, sorted by place. Test files and testdata are not checked: a test
// may import and print what it likes. The error is about reading, never about rules.
func Check(dir string, rules Rules) ([]Finding, error) {
	packages, err := parse(dir)
	if err != nil {
		return nil, err
	}
	var found []Finding
	for _, p := range packages {
		found = append(found, rules.imports(p)...)
		found = append(found, rules.uses(p)...)
		found = append(found, rules.inits(p)...)
		found = append(found, variables(p)...)
	}
	slices.SortFunc(found, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Pos.Filename, b.Pos.Filename), cmp.Compare(a.Pos.Offset, b.Pos.Offset), cmp.Compare(a.Message, b.Message))
	})
	return found, nil
}

// pkg is one package without its tests.
type pkg struct {
	name  string // relative to the module; "" is its root
	main  bool
	fset  *token.FileSet
	files []*ast.File
	info  *types.Info
}

func (p *pkg) finding(at ast.Node, format string, args ...any) Finding {
	return Finding{Pos: p.fset.Position(at.Pos()), Message: fmt.Sprintf(format, args...)}
}

func parse(dir string) ([]*pkg, error) {
	byDir := map[string]*pkg{}
	err := filepath.WalkDir(dir, func(file string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		base := e.Name()
		if e.IsDir() {
			hidden := strings.HasPrefix(base, ".") || strings.HasPrefix(base, "_") || base == "testdata"
			if hidden && file != dir {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(base, ".go") || strings.HasSuffix(base, "_test.go") {
			return nil
		}
		return addFile(byDir, dir, file)
	})
	if err != nil {
		return nil, err
	}
	packages := make([]*pkg, 0, len(byDir))
	for _, p := range byDir {
		p.resolve()
		packages = append(packages, p)
	}
	slices.SortFunc(packages, func(a, b *pkg) int { return cmp.Compare(a.name, b.name) })
	return packages, nil
}

func addFile(byDir map[string]*pkg, root, file string) error {
	rel, err := filepath.Rel(root, file)
	if err != nil {
		return err
	}
	name := strings.TrimPrefix(path.Dir(filepath.ToSlash(rel)), ".")
	p := byDir[name]
	if p == nil {
		p = &pkg{name: name, fset: token.NewFileSet()}
		byDir[name] = p
	}
	src, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	f, err := parser.ParseFile(p.fset, filepath.ToSlash(rel), src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return err
	}
	p.main = f.Name.Name == "main"
	p.files = append(p.files, f)
	return nil
}

// resolve finds what every identifier means inside the package. Imports are empty shells and the type errors that follow are ignored:
// to tell a package's variable from a local one, and package os from a variable called os, scopes are enough.
func (p *pkg) resolve() {
	p.info = &types.Info{Uses: map[*ast.Ident]types.Object{}, Defs: map[*ast.Ident]types.Object{}}
	config := types.Config{Importer: noImports{}, Error: func(error) {}, FakeImportC: true}
	config.Check(p.name, p.fset, p.files, p.info)
}

type noImports struct{}

func (noImports) Import(string) (*types.Package, error) {
	return nil, errors.New("imports are not read")
}

// matches reports whether name is the pattern, or is beneath it when the pattern ends in "/...".
func matches(pattern, name string) bool {
	if above, ok := strings.CutSuffix(pattern, "/..."); ok {
		return name == above || strings.HasPrefix(name, above+"/")
	}
	return pattern == name
}

func anyMatches(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, name) })
}

func (r Rules) imports(p *pkg) []Finding {
	var found []Finding
	allowed, known := r.Own[p.name]
	if !known {
		found = append(found, p.finding(p.files[0], "package %s has no place in the house: say in internal/arch what it may import", p.name))
	}
	for _, file := range p.files {
		for _, spec := range file.Imports {
			target, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				continue // the parser has checked it
			}
			own, isOwn := strings.CutPrefix(target, r.Module+"/")
			switch {
			case isOwn && known && !anyMatches(allowed, own):
				found = append(found, p.finding(spec, "%s imports %s: imports only go down, and what %s may know is %s",
					p.name, own, p.name, listed(allowed)))
			case !isOwn:
				if home, ok := r.home(target); ok && !anyMatches(home.Only, p.name) {
					found = append(found, p.finding(spec, "%s imports %s: only %s may, because %s", p.name, target, listed(home.Only), home.Why))
				}
			}
		}
	}
	return found
}

func listed(names []string) string {
	if len(names) == 0 {
		return "nothing of ours"
	}
	return strings.Join(names, ", ")
}

func (r Rules) home(target string) (Foreign, bool) {
	var best Foreign
	for _, f := range r.Foreign {
		if matches(f.Path+"/...", target) && len(f.Path) > len(best.Path) {
			best = f
		}
	}
	return best, best.Path != ""
}

func (r Rules) uses(p *pkg) []Finding {
	if anyMatches(r.Callers, p.name) {
		return nil
	}
	var found []Finding
	for _, file := range p.files {
		for _, decl := range file.Decls {
			inside := p.name + "." + declared(decl)
			ast.Inspect(decl, func(n ast.Node) bool {
				from, name, ok := p.used(n)
				if !ok {
					return true
				}
				for _, call := range r.Calls {
					if call.Package == from && nameMatches(call.Name, name) && !call.excepts(inside) {
						found = append(found, p.finding(n, "%s uses %s: %s", p.name, strings.TrimPrefix(from+"."+name, "."), call.Why))
					}
				}
				return true
			})
		}
	}
	return found
}

// used names what a node refers to: a name of an imported package, or a builtin.
func (p *pkg) used(n ast.Node) (from, name string, ok bool) {
	switch n := n.(type) {
	case *ast.SelectorExpr:
		id, isIdent := n.X.(*ast.Ident)
		if !isIdent {
			return "", "", false
		}
		imported, isPackage := p.info.Uses[id].(*types.PkgName)
		if !isPackage {
			return "", "", false
		}
		return imported.Imported().Path(), n.Sel.Name, true
	case *ast.Ident:
		_, builtin := p.info.Uses[n].(*types.Builtin)
		return "", n.Name, builtin
	}
	return "", "", false
}

func nameMatches(pattern, name string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(name, prefix)
	}
	return pattern == name
}

func (c Call) excepts(function string) bool {
	return slices.ContainsFunc(c.Except, func(e Except) bool { return e.Function == function })
}

// declared names the function that a declaration is, as Except.Function spells it after the package.
func declared(d ast.Decl) string {
	f, ok := d.(*ast.FuncDecl)
	if !ok {
		return ""
	}
	if f.Recv == nil || len(f.Recv.List) == 0 {
		return f.Name.Name
	}
	receiver := f.Recv.List[0].Type
	if star, ok := receiver.(*ast.StarExpr); ok {
		receiver = star.X
	}
	if id, ok := receiver.(*ast.Ident); ok {
		return id.Name + "." + f.Name.Name
	}
	return f.Name.Name
}

func (r Rules) inits(p *pkg) []Finding {
	var found []Finding
	if slices.ContainsFunc(r.Inits, func(e Except) bool { return e.Function == p.name+".init" }) {
		return nil
	}
	for _, file := range p.files {
		for _, decl := range file.Decls {
			if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil && f.Name.Name == "init" {
				found = append(found, p.finding(f, "%s has func init: what a package does must not depend on who imports it, and every RUN would pay for it again", p.name))
			}
		}
	}
	return found
}
