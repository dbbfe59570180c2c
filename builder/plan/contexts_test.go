package plan

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestOCILayoutContextIsResolvedByItsName(t *testing.T) {
	layout := t.TempDir()
	pin := digest.FromString("pinned").String()
	for _, test := range []struct {
		name, value string
		dockerfile  string
		ask         string
	}{
		{"busybox", "oci-layout://" + layout, "FROM busybox", "oci-layout://busybox"},
		{"busybox", "oci-layout://" + layout + ":v1.0", "FROM busybox", "oci-layout://busybox:v1.0"},
		{"busybox", "oci-layout://" + layout + "@" + pin, "FROM busybox", "oci-layout://busybox@" + pin},
		{"busybox", "oci-layout://" + layout + ":v1@" + pin, "FROM busybox:latest", "oci-layout://busybox:v1@" + pin},
		{"example.com/a/b:2", "oci-layout://" + layout + ":v1", "FROM example.com/a/b:2", "oci-layout://example.com/a/b:2:v1"},
		{"base", "oci-layout://" + layout + ":v1", "FROM scratch AS base\nFROM base", "oci-layout://base:v1"},
		{"base", "oci-layout://" + layout + ":v1", "FROM scratch\nCOPY --from=base / /", "oci-layout://base:v1"},
		{"base", "oci-layout://" + layout + ":v1", "FROM debian\nRUN --mount=from=base,target=/x true", "oci-layout://base:v1"},
	} {
		t.Run(test.value+" "+test.dockerfile, func(t *testing.T) {
			lib := library()
			lib.known[test.ask] = image(ocispec.ImageConfig{Env: []string{"FROM=layout"}}, 1)
			dir := project(t, map[string]string{"Dockerfile": test.dockerfile + "\nRUN x\n"})
			g := mustMake(t, Request{Context: dir, Contexts: map[string]string{test.name: test.value}}, lib)
			var got []Image
			for _, s := range g.Steps {
				if img, ok := s.Op.(Image); ok && img.Layout {
					got = append(got, img)
				}
			}
			bare, _, _ := strings.Cut(test.ask, "@")
			want := digest.FromString(test.ask)
			if len(got) != 1 || got[0].Ref != bare+"@"+want.String() || got[0].Digest != want {
				t.Errorf("images of layouts are %+v, want %s with what the resolver answered", got, bare)
			}
		})
	}
}

func TestBaseConfigIsKnownWhenAContextReplacesAStage(t *testing.T) {
	lib := library()
	lib.known["oci-layout://base"] = image(ocispec.ImageConfig{}, 3)
	dir := project(t, map[string]string{"Dockerfile": lines("FROM scratch AS base", "COPY a /", "FROM base", "RUN x")})
	g := mustMake(t, Request{Context: dir, Contexts: map[string]string{"base": "oci-layout://" + t.TempDir()}}, lib)
	if !strings.Contains(string(g.BaseConfig), "base 2") {
		t.Errorf("base config is %s", g.BaseConfig)
	}
	if got := layerNames(g); len(got) != 1 {
		t.Errorf("layers are %q", got)
	}
}

func TestDockerImageContextIsPinned(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines("FROM app", "RUN x")})
	g := mustMake(t, Request{Context: dir, Contexts: map[string]string{"app": "docker-image://busybox"}}, library())
	want := Image{
		Ref:      "docker.io/library/busybox:latest@" + digest.FromString("docker.io/library/busybox:latest").String(),
		Digest:   digest.FromString("docker.io/library/busybox:latest"),
		Platform: g.Steps[g.Base].Op.(Image).Platform,
	}
	if diff := cmp.Diff(Op(want), g.Steps[g.Base].Op); diff != "" {
		t.Errorf("base (-want +got):\n%s", diff)
	}
}

func TestDirectoryContextHasItsOwnIgnoreFile(t *testing.T) {
	other := project(t, map[string]string{".dockerignore": "*.tmp\n", "a/b": ""})
	dir := project(t, map[string]string{"Dockerfile": lines("FROM scratch", "COPY --from=other a/b /")})
	g := mustMake(t, Request{Context: dir, Contexts: map[string]string{"other": other}}, library())
	got := opNamed[Local](t, g, "[context other] load from client")
	if diff := cmp.Diff(Local{Name: "other", Dir: other, Exclude: []string{"*.tmp"}, Follow: []string{"a/b"}}, got); diff != "" {
		t.Errorf("context (-want +got):\n%s", diff)
	}
}

func TestDirectoryContextCanBeABase(t *testing.T) {
	root := project(t, map[string]string{"bin/sh": ""})
	dir := project(t, map[string]string{"Dockerfile": lines("FROM rootfs", "RUN x")})
	g := mustMake(t, Request{Context: dir, Contexts: map[string]string{"rootfs": root}}, library())
	if len(g.Layers) != 2 || g.Base != Scratch {
		t.Fatalf("layers are %q on %d, want the directory and RUN", layerNames(g), g.Base)
	}
	if _, ok := g.Steps[g.Layers[0]].Op.(Local); !ok {
		t.Errorf("the first layer is %+v", g.Steps[g.Layers[0]])
	}
}

func TestContextReplacesAStage(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines("FROM nosuch AS build", "RUN never", "FROM busybox", "COPY --from=build /a /a")})
	g := mustMake(t, Request{Context: dir, Contexts: map[string]string{"build": "docker-image://debian"}}, library())
	for _, name := range stepNames(g) {
		if strings.Contains(name, "never") {
			t.Errorf("the replaced stage is built: %q", name)
		}
	}
}

func TestUnusableContextIsRefusedWhereItIsUsed(t *testing.T) {
	for _, value := range []string{"github.com/a/b", "target:other"} {
		contexts := map[string]string{"ext": value}
		for _, test := range []struct {
			dockerfile []string
			line       int
		}{
			{[]string{"FROM busybox", "FROM ext", "RUN x"}, 2},
			{[]string{"FROM busybox", "RUN x", "COPY --from=ext / /"}, 3},
			{[]string{"FROM busybox AS ext", "FROM busybox", "COPY --from=ext / /"}, 1},
			{[]string{"FROM busybox", "RUN --mount=from=ext,target=/x true"}, 2},
		} {
			dir := project(t, map[string]string{"Dockerfile": lines(test.dockerfile...)})
			err := mustFail(t, Request{Context: dir, Contexts: contexts}, library())
			if err.Where.Line() != test.line || !strings.Contains(err.Hint(), "ext") {
				t.Errorf("%s in %q: located at %s, want line %d: %v (%s)", value, test.dockerfile, err.Where, test.line, err, err.Hint())
			}
		}
		dir := project(t, map[string]string{"Dockerfile": lines("FROM busybox", "RUN x")})
		mustMake(t, Request{Context: dir, Contexts: contexts}, library())
	}
}

func TestContextsThatCannotBeAreRefusedAtOnce(t *testing.T) {
	file := filepath.Join(project(t, map[string]string{"f": ""}), "f")
	for name, value := range map[string]string{
		"UPPER CASE": ".", "file": file, "none": filepath.Join(t.TempDir(), "none"), "empty": "",
		"layout": "oci-layout://" + file, "digest": "oci-layout://" + t.TempDir() + "@sha256:short",
	} {
		dir := project(t, map[string]string{"Dockerfile": lines("FROM scratch", "COPY a /")})
		err := mustFail(t, Request{Context: dir, Contexts: map[string]string{name: value}}, library())
		if !strings.Contains(err.Error(), name) {
			t.Errorf("%s=%s: the error does not name it: %v", name, value, err)
		}
	}
}
