package main

import (
	"errors"
	"strconv"
	"time"

	"github.com/spf13/cobra"
)

// buildFlags are named and spelled as docker buildx build has them, where it has them.
type buildFlags struct {
	file, target, network, progress, call      string
	shmSize, cgroupParent, memory, keepStorage string
	cpus                                       float64
	pidsLimit                                  int
	stepTimeout                                time.Duration
	iidFile, metadataFile                      string
	policy, signKey                            string
	tags, labels, annotations, outputs         []string
	buildArgs, contexts, platforms             []string
	secrets, ssh, allow, egress                []string
	sandbox                                    string
	hosts, ulimits, noCacheFilter              []string
	push, noCache, pull, quiet                 bool
	explain, verifyCache                       bool
	jobs                                       int
}

func newBuild() *cobra.Command {
	var f buildFlags
	c := &cobra.Command{
		Use:     "build [flags] PATH | URL | -",
		Aliases: []string{"b"},
		Short:   "Build an image from a Dockerfile",
		Args:    oneArg("build needs one context: cooper build [flags] PATH | URL | -"),
		RunE:    func(c *cobra.Command, args []string) error { return build(c, f, args[0]) },
	}
	f.sourceFlags(c)
	f.runFlags(c)
	f.resultFlags(c)
	addRefused(c)
	return c
}

// sourceFlags say what is built.
func (f *buildFlags) sourceFlags(c *cobra.Command) {
	fl := c.Flags()
	fl.StringVarP(&f.file, "file", "f", "", "the Dockerfile (default PATH/Dockerfile), or - for standard input")
	fl.StringVar(&f.target, "target", "", "the stage to build")
	fl.StringArrayVar(&f.platforms, "platform", nil, "build for this `OS/ARCHITECTURE`; several, with commas, make an index")
	fl.StringArrayVar(&f.buildArgs, "build-arg", nil, "a value for an ARG: `NAME=VALUE`, or NAME for the environment's value")
	fl.StringArrayVar(&f.contexts, "build-context", nil, "a named context: `NAME=DIR`, a git or http URL, docker-image://REF, oci-layout://DIR[:TAG] or target:STAGE")
	fl.BoolVar(&f.pull, "pull", false, "ask the registry for base images that are known already")
	fl.BoolVar(&f.noCache, "no-cache", false, "run every step again")
	fl.StringArrayVar(&f.noCacheFilter, "no-cache-filter", nil, "run every step of this `stage` again")
	fl.BoolVar(&f.explain, "explain", false, "tell for each step whether the store had its result and, if not, what changed")
	fl.BoolVar(&f.verifyCache, "verify-cache", false, "make again what the store answers and compare; exit code 5 if something differs")
	fl.StringVar(&f.call, "call", "build", "build, or answer a question about the Dockerfile: check, outline or targets[,format=json][,ignorestatus=true]")
	fl.BoolFunc("check", "short for --call=check", f.setCheck)
	fl.Lookup("check").DefValue = "false"
	fl.StringVar(&f.call, "print", "build", "an old name of --call")
	hide(c, "print")
}

// setCheck is as in buildx: of --call and --check the last counts, and --check=false is no choice.
func (f *buildFlags) setCheck(v string) error {
	on, err := strconv.ParseBool(v)
	if err == nil && on {
		f.call = "check"
	}
	return err
}

// runFlags say what a RUN gets.
func (f *buildFlags) runFlags(c *cobra.Command) {
	fl := c.Flags()
	fl.StringArrayVar(&f.secrets, "secret", nil, "a secret for RUN --mount=type=secret: `id=ID,src=FILE` or id=ID,env=NAME")
	fl.StringVar(&f.keepStorage, "keep-storage", "", "how much the store may hold after the build: `SIZE` or none (default: $COOPER_KEEP_STORAGE, else a tenth of its file system)")
	fl.StringArrayVar(&f.egress, "egress", nil, "what RUN may connect to, and nothing else: `allow=HOST[:PORT],...`, HOST a name, *.NAME, an address or a network")
	fl.StringArrayVar(&f.ssh, "ssh", nil, "an ssh agent for RUN --mount=type=ssh and git: `default|ID[=SOCKET|KEY[,KEY]]`")
	fl.StringVar(&f.network, "network", "default", "the network of RUN: default, host or none")
	fl.StringVar(&f.sandbox, "sandbox", "", "what RUN is kept in: `auto`, root, subids, single or chroot (default: $COOPER_SANDBOX, else auto, which is the best that can be had; cooper doctor explains it)")
	fl.StringArrayVar(&f.allow, "allow", nil, "what a Dockerfile gets only if you trust it: `network.host` or security.insecure")
	fl.StringSliceVar(&f.hosts, "add-host", nil, "a line for /etc/hosts of RUN: `HOST:IP`")
	fl.StringVar(&f.shmSize, "shm-size", "", "the `size` of /dev/shm, such as 128m")
	fl.StringArrayVar(&f.ulimits, "ulimit", nil, "a limit of RUN: `NAME=SOFT[:HARD]`")
	fl.StringVar(&f.cgroupParent, "cgroup-parent", "", "the control group that RUN belongs below")
	fl.StringVarP(&f.memory, "memory", "m", "", "the memory that a RUN may use, such as `512m`")
	fl.Float64Var(&f.cpus, "cpus", 0, "the processors that a RUN may keep busy, such as `1.5`")
	fl.IntVar(&f.pidsLimit, "pids-limit", 0, "the `number` of processes and threads that a RUN may have")
	fl.DurationVar(&f.stepTimeout, "step-timeout", 0, "how long a RUN may take, such as `10m`")
	fl.IntVar(&f.jobs, "jobs", 0, "steps at a time (default: two per processor, at least four)")
}

// resultFlags say what becomes of the result and what is told of it.
func (f *buildFlags) resultFlags(c *cobra.Command) {
	fl := c.Flags()
	fl.StringArrayVarP(&f.tags, "tag", "t", nil, "the image's `name[:tag]`")
	fl.StringArrayVar(&f.labels, "label", nil, "a label for the image: `NAME=VALUE`")
	fl.StringArrayVar(&f.annotations, "annotation", nil, "an annotation: `[TYPE:]NAME=VALUE`; TYPE is manifest, index, manifest-descriptor or index-descriptor")
	fl.StringArrayVarP(&f.outputs, "output", "o", nil, "where the result goes: `type=TYPE,dest=PATH` with oci, docker, local, tar, image, registry or cacheonly; a directory for the files; or - for their tar")
	fl.BoolVar(&f.push, "push", false, "send the image to the registry of each tag")
	fl.StringVar(&f.iidFile, "iidfile", "", "write the image's id to this `file`")
	fl.StringVar(&f.metadataFile, "metadata-file", "", "write what was built, or what failed, to this `file` as JSON")
	fl.StringVar(&f.progress, "progress", "auto", "auto, plain, tty, quiet, none or rawjson ($BUILDKIT_PROGRESS)")
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "print nothing but the image's id")
	fl.StringVar(&f.policy, "policy", "", "a policy file, or the profile none, default or strict (default: PATH/cooper-policy.yaml, else default)")
	fl.StringVar(&f.signKey, "sign-key", "", "sign with this private key (passphrase in $COOPER_PASSPHRASE)")
}

func hide(c *cobra.Command, name string) { c.Flags().Lookup(name).Hidden = true }

func oneArg(message string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usageError{errors.New(message)}
		}
		return nil
	}
}
