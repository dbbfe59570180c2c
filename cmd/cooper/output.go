package main

import (
	"encoding/csv"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/term"

	"github.com/cooper-build/cooper/builder"
)

// fields reads a flag value of the form key=value,key=value, as buildx does (a CSV line, so that a value
// may hold a comma when it is quoted).
func fields(flag, s string, known ...string) (map[string]string, error) {
	parts, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return nil, usageError{fmt.Errorf("%s %q: %w", flag, s, err)}
	}
	out := map[string]string{}
	for _, p := range parts {
		k, v, ok := strings.Cut(p, "=")
		k = strings.ToLower(strings.TrimSpace(k))
		if !ok {
			return nil, usageError{fmt.Errorf("%s %q: %q is not key=value", flag, s, p)}
		}
		if !slices.Contains(known, k) {
			return nil, usageError{fmt.Errorf("%s %q: unknown key %q (known: %s)", flag, s, k, strings.Join(known, ", "))}
		}
		if _, twice := out[k]; twice {
			return nil, usageError{fmt.Errorf("%s %q: %s is given twice", flag, s, k)}
		}
		out[k] = v
	}
	return out, nil
}

// addOutputs reads every -o into the request.
func (f *buildFlags) addOutputs(r *builder.Request) error {
	for _, s := range f.outputs {
		if !strings.Contains(s, "=") { // buildx: a bare path is a directory for the files
			r.Outputs = append(r.Outputs, builder.Tree{Dir: s})
			continue
		}
		o, err := fields("--output", s, "type", "dest", "tar", "push", "name")
		if err != nil {
			return err
		}
		if err := addOutput(r, s, o); err != nil {
			return err
		}
	}
	if r.Push && len(r.Names) == 0 {
		return usageError{fmt.Errorf("pushing needs a name: add --tag REGISTRY/NAME:TAG")}
	}
	return nil
}

// outputKeys are the keys that mean something to each type: one that would be ignored is a mistake.
var outputKeys = map[string][]string{
	"oci":      {"dest", "tar", "name"},
	"local":    {"dest"},
	"image":    {"push", "name"},
	"registry": {"push", "name"},
}

func addOutput(r *builder.Request, s string, o map[string]string) error {
	flag := func(name string, unset bool) (bool, error) {
		v, given := o[name]
		if !given {
			return unset, nil
		}
		b, err := strconv.ParseBool(v)
		if err != nil {
			return false, usageError{fmt.Errorf("--output %q: %s=%q is not true or false", s, name, v)}
		}
		return b, nil
	}
	dest := func() (string, error) {
		if o["dest"] == "" {
			return "", usageError{fmt.Errorf("--output %q: dest= is missing", s)}
		}
		return o["dest"], nil
	}
	for key := range o {
		if key != "type" && !slices.Contains(outputKeys[o["type"]], key) && outputKeys[o["type"]] != nil {
			return usageError{fmt.Errorf("--output %q: %s= means nothing to type %s", s, key, o["type"])}
		}
	}
	if n := o["name"]; n != "" {
		full, err := fullName(n)
		if err != nil {
			return err
		}
		r.Names = append(r.Names, full)
	}
	switch o["type"] {
	case "oci":
		to, err := dest()
		if err != nil {
			return err
		}
		tar, err := flag("tar", true)
		if err != nil {
			return err
		}
		switch {
		case to == "-" && !tar:
			return usageError{fmt.Errorf("--output %q: a directory cannot go to standard output", s)}
		case to == "-" && term.IsTerminal(int(os.Stdout.Fd())):
			return usageError{fmt.Errorf("--output %q: standard output is a terminal; send it to a file or a pipe", s)}
		case to == "-":
			r.Outputs = append(r.Outputs, builder.Stream{To: os.Stdout})
		case tar:
			r.Outputs = append(r.Outputs, builder.Archive{File: to})
		default:
			r.Outputs = append(r.Outputs, builder.Layout{Dir: to})
		}
	case "local":
		to, err := dest()
		if err != nil {
			return err
		}
		r.Outputs = append(r.Outputs, builder.Tree{Dir: to})
	case "image", "registry":
		push, err := flag("push", o["type"] == "registry")
		if err != nil {
			return err
		}
		r.Push = r.Push || push
	case "":
		return usageError{fmt.Errorf("--output %q: type= is missing", s)}
	default:
		return usageError{fmt.Errorf("--output %q: type %q is not supported (oci, local, image and registry are)", s, o["type"])}
	}
	return nil
}
