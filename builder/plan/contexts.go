package plan

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/frontend/dockerfile/dfgitutil"
	"github.com/opencontainers/go-digest"
)

// contexts are the named build contexts as the frontend wants them.
type contexts struct {
	opts    map[string]string // option of the frontend -> value
	locals  map[string]local  // name in local:// -> directory
	layouts map[string]string // store in oci-layout:// -> reference for the Resolver
}

// local is a directory under the name that the user gave it.
type local struct {
	name string
	tree
}

// unknownDigest stands where the frontend insists on the digest of a layout
// before it asks for it. The answer of the Resolver replaces it.
var unknownDigest = digest.FromString("")

// namedContexts reads the values of --build-context. What cannot be used yet
// becomes an option at which the frontend fails where, and only if, it is used.
func namedContexts(given map[string]string) (contexts, error) {
	c := contexts{opts: map[string]string{}, locals: map[string]local{}, layouts: map[string]string{}}
	for i, key := range slices.Sorted(maps.Keys(given)) {
		value := given[key]
		named, err := reference.ParseNormalizedNamed(key)
		if err != nil {
			return contexts{}, fmt.Errorf("build context %q: %w", key, err)
		}
		// the frontend looks for a name in this form
		name := strings.TrimSuffix(reference.FamiliarString(named), ":latest")
		opt, err := c.add(i, key, value)
		if err != nil {
			return contexts{}, fmt.Errorf("build context %s: %w", key, err)
		}
		c.opts["context:"+name] = opt
	}
	return c, nil
}

func (c *contexts) add(i int, key, value string) (opt string, err error) {
	if strings.HasPrefix(value, "docker-image://") {
		return value, nil
	}
	if where, ok := strings.CutPrefix(value, "oci-layout://"); ok {
		store := fmt.Sprintf("layout%d", i)
		ref, at, err := layoutRef(key, where)
		if err != nil {
			return "", err
		}
		c.layouts[store] = ref
		return "oci-layout://" + store + "@" + at.String(), nil
	}
	if isDir(value) {
		name := fmt.Sprintf("context%d", i)
		c.locals[name] = local{name: key, tree: tree{dir: value}}
		return "local:" + name, nil
	}
	if strings.HasPrefix(value, "target:") {
		return "another target:" + value, nil
	}
	if IsRemote(value) {
		return value, nil // the frontend tells git from http
	}
	return "", fmt.Errorf("%s is not a directory", value)
}

// main adds the main context and the Dockerfile, and gives the Dockerfile's name.
func (c *contexts) main(r Request, opts map[string]string) (file string, err error) {
	if len(r.Text) > 0 {
		file = "Dockerfile"
		c.locals["dockerfile"] = local{name: "dockerfile", tree: tree{only: map[string][]byte{file: r.Text}}}
		opts["dockerfilekey"] = "dockerfile"
	}
	switch {
	case r.Context == Uploaded:
		opts["context"] = uploadURL
	case IsRemote(r.Context):
		opts["context"] = r.Context
	case r.Context == "":
		c.locals["context"] = local{name: "context", tree: tree{only: map[string][]byte{}}}
	case isDir(r.Context):
		c.locals["context"] = local{name: "context", tree: tree{dir: r.Context}}
	default:
		return "", fmt.Errorf("the build context %q is not a directory", r.Context)
	}
	if len(r.Text) > 0 {
		return file, nil
	}
	if _, remote := opts["context"]; remote {
		return c.remoteDockerfile(r, opts)
	}
	var dockerfile tree
	if dockerfile, file, err = dockerfileTree(r.Context, r.Dockerfile); err != nil {
		return "", err
	}
	c.locals["dockerfile"] = local{name: "dockerfile", tree: dockerfile}
	return file, nil
}

// remoteDockerfile is as buildx has it: a path in the remote context, unless it is absolute.
func (c *contexts) remoteDockerfile(r Request, opts map[string]string) (string, error) {
	if !filepath.IsAbs(r.Dockerfile) {
		return cmp.Or(filepath.ToSlash(r.Dockerfile), "Dockerfile"), nil
	}
	c.locals["dockerfile"] = local{name: "dockerfile", tree: tree{dir: filepath.Dir(r.Dockerfile)}}
	opts["dockerfilekey"] = "dockerfile"
	return filepath.Base(r.Dockerfile), nil
}

// IsRemote tells whether a build context is a git repository or a file of an
// http server.
func IsRemote(context string) bool {
	if strings.HasPrefix(context, "http://") || strings.HasPrefix(context, "https://") {
		return true
	}
	_, isGit, _ := dfgitutil.ParseGitRef(context)
	return isGit && !isDir(context)
}

// layoutRef reads DIR[:TAG][@DIGEST] and gives the reference that the Resolver
// knows, with the digest that the frontend is told.
func layoutRef(name, where string) (ref string, at digest.Digest, err error) {
	ref, at = "oci-layout://"+name, unknownDigest
	if isDir(where) {
		return ref, at, nil
	}
	if i := strings.LastIndex(where, "@"); i >= 0 && !strings.Contains(where[i:], "/") {
		if at, err = digest.Parse(where[i+1:]); err != nil {
			return "", "", fmt.Errorf("digest %q: %w", where[i+1:], err)
		}
		where = where[:i]
	}
	if i := strings.LastIndex(where, ":"); i >= 0 && !strings.Contains(where[i:], "/") && !isDir(where) {
		ref, where = ref+where[i:], where[:i]
	}
	if !isDir(where) {
		return "", "", fmt.Errorf("%s is not the directory of an OCI layout", where)
	}
	if at != unknownDigest {
		ref += "@" + at.String()
	}
	return ref, at, nil
}

func isDir(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.IsDir()
}
