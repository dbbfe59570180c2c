package builder

import (
	"errors"

	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/policy"
	"github.com/cooper-build/cooper/sandbox/userns"
)

// inChroot reports whether a RUN has no namespace here.
func (b *build) inChroot() bool { return b.kind == userns.Chroot }

// sandboxOf is what policy judges of how the commands of a graph are kept: nothing if there are none.
func (b *build) sandboxOf(g *plan.Graph) string {
	for _, s := range g.Steps {
		if _, ok := s.Op.(plan.Exec); ok {
			return b.kind.Name()
		}
	}
	return ""
}

// unprotected is what everybody is told who builds in a chroot.
const unprotected = "RUN has no namespaces here, only a chroot (sandbox rung 5): a command has the network of this container, with what listens on its loopback interface and " +
	"the cloud's metadata, and shares its processes' kernel, IPC objects and disk space. Build only Dockerfiles and base images that you trust, " +
	"or give the container what rung 1 takes: seccompProfile with docs/seccomp.json, and hostUsers: false"

// allowSandbox asks policy about the sandbox before anything runs in it, and says what a chroot does not protect.
func (b *build) allowSandbox(g *plan.Graph) error {
	sandbox := b.sandboxOf(g)
	findings := b.Policy.EvaluateSandbox(sandbox)
	if policy.Denied(findings) {
		return &DeniedError{Policy: b.Policy.Name(), Findings: findings}
	}
	if sandbox == userns.Chroot.Name() {
		b.note(unprotected)
	}
	return nil
}

// allowInChroot refuses what takes a namespace or a mount.
func (b *build) allowInChroot(op plan.Exec) error {
	no := func(what string) error {
		return hinted{errors.New(what), "leave it out, or build where user namespaces can be made: cooper doctor says what that takes here"}
	}
	switch {
	case op.Insecure:
		return no("--security=insecure cannot be had in a chroot, where it would be the builder itself")
	case op.Network == plan.NetworkNone:
		return no("--network=none cannot be had in a chroot: a RUN has the network of the builder there")
	case op.Network == plan.NetworkDefault && b.bound != nil:
		return no(b.bound.Name + " bounds what a RUN may connect to, which nothing does in a chroot: a RUN has the network of the builder there")
	case op.Network == plan.NetworkDefault && len(b.Egress) > 0:
		return no("--egress cannot be had in a chroot: a RUN has the network of the builder there, and nobody between")
	}
	return nil
}
