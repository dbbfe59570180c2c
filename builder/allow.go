package builder

import (
	"errors"
	"fmt"
	"runtime"

	"github.com/containerd/platforms"

	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/policy"
	"github.com/cooper-build/cooper/sandbox/egress"
)

// allow refuses, before anything runs, a graph that asks for more than the user grants or the machine can do.
func (b *build) allow(g *plan.Graph) error {
	for _, s := range g.Steps {
		op, ok := s.Op.(plan.Exec)
		if !ok {
			continue
		}
		if err := b.allowExec(op); err != nil {
			return located(s, err)
		}
	}
	return nil
}

func (b *build) allowExec(op plan.Exec) error {
	if op.Network == plan.NetworkHost && !b.Allow.NetworkHost {
		return hinted{errors.New("the host's network is not granted"), "pass --allow network.host if you trust this Dockerfile"}
	}
	if op.Network == plan.NetworkHost && b.bound != nil {
		return hinted{
			fmt.Errorf("%s bounds what a RUN may connect to, which nothing does on the host's network", b.bound.Name),
			"use the default network, or take egress out of the policy",
		}
	}
	if op.Insecure && !b.Allow.SecurityInsecure {
		return hinted{errors.New("a RUN without a sandbox's limits is not granted"), "pass --allow security.insecure if you trust this Dockerfile"}
	}
	if b.inChroot() {
		if err := b.allowInChroot(op); err != nil {
			return err
		}
	}
	if p := op.Platform; p.Architecture != "" && p.Architecture != runtime.GOARCH && !b.CachedOnly {
		if err := b.emulator.Enable(p.Architecture); err != nil {
			return fmt.Errorf("run a command for %s: %w", platforms.Format(p), err)
		}
	}
	return nil
}

// egressBound is what the policy says of the network.
func egressBound(p *policy.Policy) (*egress.Bound, error) {
	rules, bounded := p.Egress()
	if !bounded {
		return nil, nil
	}
	bound := &egress.Bound{Name: "policy " + p.Name()}
	for _, r := range rules {
		parsed, err := egress.ParseRules(r.Text)
		if err != nil {
			return nil, fmt.Errorf("policy %s: line %d: egress: %w", p.Name(), r.Line, err)
		}
		bound.Allow = append(bound.Allow, parsed...)
	}
	return bound, nil
}
