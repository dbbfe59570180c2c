package plan

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// mustFail plans and gives the error, which must be located and not be wrapped.
func mustFail(t *testing.T, r Request, res Resolver) *Error {
	t.Helper()
	g, err := Make(t.Context(), r, res)
	if err == nil {
		t.Fatalf("Make gave the steps %q, want an error", stepNames(planned{Graph: g}))
	}
	located, ok := err.(*Error)
	if !ok {
		t.Fatalf("the error is a %T and not an *Error: %v", err, err)
	}
	return located
}

func TestWhatCannotBeRunIsRefusedAtItsLine(t *testing.T) {
	for _, test := range []struct {
		name       string
		dockerfile []string
		line       int
		says       string
	}{
		{"device", []string{"FROM busybox", "RUN --device=vendor.com/gpu=0 x"}, 2, "--device"},
		{"network mode", []string{"FROM busybox", "RUN --network=bridge x"}, 2, "bridge"},
		{"user name on scratch", []string{"FROM scratch", "COPY --chown=joe a /"}, 2, `"joe"`},
		{"WORKDIR of a user name on scratch", []string{"FROM scratch", "USER joe", "WORKDIR /w"}, 3, `"joe"`},
		{"negative id", []string{"FROM busybox", "COPY --chown=-1 a /"}, 2, "negative id"},
		{"windows", []string{"FROM --platform=windows/amd64 busybox", "RUN x"}, 1, "windows"},
		{"other frontend", []string{"# syntax=example/lang:1", "FROM busybox"}, 1, "example/lang:1"},
		{"frontend by name only", []string{"#syntax = tonistiigi/nix", "nonsense"}, 1, "tonistiigi/nix"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := project(t, map[string]string{"Dockerfile": lines(test.dockerfile...)})
			err := mustFail(t, Request{Context: dir}, library())
			if err.Where.Line() != test.line {
				t.Errorf("located at %v, want line %d: %v", err.Where, test.line, err)
			}
			if !strings.Contains(err.Error(), test.says) {
				t.Errorf("the error does not name %q: %v", test.says, err)
			}
			if test.name != "network mode" && err.Hint() == "" {
				t.Errorf("there is no hint: %v", err)
			}
			if !strings.Contains(err.Excerpt(), ">>> "+test.dockerfile[test.line-1]) {
				t.Errorf("the excerpt does not mark the line:\n%s", err.Excerpt())
			}
		})
	}
}

func TestUnusedStagesAreNotRefused(t *testing.T) {
	g := mustPlan(t, "FROM busybox AS later", "RUN --device=vendor.com/gpu=0 x", "FROM busybox", "RUN x")
	if len(g.Layers) != 1 {
		t.Errorf("layers are %q", layerNames(g))
	}
}

func TestHostNetworkIsAValueAndNoError(t *testing.T) {
	if got := opNamed[Exec](t, mustPlan(t, "FROM busybox", "RUN --network=host x"), "RUN").Network; got != NetworkHost {
		t.Errorf("network is %v", got)
	}
}

func TestMistakesAreFoundAtTheirLine(t *testing.T) {
	for _, test := range []struct {
		name       string
		dockerfile []string
		line       int
		says       string
	}{
		{"unknown instruction", []string{"FROM busybox", "", "RUNN x"}, 3, "did you mean RUN?"},
		{"unknown flag", []string{"FROM busybox", "COPY --form=x a b"}, 2, "did you mean"},
		{"no source image", []string{"RUN x"}, 1, "no build stage"},
		{"missing argument", []string{"FROM busybox", "COPY a"}, 2, "at least two arguments"},
		{"missing image", []string{"FROM busybox AS a", "FROM nosuch"}, 2, "nosuch"},
		{"misspelt stage", []string{"FROM busybox AS builder", "FROM busybox", "COPY --from=bilder / /"}, 3, "did you mean builder?"},
		{"missing image of a mount", []string{"FROM busybox", "RUN one", "RUN --mount=type=bind,from=nosuch,target=/x \\", " y"}, 3, "nosuch"},
		{"unfinished heredoc", []string{"FROM busybox", "RUN <<E", "x"}, 2, "heredoc"},
		{"bad mode", []string{"FROM busybox", "COPY --chmod=99 a /"}, 2, "99"},
		{"bad mount", []string{"FROM busybox", "RUN --mount=type=bnd,target=/x y"}, 2, "bnd"},
		{"bad platform", []string{"FROM --platform=a/b/c/d/e busybox"}, 1, "platform"},
		{"cycle", []string{"FROM busybox AS a", "COPY --from=a / /"}, 0, "ircular"},
		{"not in UTF-8", []string{"FROM busybox", "# \xff", "RUN a \\", " \xff"}, 3, "UTF-8"},
		{"bad signal", []string{"FROM busybox", "STOPSIGNAL NONE"}, 2, "NONE"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := project(t, map[string]string{"Dockerfile": lines(test.dockerfile...)})
			err := mustFail(t, Request{Context: dir}, library())
			if test.line != 0 && err.Where.Line() != test.line {
				t.Errorf("located at %v, want line %d: %v", err.Where, test.line, err)
			}
			if !strings.Contains(err.Error(), test.says) {
				t.Errorf("the error does not say %q: %v", test.says, err)
			}
			if err.Where.File != "Dockerfile" {
				t.Errorf("the file is %q", err.Where.File)
			}
		})
	}
}

func TestOtherOperatingSystemsAreRefused(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines("FROM scratch", "COPY a /")})
	err := mustFail(t, Request{Context: dir, Platforms: []ocispec.Platform{{OS: "windows", Architecture: "amd64"}}}, library())
	if !strings.Contains(err.Error(), "windows") || err.Hint() == "" {
		t.Errorf("error is %v with the hint %q", err, err.Hint())
	}
}

func TestErrorsBehindASyntaxLineAreNotBlamedOnIt(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines("# syntax=docker/dockerfile:1", "FROM busybox AS a", "RUNN x")})
	if err := mustFail(t, Request{Context: dir}, library()); err.Where.Line() != 3 {
		t.Errorf("located at %s: %v", err.Where, err)
	}
	dir = project(t, map[string]string{"Dockerfile": lines("# syntax=docker/dockerfile:1", "FROM busybox AS builder")})
	err := mustFail(t, Request{Context: dir, Target: "bilder"}, library())
	if err.Where.Line() != 0 || !strings.Contains(err.Error(), "did you mean builder?") {
		t.Errorf("a wrong target is located at %s: %v", err.Where, err)
	}
}

func TestSyntaxArgumentIsJudgedToo(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines("FROM busybox", "RUN x")})
	mustMake(t, Request{Context: dir, Args: map[string]string{"BUILDKIT_SYNTAX": "docker/dockerfile:1"}}, library())
	err := mustFail(t, Request{Context: dir, Args: map[string]string{"BUILDKIT_SYNTAX": "evil/frontend"}}, library())
	if !strings.Contains(err.Error(), "evil/frontend") || err.Hint() == "" {
		t.Errorf("error is %v with the hint %q", err, err.Hint())
	}
}

type failing struct {
	*images
	err error
}

func (f failing) ResolveImage(context.Context, string, ocispec.Platform) (digest.Digest, []byte, error) {
	return "", nil, f.err
}

type hinted struct{ error }

func (hinted) Hint() string { return "log in first" }

func TestErrorsOfTheResolverKeepIdentityAndHint(t *testing.T) {
	cause := hinted{errors.New("denied")}
	dir := project(t, map[string]string{"Dockerfile": lines("FROM busybox")})
	err := mustFail(t, Request{Context: dir}, failing{err: cause})
	if !errors.Is(err, cause) {
		t.Errorf("the cause cannot be found in %v", err)
	}
	if err.Hint() != "log in first" {
		t.Errorf("hint is %q", err.Hint())
	}
}

func TestCancelledPlanSaysSo(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines("FROM busybox")})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := Make(ctx, Request{Context: dir}, failing{err: context.Canceled})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
}

func TestMissingDockerfileHasAHint(t *testing.T) {
	err := mustFail(t, Request{Context: t.TempDir()}, library())
	if !strings.Contains(err.Hint(), "-f") || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error is %v with the hint %q", err, err.Hint())
	}
	dir := filepath.Join(t.TempDir(), "none")
	if err := mustFail(t, Request{Context: dir}, library()); !strings.Contains(err.Error(), dir) {
		t.Errorf("context %s: %v", dir, err)
	}
}

func TestExcerptLooksLikeBuildKits(t *testing.T) {
	source := []byte("FROM a\n\nRUN b\nRUN c \\\n  d\nRUN e\nRUN f\nRUN g")
	for _, test := range []struct {
		lines []Range
		want  string
	}{
		{[]Range{{3, 3}}, "Dockerfile:3\n--------------------\n   1 |     FROM a\n   2 |     \n   3 | >>> RUN b\n   4 |     RUN c \\\n   5 |       d\n--------------------\n"},
		{[]Range{{4, 5}}, "Dockerfile:4\n--------------------\n   3 |     RUN b\n   4 | >>> RUN c \\\n   5 | >>>   d\n   6 |     RUN e\n--------------------\n"},
		{[]Range{{8, 8}}, "Dockerfile:8\n--------------------\n   6 |     RUN e\n   7 |     RUN f\n   8 | >>> RUN g\n--------------------\n"},
		{[]Range{{9, 9}}, ""},
		{[]Range{{0, 0}}, ""},
		{nil, ""},
	} {
		got := Location{File: "Dockerfile", Lines: test.lines, Source: source}.Excerpt()
		if got != test.want {
			t.Errorf("lines %v:\n%s\nwant:\n%s", test.lines, got, test.want)
		}
	}
}

// A frontend that is newer than the decoder must not be able to ask for
// something and not get it.
func TestFieldsThatTheDecoderDoesNotReadAreRefused(t *testing.T) {
	unknown := &pb.ExecOp{Meta: &pb.Meta{Args: []string{"x"}}}
	unknown.Meta.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 999, protowire.VarintType), 1))
	for name, op := range map[string]*pb.Op{
		"unknown field":    {Op: &pb.Op_Exec{Exec: unknown}},
		"exit codes":       {Op: &pb.Op_Exec{Exec: &pb.ExecOp{Meta: &pb.Meta{Args: []string{"x"}, ValidExitCodes: []int32{1}}}}},
		"content cache":    {Op: &pb.Op_Exec{Exec: &pb.ExecOp{Mounts: []*pb.Mount{{ContentCache: pb.MountContentCache_ON}}}}},
		"nested build":     {Op: &pb.Op_Build{Build: &pb.BuildOp{}}},
		"pass through":     {Op: &pb.Op_Passthrough{Passthrough: &pb.PassthroughOp{}}},
		"worker filter":    {Op: &pb.Op_Merge{Merge: &pb.MergeOp{}}, Constraints: &pb.WorkerConstraints{Filter: []string{"x"}}},
		"source":           {Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "docker-image+blob://x"}}},
		"security unknown": {Op: &pb.Op_Exec{Exec: &pb.ExecOp{Security: 7}}},
	} {
		if err := refuse(op, nil); err == nil {
			t.Errorf("%s: accepted, so the build would silently do something else", name)
		}
	}
	if err := refuse(&pb.Op{Op: &pb.Op_Merge{}}, &pb.OpMetadata{LinuxResources: &pb.LinuxResources{Memory: 1}}); err == nil {
		t.Error("resource limits: accepted, so the step would run without them")
	}
	if err := checkAttrs("local", map[string]string{"local.metadatatransfer": "true"}); err == nil {
		t.Error("attribute of a source: accepted, so its content would be another")
	}
}

// Every field that is listed as known must exist, or the list would protect
// against nothing after an update of BuildKit.
func TestKnownFieldsExist(t *testing.T) {
	seen := map[protoreflect.Name]bool{}
	var walk func(protoreflect.MessageDescriptor)
	walk = func(m protoreflect.MessageDescriptor) {
		known, ok := knownFields[m.Name()]
		if !ok || seen[m.Name()] {
			return
		}
		seen[m.Name()] = true
		for _, name := range known {
			f := m.Fields().ByName(name)
			if f == nil {
				t.Errorf("%s has no field %s", m.Name(), name)
			} else if f.Message() != nil && !f.IsMap() {
				walk(f.Message())
			}
		}
	}
	walk((&pb.Op{}).ProtoReflect().Descriptor())
	walk((&pb.OpMetadata{}).ProtoReflect().Descriptor())
	for name := range knownFields {
		if !seen[name] {
			t.Errorf("no step has a %s", name)
		}
	}
}

func TestSecondOutputOfAStepIsRefused(t *testing.T) {
	exec := &pb.Op{Op: &pb.Op_Exec{Exec: &pb.ExecOp{Mounts: []*pb.Mount{{Dest: "/"}, {Dest: "/x", Output: 1}}}}}
	d := &decoder{}
	if err := d.checkOutput(exec, 0); err != nil {
		t.Errorf("the root: %v", err)
	}
	if err := d.checkOutput(exec, 1); err == nil {
		t.Error("the output of a mount was taken for the root")
	}
	if err := d.checkOutput(&pb.Op{Op: &pb.Op_File{}}, 1); err == nil {
		t.Error("the second output of a file step was taken for the first")
	}
}

func TestLayersThatTheHistoryDoesNotNameAreAnError(t *testing.T) {
	steps := []Step{{Op: Image{}}, {Op: Exec{Root: 0}}, {Op: Local{}}, {Op: Exec{Root: 2}}}
	for _, test := range []struct {
		layers []Ref
		named  int
		ok     bool
	}{
		{[]Ref{1}, 1, true}, {[]Ref{1}, 0, false}, {[]Ref{1}, 2, false}, {nil, 0, true}, {nil, 1, false},
		{[]Ref{2, 3}, 1, true}, {[]Ref{2, 3}, 2, false},
	} {
		if err := checkHistory(steps, test.layers, test.named); (err == nil) != test.ok {
			t.Errorf("%d steps and a history of %d: %v", len(test.layers), test.named, err)
		}
	}
}

func TestOnlyALinkedCopyIsALayerByMerge(t *testing.T) {
	copied := Step{Op: Files{Base: Scratch}}
	for name, steps := range map[string][]Step{
		"three inputs":     {{Op: Image{}}, copied, copied, {Op: Merge{Inputs: []Ref{0, 1, 2}}}},
		"not on scratch":   {{Op: Image{}}, {Op: Files{Base: 0}}, {Op: Merge{Inputs: []Ref{0, 1}}}},
		"an image on top":  {{Op: Image{}}, {Op: Image{}}, {Op: Merge{Inputs: []Ref{0, 1}}}},
		"a difference":     {{Op: Image{}}, {Op: Image{}}, {Op: Diff{Lower: 0, Upper: 1}}},
		"scratch on top":   {{Op: Image{}}, {Op: Merge{Inputs: []Ref{0, Scratch}}}},
		"a single content": {{Op: Image{}}, {Op: Merge{Inputs: []Ref{0}}}},
	} {
		if _, layers, err := chain(steps, Ref(len(steps)-1)); err == nil {
			t.Errorf("%s: taken for the layers %v, though it is not one layer", name, layers)
		}
	}
}
