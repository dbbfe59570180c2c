package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/cooper-build/cooper/builder"
	"github.com/cooper-build/cooper/builder/plan"
)

// A call is a question that is asked instead of a build.
type call struct {
	question     plan.Question
	json         bool
	ignoreStatus bool
}

// parseCall reads --call; nil is a build.
func parseCall(s string) (*call, error) {
	if s == "" {
		return nil, nil
	}
	parts, err := csvLine("--call", s)
	if err != nil {
		return nil, err
	}
	var c call
	var name string
	for _, p := range parts {
		k, v, ok := strings.Cut(p, "=")
		switch {
		case !ok && name == "":
			name = p
		case k == "format" && (v == "json" || v == "text" || v == ""):
			c.json = v == "json"
		case k == "format":
			return nil, usageError{fmt.Errorf("--call %q: format %q is none of text and json", s, v)}
		case k == "ignorestatus":
			if c.ignoreStatus, err = strconv.ParseBool(v); err != nil {
				return nil, usageError{fmt.Errorf("--call %q: ignorestatus=%q is not true or false", s, v)}
			}
		default:
			return nil, usageError{fmt.Errorf("--call %q: %q is not expected", s, p)}
		}
	}
	switch name {
	case "build":
		return nil, nil
	case "check", "lint":
		c.question = plan.Check
	case "outline":
		c.question = plan.Outline
	case "targets":
		c.question = plan.Targets
	default:
		return nil, usageError{fmt.Errorf("--call %q: build, check, outline or targets expected", s)}
	}
	return &c, nil
}

// ask prints the answer to a call. What a check found is the answer and no error of ours; the exit code tells of it.
func (c *call) ask(ctx context.Context, r builder.Request, w io.Writer) error {
	answer, err := builder.Ask(ctx, r, c.question)
	if err != nil {
		return err
	}
	if c.json {
		_, err = fmt.Fprintf(w, "%s\n", answer.JSON)
	} else {
		_, err = w.Write(answer.Text)
	}
	if err != nil {
		return err
	}
	if answer.Failed && !(c.ignoreStatus && !broken(answer)) {
		return exitCode(exitFailed)
	}
	return nil
}

// broken tells whether a check ended because the Dockerfile cannot be built, which buildx does not ignore.
func broken(a *plan.Answer) bool {
	var found struct {
		BuildError json.RawMessage `json:"buildError"`
	}
	return json.Unmarshal(a.JSON, &found) == nil && len(found.BuildError) > 0
}
