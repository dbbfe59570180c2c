package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cooper-build/cooper/builder"
	"github.com/cooper-build/cooper/builder/plan"
)

// A parse is one flag value: what it means, or a part of the error that it gives.
type parse[T any] struct {
	in   string
	want T
	err  string
}

// check runs a table. Every error must be the user's mistake, which has an exit code of its own.
func check[T any](t *testing.T, table []parse[T], f func(string) (T, error), opts ...cmp.Option) {
	t.Helper()
	for _, c := range table {
		got, err := f(c.in)
		if c.err != "" {
			var usage usageError
			if !errors.As(err, &usage) || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q: error %v, want a usage error with %q", c.in, err, c.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", c.in, err)
			continue
		}
		if d := cmp.Diff(c.want, got, opts...); d != "" {
			t.Errorf("%q (-want +got):\n%s", c.in, d)
		}
	}
}

func TestFields(t *testing.T) {
	check(t, []parse[map[string]string]{
		{in: "a=1,B=2", want: map[string]string{"a": "1", "b": "2"}},
		{in: `"a=1,2",b="3"`, err: `bare "`},
		{in: `"a=1,2",b=`, want: map[string]string{"a": "1,2", "b": ""}},
		{in: "a=b=c", want: map[string]string{"a": "b=c"}},
		{in: "", err: "empty"},
		{in: "a", err: "not key=value"},
		{in: "=1", err: "not key=value"},
		{in: "a=1,a=2", err: "given twice"},
		{in: "a=1\nb=2", err: "more than one line"},
		{in: `"a=1`, err: `"`},
		{in: "c=1", err: "unknown key"},
	}, func(s string) (map[string]string, error) { return fields("--x", s, "a", "b") })
}

func TestPlatforms(t *testing.T) {
	check(t, []parse[[]ocispec.Platform]{
		{in: "linux/amd64", want: []ocispec.Platform{{OS: "linux", Architecture: "amd64"}}},
		{in: "linux/arm64,linux/arm/v7", want: []ocispec.Platform{{OS: "linux", Architecture: "arm64"}, {OS: "linux", Architecture: "arm", Variant: "v7"}}},
		{in: "linux/x86_64,linux/amd64", err: "given twice"},
		{in: "linux/amd64,", err: "OS/ARCHITECTURE"},
		{in: "*", err: "OS/ARCHITECTURE"},
		{in: "a/b/c/d", err: "--platform"},
	}, func(s string) ([]ocispec.Platform, error) { return parsePlatforms([]string{s}, "linux/riscv64") })

	fromEnv, err := parsePlatforms(nil, "linux/riscv64")
	if err != nil || len(fromEnv) != 1 || fromEnv[0].Architecture != "riscv64" {
		t.Errorf("DOCKER_DEFAULT_PLATFORM: got %v, %v", fromEnv, err)
	}
	local, err := parsePlatforms([]string{"LOCAL"}, "")
	if err != nil || len(local) != 1 || local[0].OS != "linux" {
		t.Errorf("local: got %v, %v", local, err)
	}
}

func TestAnnotations(t *testing.T) {
	arm := &ocispec.Platform{OS: "linux", Architecture: "arm64"}
	check(t, []parse[[]builder.Annotation]{
		{in: "a=b=c", want: []builder.Annotation{{Key: "a", Value: "b=c"}}},
		{in: "a=", want: []builder.Annotation{{Key: "a"}}},
		{in: "index,manifest:a=b", want: []builder.Annotation{{On: builder.OnIndex, Key: "a", Value: "b"}, {On: builder.OnManifest, Key: "a", Value: "b"}}},
		{in: "manifest[linux/arm64]:a=b:c", want: []builder.Annotation{{Platform: arm, Key: "a", Value: "b:c"}}},
		{in: "manifest-descriptor[linux/arm64]:a=b", want: []builder.Annotation{{On: builder.OnManifestDescriptor, Platform: arm, Key: "a", Value: "b"}}},
		{in: "index-descriptor:a=b", want: []builder.Annotation{{On: builder.OnIndexDescriptor, Key: "a", Value: "b"}}},
		{in: "index[linux/arm64]:a=b", err: "for all platforms"},
		{in: "floor:a=b", err: "floor"},
		{in: "manifest[:a=b", err: "square brackets"},
		{in: "manifest,:a=b", err: "square brackets"},
		{in: "manifest:=b", err: "name is missing"},
		{in: "=b", err: "name is missing"},
		{in: "a", err: "NAME=VALUE"},
	}, parseAnnotation)
}

func TestOutputs(t *testing.T) {
	out := os.Stdout
	check(t, []parse[builder.Output]{
		{in: "type=oci,dest=a.tar", want: builder.Archive{File: "a.tar"}},
		{in: "type=oci,dest=a,tar=false", want: builder.Layout{Dir: "a"}},
		{in: "type=oci,dest=-", want: builder.Stream{To: out}},
		{in: "type=oci", want: builder.Stream{To: out}},
		{in: "type=docker,dest=a", want: builder.DockerArchive{File: "a"}},
		{in: "type=docker,dest=-", want: builder.DockerArchive{To: out}},
		{in: "type=tar,dest=a", want: builder.TreeTar{File: "a"}},
		{in: "type=tar", want: builder.TreeTar{To: out}},
		{in: "-", want: builder.TreeTar{To: out}},
		{in: "type=local,dest=a,platform-split=false", want: builder.Tree{Dir: "a"}},
		{in: "a/b", want: builder.Tree{Dir: "a/b"}},
		{in: "a=b", want: builder.Tree{Dir: "a=b"}},
		{in: "type=cacheonly", want: builder.Nowhere{}},
		{in: `type=image,"name=a,b:1",push=true`},
		{in: "type=registry,annotation.a=b,annotation-index[linux/arm64].a=b", err: "for all platforms"},
		{in: "type=local,annotation.a=b,dest=a", err: "means nothing to type local"},
		{in: "type=image,annotation-x.a=b", err: "none of manifest"},
		{in: "dest=a", err: "type= is missing"},
		{in: "type=", err: "type= is missing"},
		{in: "a,b", err: "not key=value"},
		{in: "type=floppy", err: "floppy"},
		{in: "type=local", err: "dest= is missing"},
		{in: "type=local,dest=-", err: "standard output"},
		{in: "type=oci,tar=false", err: "dest= is missing"},
		{in: "type=oci,tar=maybe,dest=a", err: "true or false"},
		{in: "type=docker", err: "no daemon"},
		{in: "type=docker,dest=a,tar=false", err: "only a tar"},
		{in: "type=docker,dest=a,context=b", err: "no daemon"},
		{in: "type=image,name=a@sha256:0", err: "image name"},
		{in: "type=image,name=a,name=b", err: "given twice"},
		{in: "type=image,compression=zstd,compression-level=22,force-compression=true"},
		{in: "type=image,compression=xz", err: "none of gzip"},
		{in: "type=image,compression=estargz", err: "not supported"},
		{in: "type=image,compression=", err: "name expected"},
		{in: "type=image,compression-level=10", err: "from 0 to 9"},
		{in: "type=image,compression-level=best", err: "number"},
		{in: "type=image,compression=uncompressed,compression-level=0", err: "no levels"},
		{in: "type=image,force-compression=maybe", err: "true or false"},
		{in: "type=image,rewrite-timestamp=false", err: "clamped"},
		{in: "type=image,unpack=true", err: "no daemon"},
		{in: "type=image,store=false", err: "cacheonly"},
		{in: "type=registry,push=false", err: "type=image"},
		{in: "type=registry,store=true", err: "local store"},
		{in: "type=image,name-canonical=true", err: "digest"},
		{in: "type=image,registry.insecure=true", err: "whole build"},
		{in: "type=local,dest=a,platform-split=true", err: "one platform"},
		{in: "type=local,dest=a,mode=delete", err: "only added"},
		{in: "type=oci,dest=a,nonsense=1", err: "known to type oci: attestation-inline"},
	}, func(s string) (builder.Output, error) {
		o, err := parseOutput(s, false)
		return o.to(out), err
	}, cmp.Comparer(func(a, b *os.File) bool { return a == b }))
}

func TestOutputsOfSeveralPlatforms(t *testing.T) {
	for in, want := range map[string]string{
		"type=docker,dest=a":                     "one platform",
		"type=local,dest=a,platform-split=false": "directory each",
		"type=oci,dest=a":                        "",
	} {
		_, err := parseOutput(in, true)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: error %v, want %q", in, err, want)
		}
	}
}

func TestHosts(t *testing.T) {
	check(t, []parse[[]plan.Host]{
		{in: "a:1.2.3.4", want: []plan.Host{{Name: "a", IP: "1.2.3.4"}}},
		{in: "a=1.2.3.4", want: []plan.Host{{Name: "a", IP: "1.2.3.4"}}},
		{in: "a=1.2.3.4,[fd00::1]", want: []plan.Host{{Name: "a", IP: "1.2.3.4"}, {Name: "a", IP: "fd00::1"}}},
		{in: "a:fd00::1", want: []plan.Host{{Name: "a", IP: "fd00::1"}}},
		{in: "a:host-gateway", err: "host-gateway"},
		{in: "a", err: "HOST:IP"},
		{in: ":1.2.3.4", err: "HOST:IP"},
		{in: "a:", err: "HOST:IP"},
		{in: "a:b", err: "not an IP address"},
		{in: "a\n6.6.6.6 bank:1.2.3.4", err: "HOST:IP"},
	}, func(s string) ([]plan.Host, error) { return parseHosts([]string{s}) })
}

func TestSizesAndLimits(t *testing.T) {
	check(t, []parse[int64]{
		{in: "", want: 0},
		{in: "64", want: 64},
		{in: "2m", want: 2 << 20},
		{in: "1GiB", want: 1 << 30},
		{in: "-1", err: "size"},
		{in: "much", err: "size"},
	}, parseShmSize)
	check(t, []parse[[]plan.Ulimit]{
		{in: "nofile=10:20", want: []plan.Ulimit{{Name: "nofile", Soft: 10, Hard: 20}}},
		{in: "nproc=-1", want: []plan.Ulimit{{Name: "nproc", Soft: -1, Hard: -1}}},
		{in: "nofile=20:10", err: "--ulimit"},
		{in: "luck=1", err: "luck"},
		{in: "nofile", err: "--ulimit"},
	}, func(s string) ([]plan.Ulimit, error) { return parseUlimits([]string{s}) })
	last, err := parseUlimits([]string{"nofile=1", "nproc=2", "nofile=3"})
	if d := cmp.Diff([]plan.Ulimit{{Name: "nproc", Soft: 2, Hard: 2}, {Name: "nofile", Soft: 3, Hard: 3}}, last); d != "" || err != nil {
		t.Errorf("of two limits the last counts: %v\n%s", err, d)
	}
}

func TestEntitlements(t *testing.T) {
	check(t, []parse[builder.Entitlements]{
		{in: "network.host", want: builder.Entitlements{NetworkHost: true}},
		{in: "security.insecure", want: builder.Entitlements{SecurityInsecure: true}},
		{in: "", want: builder.Entitlements{}},
		{in: "network.host=x", err: "network.host or"},
		{in: "device=nvidia.com/gpu", err: "--device"},
		{in: "fs=*", err: "bake"},
		{in: "everything", err: "network.host or"},
	}, func(s string) (builder.Entitlements, error) { return parseAllow([]string{s}) })
}

func TestAgents(t *testing.T) {
	check(t, []parse[[]agentSpec]{
		{in: "default", want: []agentSpec{{id: "default"}}},
		{in: "=a", want: []agentSpec{{id: "default", paths: []string{"a"}}}},
		{in: "id=a,b=c", want: []agentSpec{{id: "id", paths: []string{"a", "b=c"}}}},
		{in: "id=", err: "missing"},
		{in: "id=a,,b", err: "missing"},
	}, func(s string) ([]agentSpec, error) { return parseSSH([]string{s}) }, cmp.AllowUnexported(agentSpec{}))
	if _, err := parseSSH([]string{"a", "a=b"}); err == nil {
		t.Error("an id for two agents was accepted: one of them would be ignored")
	}
	for context, want := range map[string]bool{
		"git@github.com:a/b.git": true, "ssh://git@host/a": true, "https://user@host:1/a.git": false,
		"github.com/a/b": false, "git://host/a": false, "dir": false, "": false,
	} {
		if got := isSSH(context); got != want {
			t.Errorf("isSSH(%q) = %v", context, got)
		}
	}
}

func TestSecrets(t *testing.T) {
	check(t, []parse[secretSpec]{
		{in: "id=a", want: secretSpec{id: "a"}},
		{in: "id=a,src=f", want: secretSpec{id: "a", file: "f"}},
		{in: "ID=a,source=f,type=file", want: secretSpec{id: "a", file: "f"}},
		{in: "id=a,env=E", want: secretSpec{id: "a", env: "E"}},
		{in: "type=env,id=a,src=E", want: secretSpec{id: "a", env: "E"}},
		{in: `id=a,"src=f,g"`, want: secretSpec{id: "a", file: "f,g"}},
		{in: "src=f", err: "id=ID is missing"},
		{in: "id=a,type=vault", err: "vault"},
		{in: "id=a,src=f,env=E", err: "one of src and env"},
		{in: "id=a,src=f,source=g", err: "the same"},
		{in: "id=a,mode=1", err: "unknown key"},
		{in: "a", err: "not key=value"},
	}, parseSecret, cmp.AllowUnexported(secretSpec{}))

	t.Setenv("FROM_ENV", "value")
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte("in file"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := readSecrets([]string{"id=FROM_ENV", "", "id=a,src=/nowhere,type=env,env=FROM_ENV", "id=a,src=" + file}, true)
	if err == nil {
		t.Errorf("src and env were both taken: %v", got)
	}
	got, err = readSecrets([]string{"id=FROM_ENV", "", "id=a,env=FROM_ENV", "id=a,src=" + file}, true)
	want := []builder.Secret{{ID: "FROM_ENV", Value: []byte("value")}, {ID: "a", Value: []byte("in file")}}
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Errorf("%v\n%s", err, d)
	}
	if _, err := readSecrets([]string{"id=a,src=/dev/null"}, false); !errors.Is(err, errReadOnce) {
		t.Errorf("what can be read once was read by the process that only tries the cache: %v", err)
	}
}

func TestCalls(t *testing.T) {
	check(t, []parse[*call]{
		{in: ""},
		{in: "build"},
		{in: "build,format=json"},
		{in: "check", want: &call{}},
		{in: "lint,format=json,ignorestatus=1", want: &call{json: true, ignoreStatus: true}},
		{in: "format=text,outline", want: &call{question: plan.Outline}},
		{in: "targets", want: &call{question: plan.Targets}},
		{in: "subrequests.describe", err: "outline or targets"},
		{in: "check,outline", err: "not expected"},
		{in: "check,format=xml", err: "xml"},
		{in: "check,ignorestatus=perhaps", err: "true or false"},
		{in: "check,colour=red", err: "not expected"},
		{in: "format=json", err: "outline or targets"},
	}, parseCall, cmp.AllowUnexported(call{}))
}

func TestDisplays(t *testing.T) {
	for _, c := range []struct {
		progress string
		quiet    bool
		env      string
		want     display
		err      bool
	}{
		{progress: "auto", want: display{mode: "auto"}},
		{progress: "auto", env: "plain", want: display{mode: "plain"}},
		{progress: "auto", env: "none", want: display{mode: "quiet"}},
		{progress: "tty", env: "plain", want: display{mode: "tty"}},
		{progress: "none", want: display{mode: "quiet"}},
		{progress: "quiet", env: "plain", want: display{mode: "quiet", printsID: true}},
		{progress: "auto", quiet: true, env: "plain", want: display{mode: "quiet", printsID: true}},
		{progress: "plain", quiet: true, err: true},
	} {
		got, err := parseDisplay(c.progress, c.quiet, c.env)
		if got != c.want || (err != nil) != c.err {
			t.Errorf("%+v: got %+v, %v", c, got, err)
		}
	}
}

func TestPairs(t *testing.T) {
	t.Setenv("SET", "from the environment")
	for _, c := range []struct {
		in      []string
		without withoutValue
		want    map[string]string
		err     bool
	}{
		{in: []string{"a=1", "a=2", "b="}, want: map[string]string{"a": "2", "b": ""}},
		{in: []string{""}, want: map[string]string{}},
		{in: []string{"a"}, err: true},
		{in: []string{"=a"}, without: valueOptional, err: true},
		{in: []string{"a"}, without: valueOptional, want: map[string]string{"a": ""}},
		{in: []string{"SET", "COOPER_NOT_SET"}, without: valueFromEnv, want: map[string]string{"SET": "from the environment"}},
	} {
		got, err := pairs("--x", c.in, c.without)
		if (err != nil) != c.err || !c.err && !cmp.Equal(c.want, got) {
			t.Errorf("%q: got %v, %v; want %v", c.in, got, err, c.want)
		}
	}
}

func TestProxiesOfDocker(t *testing.T) {
	got, err := parseProxies([]byte(`{"auths": {}, "proxies": {"default": {"httpProxy": "a", "noProxy": "b"}, "tcp://daemon": {"ftpProxy": "c"}}}`))
	if d := cmp.Diff(map[string]string{"HTTP_PROXY": "a", "NO_PROXY": "b"}, got); d != "" || err != nil {
		t.Errorf("%v\n%s", err, d)
	}
	if _, err := parseProxies([]byte("{")); err == nil {
		t.Error("a broken configuration was taken for one without proxies")
	}
}

func TestSources(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		context, file string
		want          source
		err           string
	}{
		{context: dir, want: source{context: dir}},
		{context: dir, file: "-", want: source{context: dir, stdin: stdinDockerfile}},
		{context: "-", want: source{stdin: stdinContext}},
		{context: "-", file: "a/b", want: source{file: "a/b", stdin: stdinContext}},
		{context: "https://example.com/a.git#main:dir", file: "b", want: source{context: "https://example.com/a.git#main:dir", file: "b"}},
		{context: "git@example.com:a/b.git", want: source{context: "git@example.com:a/b.git"}},
		{context: "github.com/a/b", want: source{context: "github.com/a/b"}},
		{context: "-", file: "-", err: "both"},
		{context: "", err: "empty"},
		{context: file, err: "not a directory"},
		{context: filepath.Join(dir, "none"), err: "no such file"},
		{context: dir, file: "https://example.com/Dockerfile", err: "not supported"},
	} {
		got, err := parseSource(c.context, c.file)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q -f %q: error %v, want %q", c.context, c.file, err, c.err)
			}
		} else if got != c.want || err != nil {
			t.Errorf("%q -f %q: got %+v, %v", c.context, c.file, got, err)
		}
	}
}

func TestArchivesAreToldFromDockerfiles(t *testing.T) {
	text := append([]byte("FROM scratch\n"), bytes.Repeat([]byte("# a long comment\n"), 100)...)
	for name, c := range map[string]struct {
		head []byte
		want bool
	}{
		"Dockerfile":       {text, false},
		"short Dockerfile": {[]byte("FROM a"), false},
		"gzip":             {[]byte("\x1f\x8b\x08\x00"), true},
		"empty tar":        {make([]byte, 1024), true},
		"zeros, too short": {make([]byte, 100), false},
		"magic in a text":  {append(bytes.Repeat([]byte("a"), 257), append([]byte("ustar"), bytes.Repeat([]byte("b"), 400)...)...), false},
	} {
		if got := isArchive(c.head); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// FuzzFlagValues holds that no value makes a parser panic, and that what is accepted is complete.
func FuzzFlagValues(f *testing.F) {
	for _, s := range []string{"type=oci,dest=a", `"type=image,name=a"`, "-", "annotation-index[a/b].c=d", "id=a,src=b", "index[a/b],manifest:c=d", "a=[::1]", "check,format=json"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, index := range []bool{false, true} {
			if o, err := parseOutput(s, index); err == nil && o.to(nil) == nil && o.kind != "image" && o.kind != "registry" {
				t.Errorf("output %q was accepted and goes nowhere", s)
			}
		}
		if spec, err := parseSecret(s); err == nil && spec.id == "" {
			t.Errorf("secret %q has no id", s)
		}
		if all, err := parseAnnotation(s); err == nil && (len(all) == 0 || all[0].Key == "") {
			t.Errorf("annotation %q has no key", s)
		}
		_, _ = parseCall(s)
		_, _ = parseSSH([]string{s})
		_, _ = parsePlatforms([]string{s}, "")
		hosts, _ := parseHosts([]string{s})
		for _, h := range hosts {
			if strings.ContainsAny(h.Name+h.IP, "\n\t ") {
				t.Errorf("host %q writes more than its line of /etc/hosts", s)
			}
		}
		isArchive([]byte(s))
	})
}
