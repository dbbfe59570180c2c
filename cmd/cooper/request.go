package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cooper-build/cooper/builder"
	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/builder/plan"
)

// request turns flags into the plain struct that the builder works from. final says that this process will do the whole
// build.
func (f *buildFlags) request(c *cobra.Command, src source, final bool) (r builder.Request, out outputs, err error) {
	r.Plan.Context, r.Plan.Dockerfile = src.context, src.file
	if err := f.planRequest(c, &r.Plan); err != nil {
		return r, nil, err
	}
	if r.Allow, err = parseAllow(f.allow); err != nil {
		return r, nil, err
	}
	if r.Plan.Network == plan.NetworkHost {
		r.Allow.NetworkHost = true // as in buildx: who asks for it for every RUN grants it
	}
	for _, t := range f.tags {
		n, err := fullName(t)
		if err != nil {
			return r, nil, err
		}
		r.Names = append(r.Names, n)
	}
	if out, err = f.results(&r); err != nil {
		return r, nil, err
	}
	if r.Secrets, err = readSecrets(f.secrets, final); err != nil {
		return r, nil, err
	}
	specs, err := parseSSH(f.ssh)
	if err != nil {
		return r, nil, err
	}
	if r.Agents, err = openAgents(specs, src.context, os.Getenv("SSH_AUTH_SOCK")); err != nil {
		return r, nil, err
	}
	if r.Policy, err = loadPolicy(f.policy, src.dir()); err != nil {
		return r, nil, err
	}
	if f.signKey != "" {
		if r.Signer, err = loadPrivate(f.signKey); err != nil {
			return r, nil, err
		}
	}
	r.Explain, r.VerifyCache = f.explain, f.verifyCache
	if r.Jobs = f.jobs; r.Jobs < 0 {
		return r, nil, usageError{fmt.Errorf("--jobs %d: a number of steps, or 0 for the default, is expected", f.jobs)}
	}
	if r.Egress, err = parseEgress(f.egress); err != nil {
		return r, nil, err
	}
	if r.KeepStorage, err = parseKeep(cmp.Or(f.keepStorage, os.Getenv("COOPER_KEEP_STORAGE"))); err != nil {
		return r, nil, err
	}
	if r.Sandbox, err = f.kind(); err != nil {
		return r, nil, err
	}
	if r.Limits, err = f.limits(); err != nil {
		return r, nil, err
	}
	r.KnownHosts = knownHosts()
	r.Emulators = filepath.SplitList(os.Getenv("PATH"))
	if r.Root, err = storeRoot(c); err != nil {
		return r, nil, err
	}
	r.Registry, err = registry(c, r.Plan.Contexts)
	return r, out, err
}

// planRequest reads the flags that the plan depends on.
func (f *buildFlags) planRequest(c *cobra.Command, p *plan.Request) (err error) {
	p.Target, p.Pull, p.CgroupParent = f.target, f.pull, f.cgroupParent
	if p.Platforms, err = parsePlatforms(f.platforms, os.Getenv("DOCKER_DEFAULT_PLATFORM")); err != nil {
		return err
	}
	p.NoCache = f.noCache
	for _, s := range f.noCacheFilter {
		if s != "" {
			p.NoCacheStages = append(p.NoCacheStages, strings.Split(s, ",")...)
		}
	}
	if p.NoCache && len(p.NoCacheStages) > 0 {
		return usageError{errors.New("--no-cache is for every stage, --no-cache-filter for some: give one of them")}
	}
	if p.Epoch, err = epoch(os.Getenv("SOURCE_DATE_EPOCH")); err != nil {
		return err
	}
	if p.Args, err = f.args(dockerConfig(c)); err != nil {
		return err
	}
	if n, notNumber := strconv.ParseInt(p.Args["SOURCE_DATE_EPOCH"], 10, 64); notNumber == nil { // else it names a source that has a time
		t := time.Unix(n, 0)
		if err := plan.CheckEpoch(&t); err != nil {
			return usageError{fmt.Errorf("--build-arg %w", err)}
		}
	}
	if p.Labels, err = pairs("--label", f.labels, valueOptional); err != nil {
		return err
	}
	if p.Contexts, err = pairs("--build-context", f.contexts, valueRequired); err != nil {
		return err
	}
	if p.Network, err = parseNetwork(f.network); err != nil {
		return err
	}
	if p.Hosts, err = parseHosts(f.hosts); err != nil {
		return err
	}
	if p.ShmSize, err = parseShmSize(f.shmSize); err != nil {
		return err
	}
	if p.Ulimits, err = parseUlimits(f.ulimits); err != nil {
		return err
	}
	if os.Getenv("EXPERIMENTAL_BUILDKIT_SOURCE_POLICY") != "" {
		return usageError{hinted{errors.New("EXPERIMENTAL_BUILDKIT_SOURCE_POLICY: BuildKit's source policies are not supported"), "unset it, and state the rule in a policy: see docs/policy.md"}}
	}
	return nil
}

// args are the build arguments, with the proxies of docker's configuration where they are not given.
func (f *buildFlags) args(config string) (map[string]string, error) {
	given, err := pairs("--build-arg", f.buildArgs, valueFromEnv)
	if err != nil {
		return nil, err
	}
	if on, err := strconv.ParseBool(given["BUILDKIT_INLINE_CACHE"]); err == nil && on {
		return nil, refusedFlag("build-arg BUILDKIT_INLINE_CACHE="+given["BUILDKIT_INLINE_CACHE"], "caches in images are not supported yet", cacheHint)
	}
	args, err := proxyArgs(config)
	if err != nil {
		return nil, err
	}
	if args == nil {
		return given, nil
	}
	maps.Copy(args, given)
	return args, nil
}

// results reads where the image goes and what is written on it.
func (f *buildFlags) results(r *builder.Request) (outputs, error) {
	index := len(r.Plan.Platforms) > 1
	if on, err := strconv.ParseBool(r.Plan.Args["BUILDKIT_MULTI_PLATFORM"]); err == nil && on {
		index = true
	}
	out, err := parseOutputs(f.outputs, index)
	if err != nil {
		return nil, err
	}
	r.Push = f.push
	if err := out.add(r); err != nil {
		return nil, err
	}
	if i := firstImage(out); i >= 0 {
		r.Annotations = append(r.Annotations, out[i].annotations...)
	}
	for _, s := range f.annotations {
		if s == "" {
			continue
		}
		all, err := parseAnnotation(s)
		if err != nil {
			return nil, err
		}
		r.Annotations = append(r.Annotations, all...)
	}
	if err := checkAnnotations(r.Annotations, r.Plan.Platforms, index); err != nil {
		return nil, err
	}
	for _, o := range out {
		if f.iidFile != "" && (o.kind == "local" || o.kind == "tar") {
			return nil, usageError{hinted{fmt.Errorf("--iidfile: an output of type %s is files and has no id", o.kind), "leave out one of them"}}
		}
	}
	return out, nil
}

// registry are the settings of the registry client: where credentials are, and which layouts have a name.
func registry(c *cobra.Command, contexts map[string]string) (image.ClientOptions, error) {
	plain, err := c.Flags().GetStringSlice("plain-http")
	if err != nil {
		return image.ClientOptions{}, err
	}
	o := image.ClientOptions{
		PlainHTTP: plain, Layouts: map[string]string{}, DockerConfig: dockerConfig(c),
		UserAgent: "cooper", Proxy: http.ProxyFromEnvironment,
	}
	for name, v := range contexts {
		if dir, ok := strings.CutPrefix(v, "oci-layout://"); ok {
			o.Layouts[name] = dir
		}
	}
	return o, nil
}

// storeRoot is --root, or cooper's place in the user's data directory.
func storeRoot(c *cobra.Command) (string, error) {
	root, err := c.Flags().GetString("root")
	if err != nil || root != "" {
		return root, err
	}
	data := os.Getenv("XDG_DATA_HOME")
	if data == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", hinted{fmt.Errorf("where is the store: %w", err), "set $HOME, or name a directory with --root"}
		}
		data = filepath.Join(home, ".local", "share")
	}
	return filepath.Join(data, "cooper"), nil
}

// fullName completes a name as docker does: docker.io, library/ and :latest.
func fullName(s string) (string, error) {
	n, err := image.Normalize(s)
	if err != nil {
		return "", usageError{fmt.Errorf("image name %q: %w", s, err)}
	}
	if strings.Contains(n, "@") {
		return "", usageError{fmt.Errorf("image name %q: a digest cannot be chosen, only a tag", s)}
	}
	return n, nil
}

// withoutValue says what NAME alone means to a flag that takes NAME=VALUE.
type withoutValue int

const (
	valueRequired withoutValue = iota
	valueOptional              // the value is empty
	valueFromEnv               // the environment has it; else nothing is given
)

// pairs reads a flag of NAME=VALUE. As in buildx, of several for one name the last counts.
func pairs(flag string, in []string, without withoutValue) (map[string]string, error) {
	out := map[string]string{}
	for _, s := range in {
		if s == "" && without == valueRequired {
			continue
		}
		k, v, ok := strings.Cut(s, "=")
		if k == "" || !ok && without == valueRequired {
			return nil, usageError{fmt.Errorf("%s %q: NAME=VALUE expected", flag, s)}
		}
		if !ok && without == valueFromEnv {
			if v, ok = os.LookupEnv(k); !ok {
				continue
			}
		}
		out[k] = v
	}
	return out, nil
}

// epoch reads SOURCE_DATE_EPOCH: seconds since 1970 (reproducible-builds.org/specs/source-date-epoch).
func epoch(s string) (*time.Time, error) {
	if s == "" {
		return nil, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 {
		return nil, usageError{fmt.Errorf("SOURCE_DATE_EPOCH=%q is not a number of seconds since 1970", s)}
	}
	t := time.Unix(n, 0).UTC()
	if err := plan.CheckEpoch(&t); err != nil {
		return nil, usageError{err}
	}
	return &t, nil
}
