package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/term"

	"github.com/cooper-build/cooper/builder"
	"github.com/cooper-build/cooper/snapshot/layer"
)

// An output is a value of --output.
type output struct {
	raw         string
	kind        string
	dest        string
	keys        map[string]string // the others that were given
	names       []string
	annotations []builder.Annotation
}

// carriesImage says whether names and annotations mean something to it.
func (o output) carriesImage() bool { return slices.Contains(imageKinds(), o.kind) }

// toStdout says whether it is written to standard output.
func (o output) toStdout() bool { return o.dest == "-" }

func (o output) is(key string) bool {
	b, err := strconv.ParseBool(o.keys[key])
	return err == nil && b
}

func (o output) fail(format string, args ...any) error {
	return usageError{fmt.Errorf("--output %q: %w", o.raw, fmt.Errorf(format, args...))}
}

// parseOutput reads one value; index says whether images of several platforms are made.
func parseOutput(s string, index bool) (output, error) {
	o := output{raw: s, keys: map[string]string{}}
	parts, err := csvLine("--output", s)
	if err != nil {
		return o, err
	}
	if len(parts) == 1 && parts[0] == s && !slices.ContainsFunc(allOutputKeys(), func(k string) bool { return strings.HasPrefix(s, k+"=") }) {
		o.kind, o.dest = "local", s // buildx: a bare path is a directory for the files
		if s == "-" {
			o.kind = "tar"
		}
		return o, nil
	}
	given, err := fields("--output", s)
	if err != nil {
		return o, err
	}
	o.kind, o.dest = given["type"], given["dest"]
	delete(given, "type")
	if err := o.checkKind(); err != nil {
		return o, err
	}
	for key, v := range given {
		if err := o.take(key, v, index); err != nil {
			return o, err
		}
	}
	slices.SortFunc(o.annotations, func(a, b builder.Annotation) int { return strings.Compare(a.Key, b.Key) })
	return o, o.complete(index)
}

func (o *output) checkKind() error {
	switch {
	case o.kind == "":
		return o.fail("type= is missing")
	case !slices.Contains(outputKinds(), o.kind):
		return o.fail("type %q is not supported (%s are)", o.kind, strings.Join(outputKinds(), ", "))
	}
	return nil
}

// take stores the value of a key, once it is known to mean what it means to BuildKit.
func (o *output) take(key, v string, index bool) error {
	a, isAnnotation, err := outputAnnotation(key, v)
	if err != nil {
		return o.fail("%w", err)
	}
	if isAnnotation {
		if !o.carriesImage() {
			return o.fail("%s= means nothing to type %s", key, o.kind)
		}
		o.annotations = append(o.annotations, a)
		return nil
	}
	rule, known := outputKeys()[key]
	switch {
	case !known:
		return o.fail("unknown key %q (known to type %s: %s)", key, o.kind, strings.Join(keysOf(o.kind), ", "))
	case !slices.Contains(rule.kinds, o.kind):
		return o.fail("%s= means nothing to type %s", key, o.kind)
	}
	if rule.check != nil {
		if err := rule.check(v, index); err != nil {
			return usageError{hinted{fmt.Errorf("--output %q: %s=%s: %w", o.raw, key, v, err), rule.hint}}
		}
	}
	if key == "name" {
		for _, n := range strings.Split(v, ",") {
			full, err := fullName(n)
			if err != nil {
				return err
			}
			o.names = append(o.names, full)
		}
	}
	o.keys[key] = v
	return nil
}

// complete fills in the destination that is meant, and refuses combinations.
func (o *output) complete(index bool) error {
	if err := o.compression().Check(); err != nil {
		return o.fail("compression-level: %w", err)
	}
	tar := o.keys["tar"] == "" || o.is("tar")
	switch {
	case o.kind == "docker" && o.dest == "":
		return usageError{hinted{fmt.Errorf("--output %q: %s to load the image into", o.raw, noDaemon), loadHint}}
	case o.kind == "docker" && !tar:
		return o.fail("tar=false: only a tar can be loaded into docker")
	case o.kind == "docker" && index:
		return usageError{hinted{fmt.Errorf("--output %q: a docker archive holds an image for one platform", o.raw), "use type=oci"}}
	case o.kind == "local" && o.dest == "", o.kind == "oci" && !tar && o.dest == "":
		return o.fail("dest= is missing")
	case o.kind == "local" && o.toStdout(), o.kind == "oci" && !tar && o.toStdout():
		return o.fail("a directory cannot go to standard output")
	case o.dest == "" && (o.kind == "oci" || o.kind == "tar"):
		o.dest = "-"
	case o.kind == "image" && !o.is("push") && o.keys["store"] != "" && !o.is("store"):
		return o.fail("store=false without push=true is an image that goes nowhere: use type=cacheonly")
	case o.is("push") && o.is("store"), o.kind == "registry" && o.is("store"):
		return usageError{hinted{fmt.Errorf("--output %q: what is pushed gets no name in the local store", o.raw), "build without push, and then run cooper push"}}
	case o.kind == "registry" && o.keys["push"] != "" && !o.is("push"):
		return o.fail("push=false is no type=registry: use type=image")
	}
	return nil
}

// compression is how the layers of the image are compressed. Its keys were checked.
func (o output) compression() layer.Compression {
	c := layer.Compression{Codec: layer.Codec(o.keys["compression"])}
	if level, err := strconv.Atoi(o.keys["compression-level"]); err == nil {
		c.Level = &level
	}
	return c
}

// to is where the builder writes; nil if the image only gets names.
func (o output) to(stdout *os.File) builder.Output {
	tar := o.keys["tar"] == "" || o.is("tar")
	switch {
	case o.kind == "oci" && o.toStdout():
		return builder.Stream{To: stdout}
	case o.kind == "oci" && tar:
		return builder.Archive{File: o.dest}
	case o.kind == "oci":
		return builder.Layout{Dir: o.dest}
	case o.kind == "docker" && o.toStdout():
		return builder.DockerArchive{To: stdout}
	case o.kind == "docker":
		return builder.DockerArchive{File: o.dest}
	case o.kind == "tar" && o.toStdout():
		return builder.TreeTar{To: stdout}
	case o.kind == "tar":
		return builder.TreeTar{File: o.dest}
	case o.kind == "local":
		return builder.Tree{Dir: o.dest}
	case o.kind == "cacheonly":
		return builder.Nowhere{}
	}
	return nil
}

// outputs are all values of --output.
type outputs []output

func parseOutputs(given []string, index bool) (outputs, error) {
	var all outputs
	for _, s := range given {
		if s == "" {
			continue // as buildx
		}
		o, err := parseOutput(s, index)
		if err != nil {
			return nil, err
		}
		all = append(all, o)
	}
	if n := len(slices.DeleteFunc(slices.Clone(all), func(o output) bool { return !o.toStdout() })); n > 1 {
		return nil, usageError{fmt.Errorf("--output: %d outputs are to go to standard output", n)}
	}
	return all, all.agree()
}

// agree refuses images that differ between outputs: a build makes one, with one set of names.
func (all outputs) agree() error {
	var first *output
	for i, o := range all {
		if !o.carriesImage() {
			continue
		}
		if first == nil {
			first = &all[i]
		}
		if !slices.Equal(o.names, first.names) {
			return usageError{hinted{errors.New("--output: the names differ between outputs"), "name the image with --tag, or build once for each"}}
		}
		if !reflect.DeepEqual(o.annotations, first.annotations) {
			return usageError{hinted{errors.New("--output: the annotations differ between outputs"), "give them with --annotation, or build once for each"}}
		}
		if o.compression().String() != first.compression().String() || o.is("force-compression") != first.is("force-compression") {
			return usageError{hinted{errors.New("--output: the compression differs between outputs"), "build once for each: all but the compressing is in the cache"}}
		}
	}
	return nil
}

// carryImage says whether there is an image to tell of; without any output it goes to the store.
func (all outputs) carryImage() bool { return len(all) == 0 || firstImage(all) >= 0 }

// add puts the outputs into the request, which has the names of --tag and what --push says.
func (all outputs) add(r *builder.Request) error {
	stored := false
	for _, o := range all {
		if len(o.names) > 0 && len(r.Names) > 0 && !slices.Equal(r.Names, o.names) {
			return usageError{hinted{fmt.Errorf("--output %q: --tag names the image, too", o.raw), "give all names with --tag"}}
		}
		if o.kind == "image" && !o.is("push") && !r.Push {
			stored = true
		}
	}
	for _, o := range all {
		if !o.carriesImage() {
			continue
		}
		r.Compression, r.ForceCompression = o.compression(), o.is("force-compression")
		if len(r.Names) == 0 {
			r.Names = o.names
		}
		r.Push = r.Push || o.kind == "registry" || o.is("push")
	}
	for _, o := range all {
		if to := o.to(os.Stdout); to != nil {
			r.Outputs = append(r.Outputs, to)
		}
	}
	if stored {
		// An image stays in the store when nothing else is asked for.
		r.Outputs = slices.DeleteFunc(r.Outputs, func(o builder.Output) bool { _, nowhere := o.(builder.Nowhere); return nowhere })
		if len(r.Outputs) > 0 || r.Push {
			return usageError{hinted{errors.New("--output type=image: an image that goes elsewhere does not also stay in the store"),
				"leave it out, and build again for the store: all of it is in the cache"}}
		}
	}
	if r.Push && len(r.Names) == 0 {
		return usageError{errors.New("pushing needs a name: add --tag REGISTRY/NAME:TAG")}
	}
	return nil
}

// usesStdout says whether an output is written to standard output.
func (all outputs) usesStdout() bool { return slices.ContainsFunc(all, output.toStdout) }

// prepare looks at the places before hours are spent on what goes there, and makes the directories that files go into,
// as buildx does.
func (all outputs) prepare(stdout *os.File) error {
	for _, o := range all {
		if o.toStdout() && term.IsTerminal(int(stdout.Fd())) {
			return o.fail("standard output is a terminal; send it to a file or a pipe")
		}
		if o.dest == "" || o.toStdout() {
			continue
		}
		isDir := o.kind == "local" || o.keys["tar"] != "" && !o.is("tar")
		info, err := os.Stat(o.dest)
		switch {
		case err == nil && info.IsDir() && !isDir:
			return o.fail("%s is a directory, not a file", o.dest)
		case err == nil && !info.IsDir() && isDir:
			return o.fail("%s is a file, not a directory", o.dest)
		case err != nil && !errors.Is(err, os.ErrNotExist):
			return o.fail("%w", err)
		}
		if !isDir {
			if err := os.MkdirAll(filepath.Dir(o.dest), 0o755); err != nil {
				return o.fail("%w", err)
			}
		}
	}
	return nil
}

// firstImage is the first output that an image goes to, -1 if there is none.
func firstImage(all outputs) int { return slices.IndexFunc(all, output.carriesImage) }
