package main

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cooper-build/cooper/builder"
)

var (
	annotationType = regexp.MustCompile(`^([a-z-]+)(?:\[([A-Za-z0-9_/-]+)\])?$`)
	annotationKey  = regexp.MustCompile(`^annotation(?:-([a-z-]+))?(?:\[([a-z0-9_/-]+)\])?\.(\S+)$`)
)

// parseAnnotation reads --annotation: a value for one key in several places.
func parseAnnotation(s string) ([]builder.Annotation, error) {
	fail := func(err error) ([]builder.Annotation, error) {
		return nil, usageError{fmt.Errorf("--annotation %q: %w", s, err)}
	}
	where, value, ok := strings.Cut(s, "=")
	if !ok {
		return fail(errors.New("[TYPE:]NAME=VALUE expected"))
	}
	types, key, ok := strings.Cut(where, ":")
	if !ok {
		types, key = "manifest", where
	}
	if key == "" {
		return fail(errors.New("the name is missing"))
	}
	var out []builder.Annotation
	for _, t := range strings.Split(types, ",") {
		m := annotationType.FindStringSubmatch(t)
		if m == nil {
			return fail(fmt.Errorf("%q is not a type with an optional platform in square brackets", t))
		}
		a, err := annotation(m[1], m[2], key, value)
		if err != nil {
			return fail(err)
		}
		out = append(out, a)
	}
	return out, nil
}

// outputAnnotation reads annotation.NAME, annotation-index.NAME, annotation-manifest[PLATFORM].NAME of --output; isOne
// says whether the key is one of those.
func outputAnnotation(key, value string) (a builder.Annotation, isOne bool, err error) {
	m := annotationKey.FindStringSubmatch(key)
	if m == nil {
		return a, false, nil
	}
	if m[1] == "" {
		m[1] = "manifest"
	}
	a, err = annotation(m[1], m[2], m[3], value)
	return a, true, err
}

func annotation(where, platform, key, value string) (builder.Annotation, error) {
	a := builder.Annotation{Key: key, Value: value}
	switch where {
	case "manifest":
		a.On = builder.OnManifest
	case "index":
		a.On = builder.OnIndex
	case "manifest-descriptor":
		a.On = builder.OnManifestDescriptor
	case "index-descriptor":
		a.On = builder.OnIndexDescriptor
	default:
		return a, fmt.Errorf("type %q is none of manifest, index, manifest-descriptor and index-descriptor", where)
	}
	if platform == "" {
		return a, nil
	}
	if onIndex(a) {
		return a, fmt.Errorf("an %s is for all platforms: leave out [%s]", where, platform)
	}
	p, err := parsePlatform(platform)
	if err != nil {
		return a, err
	}
	a.Platform = &p
	return a, nil
}

func onIndex(a builder.Annotation) bool {
	return a.On == builder.OnIndex || a.On == builder.OnIndexDescriptor
}

// checkAnnotations refuses what would be on nothing that is built.
func checkAnnotations(all []builder.Annotation, targets []ocispec.Platform, index bool) error {
	if len(targets) == 0 {
		targets = []ocispec.Platform{platforms.DefaultSpec()}
	}
	for _, a := range all {
		if onIndex(a) && !index {
			return usageError{hinted{fmt.Errorf("annotation %s: an image for one platform has no index", a.Key),
				"leave out the type to annotate the manifest, or build for several with --platform"}}
		}
		if a.Platform != nil && !slices.ContainsFunc(targets, platforms.Only(*a.Platform).Match) {
			return usageError{hinted{fmt.Errorf("annotation %s: nothing is built for %s", a.Key, platforms.Format(*a.Platform)),
				"add it to --platform, or leave out the platform to annotate every one"}}
		}
	}
	return nil
}
