package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/cooper-build/cooper/builder"
	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/sandbox/userns"
)

// buildFlags are named and spelled as docker buildx build has them, where it has them.
type buildFlags struct {
	file, target, network, progress, policy, signKey string
	tags, buildArgs, contexts, outputs, secrets      []string
	labels                                           []string
	push, noCache, quiet                             bool
	jobs                                             int
}

func newBuild() *cobra.Command {
	var f buildFlags
	c := &cobra.Command{
		Use:   "build [flags] CONTEXT",
		Short: "Build an image from a Dockerfile",
		Args:  oneArg("build needs the context directory: cooper build [flags] CONTEXT"),
		RunE:  func(c *cobra.Command, args []string) error { return build(c, f, args[0]) },
	}
	fl := c.Flags()
	fl.StringVarP(&f.file, "file", "f", "", "the Dockerfile (default CONTEXT/Dockerfile)")
	fl.StringArrayVarP(&f.tags, "tag", "t", nil, "the image's `name[:tag]`")
	fl.StringArrayVar(&f.buildArgs, "build-arg", nil, "a value for an ARG: `NAME=VALUE`, or NAME for the environment's value")
	fl.StringArrayVar(&f.contexts, "build-context", nil, "a named context: `NAME=DIR`, NAME=docker-image://REF or NAME=oci-layout://DIR[:TAG]")
	fl.StringVar(&f.target, "target", "", "the stage to build")
	fl.StringArrayVarP(&f.outputs, "output", "o", nil, "`type=oci,dest=FILE`, type=oci,dest=DIR,tar=false, type=local,dest=DIR or type=image,push=true")
	fl.BoolVar(&f.push, "push", false, "send the image to the registry of each tag")
	fl.StringArrayVar(&f.secrets, "secret", nil, "a secret for RUN --mount=type=secret: `id=ID,src=FILE` or id=ID,env=NAME")
	fl.StringArrayVar(&f.labels, "label", nil, "a label for the image: `NAME=VALUE`")
	fl.StringVar(&f.network, "network", "default", "the network of RUN: default, host or none")
	fl.BoolVar(&f.noCache, "no-cache", false, "run every step again")
	fl.StringVar(&f.progress, "progress", "auto", "auto, plain, tty, quiet or rawjson")
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "print nothing but the image's digest")
	fl.StringVar(&f.policy, "policy", "", "a policy file, or the profile none, default or strict (default: CONTEXT/cooper-policy.yaml, else default)")
	fl.StringVar(&f.signKey, "sign-key", "", "sign with this private key (passphrase in $COOPER_PASSPHRASE)")
	fl.IntVar(&f.jobs, "jobs", 0, "steps at a time (default: one per processor)")
	return c
}

// build answers from the cache where it can; otherwise it does the work inside a user namespace, by running
// this program again there.
func build(c *cobra.Command, f buildFlags, contextDir string) error {
	ctx := c.Context()
	req, err := f.request(c, contextDir)
	if err != nil {
		return err
	}
	_, inside := userns.Inside()
	if f.quiet {
		f.progress = "quiet"
	}
	screen, err := newScreen(ctx, os.Stderr, f.progress, !inside)
	if err != nil {
		return err
	}
	req.Events = screen.show
	req.CachedOnly = !inside
	result, err := builder.Build(ctx, req)
	if errors.Is(err, builder.ErrNotCached) {
		screen.discard()
		code, err := userns.Enter(ctx, os.Args, os.Environ(), userns.Options{})
		if err != nil {
			return err
		}
		if code != 0 {
			return exitCode(code)
		}
		return nil
	}
	if closeErr := screen.close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	if f.progress == "quiet" {
		fmt.Fprintln(c.OutOrStdout(), result.Image.Digest)
		return nil
	}
	printFindings(c.ErrOrStderr(), result.Findings)
	fmt.Fprintf(c.ErrOrStderr(), "image %s%s\n", result.Image.Digest, named(req.Names))
	return nil
}

func named(names []string) string {
	if len(names) == 0 {
		return ""
	}
	return " " + strings.Join(names, " ")
}

// request turns flags into the plain struct that the builder works from.
func (f *buildFlags) request(c *cobra.Command, contextDir string) (builder.Request, error) {
	var r builder.Request
	if contextDir == "-" || strings.Contains(contextDir, "://") || strings.HasPrefix(contextDir, "git@") {
		return r, usageError{fmt.Errorf("context %q: only a directory can be a build context yet", contextDir)}
	}
	if st, err := os.Stat(contextDir); err != nil {
		return r, usageError{fmt.Errorf("context: %w", err)}
	} else if !st.IsDir() {
		return r, usageError{fmt.Errorf("context %s is not a directory", contextDir)}
	}
	r.Plan = plan.Request{
		Dockerfile: f.file,
		Context:    contextDir,
		Target:     f.target,
		NoCache:    f.noCache,
		Platform:   ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
	}
	if f.file == "" {
		r.Plan.Dockerfile = filepath.Join(contextDir, "Dockerfile")
	}
	var err error
	if r.Plan.Epoch, err = epoch(os.Getenv("SOURCE_DATE_EPOCH")); err != nil {
		return r, err
	}
	if r.Plan.Args, err = pairs("--build-arg", f.buildArgs, true); err != nil {
		return r, err
	}
	if r.Plan.Labels, err = pairs("--label", f.labels, false); err != nil {
		return r, err
	}
	if r.Plan.Contexts, err = pairs("--build-context", f.contexts, false); err != nil {
		return r, err
	}
	if r.Network, err = network(f.network); err != nil {
		return r, err
	}
	for _, t := range f.tags {
		n, err := fullName(t)
		if err != nil {
			return r, err
		}
		r.Names = append(r.Names, n)
	}
	r.Push = f.push
	if err := f.addOutputs(&r); err != nil {
		return r, err
	}
	for _, s := range f.secrets {
		secret, err := parseSecret(s)
		if err != nil {
			return r, err
		}
		r.Secrets = append(r.Secrets, secret)
	}
	if r.Policy, err = loadPolicy(f.policy, contextDir); err != nil {
		return r, err
	}
	if f.signKey != "" {
		key, err := loadPrivate(f.signKey)
		if err != nil {
			return r, err
		}
		r.Signer = key
	}
	if r.Jobs = f.jobs; r.Jobs < 0 {
		return r, usageError{fmt.Errorf("--jobs %d: a number of steps, or 0 for one per processor, is expected", f.jobs)}
	}
	if r.Root, err = storeRoot(c); err != nil {
		return r, err
	}
	r.Registry, err = registry(c, r.Plan.Contexts)
	return r, err
}

// registry are the settings of the registry client: where credentials are, and which layouts have a name.
func registry(c *cobra.Command, contexts map[string]string) (image.ClientOptions, error) {
	plain, err := c.Flags().GetStringSlice("plain-http")
	if err != nil {
		return image.ClientOptions{}, err
	}
	o := image.ClientOptions{
		PlainHTTP: plain, Layouts: map[string]string{}, DockerConfig: os.Getenv("DOCKER_CONFIG"),
		UserAgent: "cooper", Proxy: http.ProxyFromEnvironment,
	}
	if o.DockerConfig == "" {
		if home, err := os.UserHomeDir(); err == nil {
			o.DockerConfig = filepath.Join(home, ".docker")
		}
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

func pairs(flag string, in []string, fromEnv bool) (map[string]string, error) {
	out := map[string]string{}
	for _, s := range in {
		k, v, ok := strings.Cut(s, "=")
		if k == "" {
			return nil, usageError{fmt.Errorf("%s %q: NAME=VALUE expected", flag, s)}
		}
		if !ok {
			if !fromEnv {
				return nil, usageError{fmt.Errorf("%s %q: NAME=VALUE expected", flag, s)}
			}
			if v, ok = os.LookupEnv(k); !ok {
				continue // as docker: an argument that the environment does not have is not given
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
	return &t, nil
}

func network(s string) (plan.Network, error) {
	switch s {
	case "", "default":
		return plan.NetworkDefault, nil
	case "host":
		return plan.NetworkHost, nil
	case "none":
		return plan.NetworkNone, nil
	}
	return plan.NetworkDefault, usageError{fmt.Errorf("--network %q: default, host or none expected", s)}
}

// longestSecret is BuildKit's limit.
const longestSecret = 500 << 10

// parseSecret reads --secret as buildx does: with neither src nor env, the variable named like the id is
// used when there is one, else the file.
func parseSecret(s string) (builder.Secret, error) {
	f, err := fields("--secret", s, "id", "src", "source", "env", "type")
	if err != nil {
		return builder.Secret{}, err
	}
	id, src, env := f["id"], f["src"]+f["source"], f["env"]
	if id == "" {
		return builder.Secret{}, usageError{fmt.Errorf("--secret %q: id=ID is missing", s)}
	}
	if t := f["type"]; t != "" && t != "file" && t != "env" {
		return builder.Secret{}, usageError{fmt.Errorf("--secret id=%s: type %q is none of file and env", id, t)}
	}
	if src == "" && env == "" {
		if _, ok := os.LookupEnv(id); ok && f["type"] != "file" {
			env = id
		} else {
			src = id
		}
	}
	if f["type"] == "env" && env == "" {
		env, src = src, ""
	}
	if env != "" {
		v, ok := os.LookupEnv(env)
		if !ok {
			return builder.Secret{}, usageError{fmt.Errorf("--secret id=%s: the environment has no %s", id, env)}
		}
		return builder.Secret{ID: id, Value: []byte(v)}, nil
	}
	file, err := os.Open(src)
	if err != nil {
		return builder.Secret{}, usageError{fmt.Errorf("--secret id=%s: %w", id, err)}
	}
	defer file.Close()
	v, err := io.ReadAll(io.LimitReader(file, longestSecret+1))
	if err != nil {
		return builder.Secret{}, usageError{fmt.Errorf("--secret id=%s: %w", id, err)}
	}
	if len(v) > longestSecret {
		return builder.Secret{}, usageError{fmt.Errorf("--secret id=%s: more than %d bytes", id, longestSecret)}
	}
	return builder.Secret{ID: id, Value: v}, nil
}

func oneArg(message string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usageError{errors.New(message)}
		}
		return nil
	}
}
