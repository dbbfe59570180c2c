package plan

import (
	"context"
	"io/fs"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const someSum = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func TestRemoteSourcesSayAllThatTheDockerfileSays(t *testing.T) {
	const sha = "0123456789abcdef0123456789abcdef01234567"
	for _, test := range []struct {
		name, instruction string
		want              Op
	}{
		{"git", "ADD https://example.com/a/b.git#v1:sub /src", Git{
			Remote: "https://example.com/a/b.git", Ref: "v1", Subdir: "sub", TokenSecret: "GIT_AUTH_TOKEN", HeaderSecret: "GIT_AUTH_HEADER",
		}},
		{"git with its directory and a checksum", "ADD --keep-git-dir=true --checksum=" + sha + " https://example.com/a/b.git#main /src", Git{
			Remote: "https://example.com/a/b.git", Ref: "main", KeepGitDir: true, Checksum: sha, TokenSecret: "GIT_AUTH_TOKEN", HeaderSecret: "GIT_AUTH_HEADER",
		}},
		{"git without submodules", "ADD https://example.com/a/b.git?submodules=false&branch=x /src", Git{
			Remote: "https://example.com/a/b.git", Ref: "refs/heads/x", SkipSubmodules: true, TokenSecret: "GIT_AUTH_TOKEN", HeaderSecret: "GIT_AUTH_HEADER",
		}},
		{"http", "ADD https://example.com/d/f.tgz /", HTTP{URL: "https://example.com/d/f.tgz", Filename: "f.tgz"}},
		{"http with a checksum", "ADD --checksum=" + someSum + " http://example.com/g /f", HTTP{URL: "http://example.com/g", Filename: "g", Checksum: digest.Digest(someSum)}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := mustPlan(t, "FROM busybox", test.instruction)
			var got Op
			for _, s := range g.Steps {
				switch s.Op.(type) {
				case Git, HTTP:
					got = s.Op
				}
			}
			if d := cmp.Diff(test.want, got); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

func TestCredentialsAreNoPartOfWhatARemoteSourceMeans(t *testing.T) {
	a := Git{Remote: "https://example.com/a.git", TokenSecret: "one", SSH: "two"}
	if got, want := string(Encode(a)), string(Encode(Git{Remote: a.Remote})); got != want {
		t.Errorf("the key depends on how the repository is reached:\n%s\n%s", got, want)
	}
}

func TestAgentAndLimitsReachTheStep(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines("FROM busybox",
		"RUN --mount=type=ssh,id=deploy,target=/agent,uid=1,gid=2,mode=0640,required=true --security=insecure x")})
	g := mustMake(t, Request{
		Context: dir, ShmSize: 1 << 20, CgroupParent: "builds", Network: NetworkNone,
		Ulimits: []Ulimit{{"nofile", 1024, 2048}, {"nproc", 7, 7}}, Hosts: []Host{{"Name", "10.0.0.1"}, {"six", "fe80::1"}},
	}, library())
	got := opNamed[Exec](t, g, "RUN")
	want := []Mount{{Kind: MountSSH, From: Scratch, Target: "/agent", ID: "deploy", UID: 1, GID: 2, Mode: 0o640}}
	if d := cmp.Diff(want, got.Mounts); d != "" {
		t.Errorf("mounts (-want +got):\n%s", d)
	}
	if !got.Insecure || got.ShmSize != 1<<20 || got.CgroupParent != "builds" || got.Network != NetworkNone {
		t.Errorf("the step is %+v", got)
	}
	if d := cmp.Diff([]Ulimit{{"nofile", 1024, 2048}, {"nproc", 7, 7}}, got.Ulimits); d != "" {
		t.Errorf("limits (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]Host{{"name", "10.0.0.1"}, {"six", "fe80::1"}}, got.Hosts); d != "" {
		t.Errorf("hosts (-want +got):\n%s", d)
	}
	if !strings.Contains(strings.Join(got.Env, " "), "SSH_AUTH_SOCK=/agent") {
		t.Errorf("the environment does not name the socket: %q", got.Env)
	}
}

// tree is a Resolver with one remote tree.
type remoteTree struct {
	*images
	files map[string]string
	steps []Step
}

func (r *remoteTree) ReadFile(_ context.Context, steps []Step, _ Ref, path string, limit int64) ([]byte, error) {
	r.steps = steps
	text, ok := r.files[path]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return []byte(text[:min(int64(len(text)), limit)]), nil
}

func TestRemoteContextIsReadThroughTheResolver(t *testing.T) {
	dockerfile := lines("FROM busybox", "COPY a /")
	gzip := "\x1f\x8b\x08 not really"
	for _, test := range []struct {
		name    string
		request Request
		files   map[string]string
		source  Op
	}{
		{"git", Request{Context: "https://example.com/a.git#v1"}, map[string]string{"Dockerfile": dockerfile},
			Git{Remote: "https://example.com/a.git", Ref: "v1", TokenSecret: "GIT_AUTH_TOKEN", HeaderSecret: "GIT_AUTH_HEADER"}},
		{"another Dockerfile in git", Request{Context: "https://example.com/a.git", Dockerfile: "sub/D"}, map[string]string{"sub/D": dockerfile},
			Git{Remote: "https://example.com/a.git", TokenSecret: "GIT_AUTH_TOKEN", HeaderSecret: "GIT_AUTH_HEADER"}},
		{"archive", Request{Context: "https://example.com/a.tgz"}, map[string]string{"context": gzip, "Dockerfile": dockerfile},
			HTTP{URL: "https://example.com/a.tgz", Filename: "context"}},
		{"Dockerfile from a server", Request{Context: "https://example.com/D"}, map[string]string{"context": dockerfile},
			HTTP{URL: "https://example.com/D", Filename: "context"}},
		{"upload", Request{Context: Uploaded}, map[string]string{"context": gzip, "Dockerfile": dockerfile}, Upload{Filename: "context"}},
		{"given Dockerfile", Request{Context: "https://example.com/a.git", Text: []byte(dockerfile)}, nil,
			Git{Remote: "https://example.com/a.git", TokenSecret: "GIT_AUTH_TOKEN", HeaderSecret: "GIT_AUTH_HEADER"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := mustMake(t, test.request, &remoteTree{images: library(), files: test.files})
			found := false
			for _, s := range g.Steps {
				found = found || cmp.Equal(s.Op, test.source)
			}
			if !found {
				t.Errorf("no step is %+v: %q", test.source, stepNames(g))
			}
			if string(g.Dockerfile) != dockerfile {
				t.Errorf("the Dockerfile is %q", g.Dockerfile)
			}
		})
	}
}

func TestGivenDockerfileAndEmptyContext(t *testing.T) {
	g := mustMake(t, Request{Text: []byte(lines("FROM busybox", "RUN x"))}, library())
	if len(g.Layers) != 1 {
		t.Errorf("layers are %q", layerNames(g))
	}
	err := mustFail(t, Request{Text: []byte(lines("FROM busybox", "RUNN x"))}, library())
	if err.Where.Line() != 2 || !strings.Contains(err.Excerpt(), ">>> RUNN x") {
		t.Errorf("located at %s:\n%s", err.Where, err.Excerpt())
	}
}

func TestNamedContextsMayBeRemote(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines("FROM busybox", "COPY --from=src a /", "COPY --from=file context /")})
	g := mustMake(t, Request{Context: dir, Contexts: map[string]string{"src": "https://example.com/a.git#v2", "file": "https://example.com/f"}}, library())
	var remote []string
	for _, s := range g.Steps {
		switch op := s.Op.(type) {
		case Git:
			remote = append(remote, op.Remote+"#"+op.Ref)
		case HTTP:
			remote = append(remote, op.URL)
		}
	}
	if d := cmp.Diff([]string{"https://example.com/a.git#v2", "https://example.com/f"}, remote); d != "" {
		t.Errorf("remote sources (-want +got):\n%s", d)
	}
}

func TestOneStepServesEveryPlatformThatNeedsIt(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines(
		"FROM --platform=$BUILDPLATFORM busybox AS tools", "RUN make tools",
		"FROM busybox", "COPY --from=tools /t /", "ARG TARGETARCH", "RUN use $TARGETARCH")})
	amd, arm := ocispec.Platform{OS: "linux", Architecture: "amd64"}, ocispec.Platform{OS: "linux", Architecture: "arm64"}
	g, err := Make(t.Context(), Request{Context: dir, Platforms: []ocispec.Platform{amd, arm}}, library())
	if err != nil {
		t.Fatal(err)
	}
	checkGraph(t, g)
	if !g.Index || len(g.Targets) != 2 {
		t.Fatalf("index %v, %d targets", g.Index, len(g.Targets))
	}
	count := map[string]int{}
	for _, s := range g.Steps {
		if e, ok := s.Op.(Exec); ok {
			count[e.Args[len(e.Args)-1]]++
		}
	}
	if d := cmp.Diff(map[string]int{"make tools": 1, "use $TARGETARCH": 2}, count); d != "" {
		t.Errorf("commands (-want +got):\n%s", d)
	}
	for i, arch := range []string{"amd64", "arm64"} {
		if g.Targets[i].Platform.Architecture != arch || len(g.Targets[i].Layers) != 2 {
			t.Errorf("target %d is %+v", i, g.Targets[i])
		}
	}
}

func TestTimeOfTheContextCanBeTheEpoch(t *testing.T) {
	res := &dated{remoteTree{images: library(), files: map[string]string{"Dockerfile": lines("FROM busybox", "RUN x")}}}
	g := mustMake(t, Request{Context: "https://example.com/a.git", Args: map[string]string{"SOURCE_DATE_EPOCH": "context"}}, res)
	if g.Epoch == nil || !g.Epoch.Equal(time.Unix(1700000000, 0)) {
		t.Errorf("the epoch is %v", g.Epoch)
	}
}

type dated struct{ remoteTree }

func (*dated) ResolveRevision(context.Context, Op) (Revision, error) {
	return Revision{Commit: []byte("tree " + strings.Repeat("0", 40) + "\nauthor a <a@b> 1600000000 +0000\ncommitter a <a@b> 1700000000 +0100\n\nmessage\n")}, nil
}

func TestQuestionsAreAnswered(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines("# tools makes the tools", "FROM busybox AS tools", "ARG VERSION=1", "RUN --mount=type=secret,id=token x", "FROM tools As last", "MAINTAINER x")})
	for _, test := range []struct {
		name   string
		ask    Question
		says   []string
		failed bool
	}{
		{"check", Check, []string{"2 warnings have been found", "MaintainerDeprecated", "FromAsCasing", "https://docs.docker.com/"}, true},
		{"outline", Outline, []string{"VERSION", "token"}, false},
		{"targets", Targets, []string{"tools", "last (default)", "makes the tools"}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := Ask(t.Context(), Request{Context: dir}, test.ask, library())
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range test.says {
				if !strings.Contains(string(got.Text), s) {
					t.Errorf("the answer does not say %q:\n%s", s, got.Text)
				}
			}
			if got.Failed != test.failed || len(got.JSON) == 0 || got.JSON[0] != '{' {
				t.Errorf("failed %v, JSON %s", got.Failed, got.JSON)
			}
		})
	}
	if err := os.WriteFile(dir+"/Dockerfile", []byte("FROM busybox\nRUNN x\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := Ask(t.Context(), Request{Context: dir}, Check, library())
	if err != nil {
		t.Fatal(err)
	}
	if !got.Failed || !strings.Contains(string(got.Text), "did you mean RUN?") {
		t.Errorf("a Dockerfile that cannot be built passes: %v\n%s", got.Failed, got.Text)
	}
}
