package plan

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/moby/buildkit/frontend/dockerfile/dockerfile2llb"
	"github.com/moby/buildkit/frontend/subrequests/lint"
	"github.com/moby/buildkit/frontend/subrequests/outline"
	"github.com/moby/buildkit/frontend/subrequests/targets"
)

// Question is what can be asked about a Dockerfile instead of building it.
type Question int

// The questions, as docker buildx build --call has them.
const (
	// Check asks for what the build checks find.
	Check Question = iota
	// Outline asks for the arguments, secrets and agents that a target takes.
	Outline
	// Targets asks for the stages.
	Targets
)

// Answer is what BuildKit's frontend answers, for people and for programs.
type Answer struct {
	Text, JSON []byte
	// Failed says that a check found something.
	Failed bool
}

// Ask answers a question about a Dockerfile. Nothing is built, but base images
// are looked up where the answer depends on them. A Dockerfile that cannot be
// built is an error, except for Check, whose answer it is.
func Ask(ctx context.Context, r Request, q Question, res Resolver) (*Answer, error) {
	c, err := newClient(r, res)
	if err != nil {
		return nil, at(Location{}, err)
	}
	answer, err := interruptible(ctx, func(ctx context.Context) (*Answer, error) { return c.answer(ctx, q) })
	if ctx.Err() != nil {
		return nil, at(Location{}, context.Cause(ctx))
	}
	if err := c.explained(err); err != nil {
		return nil, err
	}
	return answer, nil
}

func (c *client) answer(ctx context.Context, q Question) (*Answer, error) {
	e, err := c.read(ctx)
	if err != nil {
		return nil, err
	}
	if n := len(e.ui.TargetPlatforms); n > 0 {
		e.opt.TargetPlatform = &e.ui.TargetPlatforms[0]
	}
	switch q {
	case Check:
		found, err := dockerfile2llb.DockerfileLint(ctx, e.src.Data, e.opt)
		if err != nil {
			return nil, err
		}
		return checked(found)
	case Outline:
		o, err := dockerfile2llb.Dockerfile2Outline(ctx, e.src.Data, e.opt)
		if err != nil {
			return nil, err
		}
		return answered(o, outline.PrintOutline)
	case Targets:
		list, err := dockerfile2llb.ListTargets(ctx, e.src.Data)
		if err != nil {
			return nil, err
		}
		return answered(list, targets.PrintTargets)
	default:
		return nil, fmt.Errorf("question %d is unknown", q)
	}
}

func answered(value any, print func([]byte, io.Writer) error) (*Answer, error) {
	text, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := print(text, &b); err != nil {
		return nil, err
	}
	return &Answer{Text: b.Bytes(), JSON: text}, nil
}

// checked says how many warnings there are before it shows them, as buildx does.
func checked(found *lint.LintResults) (*Answer, error) {
	text, err := json.MarshalIndent(found, "", "  ")
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	switch n := len(found.Warnings); {
	case n == 1:
		fmt.Fprintln(&b, "Check complete, 1 warning has been found!")
	case n > 1:
		fmt.Fprintf(&b, "Check complete, %d warnings have been found!\n", n)
	case found.Error == nil:
		fmt.Fprintln(&b, "Check complete, no warnings found.")
	}
	if err := lint.PrintLintViolations(text, &b, nil); err != nil {
		return nil, err
	}
	if found.Error != nil {
		if len(found.Warnings) > 0 {
			fmt.Fprintln(&b)
		}
		found.PrintErrorTo(&b, nil)
	}
	return &Answer{Text: b.Bytes(), JSON: text, Failed: len(found.Warnings) > 0 || found.Error != nil}, nil
}
