package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cooper-build/cooper/internal/ocidiff"
	"github.com/cooper-build/cooper/internal/testimage"
	"github.com/cooper-build/cooper/sandbox/userns"
)

// TestConformance builds every case of testdata/conformance with cooper and compares the outcome with BuildKit's: that
// of a BuildKit of this machine, where there is one, and the recorded one. $COOPER_TEST_RECORD names a directory to
// record into.
func TestConformance(t *testing.T) {
	cases := readCases(t, "testdata/conformance")
	if len(cases) == 0 {
		t.Fatal("no cases")
	}
	base := testimage.Busybox(t)
	s := &suite{
		base: base, platforms: platformsLayout(t), hosts: map[string]string{"HTTP_HOST": startServer(t), "REGISTRY_HOST": testimage.Serve(t, base)}, rows: differencesOnPurpose(t), store: newStore(t), bk: peer(t),
		record: os.Getenv("COOPER_TEST_RECORD"), slots: make(chan struct{}, 3),
	}
	if s.record != "" && s.bk == nil {
		t.Fatal("only what BuildKit makes can be recorded, and there is none: .ci/buildkit DIR installs it, COOPER_TEST_BUILDKIT=DIR names it")
	}
	var err error
	if s.baseImage, err = ocidiff.Load(base); err != nil {
		t.Fatal(err)
	}
	for _, c := range cases {
		t.Run(c.name(), func(t *testing.T) {
			t.Parallel()
			s.slots <- struct{}{}
			defer func() { <-s.slots }()
			s.run(t, c)
		})
	}
}

// peer is BuildKit, or nil where it is not installed or cannot run.
func peer(t *testing.T) *buildkit {
	t.Helper()
	if m, err := userns.Plan(userns.Options{}); err != nil || m.Kind == userns.Single || os.Getenv("COOPER_TEST_BUILDKIT") == "" {
		t.Log("no BuildKit here: cooper is compared with what is recorded")
		return nil
	}
	return startBuildKit(t)
}

// A suite is what the cases share. Nothing in it changes while they run.
type suite struct {
	base      string // layout, the image busybox of every case
	platforms string // layout, the image platforms
	baseImage *ocidiff.Image
	hosts     map[string]string // host:port of this run by its placeholder
	rows      []string          // of docs/compatibility.md
	store     string
	bk        *buildkit // may be nil
	record    string
	slots     chan struct{}
	images    ocidiff.Loader
}

func (s *suite) run(t *testing.T, c *conformanceCase) {
	if c.differs != "" && !slices.Contains(s.rows, c.differs) {
		t.Errorf("differs: %q is no row of docs/compatibility.md", c.differs)
	}
	dir := c.unpack(t, s.replacer(false))
	want := c.want
	if s.bk != nil {
		want = s.buildkit(t, c, dir)
		if s.record == "" && want != c.want {
			t.Errorf("BuildKit does not do what is recorded (-recorded +BuildKit); make conformance records again:\n%s", lineDiff(c.want, want))
		}
	}
	got := s.cooper(t, c, dir)
	if s.record != "" {
		c.record(t, s.record, want, got)
	}
	s.judge(t, c, want, got)
}

func (s *suite) judge(t *testing.T, c *conformanceCase, want, got string) {
	if want == "" {
		t.Fatal("nothing is recorded for this case: make conformance")
	}
	if failed := strings.HasPrefix(want, "fails"); failed != c.fails {
		t.Errorf("BuildKit fails: %v, the case says %v", failed, c.fails)
	}
	same := got == want || want == "fails\n" && strings.HasPrefix(got, "fails") // cooper may name a line where BuildKit has none
	switch {
	case c.soon != "":
		if same {
			t.Errorf("cooper does what BuildKit does now: remove \"soon: %s\"", c.soon)
		}
	case c.differs != "":
		if same {
			t.Errorf("cooper does what BuildKit does now: remove \"differs\" here, and the row of docs/compatibility.md when it was the last case of it")
		}
		if s.record == "" && got != c.ours {
			t.Errorf("cooper does not what it is to do instead of what BuildKit does (-recorded +cooper):\n%s", lineDiff(c.ours, got))
		}
	case !same:
		t.Errorf("cooper does not what BuildKit does (-BuildKit +cooper):\n%s", lineDiff(want, got))
	}
}

func lineDiff(want, got string) string {
	return cmp.Diff(strings.Split(want, "\n"), strings.Split(got, "\n"))
}

// replacer puts the hosts of this run in the place of their names, or back.
func (s *suite) replacer(back bool) *strings.Replacer {
	var pairs []string
	for name, host := range s.hosts {
		if back {
			name, host = host, name
		}
		pairs = append(pairs, name, host)
	}
	return strings.NewReplacer(pairs...)
}

// buildkit is the outcome of a case with BuildKit.
func (s *suite) buildkit(t *testing.T, c *conformanceCase, dir string) string {
	t.Helper()
	layouts := map[string]string{"busybox": s.base, "platforms": s.platforms}
	for _, b := range c.bases {
		layout := filepath.Join(t.TempDir(), "base")
		args := append(s.buildkitArgs(t, c, dir, layouts), "--opt", "filename="+b.value, "--output", "type=oci,tar=false,dest="+layout)
		if text, err := s.bk.command(t.Context(), "buildctl", args...).CombinedOutput(); err != nil {
			t.Fatalf("BuildKit, base %s: %v\n%s", b.name, err, text)
		}
		layouts[b.name] = layout
	}
	layout := filepath.Join(t.TempDir(), "out")
	args := append(s.buildkitArgs(t, c, dir, layouts), "--output", "type=oci,tar=false,dest="+layout)
	if c.remoteContext() && c.file != "" {
		args = append(args, "--opt", "filename="+c.file)
	} else if c.file != "" {
		args = append(args, "--opt", "filename="+filepath.Base(c.file))
	}
	for _, o := range []struct{ name, value string }{
		{"target", c.target}, {"platform", c.platform}, {"shm-size", c.shmSize}, {"add-hosts", strings.Join(c.addHosts, ",")},
		{"ulimit", strings.Join(c.ulimits, ",")}, {"force-network-mode", c.network},
	} {
		if o.value != "" {
			args = append(args, "--opt", o.name+"="+o.value)
		}
	}
	for _, v := range c.labels {
		args = append(args, "--opt", "label:"+v)
	}
	text, err := s.bk.command(t.Context(), "buildctl", args...).CombinedOutput()
	if err != nil {
		t.Logf("BuildKit: %v\n%s", err, tail(text))
		return failsAs(text)
	}
	return s.describe(t, layout)
}

// context is where the context of a case is.
func (s *suite) context(c *conformanceCase, dir string) string {
	if c.remoteContext() {
		return s.replacer(false).Replace(c.context)
	}
	return filepath.Join(dir, c.context)
}

// buildkitArgs are the arguments that the bases of a case share with the case.
func (s *suite) buildkitArgs(t *testing.T, c *conformanceCase, dir string, layouts map[string]string) []string {
	// Without the cache no case depends on another: neither cache looks at everything, such as times.
	args := []string{"--addr", s.bk.address(), "build", "--no-cache", "--progress=plain", "--frontend", "dockerfile.v0"}
	if context := s.context(c, dir); c.remoteContext() {
		args = append(args, "--opt", "context="+context)
	} else {
		args = append(args, "--local", "context="+context, "--local", "dockerfile="+filepath.Join(context, filepath.Dir(c.file)))
	}
	for _, name := range slices.Sorted(maps.Keys(layouts)) {
		args = append(args, "--oci-layout", name+"="+layouts[name], "--opt", "context:"+name+"=oci-layout://"+name+"@"+firstDigest(t, layouts[name]))
	}
	for _, v := range c.contexts {
		if strings.Contains(v.value, "://") {
			args = append(args, "--opt", "context:"+v.name+"="+s.replacer(false).Replace(v.value))
			continue
		}
		args = append(args, "--local", "named-"+v.name+"="+filepath.Join(dir, v.value), "--opt", "context:"+v.name+"=local:named-"+v.name)
	}
	for _, v := range c.buildArgs {
		args = append(args, "--opt", "build-arg:"+v)
	}
	if c.epoch != "" {
		args = append(args, "--opt", "build-arg:SOURCE_DATE_EPOCH="+c.epoch)
	}
	for _, v := range c.secrets {
		args = append(args, "--secret", "id="+v.name+",src="+secretFile(t, v))
	}
	return args
}

func secretFile(t *testing.T, secret pair) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(secret.value), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// cooper is the outcome of a case with cooper.
func (s *suite) cooper(t *testing.T, c *conformanceCase, dir string) string {
	t.Helper()
	layouts := map[string]string{"busybox": s.base + ":latest", "platforms": s.platforms + ":latest"}
	for _, b := range c.bases {
		layout := filepath.Join(t.TempDir(), "base")
		args := append(s.cooperArgs(t, c, dir, layouts), "-f", filepath.Join(dir, c.context, b.value), "-o", "type=oci,tar=false,dest="+layout)
		if text, err := s.cooperCommand(c, dir, args).CombinedOutput(); err != nil {
			t.Fatalf("cooper, base %s: %v\n%s", b.name, err, text)
		}
		layouts[b.name] = layout
	}
	layout := filepath.Join(t.TempDir(), "out")
	args := append(s.cooperArgs(t, c, dir, layouts), "-o", "type=oci,tar=false,dest="+layout)
	if c.remoteContext() && c.file != "" {
		args = append(args, "-f", c.file)
	} else if c.file != "" {
		args = append(args, "-f", filepath.Join(dir, c.context, c.file))
	}
	for _, o := range []struct{ name, value string }{
		{"target", c.target}, {"platform", c.platform}, {"shm-size", c.shmSize}, {"network", c.network},
	} {
		if o.value != "" {
			args = append(args, "--"+o.name, o.value)
		}
	}
	for flag, values := range map[string][]string{"label": c.labels, "add-host": c.addHosts, "ulimit": c.ulimits} {
		for _, v := range values {
			args = append(args, "--"+flag, v)
		}
	}
	text, err := s.cooperCommand(c, dir, args).CombinedOutput()
	if err != nil {
		t.Logf("cooper: %v\n%s", err, tail(text))
		return failsAs(text)
	}
	return s.describe(t, layout)
}

// cooperArgs are the arguments that the bases of a case share with the case.
func (s *suite) cooperArgs(t *testing.T, c *conformanceCase, dir string, layouts map[string]string) []string {
	args := []string{"--root", s.store, "build", "--no-cache", "--progress=plain", "--policy", "none"}
	for _, name := range slices.Sorted(maps.Keys(layouts)) {
		args = append(args, "--build-context", name+"=oci-layout://"+layouts[name])
	}
	for _, v := range c.contexts {
		if !strings.Contains(v.value, "://") {
			v.value = filepath.Join(dir, v.value)
		}
		args = append(args, "--build-context", v.name+"="+s.replacer(false).Replace(v.value))
	}
	for _, v := range c.buildArgs {
		args = append(args, "--build-arg", v)
	}
	for _, v := range c.secrets {
		args = append(args, "--secret", "id="+v.name+",src="+secretFile(t, v))
	}
	return args
}

func (s *suite) cooperCommand(c *conformanceCase, dir string, args []string) *exec.Cmd {
	cmd := exec.Command("cooper", append(args, s.context(c, dir))...)
	cmd.Env = os.Environ()
	if c.epoch != "" {
		cmd.Env = append(cmd.Env, "SOURCE_DATE_EPOCH="+c.epoch)
	}
	return cmd
}

// tail is enough of an output to see why a build failed.
func tail(text []byte) string {
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	lines = lines[max(0, len(lines)-15):]
	for i, l := range lines {
		lines[i] = l[:min(len(l), 300)]
	}
	return strings.Join(lines, "\n")
}

var (
	excerptLine = regexp.MustCompile(`(?m)^(\S+:\d+)\n-{20}$`)
	parseLine   = regexp.MustCompile(`parse error (?:on|in) line (\d+)`)
	exitCodeOf  = regexp.MustCompile(`exit (?:code:?|status) (\d+)`)
)

// failsAs is what both builders say of a build that fails: the line of the Dockerfile, and the exit code of a RUN.
func failsAs(output []byte) string {
	text := "fails"
	if all := excerptLine.FindAllSubmatch(output, -1); len(all) > 0 {
		text += " " + path.Base(string(all[len(all)-1][1])) // of several, such as those of a cycle, the last
	} else if m := parseLine.FindSubmatch(output); m != nil {
		text += " Dockerfile:" + string(m[1])
	}
	// What runc could not even start has no exit code; BuildKit gives runc's own.
	if m := exitCodeOf.FindSubmatch(output); m != nil && !bytes.Contains(output, []byte("runc run failed")) {
		text += " exit code " + string(m[1])
	}
	return text + "\n"
}

// describe renders what a layout holds, but for what two builds may differ in: times, and the bytes of layers of our
// own. What is the same in the base image is left out, so that a recording does not depend on it.
func (s *suite) describe(t *testing.T, layout string) string {
	t.Helper()
	images, err := s.images.LoadAll(layout)
	if err != nil {
		t.Fatalf("%s: %v", layout, err)
	}
	var b strings.Builder
	for _, img := range images {
		if len(images) > 1 {
			fmt.Fprintf(&b, "image %s\n", img.Platform)
		}
		s.describeImage(&b, img)
	}
	return s.replacer(true).Replace(b.String())
}

func (s *suite) describeImage(b *strings.Builder, img *ocidiff.Image) {
	for i, entries := range img.Layers {
		if img.Manifest.Layers[i].Digest == s.baseImage.Manifest.Layers[0].Digest {
			b.WriteString("layer of the base\n")
			continue
		}
		b.WriteString("layer\n")
		for _, l := range ocidiff.Lines(entries) {
			b.WriteString("  " + l + "\n")
		}
	}
	was, is := configFields(s.baseImage.Config), configFields(img.Config)
	for _, key := range slices.Sorted(maps.Keys(was)) {
		if _, kept := is[key]; !kept {
			is[key] = nil
		}
	}
	for _, key := range slices.Sorted(maps.Keys(is)) {
		if reflect.DeepEqual(was[key], is[key]) {
			continue
		}
		fmt.Fprintf(b, "%s %s\n", key, hostless(asJSON(is[key])))
	}
	for _, h := range history(img.Config) {
		if slices.Contains(history(s.baseImage.Config), h) {
			continue
		}
		b.WriteString("history " + hostless(h) + "\n")
	}
}

// hostless takes the architecture of this machine out of a text.
func hostless(s string) string { return strings.ReplaceAll(s, runtime.GOARCH, "HOSTARCH") }

// configFields are the members of a config and of its "config" object, without times, layers and history.
func configFields(config map[string]any) map[string]any {
	out := map[string]any{}
	for k, v := range config {
		switch inner, _ := v.(map[string]any); k {
		case "created", "history":
		case "config":
			for k, v := range inner {
				out["config."+k] = v
			}
		case "rootfs":
			out["rootfs.type"] = inner["type"]
		default:
			out[k] = v
		}
	}
	return out
}

// history are the entries of a config's history, one line each.
func history(config map[string]any) []string {
	var out []string
	all, _ := config["history"].([]any)
	for _, h := range all {
		e, ok := h.(map[string]any)
		if !ok {
			out = append(out, fmt.Sprint(h))
			continue
		}
		line := asJSON(e["created_by"])
		for _, k := range slices.Sorted(maps.Keys(e)) {
			if k != "created" && k != "created_by" && !(k == "comment" && e[k] == "buildkit.dockerfile.v0") {
				line += fmt.Sprintf(" %s=%v", k, e[k])
			}
		}
		out = append(out, line)
	}
	return out
}

// asJSON renders what was read from JSON.
func asJSON(v any) string {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return err.Error()
	}
	return strings.TrimSpace(b.String())
}
