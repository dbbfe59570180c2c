package builder

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/platforms"

	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/policy"
)

// A DeniedError says that policy refused the image. Nothing was written to any output.
type DeniedError struct {
	Policy   string
	Findings []policy.Finding // all of them, denied or not
}

func (e *DeniedError) Error() string {
	n := 0
	for _, f := range e.Findings {
		if f.Level == policy.Deny {
			n++
		}
	}
	if n == 1 {
		return fmt.Sprintf("policy %q denies the image", e.Policy)
	}
	return fmt.Sprintf("policy %q denies the image for %d reasons", e.Policy, n)
}

// Hint names the ways out.
func (e *DeniedError) Hint() string {
	return "change the Dockerfile as each finding says, or set the rule's level or a waiver in a policy file (--policy FILE)"
}

// judge assembles the image of each target and asks policy about it.
func (b *build) judge(ctx context.Context, g *plan.Graph, solved []value) ([]*assembled, []policy.Finding, error) {
	var images []*assembled
	var all []policy.Finding
	for _, t := range g.Targets {
		img, findings, err := b.judgeTarget(ctx, g, t, solved)
		if err != nil {
			return nil, nil, err
		}
		if g.Index {
			for i := range findings {
				findings[i].Message = platforms.Format(t.Platform) + ": " + findings[i].Message
			}
		}
		images, all = append(images, img), append(all, findings...)
	}
	b.maskFindings(all)
	if policy.Denied(all) {
		return nil, nil, &DeniedError{Policy: b.Policy.Name(), Findings: all}
	}
	return images, all, nil
}

// judgeTarget judges one image. Where policy wants a fix, the image is assembled once more with it and judged again; a
// finding that outlives its fix is a denial.
func (b *build) judgeTarget(ctx context.Context, g *plan.Graph, t plan.Target, solved []value) (*assembled, []policy.Finding, error) {
	img, err := b.assemble(ctx, g.Steps, t, solved, policy.Fixes{})
	if err != nil {
		return nil, nil, err
	}
	img.Facts.Now, img.Facts.Sandbox = time.Now(), b.sandboxOf(g)
	findings := b.Policy.Evaluate(img.Facts)
	fixes := b.Policy.Fixes(findings)
	if fixes.None() {
		return img, findings, nil
	}
	if img, err = b.assemble(ctx, g.Steps, t, solved, fixes); err != nil {
		return nil, nil, err
	}
	img.Facts.Now, img.Facts.Sandbox, img.Facts.Fixed = time.Now(), b.sandboxOf(g), true
	fixed := findings
	findings = b.Policy.Evaluate(img.Facts)
	for _, f := range fixed {
		if f.Level == policy.Fix {
			findings = append(findings, f)
		}
	}
	return img, findings, nil
}

// maskFindings takes the values of secrets out of what is going to be printed and signed: a file may be named like one.
func (b *build) maskFindings(findings []policy.Finding) {
	mask, _ := b.masker()
	for i := range findings {
		f := &findings[i]
		for _, text := range []*string{&f.Message, &f.Path, &f.Link, &f.Hint, &f.Step} {
			*text = string(mask([]byte(*text)))
		}
	}
}
