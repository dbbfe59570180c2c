package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
)

// A refusal is a flag of docker build that this program knows and cannot do: it says why, and what to do instead.
type refusal struct {
	name, short string
	isBool      bool // the value false asks for nothing
	why, hint   string
}

const (
	noDaemon = "there is no daemon"
	cpusHint = "use --cpus"
)

// refusals are all of them but those whose value decides, which refuse has.
func refusals() []refusal {
	return []refusal{
		{name: "load", isBool: true, why: noDaemon + " to load the image into", hint: loadHint},
		{name: "builder", why: noDaemon + " to choose: this program is the builder", hint: "leave it out"},
		{name: "debug", short: "D", isBool: true, why: "there is no log of a daemon to show", hint: "use --progress=plain for all output of every step"},
		{name: "compress", isBool: true, why: noDaemon + " that the context is sent to: it is read in place", hint: "leave it out"},
		{name: "isolation", why: "it chooses between technologies of Windows", hint: "leave it out"},
		{name: "security-opt", why: "what a RUN may do is fixed", hint: "use RUN --security=insecure with --allow security.insecure"},
		{name: "squash", isBool: true, why: "BuildKit has no such thing either", hint: "copy what is wanted into a last stage: FROM scratch and COPY --from"},
		{name: "memory-swap", why: "a RUN whose memory is limited by a control group gets no swap", hint: "leave it out; --memory is the limit"},
		{name: "cpu-shares", short: "c", why: "no RUN has a weight", hint: cpusHint},
		{name: "cpu-period", why: "the period of a limit is the kernel's", hint: cpusHint},
		{name: "cpu-quota", why: "a limit is given in processors", hint: cpusHint},
		{name: "cpuset-cpus", why: "the processors of a RUN are those of this program", hint: "use taskset -c CPUS cooper build"},
		{name: "cpuset-mems", why: "the memory of a RUN is taken where this program's is", hint: "use numactl --membind=NODES cooper build"},
	}
}

const loadHint = "pipe it: cooper build -o type=docker,dest=- ... | docker load"

// addRefused makes the flags known, and keeps them out of the help.
func addRefused(c *cobra.Command) {
	fl := c.Flags()
	for _, r := range refusals() {
		if r.isBool {
			fl.BoolP(r.name, r.short, false, r.why)
		} else {
			fl.StringP(r.name, r.short, "", r.why)
		}
		hide(c, r.name)
	}
	for _, name := range []string{"rm", "force-rm"} {
		fl.Bool(name, true, "no RUN leaves a container behind")
		hide(c, name)
	}
	for _, name := range []string{"cache-from", "cache-to", "attest"} {
		fl.StringArray(name, nil, "not supported")
		hide(c, name)
	}
	for _, name := range []string{"provenance", "sbom"} {
		fl.String(name, "", "not supported")
		hide(c, name)
	}
}

// refuse reports the first flag that was given and cannot be done.
func refuse(c *cobra.Command) error {
	fl := c.Flags()
	for _, r := range refusals() {
		f := fl.Lookup(r.name)
		if f.Changed && !(r.isBool && f.Value.String() == "false") {
			return refusedFlag(r.name, r.why, r.hint)
		}
	}
	for _, name := range []string{"rm", "force-rm"} {
		if fl.Lookup(name).Value.String() == "false" {
			return refusedFlag(name+"=false", "no RUN ever leaves a container behind", "leave it out; to look into a failed build, build the stage before with --target")
		}
	}
	return errors.Join(refuseCaches(c), refuseAttestations(c))
}

func refusedFlag(flag, why, hint string) error {
	return usageError{hinted{fmt.Errorf("--%s: %s", flag, why), hint}}
}

func refuseCaches(c *cobra.Command) error {
	for _, name := range []string{"cache-from", "cache-to"} {
		values, err := c.Flags().GetStringArray(name)
		if err != nil {
			return err
		}
		for _, v := range values {
			if v != "" { // which buildx skips, and CI systems give
				return refusedFlag(name+" "+v, "caches elsewhere are not supported yet", cacheHint)
			}
		}
	}
	return nil
}

const cacheHint = "leave it out: the local store ($XDG_DATA_HOME/cooper, or --root) caches by itself; keep that directory between builds"

// refuseAttestations accepts what says that there are to be none.
func refuseAttestations(c *cobra.Command) error {
	attests, err := c.Flags().GetStringArray("attest")
	if err != nil {
		return err
	}
	for _, v := range attests {
		f, err := fields("--attest", v)
		if err != nil {
			return err
		}
		if f["type"] == "" {
			return usageError{fmt.Errorf("--attest %q: type= is missing", v)}
		}
		if off, err := strconv.ParseBool(f["disabled"]); err != nil || !off {
			return refusedAttestation("attest " + v)
		}
	}
	for _, name := range []string{"provenance", "sbom"} {
		v := strings.TrimSpace(c.Flags().Lookup(name).Value.String())
		if on, err := strconv.ParseBool(v); v != "" && (err != nil || on) {
			return refusedAttestation(name + "=" + v)
		}
	}
	return nil
}

func refusedAttestation(flag string) error {
	return refusedFlag(flag, "attestations are not supported yet", "leave it out; --sign-key signs the image and the verdict of the policy")
}
