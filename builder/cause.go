package builder

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"

	"github.com/cooper-build/cooper/builder/files"
	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/snapshot"
)

// A cause is all that a step's result depends on, part by part. Its key is a hash of the parts, and a step that has to run
// is explained by the parts that differ from an earlier cause: so an explanation cannot forget what the key has.
type cause struct {
	kind  string
	op    []byte // as plan.Encode gives it
	parts []part

	// lists are those of the selections in the user's own directories, when they were asked for.
	lists map[digest.Digest]files.Listing
}

// A part is one thing that a step depends on besides its operation.
type part struct {
	Role  role   `json:"role,omitempty"`
	Name  string `json:"name"`
	Value string `json:"value"`
	// From is the step that an input comes from, and Image the digest of the image that it is.
	From  place         `json:"from,omitzero"`
	Image digest.Digest `json:"image,omitempty"`

	source string // From as people know it
}

type role string

const (
	plainPart role = ""
	inputPart role = "input" // Value is an id
	filesPart role = "files" // Value is the digest of a selection
	givenPart role = "given" // Value is a JSON bool
)

// epochPart names a part whose value is a time as JSON has it, or null.
const epochPart = "SOURCE_DATE_EPOCH"

func (c *cause) add(name, value string) {
	c.parts = append(c.parts, part{Name: name, Value: value})
}

func (c *cause) given(name string, is bool) {
	c.parts = append(c.parts, part{Role: givenPart, Name: name, Value: strconv.FormatBool(is)})
}

// input adds what the step stands on; id is what it is.
func (c *cause) input(name string, v value, id string) {
	p := part{Role: inputPart, Name: name, Value: id, From: v.place, source: v.name}
	if v.image != nil {
		p.Image = v.image.Descriptor.Digest
	}
	c.parts = append(c.parts, p)
}

// files adds what the step reads of v.
func (c *cause) files(name string, v value, d digest.Digest) {
	c.parts = append(c.parts, part{Role: filesPart, Name: name, Value: d.String(), From: v.place, source: v.name})
}

func (c *cause) key() snapshot.Key {
	k := newKey(c.kind).bytes(c.op)
	for _, p := range c.parts {
		k = k.str(p.Value)
	}
	return k.sum()
}

func asJSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return "unencodable: " + err.Error() // as in hasher.value
	}
	return string(b)
}

// A place says which step of a Dockerfile something is, in a way that other builds can find again: names of steps show
// values of arguments, and numbers shift.
type place struct {
	Stage string `json:"stage,omitempty"` // also of the platform
	At    int    `json:"at,omitempty"`
	Text  string `json:"text,omitempty"` // a short digest of the instruction as it is written
}

func placeOf(s plan.Step) place {
	p, text := cutStepName(s.Name)
	if written := s.Where.Text(); written != "" {
		text = written
	}
	p.Text = shortDigest(fmt.Sprintf("%T %s", s.Op, text)) // an instruction may be several steps
	return p
}

// cutStepName takes the name of a step of a stage apart: [linux/arm64 build 2/4] RUN make.
func cutStepName(name string) (p place, text string) {
	head, text, ok := strings.Cut(name, "] ")
	head, bracket := strings.CutPrefix(head, "[")
	if !ok || !bracket {
		return place{}, name
	}
	stage, count := "", head
	if i := strings.LastIndexByte(head, ' '); i >= 0 {
		stage, count = head[:i], head[i+1:]
	}
	at, _, ok := strings.Cut(count, "/")
	n, err := strconv.Atoi(at)
	if !ok || err != nil {
		return place{}, name
	}
	return place{Stage: stage, At: n}, text
}

// sameStep reports whether two places are one step, which may have been edited.
func (p place) sameStep(o place) bool {
	return p.Stage == o.Stage && p.At == o.At || p.Text == o.Text
}

func shortDigest(s string) string { return digest.FromString(s).Encoded()[:16] }

// imageCause is what a base image is known by. It is never looked up: its layers are.
func imageCause(op plan.Image, src *image.Source) *cause {
	c := &cause{kind: "image"}
	name, _, _ := strings.Cut(op.Ref, "@")
	c.add("image", name)
	c.add("platform", platforms.FormatAll(op.Platform))
	c.add("base digest", src.Descriptor.Digest.String())
	return c
}
