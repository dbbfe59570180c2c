package plan

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

// builtin is the version of the Dockerfile language that the linked BuildKit,
// v0.34, speaks; labs features are in it.
var builtin = [2]int{1, 28}

// syntaxArg is the build argument that replaces a # syntax= line.
const syntaxArg = "BUILDKIT_SYNTAX"

// acceptSyntax judges the image of a # syntax= line, which is not used. The
// standard frontend is the one that is built in; any other is refused, as the
// file may be in another language. A doubt is a warning.
func acceptSyntax(file string, dockerfile []byte, args map[string]string) ([]Warning, error) {
	where := Location{File: file}
	arg, given := args[syntaxArg]
	image, _, _ := strings.Cut(strings.TrimSpace(arg), " ")
	if !given {
		var ranges []parser.Range
		var ok bool
		if image, _, ranges, ok = parser.DetectSyntax(dockerfile); !ok {
			return nil, nil
		}
		where.Source, where.Lines = dockerfile, parserLines(ranges)
	}
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return nil, at(where, fmt.Errorf("syntax %q: %w", image, err))
	}
	repo := reference.Path(named)
	switch repo[strings.LastIndex(repo, "/")+1:] {
	case "dockerfile", "dockerfile-upstream":
	default:
		return nil, at(where, &unsupported{
			what: fmt.Sprintf("the frontend %s cannot be used", image),
			hint: fmt.Sprintf("only Dockerfiles can be built, with the built-in frontend %d.%d; remove the syntax line if this is one", builtin[0], builtin[1]),
		})
	}
	tag := ""
	if t, ok := named.(reference.Tagged); ok {
		tag = t.Tag()
	}
	doubt := syntaxDoubt(tag)
	if doubt == "" {
		return nil, nil
	}
	msg := fmt.Sprintf("%s is answered by the built-in frontend %d.%d, %s", image, builtin[0], builtin[1], doubt)
	return []Warning{{Rule: "Syntax", Message: msg, Where: where}}, nil
}

var syntaxVersion = regexp.MustCompile(`^v?(\d+)(?:\.(\d+))?(?:\.\d+)?(?:-rc\d+)?(-labs)?$`)

func syntaxDoubt(tag string) string {
	switch tag {
	case "", "latest", "1":
		return ""
	case "labs", "experimental":
		return "which may differ from the labs channel"
	}
	m := syntaxVersion.FindStringSubmatch(tag)
	if m == nil {
		return "which may differ from this version"
	}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	if slices.Compare([]int{major, minor}, builtin[:]) > 0 {
		return "which is older"
	}
	if m[3] != "" {
		return "which may differ from the labs channel"
	}
	return ""
}
