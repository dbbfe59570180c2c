package plan

import (
	"bytes"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// historyLines gives each entry of the history its line in the Dockerfile, 0 where that is unknown. The frontend
// does not say; but the last entries are those of the target's instructions in their order, and each entry begins
// with the word of its instruction, so a wrong pairing is noticed and ends the search.
func historyLines(dockerfile []byte, target string, history []ocispec.History) []int {
	lines := make([]int, len(history))
	ast, err := parser.Parse(bytes.NewReader(dockerfile))
	if err != nil {
		return lines
	}
	stages, _, err := instructions.Parse(ast.AST, linter.New(&linter.Config{SkipAll: true}))
	if err != nil {
		return lines
	}
	at := len(history)
	for _, s := range lineage(stages, target) {
		for i := len(s.Commands) - 1; i >= 0 && at > 0; i-- {
			c := s.Commands[i]
			where := c.Location()
			if len(where) == 0 || !strings.HasPrefix(strings.ToUpper(history[at-1].CreatedBy), strings.ToUpper(c.Name())+" ") {
				return lines
			}
			at--
			lines[at] = where[0].Start.Line
		}
	}
	return lines
}

// lineage is the target stage, the stage that it stands on, and so on.
func lineage(stages []instructions.Stage, target string) []instructions.Stage {
	var out []instructions.Stage
	i := len(stages) - 1
	if target != "" {
		found, ok := instructions.HasStage(stages, target)
		if !ok {
			n, err := strconv.Atoi(target)
			if err != nil || n < 0 || n > i {
				return nil
			}
			found = n
		}
		i = found
	}
	for i >= 0 {
		out = append(out, stages[i])
		below, ok := instructions.HasStage(stages[:i], stages[i].BaseName)
		if !ok {
			break
		}
		i = below
	}
	return out
}

// ArgNames are the names that the ARG instructions of a Dockerfile declare.
func ArgNames(dockerfile []byte) []string {
	ast, err := parser.Parse(bytes.NewReader(dockerfile))
	if err != nil {
		return nil
	}
	var names []string
	for _, node := range ast.AST.Children {
		if !strings.EqualFold(node.Value, "arg") {
			continue
		}
		for n := node.Next; n != nil; n = n.Next {
			name, _, _ := strings.Cut(n.Value, "=")
			names = append(names, name)
		}
	}
	return names
}
