package arch

import (
	"go/ast"
	"go/token"
	"go/types"
	"strings"
)

// variables finds package variables that are state: without a value from the start, made of something that exists to change, or
// written to anywhere in the package.
func variables(p *pkg) []Finding {
	var found []Finding
	declared := map[types.Object]bool{}
	for _, file := range p.files {
		for _, decl := range file.Decls {
			group, ok := decl.(*ast.GenDecl)
			if !ok || group.Tok != token.VAR {
				continue
			}
			for _, spec := range group.Specs {
				spec := spec.(*ast.ValueSpec)
				for _, name := range spec.Names {
					declared[p.info.Defs[name]] = true
				}
				if why := state(group, spec); why != "" {
					found = append(found, p.finding(spec, "package variable %s.%s %s: state has one owner, a value that a function returns", p.name, spec.Names[0].Name, why))
				}
			}
		}
	}
	delete(declared, nil)
	for _, file := range p.files {
		ast.Inspect(file, func(n ast.Node) bool {
			for _, target := range written(n) {
				id := root(target)
				if id == nil {
					continue
				}
				_, others := p.info.Uses[id].(*types.PkgName)
				if _, takesAddress := n.(*ast.UnaryExpr); others && takesAddress {
					continue // of a variable that is often meant to be pointed at, such as http.DefaultClient
				}
				if others || declared[p.info.Uses[id]] {
					found = append(found, p.finding(target, "%s changes package variable %s: no package variable changes after start", p.name, types.ExprString(target)))
				}
			}
			return true
		})
	}
	return found
}

// state says why a declaration alone makes a variable state, or "".
func state(group *ast.GenDecl, spec *ast.ValueSpec) string {
	if len(spec.Values) == 0 && !embeds(group.Doc) && !embeds(spec.Doc) {
		return "starts empty"
	}
	var why string
	ast.Inspect(spec, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncLit:
			return false // runs later, with variables of its own; what it writes to is found elsewhere
		case *ast.SelectorExpr:
			if strings.HasPrefix(n.Sel.Name, "OnceValue") {
				return true // a constant that is computed when it is first needed; start-up is paid for by every RUN
			}
			if id, ok := n.X.(*ast.Ident); ok && (id.Name == "sync" || id.Name == "atomic") {
				why = "is a " + id.Name + "." + n.Sel.Name
			}
		case *ast.CallExpr:
			if id, ok := n.Fun.(*ast.Ident); ok && (id.Name == "make" || id.Name == "new") {
				why = "is made to be filled"
			}
		case *ast.ChanType:
			why = "is a channel"
		}
		return why == ""
	})
	return why
}

func embeds(doc *ast.CommentGroup) bool {
	if doc == nil {
		return false
	}
	for _, c := range doc.List {
		if strings.HasPrefix(c.Text, "//go:embed ") {
			return true
		}
	}
	return false
}

// written lists what a node writes to, or lets others write to.
func written(n ast.Node) []ast.Expr {
	switch n := n.(type) {
	case *ast.AssignStmt:
		if n.Tok != token.DEFINE {
			return n.Lhs
		}
	case *ast.IncDecStmt:
		return []ast.Expr{n.X}
	case *ast.RangeStmt:
		if n.Tok == token.ASSIGN {
			return []ast.Expr{n.Key, n.Value}
		}
	case *ast.UnaryExpr:
		if n.Op == token.AND {
			return []ast.Expr{n.X}
		}
	case *ast.CallExpr:
		if id, ok := n.Fun.(*ast.Ident); ok && len(n.Args) > 0 {
			switch id.Name {
			case "delete", "clear", "copy":
				return n.Args[:1]
			}
		}
	}
	return nil
}

// root is the variable that an expression reaches into: x in x, x[i], x.f and *x.
func root(e ast.Expr) *ast.Ident {
	for {
		switch n := e.(type) {
		case *ast.Ident:
			return n
		case *ast.IndexExpr:
			e = n.X
		case *ast.SelectorExpr:
			e = n.X
		case *ast.StarExpr:
			e = n.X
		case *ast.ParenExpr:
			e = n.X
		case *ast.SliceExpr:
			e = n.X
		default:
			return nil
		}
	}
}
