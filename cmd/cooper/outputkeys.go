package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"github.com/cooper-build/cooper/snapshot/layer"
)

func outputKinds() []string {
	return []string{"oci", "docker", "local", "tar", "image", "registry", "cacheonly"}
}

// imageKinds are the types of --output that an image goes to, and not only its files.
func imageKinds() []string { return []string{"oci", "docker", "image", "registry"} }

// A keyRule says which types a key of --output belongs to, and which values mean here what they mean to BuildKit.
type keyRule struct {
	kinds []string
	check func(v string, index bool) error // nil: all
	hint  string
}

// outputKeys are the keys that BuildKit's exporters have. One that would be ignored is a mistake.
func outputKeys() map[string]keyRule {
	image, pushed := imageKinds(), []string{"image", "registry"}
	return map[string]keyRule{
		"dest": {kinds: []string{"oci", "docker", "local", "tar"}},
		"tar":  {kinds: []string{"oci", "docker"}, check: anyBool},
		"name": {kinds: image},
		"push": {kinds: pushed, check: anyBool},

		"oci-mediatypes":    {kinds: image, check: only(true, "images have OCI's media types, which docker and every registry read")},
		"compression":       {kinds: image, check: knownCodec, hint: "use gzip, zstd or uncompressed"},
		"compression-level": {kinds: image, check: anyNumber},
		"force-compression": {kinds: image, check: anyBool},
		"rewrite-timestamp": {kinds: image, check: only(true, "with SOURCE_DATE_EPOCH times are always clamped to it")},
		"source-date-epoch": {kinds: image, check: never("it belongs to the whole build"), hint: "set SOURCE_DATE_EPOCH in the environment"},

		"prefer-nondist-layers": {kinds: image, check: only(false, "layers of a base image keep their media type")},
		"oci-artifact":          {kinds: image, check: only(false, "attestations are not supported yet")},
		"attestation-inline":    {kinds: image, check: only(false, "attestations are not supported yet")},
		"attestation-prefix":    {kinds: []string{"local", "tar"}, check: never("attestations are not supported yet")},
		"platform-split":        {kinds: []string{"local", "tar"}, check: splitAsBuilt},
		"mode":                  {kinds: []string{"local"}, check: copies},
		"context":               {kinds: []string{"docker"}, check: never(noDaemon), hint: loadHint},

		"store":                   {kinds: pushed, check: anyBool},
		"unpack":                  {kinds: pushed, check: only(false, noDaemon+" to unpack the image for")},
		"name-canonical":          {kinds: pushed, check: only(false, "images have no names with a digest")},
		"dangling-name-prefix":    {kinds: pushed, check: never("an image without a name is found by its digest: see cooper images")},
		"danging-name-empty-only": {kinds: pushed, check: never("an image without a name is found by its digest: see cooper images")},
		"push-by-digest":          {kinds: pushed, check: only(false, "an image is always pushed under a name"), hint: "push with a tag that tells it apart; its digest is in --metadata-file"},
		"registry.insecure":       {kinds: pushed, check: only(false, "how a registry is spoken to is for the whole build"), hint: "use --plain-http HOST[:PORT]"},
	}
}

func keysOf(kind string) []string {
	all := outputKeys()
	maps.DeleteFunc(all, func(_ string, r keyRule) bool { return !slices.Contains(r.kinds, kind) })
	return slices.Sorted(maps.Keys(all))
}

func allOutputKeys() []string { return append(slices.Collect(maps.Keys(outputKeys())), "type") }

func anyBool(v string, _ bool) error {
	if _, err := strconv.ParseBool(v); err != nil {
		return errors.New("true or false expected")
	}
	return nil
}

// only accepts a key that says what is always so.
func only(always bool, why string) func(string, bool) error {
	return func(v string, _ bool) error {
		b, err := strconv.ParseBool(v)
		if err != nil {
			return errors.New("true or false expected")
		}
		if b != always {
			return errors.New(why)
		}
		return nil
	}
}

func never(why string) func(string, bool) error {
	return func(string, bool) error { return errors.New(why) }
}

func knownCodec(v string, _ bool) error {
	if v == "estargz" {
		return errors.New("layers that are read piece by piece are not supported")
	}
	if v == "" {
		return errors.New("a name expected")
	}
	return layer.Compression{Codec: layer.Codec(v)}.Check()
}

func anyNumber(v string, _ bool) error {
	if _, err := strconv.Atoi(v); err != nil {
		return errors.New("a number expected")
	}
	return nil
}

// splitAsBuilt: the files of several platforms have a directory each, those of one have none.
func splitAsBuilt(v string, index bool) error {
	b, err := strconv.ParseBool(v)
	switch {
	case err != nil:
		return errors.New("true or false expected")
	case b && !index:
		return errors.New("the files of one platform go to the destination itself")
	case !b && index:
		return errors.New("the files of several platforms go to a directory each")
	}
	return nil
}

func copies(v string, _ bool) error {
	if v != "copy" {
		return fmt.Errorf("files are only added")
	}
	return nil
}
