package plan

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestStepsAreNamedAndLocatedAsBuildKitShowsThem(t *testing.T) {
	g := mustPlan(t,
		"FROM busybox AS build",
		"WORKDIR /src",
		"RUN make \\",
		"    all",
		"FROM busybox",
		"COPY --from=build /src/out /out",
	)
	for _, want := range []struct {
		name  string
		lines []Range
	}{
		{"[build 2/3] WORKDIR /src", []Range{{2, 2}}},
		{"[build 3/3] RUN make     all", []Range{{3, 4}}},
		{"[stage-1 2/2] COPY --from=build /src/out /out", []Range{{6, 6}}},
	} {
		_, s := stepNamed(t, g, want.name)
		if s.Name != want.name {
			t.Errorf("name is %q, want %q", s.Name, want.name)
		}
		if diff := cmp.Diff(want.lines, s.Where.Lines); diff != "" {
			t.Errorf("%s: lines (-want +got):\n%s", s.Name, diff)
		}
		if s.Where.File != "Dockerfile" || string(s.Where.Source) != string(g.Dockerfile) {
			t.Errorf("%s: located in %q, whose text is not the Dockerfile's", s.Name, s.Where.File)
		}
	}
}

func TestStagesThatTheResultDoesNotNeedAreLeftOut(t *testing.T) {
	g := mustPlan(t,
		"FROM debian AS unused",
		"RUN expensive",
		"FROM busybox",
		"RUN cheap",
	)
	if got := stepNames(g); len(got) != 2 {
		t.Errorf("steps are %q, want FROM busybox and RUN cheap", got)
	}
}

func TestTargetChoosesTheStage(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines("FROM busybox AS one", "RUN first", "FROM one AS two", "RUN second")})
	g := mustMake(t, Request{Context: dir, Target: "one"}, library())
	if _, s := stepNamed(t, g, "RUN"); !strings.HasSuffix(s.Name, "RUN first") {
		t.Errorf("the only RUN is %q", s.Name)
	}
}

func TestPlanIsTheSameInEveryRun(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines(
		"FROM busybox AS a", "RUN --mount=type=bind,target=/c --mount=from=debian,target=/d x", "COPY . /a",
		"FROM debian AS b", "RUN y", "FROM busybox", "COPY --link --from=a / /a", "COPY --link --from=b / /b", "COPY <<E /e", "text", "E",
	)})
	first := mustMake(t, Request{Context: dir, Labels: map[string]string{"a": "1", "b": "2"}}, library())
	for range 5 {
		again := mustMake(t, Request{Context: dir, Labels: map[string]string{"a": "1", "b": "2"}}, library())
		if diff := cmp.Diff(first, again); diff != "" {
			t.Fatalf("two plans of one Dockerfile differ (-first +again):\n%s", diff)
		}
	}
}

func TestLayersAreTheStepsThatTheHistoryNames(t *testing.T) {
	for _, test := range []struct {
		name       string
		dockerfile []string
		layers     []string // parts of the names of the layers, base first
	}{
		{"metadata makes none", []string{"FROM busybox", "ENV a=b", "USER 1", "CMD x"}, nil},
		{"from scratch", []string{"FROM scratch", "COPY a /"}, []string{"COPY a /"}},
		{"nothing at all", []string{"FROM scratch", "ENV a=b"}, nil},
		{"WORKDIR makes one", []string{"FROM busybox", "WORKDIR /w"}, []string{"WORKDIR /w"}},
		{"WORKDIR / makes none", []string{"FROM busybox", "WORKDIR /"}, nil},
		{"several sources are one layer", []string{"FROM busybox", "COPY a b /d/"}, []string{"COPY a b /d/"}},
		{"a heredoc is one layer", []string{"FROM busybox", "COPY <<A <<B /d/", "1", "A", "2", "B", "RUN <<E", "x", "E"}, []string{"COPY <<A", "RUN <<E"}},
		{"COPY --link is one layer", []string{"FROM busybox", "RUN a", "COPY --link a /", "RUN b"}, []string{"RUN a", "LINK COPY", "RUN b"}},
		{"COPY --link twice", []string{"FROM busybox", "COPY --link a /", "COPY --link b /"}, []string{"LINK COPY --link a", "LINK COPY --link b"}},
		{"COPY --link on scratch needs no merge", []string{"FROM scratch", "COPY --link a /", "COPY --link b /"}, []string{"COPY --link a", "LINK COPY --link b"}},
		{"through stages", []string{"FROM busybox AS x", "RUN a", "FROM x AS y", "RUN b", "FROM y", "RUN c"}, []string{"RUN a", "RUN b", "RUN c"}},
		{"other stages make none", []string{"FROM busybox AS x", "RUN a", "FROM debian", "COPY --from=x / /x"}, []string{"COPY --from"}},
		{"mounts make none", []string{"FROM busybox", "RUN --mount=type=cache,target=/c,uid=1 --mount=target=/t,rw x"}, []string{"RUN --mount"}},
		{"--parents --exclude", []string{"FROM busybox", "COPY --parents --exclude=*.c a/./b c /d/"}, []string{"COPY --parents"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := mustPlan(t, test.dockerfile...)
			got := layerNames(g)
			ok := slices.EqualFunc(got, test.layers, func(g, w string) bool { return strings.Contains(g, w) })
			if !ok {
				t.Errorf("layers are %q, want %q", got, test.layers)
			}
			var config ocispec.Image
			if err := json.Unmarshal(g.Config, &config); err != nil {
				t.Fatal(err)
			}
			var own []string
			for _, h := range config.History {
				if h.Comment == "buildkit.dockerfile.v0" && !h.EmptyLayer {
					own = append(own, h.CreatedBy)
				}
			}
			if len(own) != len(got) {
				t.Errorf("history has the layers %q, the graph %q", own, got)
			}
		})
	}
}

func TestBaseIsTheImageUnderTheResult(t *testing.T) {
	g := mustPlan(t, "FROM debian AS other", "RUN x", "FROM busybox", "COPY --from=other / /", "RUN y")
	if g.Base == Scratch {
		t.Fatal("there is no base")
	}
	img := g.Steps[g.Base].Op.(Image)
	if want := "docker.io/library/busybox:latest@" + digest.FromString("docker.io/library/busybox:latest").String(); img.Ref != want {
		t.Errorf("base is %s, want %s", img.Ref, want)
	}
	if want := digest.FromString("docker.io/library/busybox:latest"); img.Digest != want {
		t.Errorf("digest is %s, want %s", img.Digest, want)
	}
	if !strings.Contains(string(g.BaseConfig), "base 1") {
		t.Errorf("base config is not the one of busybox: %s", g.BaseConfig)
	}
	if g := mustPlan(t, "FROM scratch", "COPY a /"); g.Base != Scratch || g.BaseConfig != nil {
		t.Errorf("scratch has the base %d with the config %q", g.Base, g.BaseConfig)
	}
}

func TestEmptyImageHasNoSteps(t *testing.T) {
	g := mustPlan(t, "FROM scratch", "LABEL a=b")
	if g.Result != Scratch || len(g.Steps) != 0 {
		t.Errorf("result is step %d of %q, want scratch", g.Result, stepNames(g))
	}
}

func TestConfigHasWhatTheInstructionsSay(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines(
		"FROM busybox", "ARG V=1", "ENV A=$V", "USER 3:4", "WORKDIR /w", "EXPOSE 80", "VOLUME /v", "LABEL l=$V",
		`CMD ["c"]`, `ENTRYPOINT ["e"]`, "STOPSIGNAL SIGINT", "HEALTHCHECK CMD true", "ONBUILD RUN later",
	)})
	g := mustMake(t, Request{Context: dir, Args: map[string]string{"V": "2"}, Labels: map[string]string{"given": "yes"}}, library())
	var got struct {
		Config struct {
			ocispec.ImageConfig
			OnBuild     []string
			Healthcheck struct{ Test []string }
		} `json:"config"`
	}
	if err := json.Unmarshal(g.Config, &got); err != nil {
		t.Fatal(err)
	}
	want := ocispec.ImageConfig{
		User: "3:4", Env: []string{"PATH=/bin", "A=2"}, WorkingDir: "/w", StopSignal: "SIGINT",
		ExposedPorts: map[string]struct{}{"80/tcp": {}}, Volumes: map[string]struct{}{"/v": {}},
		//lint:ignore SA1019 BuildKit sets ArgsEscaped, so images of ours have it, too
		Labels: map[string]string{"l": "2", "given": "yes"}, Entrypoint: []string{"e"}, Cmd: []string{"c"}, ArgsEscaped: true,
	}
	if diff := cmp.Diff(want, got.Config.ImageConfig); diff != "" {
		t.Errorf("config (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"RUN later"}, got.Config.OnBuild); diff != "" {
		t.Errorf("ONBUILD (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"CMD-SHELL", "true"}, got.Config.Healthcheck.Test); diff != "" {
		t.Errorf("HEALTHCHECK (-want +got):\n%s", diff)
	}
}

func TestRunHasItsEnvironmentUserAndDirectory(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines(
		"FROM busybox", "ARG WHO=nobody", "ENV A=1", "WORKDIR /w", "USER u:g", `SHELL ["/bin/sh", "-ec"]`, "RUN --network=none echo $A",
	)})
	g := mustMake(t, Request{Context: dir, Args: map[string]string{"HTTP_PROXY": "http://p", "no_proxy": "n"}}, library())
	got := opNamed[Exec](t, g, "RUN")
	want := Exec{
		Root: got.Root, Args: []string{"/bin/sh", "-ec", "echo $A"}, Env: []string{"PATH=/bin", "WHO=nobody", "A=1"},
		Dir: "/w", User: "u:g", Network: NetworkNone, Proxy: Proxy{HTTP: "http://p", No: "n"}, Platform: got.Platform,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("RUN (-want +got):\n%s", diff)
	}
	if got.Platform.OS != "linux" || got.Platform.Architecture == "" {
		t.Errorf("platform is %v", got.Platform)
	}
}

func TestExecFormRunsWithoutShell(t *testing.T) {
	got := opNamed[Exec](t, mustPlan(t, "FROM busybox", `RUN ["/bin/ls", "a b"]`), "RUN")
	if diff := cmp.Diff([]string{"/bin/ls", "a b"}, got.Args); diff != "" {
		t.Errorf("args (-want +got):\n%s", diff)
	}
}

func TestMountsAreDecodedFully(t *testing.T) {
	g := mustPlan(t,
		"FROM debian AS other", "RUN fill",
		"FROM busybox",
		"RUN --mount=type=bind,from=other,source=/a,target=/bind \\",
		"    --mount=type=bind,target=/ctx,rw \\",
		"    --mount=type=cache,target=/cache,id=i,sharing=locked,from=other,source=/seed \\",
		"    --mount=type=cache,target=/owned,uid=7,gid=8,mode=0700,sharing=private \\",
		"    --mount=type=tmpfs,target=/tmpfs,size=1m \\",
		"    --mount=type=tmpfs,target=/dev/shm,size=2m \\",
		"    --mount=type=secret,id=key,target=/k,required=true,uid=1,gid=2,mode=0440 \\",
		"    --mount=type=secret,id=tok,env=TOKEN \\",
		"    sh",
	)
	other, _ := stepNamed(t, g, "RUN fill")
	ctx, _ := stepNamed(t, g, "load build context")
	owned, _ := stepNamed(t, g, "cache mount permissions")
	got := opNamed[Exec](t, g, "RUN --mount")
	want := []Mount{
		{Kind: MountSecret, From: Scratch, ID: "tok", Env: "TOKEN", Optional: true},
		{Kind: MountBind, From: other, Selector: "/a", Target: "/bind", ReadOnly: true},
		{Kind: MountCache, From: other, Selector: "/seed", Target: "/cache", ID: "/i", Sharing: SharingLocked},
		{Kind: MountBind, From: ctx, Target: "/ctx"},
		{Kind: MountCache, From: owned, Selector: "/cache", Target: "/owned", ID: "//owned", Sharing: SharingPrivate},
		{Kind: MountTmpfs, From: Scratch, Target: "/tmpfs", Size: 1 << 20},
		{Kind: MountSecret, From: Scratch, Target: "/k", ID: "key", UID: 1, GID: 2, Mode: 0o440},
	}
	if diff := cmp.Diff(want, got.Mounts); diff != "" {
		t.Errorf("mounts (-want +got):\n%s", diff)
	}
	if got.ShmSize != 2<<20 {
		t.Errorf("/dev/shm has %d bytes, want 2 MiB", got.ShmSize)
	}
	mkdir := Mkdir{Path: "/cache", Mode: 0o700, Owner: &Owner{UID: 7, GID: 8, NamesFrom: Scratch}}
	if diff := cmp.Diff(Op(Files{Base: Scratch, Actions: []Action{mkdir}}), g.Steps[owned].Op); diff != "" {
		t.Errorf("initial content of the cache (-want +got):\n%s", diff)
	}
}

func TestHeredocsBecomeFilesAndCommands(t *testing.T) {
	g := mustPlan(t,
		"FROM busybox",
		"RUN <<E", "one", "two", "E",
		"RUN <<E", "#!/bin/awk", "x", "E",
		"RUN cat <<E", "in", "E",
		"COPY --chmod=0600 <<E /f", "text", "E",
	)
	var args []string
	for _, s := range g.Steps {
		if e, ok := s.Op.(Exec); ok {
			args = append(args, e.Args[len(e.Args)-1])
		}
	}
	if diff := cmp.Diff([]string{"one\ntwo\n", "/dev/pipes/E", "cat <<E\nin\nE"}, args); diff != "" {
		t.Errorf("commands (-want +got):\n%s", diff)
	}
	var files []string
	for _, s := range g.Steps {
		if f, ok := s.Op.(Files); ok {
			if m, ok := f.Actions[0].(Mkfile); ok {
				files = append(files, m.Path+" "+m.Mode.String()+" "+string(m.Data))
				if s.Where.Line() == 0 {
					t.Errorf("%s has no line", s.Name)
				}
			}
		}
	}
	if diff := cmp.Diff([]string{"/E -rwxr-xr-x #!/bin/awk\nx\n", "/E -rw-r--r-- text\n"}, files); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}

func TestCopySaysWhatItReadsAndWrites(t *testing.T) {
	epoch := time.Unix(1700000000, 0).UTC()
	dir := project(t, map[string]string{"Dockerfile": lines(
		"FROM busybox",
		"WORKDIR /w",
		"COPY a b/ d/",
		"ADD --chown=1 --chmod=u=rw x.tar /x/",
		"COPY --chown=joe:staff --chmod=4755 --exclude=*.o src /s",
		"COPY --chown=5:6 --parents dir/./sub/*.c /p/",
	)})
	g := mustMake(t, Request{Context: dir, Epoch: &epoch}, library())
	context, _ := stepNamed(t, g, "load build context")
	base := func(part string) Ref { return opNamed[Files](t, g, part).Base }
	common := Copy{From: context, FollowSymlink: true, ContentsOnly: true, CreateDestPath: true, Wildcard: true, AllowEmptyWildcard: true}
	with := func(change func(*Copy)) Action {
		c := common
		change(&c)
		return c
	}
	for _, test := range []struct {
		part string
		want []Action
	}{
		{"WORKDIR", []Action{Mkdir{Path: "/w", Mode: 0o755, MakeParents: true, Timestamp: &epoch}}},
		{"COPY a b/", []Action{
			with(func(c *Copy) { c.Src, c.Dst = "/a", "/w/d/" }),
			with(func(c *Copy) { c.Src, c.Dst = "/b", "/w/d/" }),
		}},
		{"ADD", []Action{with(func(c *Copy) {
			c.Src, c.Dst, c.Unpack = "/x.tar", "/x/", true
			c.Owner, c.Mode = &Owner{UID: 1, GID: 1, NamesFrom: Scratch}, &Mode{Symbolic: "u=rw"}
		})}},
		{"COPY --chown=joe", []Action{with(func(c *Copy) {
			c.Src, c.Dst, c.Exclude = "/src", "/s", []string{"*.o"}
			c.Owner, c.Mode = &Owner{UserName: "joe", GroupName: "staff", GID: GroupOfUser, NamesFrom: base("COPY --chown=joe")}, &Mode{Bits: 0o4755}
		})}},
		{"COPY --chown=5:6", []Action{with(func(c *Copy) {
			c.Src, c.Dst, c.Include = "/dir", "/p/", []string{"sub/*.c"}
			c.Owner = &Owner{UID: 5, GID: 6, NamesFrom: Scratch}
		})}},
	} {
		if diff := cmp.Diff(test.want, opNamed[Files](t, g, test.part).Actions); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.part, diff)
		}
	}
}

func TestUserNameWithoutGroupTakesTheGroupOfPasswd(t *testing.T) {
	g := mustPlan(t, "FROM busybox", "USER joe", "WORKDIR /w", "COPY --chown=:7 a /")
	owner := opNamed[Files](t, g, "WORKDIR").Actions[0].(Mkdir).Owner
	if owner == nil || owner.UserName != "joe" || owner.GID != GroupOfUser || owner.NamesFrom != g.Base {
		t.Errorf("owner of the directory is %+v", owner)
	}
	owner = opNamed[Files](t, g, "COPY").Actions[0].(Copy).Owner
	if owner == nil || owner.UID != 0 || owner.GID != 7 {
		t.Errorf("owner of --chown=:7 is %+v", owner)
	}
}

func TestEpochReachesTheHistory(t *testing.T) {
	epoch := time.Unix(42, 0).UTC()
	dir := project(t, map[string]string{"Dockerfile": lines("FROM busybox", "RUN x")})
	for _, test := range []struct {
		name string
		r    Request
		file []string
		want *time.Time
	}{
		{name: "given", r: Request{Epoch: &epoch}, want: &epoch},
		{name: "as an argument", r: Request{Args: map[string]string{"SOURCE_DATE_EPOCH": "42"}}, want: &epoch},
		{name: "the argument is stronger", r: Request{Epoch: new(time.Time), Args: map[string]string{"SOURCE_DATE_EPOCH": "42"}}, want: &epoch},
		{name: "not at all"},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.r.Context = dir
			g := mustMake(t, test.r, library())
			if diff := cmp.Diff(test.want, g.Epoch); diff != "" {
				t.Errorf("epoch (-want +got):\n%s", diff)
			}
			var config ocispec.Image
			if err := json.Unmarshal(g.Config, &config); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, config.History[len(config.History)-1].Created); diff != "" {
				t.Errorf("created (-want +got):\n%s", diff)
			}
		})
	}
	g := mustPlan(t, "ARG SOURCE_DATE_EPOCH=42", "FROM busybox", "RUN x")
	if diff := cmp.Diff(&epoch, g.Epoch); diff != "" {
		t.Errorf("epoch of the Dockerfile (-want +got):\n%s", diff)
	}
}

func TestAnEpochThatNoImageCanHaveIsRefused(t *testing.T) {
	for _, s := range []string{"253402300800", "99999999999999", "-1"} {
		dir := project(t, map[string]string{"Dockerfile": lines("ARG SOURCE_DATE_EPOCH="+s, "FROM busybox", "RUN x")})
		_, err := Make(t.Context(), Request{Context: dir}, library())
		var hint interface{ Hint() string }
		if err == nil || !strings.Contains(err.Error(), "SOURCE_DATE_EPOCH="+s) || !errors.As(err, &hint) || !strings.Contains(hint.Hint(), "253402300799") {
			t.Errorf("%s: %v", s, err)
		}
	}
	mustPlan(t, "ARG SOURCE_DATE_EPOCH=253402300799", "FROM busybox", "RUN x")
}

func TestNoCacheMarksTheInstructions(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines("FROM busybox", "RUN x", "COPY a /")})
	for _, no := range []bool{true, false} {
		g := mustMake(t, Request{Context: dir, NoCache: no}, library())
		for _, part := range []string{"RUN x", "COPY a /"} {
			if _, s := stepNamed(t, g, part); s.NoCache != no {
				t.Errorf("%s: NoCache is %v, want %v", part, s.NoCache, no)
			}
		}
	}
}

func TestPlatformReachesResolverAndSteps(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines("FROM --platform=$BUILDPLATFORM debian AS b", "RUN x", "FROM busybox", "COPY --from=b / /")})
	arm := ocispec.Platform{OS: "linux", Architecture: "arm64"}
	g := mustMake(t, Request{Context: dir, Platforms: []ocispec.Platform{arm}}, library())
	if got := opNamed[Image](t, g, "busybox").Platform; got.Architecture != "arm64" {
		t.Errorf("base is for %v, want arm64", got)
	}
	if got := opNamed[Image](t, g, "debian").Platform; got.Architecture == "arm64" {
		t.Errorf("the build stage is for %v, want this machine", got)
	}
	if g.Platform.Architecture != "arm64" {
		t.Errorf("image is for %v", g.Platform)
	}
}

func TestOnbuildOfTheBaseRunsFirst(t *testing.T) {
	lib := library()
	base := ocispec.Image{}
	base.RootFS.DiffIDs = []digest.Digest{digest.FromString("x")}
	config, err := json.Marshal(base)
	if err != nil {
		t.Fatal(err)
	}
	triggered := onbuild{images: lib, config: strings.Replace(string(config), `"config":{`, `"config":{"OnBuild":["COPY . /app","RUN trigger"]`, 1)}
	dir := project(t, map[string]string{"Dockerfile": lines("FROM onbuild", "RUN own")})
	g := mustMake(t, Request{Context: dir}, triggered)
	want := []string{"[2/4] ONBUILD COPY . /app", "[3/4] ONBUILD RUN trigger", "[4/4] RUN own"}
	if diff := cmp.Diff(want, layerNames(g)); diff != "" {
		t.Errorf("layers (-want +got):\n%s", diff)
	}
	if _, s := stepNamed(t, g, "RUN trigger"); s.Where.Line() != 1 {
		t.Errorf("the trigger is located at %v, want the FROM line", s.Where)
	}
}

type onbuild struct {
	*images
	config string
}

func (o onbuild) ResolveImage(_ context.Context, ref string, p ocispec.Platform) (digest.Digest, []byte, error) {
	return digest.FromString(ref), []byte(o.config), nil
}

func TestOnbuildOfAStageRunsInItsUser(t *testing.T) {
	g := mustPlan(t, "FROM busybox AS lib", "ONBUILD RUN trigger", "FROM lib", "RUN own")
	if got := layerNames(g); len(got) != 2 || !strings.Contains(got[0], "ONBUILD RUN trigger") {
		t.Errorf("layers are %q", got)
	}
}

func TestDockerignoreAndFollowedPathsLimitTheContext(t *testing.T) {
	files := map[string]string{
		"Dockerfile":             lines("FROM scratch", "COPY src/a lib /"),
		".dockerignore":          lines("# no", "*.o", "!keep.o"),
		"src/a":                  "",
		"Other":                  lines("FROM scratch", "COPY . /"),
		"Other.dockerignore":     "secret\n",
		"sub/Plain":              lines("FROM scratch", "COPY . /"),
		"sub/.dockerignore":      "not used\n",
		"sub/Own":                lines("FROM scratch", "COPY . /"),
		"sub/Own.dockerignore":   "own\n",
		"sub/other.dockerignore": "not used either\n",
	}
	dir := project(t, files)
	for _, test := range []struct {
		file            string
		exclude, follow []string
	}{
		{"Dockerfile", []string{"*.o", "!keep.o"}, []string{"lib", "src/a"}},
		{"Other", []string{"secret"}, nil},
		{"sub/Plain", []string{"*.o", "!keep.o"}, nil},
		{"sub/Own", []string{"own"}, nil},
	} {
		t.Run(test.file, func(t *testing.T) {
			g := mustMake(t, Request{Context: dir, Dockerfile: filepath.Join(dir, test.file)}, library())
			got := opNamed[Local](t, g, "load build context")
			want := Local{Name: "context", Dir: dir, Exclude: test.exclude, Follow: test.follow}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("context (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDockerfileMayLieOutsideTheContext(t *testing.T) {
	context := project(t, map[string]string{"a": "", ".dockerignore": "x\n"})
	other := project(t, map[string]string{"my.Dockerfile": lines("FROM scratch", "COPY a /"), "my.Dockerfile.dockerignore": "y\n"})
	g := mustMake(t, Request{Context: context, Dockerfile: filepath.Join(other, "my.Dockerfile")}, library())
	got := opNamed[Local](t, g, "load build context")
	if diff := cmp.Diff(Local{Name: "context", Dir: context, Exclude: []string{"y"}, Follow: []string{"a"}}, got); diff != "" {
		t.Errorf("context (-want +got):\n%s", diff)
	}
	if _, s := stepNamed(t, g, "COPY"); s.Where.String() != "my.Dockerfile:2" {
		t.Errorf("COPY is at %s", s.Where)
	}
}

func TestDockerfileMayBeALinkInsideTheContext(t *testing.T) {
	dir := project(t, map[string]string{"shared/Base": lines("FROM scratch", "COPY a /"), "app/x": ""})
	if err := os.Symlink("../shared/Base", filepath.Join(dir, "app", "Dockerfile")); err != nil {
		t.Fatal(err)
	}
	g := mustMake(t, Request{Context: dir, Dockerfile: filepath.Join(dir, "app", "Dockerfile")}, library())
	if len(g.Layers) != 1 {
		t.Errorf("layers are %q", layerNames(g))
	}
}

func TestLowerCaseDockerfileIsFound(t *testing.T) {
	dir := project(t, map[string]string{"dockerfile": lines("FROM busybox", "RUN x")})
	if g := mustMake(t, Request{Context: dir}, library()); len(g.Layers) != 1 {
		t.Errorf("layers are %q", layerNames(g))
	}
}

func TestWarningsHaveRuleLineAndLink(t *testing.T) {
	g := mustPlan(t, "FROM busybox AS Build", "MAINTAINER me", "cmd echo x", "ENV SECRET_KEY=1")
	got := map[string]int{}
	for _, w := range g.Warnings {
		got[w.Rule] = w.Where.Line()
		if !strings.HasPrefix(w.URL, "https://") {
			t.Errorf("%s has the link %q", w, w.URL)
		}
		if w.Message == "" || strings.Contains(w.Message, w.Rule) || strings.Contains(w.Message, "(line") {
			t.Errorf("message is %q", w.Message)
		}
		if w.Where.Excerpt() == "" {
			t.Errorf("%s has no excerpt", w)
		}
	}
	want := map[string]int{"StageNameCasing": 1, "MaintainerDeprecated": 2, "ConsistentInstructionCasing": 3, "JSONArgsRecommended": 3, "SecretsUsedInArgOrEnv": 4}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rules and lines (-want +got):\n%s", diff)
	}
	if g := mustPlan(t, "# check=skip=all", "FROM busybox AS Build", "MAINTAINER me"); len(g.Warnings) != 0 {
		t.Errorf("check=skip=all leaves %v", g.Warnings)
	}
}

func TestSyntaxLineIsAnsweredByTheBuiltInFrontend(t *testing.T) {
	for _, test := range []struct {
		image string
		warns bool
	}{
		{"docker/dockerfile:1", false},
		{"docker/dockerfile", false},
		{"docker.io/docker/dockerfile:1.4", false},
		{"docker/dockerfile:1.7.0@sha256:" + strings.Repeat("a", 64), false},
		{"mirror.example/docker/dockerfile:1", false},
		{"docker/dockerfile:1-labs", true},
		{"docker/dockerfile:1.7-labs", true},
		{"docker/dockerfile:1.999", true},
		{"docker/dockerfile:2", true},
		{"docker/dockerfile-upstream:master", true},
	} {
		t.Run(test.image, func(t *testing.T) {
			lib := library()
			dir := project(t, map[string]string{"Dockerfile": lines("# syntax="+test.image, "FROM busybox", "RUN x")})
			g := mustMake(t, Request{Context: dir}, lib)
			if len(g.Layers) != 1 {
				t.Errorf("layers are %q", layerNames(g))
			}
			if diff := cmp.Diff([]string{"docker.io/library/busybox:latest"}, lib.asked); diff != "" {
				t.Errorf("asked the resolver for (-want +got):\n%s", diff)
			}
			if warned := len(g.Warnings) == 1 && g.Warnings[0].Where.Line() == 1; warned != test.warns {
				t.Errorf("warnings are %v, want one: %v", g.Warnings, test.warns)
			}
		})
	}
}

func TestRunMountsFromAnImage(t *testing.T) {
	g := mustPlan(t, "FROM busybox", "RUN --mount=from=debian,target=/d ls /d")
	from := opNamed[Exec](t, g, "RUN").Mounts[0].From
	if img, ok := g.Steps[from].Op.(Image); !ok || !strings.HasPrefix(img.Ref, "docker.io/library/debian:") {
		t.Errorf("the mount shows %+v", g.Steps[from])
	}
	if g.Steps[from].Where.Line() != 2 {
		t.Errorf("the image is located at %s, want the RUN that mounts it", g.Steps[from].Where)
	}
}

func TestImageOfTwoStagesIsResolvedOnce(t *testing.T) {
	lib := library()
	dir := project(t, map[string]string{"Dockerfile": lines(
		"FROM busybox AS a", "RUN x", "FROM busybox:latest AS b", "RUN y", "FROM docker.io/library/busybox", "COPY --from=a / /a", "COPY --from=b / /b")})
	mustMake(t, Request{Context: dir}, lib)
	if diff := cmp.Diff([]string{"docker.io/library/busybox:latest"}, lib.asked); diff != "" {
		t.Errorf("a tag that moves would give the stages different bases (-want +got):\n%s", diff)
	}
}

func TestFilterForAStageThatIsNotThereIsNoSecret(t *testing.T) {
	dir := project(t, map[string]string{"Dockerfile": lines("FROM busybox AS one", "RUN x", "FROM one", "RUN y")})
	g := mustMake(t, Request{Context: dir, NoCacheStages: []string{"ONE", "two"}}, library())
	if len(g.Warnings) != 1 || !strings.Contains(g.Warnings[0].Message, `"two"`) {
		t.Errorf("warnings are %q", g.Warnings)
	}
	for _, s := range g.Steps {
		if _, run := s.Op.(Exec); run && s.NoCache != strings.Contains(s.Name, "RUN x") {
			t.Errorf("%s: runs again: %v", s.Name, s.NoCache)
		}
	}
}
