package builder

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cooper-build/cooper/builder/files"
	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/policy"
	"github.com/cooper-build/cooper/snapshot"
)

func opCause(kind string, op plan.Op) *cause { return &cause{kind: kind, op: plan.Encode(op)} }

// TestEveryFieldOfAnOperationIsExplained sets one field at a time. A field that is in the key and in no explanation makes
// a step run again while --explain has nothing to say.
func TestEveryFieldOfAnOperationIsExplained(t *testing.T) {
	exec := plan.Exec{Root: 0, Args: []string{"a"}, Env: []string{"A=1"}, Mounts: []plan.Mount{{Target: "/m", From: plan.Scratch}}}
	files := plan.Files{Base: 0, Actions: []plan.Action{plan.Copy{From: 0, Src: "/a", Dst: "/b"}, plan.Mkdir{Path: "/d"}, plan.Mkfile{Path: "/f"}, plan.Remove{Path: "/r"}, plan.Symlink{Old: "/o", New: "/n"}}}
	for name, op := range changedFields(exec) {
		expectExplained(t, "Exec."+name, opCause("exec", exec), opCause("exec", op.(plan.Op)))
	}
	for name, m := range changedFields(exec.Mounts[0]) {
		op := exec
		op.Mounts = []plan.Mount{m.(plan.Mount)}
		expectExplained(t, "Mount."+name, opCause("exec", exec), opCause("exec", op))
	}
	for i, a := range files.Actions {
		for name, changed := range changedFields(a) {
			op := files
			op.Actions = slices.Clone(files.Actions)
			op.Actions[i] = changed.(plan.Action)
			expectExplained(t, fmt.Sprintf("%T.%s", a, name), opCause("files", files), opCause("files", op))
		}
	}
}

func expectExplained(t *testing.T, name string, before, after *cause) {
	t.Helper()
	if before.key() == after.key() {
		return // no part of the key
	}
	b := &build{}
	reasons := b.differences(b.describe(before), after)
	if len(reasons) == 0 {
		t.Errorf("%s is in the key and is not explained", name)
	}
}

// changedFields returns v with another value in each field in turn, but for the inputs, which are explained as such.
func changedFields(v any) map[string]any {
	out := map[string]any{}
	for i := range reflect.TypeOf(v).NumField() {
		f := reflect.TypeOf(v).Field(i)
		if f.Type == reflect.TypeFor[plan.Ref]() || f.Type == reflect.TypeFor[[]plan.Action]() {
			continue
		}
		c := reflect.New(reflect.TypeOf(v)).Elem()
		c.Set(reflect.ValueOf(v))
		change(c.Field(i))
		out[f.Name] = c.Interface()
	}
	return out
}

func change(v reflect.Value) {
	switch v.Kind() {
	case reflect.String:
		v.SetString(v.String() + "x")
	case reflect.Bool:
		v.SetBool(!v.Bool())
	case reflect.Int, reflect.Int64:
		v.SetInt(v.Int() + 1)
	case reflect.Uint8, reflect.Uint32:
		v.SetUint(v.Uint() + 1)
	case reflect.Slice:
		one := reflect.New(v.Type().Elem()).Elem()
		change(one)
		v.Set(reflect.Append(v, one))
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		change(v.Elem())
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			v.Set(reflect.ValueOf(time.Unix(1, 0)))
			return
		}
		for i := range v.NumField() {
			if v.Field(i).Kind() == reflect.String || v.Field(i).Kind() == reflect.Int {
				change(v.Field(i))
				return
			}
		}
	}
}

func TestReasonsSayWhatChanged(t *testing.T) {
	exec := func(env ...string) *cause { return opCause("exec", plan.Exec{Root: 0, Args: []string{"a"}, Env: env}) }
	standsOn := func(c *cause, name, id string, p place, img string) *cause {
		v := value{name: name, place: p}
		if img != "" {
			v.image = &image.Source{Descriptor: ocispec.Descriptor{Digest: digest.FromString(img)}}
		}
		c.input("base", v, id)
		return c
	}
	given := func(is bool) *cause {
		c := exec()
		c.given("secret k", is)
		return c
	}
	egress := func(rules ...string) *cause {
		c := exec()
		for _, r := range rules {
			c.add("egress rules", r)
		}
		return c
	}
	mounts := func(all ...plan.Mount) *cause { return opCause("exec", plan.Exec{Args: []string{"a"}, Mounts: all}) }
	cached, bound := plan.Mount{Kind: plan.MountCache, Target: "/c", From: plan.Scratch}, plan.Mount{Target: "/t", From: 1}
	private := cached
	private.Sharing = plan.SharingPrivate
	run := func(e plan.Exec) *cause { return opCause("exec", e) }
	copies := func(c plan.Copy) *cause { return opCause("files", plan.Files{Actions: []plan.Action{c}}) }
	chown := func(o plan.Owner) *cause { return copies(plan.Copy{Owner: &o}) }
	at := func(epoch *time.Time) *cause {
		c := copies(plan.Copy{Timestamp: epoch})
		c.add(epochPart, asJSON(epoch))
		return c
	}
	noon := time.Unix(1600000000, 0).UTC()
	later := noon.Add(time.Second)
	make2, make3 := place{"build", 2, "m"}, place{"build", 3, "m"}
	b := &build{dockerfile: aboutDockerfile(&plan.Graph{Dockerfile: []byte("FROM a\nARG VERSION\nARG TOKEN=1\n")})}
	b.Secrets = []Secret{{ID: "k", Value: []byte("correct-horse")}}
	b.scan = policy.ScanOptions{Secrets: []policy.Secret{{ID: "k", Value: []byte("correct-horse")}}}
	for name, c := range map[string]struct {
		before, after *cause
		want          string
	}{
		"argument":       {exec("VERSION=1"), exec("VERSION=2"), `ARG VERSION changed: "1" -> "2"`},
		"variable":       {exec("A=1", "B=1"), exec("A=2"), `ENV A changed: "1" -> "2"; ENV B is gone, which was "1"`},
		"new":            {exec(), exec("B=1"), `ENV B is new: "1"`},
		"secret name":    {exec("TOKEN=a"), exec("TOKEN=b"), `ARG TOKEN changed (its value is not recorded)`},
		"secret value":   {exec("A=-u me:correct-horse"), exec("A=x"), `ENV A changed`},
		"long":           {exec("A=" + strings.Repeat("a", 999)), exec("A=" + strings.Repeat("b", 999)), `ENV A changed`},
		"result":         {standsOn(exec(), "[b 2/3] X", "1", make2, ""), standsOn(exec(), "[b 2/3] X", "2", make2, ""), "the result of [b 2/3] X changed"},
		"moved":          {standsOn(exec(), "[b 2/3] X", "1", make2, ""), standsOn(exec(), "[b 3/4] X", "2", make3, ""), "the result of [b 3/4] X changed"},
		"another":        {standsOn(exec(), "[b 2/3] X", "1", place{"build", 2, "x"}, ""), standsOn(exec(), "[b 3/4] Y", "2", make3, ""), "it stands on another step than before: [b 3/4] Y"},
		"base":           {standsOn(exec(), "F", "1", place{}, "a"), standsOn(exec(), "F", "2", place{}, "b"), "base digest changed: sha256:ca978112ca1b -> sha256:3e23e8160039"},
		"given":          {given(false), given(true), "secret k is given, and was not before"},
		"no longer":      {given(true), given(false), "secret k is not given, and was before"},
		"egress":         {egress(), egress("allow a:1"), "egress rules changed"},
		"mount":          {mounts(cached, bound), mounts(private, bound), "the options of mount /c changed"},
		"mount, other":   {mounts(cached, bound), mounts(cached, plan.Mount{Target: "/s", From: 2}, bound), "mount /s is new"},
		"chmod":          {copies(plan.Copy{Mode: &plan.Mode{Bits: 0o600}}), copies(plan.Copy{Mode: &plan.Mode{Symbolic: "u+x"}}), `mode (--chmod) changed: "0600" -> "u+x"`},
		"chmod, new":     {copies(plan.Copy{}), copies(plan.Copy{Mode: &plan.Mode{}}), `mode (--chmod) is new: "0000"`},
		"chown":          {chown(plan.Owner{UID: 1000, GID: 1000}), chown(plan.Owner{UserName: "app", GID: plan.GroupOfUser}), `owner (--chown) changed: "1000:1000" -> "app"`},
		"chown, group":   {chown(plan.Owner{}), chown(plan.Owner{UserName: "app", GroupName: "wheel"}), `owner (--chown) changed: "0:0" -> "app:wheel"`},
		"network":        {run(plan.Exec{}), run(plan.Exec{Network: plan.NetworkNone}), `network changed: "default" -> "none"`},
		"security":       {run(plan.Exec{Insecure: true}), run(plan.Exec{}), `--security changed: "insecure" -> "sandbox"`},
		"hosts":          {run(plan.Exec{}), run(plan.Exec{Hosts: []plan.Host{{Name: "a", IP: "::1"}, {Name: "b", IP: "10.0.0.1"}}}), `--add-host changed: "" -> "a=::1, b=10.0.0.1"`},
		"ulimit":         {run(plan.Exec{Ulimits: []plan.Ulimit{{Name: "nofile", Soft: 1, Hard: 2}}}), run(plan.Exec{}), `--ulimit changed: "nofile=1:2" -> ""`},
		"excluded":       {copies(plan.Copy{}), copies(plan.Copy{Exclude: []string{"*.go", "a"}}), `--exclude is new: "*.go, a"`},
		"epoch":          {at(nil), at(&noon), `timestamp is new: "1600000000"; SOURCE_DATE_EPOCH changed: not set -> 1600000000`},
		"epoch, other":   {at(&noon), at(&later), `timestamp changed: "1600000000" -> "1600000001"; SOURCE_DATE_EPOCH changed: 1600000000 -> 1600000001`},
		"egress, longer": {egress("allow a:1"), egress("allow a:1", "allow b:1"), "egress rules changed"},
	} {
		record := b.describe(c.before)
		if got := strings.Join(b.differences(record, c.after), "; "); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
		if text := asJSON(record); strings.Contains(text, "horse") || strings.Contains(text, "TOKEN\":{\"value") {
			t.Errorf("%s: the store keeps %s: who reads the store has the secret", name, text)
		}
	}
}

func TestWhatIsRecordedInAnotherWayDidNotChange(t *testing.T) {
	of := func(rule string) *cause {
		c := opCause("exec", plan.Exec{Args: []string{"a"}, Env: []string{"A=correct-horse"}})
		c.add("egress rules", rule)
		return c
	}
	with := &build{scan: policy.ScanOptions{Secrets: []policy.Secret{{ID: "k", Value: []byte("correct-horse")}}}}
	record := with.describe(of("allow a:1"))
	got := strings.Join((&build{}).differences(record, of("allow b:1")), "; ")
	if want := "egress rules changed: allow a:1 -> allow b:1"; got != want {
		t.Errorf("%q, want %q: A was recorded while it held a secret", got, want)
	}
}

// explainer is a build on a store, as far as causes need one.
func explainer(t *testing.T) *build {
	s := newShelf(t)
	b := &build{store: s.store}
	b.Root = s.root
	b.Plan.Context = t.TempDir()
	b.notebook = b.newNotebook()
	return b
}

// next is another build on the same store.
func (b *build) next() *build {
	b.saveJournals()
	n := &build{store: b.store, dockerfile: b.dockerfile}
	n.Plan, n.Root = b.Plan, b.Root
	n.notebook = n.newNotebook()
	return n
}

func (b *build) made(t *testing.T, s plan.Step, c *cause) snapshot.ID {
	t.Helper()
	a, err := b.store.Prepare(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer a.Discard()
	id, err := a.Commit(t.Context(), snapshot.ID(c.key()))
	if err == nil {
		err = b.recordCause(s, c, id)
	}
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func step(name, text string) plan.Step {
	return plan.Step{Name: name, Op: plan.Exec{}, Where: plan.Location{Lines: []plan.Range{{Start: 1, End: 1}}, Source: []byte(text)}}
}

func TestAMissIsComparedWithTheNearestEarlierCause(t *testing.T) {
	of := func(args string, env ...string) *cause {
		return opCause("exec", plan.Exec{Args: []string{args}, Env: env})
	}
	b := explainer(t)
	makeIt := step("[build 2/3] RUN make 1", "RUN make $V")
	makeIt2 := step("[build 2/3] RUN make 2", "RUN make $V")
	b.made(t, makeIt, of("make", "V=1", "W=1"))
	b.made(t, makeIt, of("make", "V=2", "W=2"))
	b.made(t, step("[build 3/3] RUN test", "RUN test"), of("test", "V=1"))
	b = b.next()

	expect := func(what string, s plan.Step, c *cause, want string) {
		t.Helper()
		if got := strings.Join(b.missReasons(s, c), "; "); got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	expect("two differ, of one less", makeIt2, of("make", "V=3", "W=1"), `ENV V changed: "1" -> "3"`)
	expect("edited", step("[build 3/3] RUN test -v", "RUN test -v"), of("test -v", "V=1"), "command changed")
	expect("in another stage", step("[other 1/3] RUN test", "RUN test"), of("test", "V=2"), `ENV V changed: "1" -> "2"`)
	expect("unknown", step("[other 1/3] RUN x", "RUN x"), of("x"), "never built before in this store")
	expect("again", makeIt, of("make", "V=1", "W=1"), "nothing changed, but its result is no longer in the store: it was pruned or damaged, or the machine lost power")

	// A line before it: what stood at its place is still there, and is not what it is compared with.
	b.dockerfile = aboutDockerfile(&plan.Graph{Steps: []plan.Step{makeIt, step("[build 3/4] RUN new", "RUN new"), step("[build 4/4] RUN test", "RUN test")}})
	expect("inserted", step("[build 3/4] RUN new", "RUN new"), of("new"), "never built before in this store")
	expect("moved", step("[build 4/4] RUN test", "RUN test"), of("test", "V=2"), `ENV V changed: "1" -> "2"`)

	// Another Dockerfile: the same instruction, or something at the same place that is much alike.
	b.Plan.Context, b.dockerfile = t.TempDir(), dockerfile{}
	b.notebook = b.newNotebook()
	expect("elsewhere", makeIt2, of("make", "V=3", "W=2"), `ENV V changed: "2" -> "3"`)
	edited, test := step("[build 2/3] RUN make -j", "RUN make -j"), step("[build 3/3] RUN test", "RUN test")
	b.dockerfile = aboutDockerfile(&plan.Graph{Steps: []plan.Step{edited, test}})
	expect("alike", edited, of("make -j", "V=2", "W=2"), "command changed")
	b.dockerfile = aboutDockerfile(&plan.Graph{Steps: []plan.Step{edited, step("[build 3/3] RUN x", "RUN x")}})
	expect("unrelated", edited, of("make -j", "V=2", "W=2"), "never built before in this store")
}

func TestACopyIsComparedWithTheOneOfTheFewestOtherFiles(t *testing.T) {
	b := explainer(t)
	context := files.Tree{Dir: t.TempDir(), Local: true}
	write := func(name, content string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(context.Dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	of := func(src, dst string) *cause {
		t.Helper()
		c := opCause("files", plan.Files{Actions: []plan.Action{plan.Copy{Src: src, Dst: dst, ContentsOnly: true, CreateDestPath: true}}})
		if err := b.selects(t.Context(), c, "", value{name: "context", tree: &context}, copyOf(0, "/"), true); err != nil {
			t.Fatal(err)
		}
		return c
	}
	written := func(dst string) plan.Step {
		s := step("[2/2] COPY . "+dst, "COPY . "+dst)
		s.Op = plan.Files{}
		return s
	}
	write("a", "1")
	b.made(t, written("/c"), of("/", "/c"))
	b = b.next()
	write("b", "1")
	b.made(t, written("/c"), of("/", "/c"))
	b = b.next()
	os.Remove(filepath.Join(context.Dir, "b"))
	write("a", "2")
	if got := b.missReasons(written("/c"), of("/", "/c")); len(got) != 1 || got[0] != "file a changed" {
		t.Errorf("%q, want only the file that changed: what was there in one build before the last is told to be gone", got)
	}

	// Elsewhere a copy is the same one if it reads or makes something of the same; its flags are those of every copy.
	run := step("[1/2] RUN make", "RUN make")
	b.made(t, run, opCause("exec", plan.Exec{Args: []string{"make"}}))
	b = b.next()
	b.Plan.Context = t.TempDir()
	b.notebook = b.newNotebook()
	for _, c := range []struct{ src, dst, want string }{
		{"/", "/c", "file a changed"},
		{"/", "/d", `destination changed: "/c" -> "/d"`},
		{"/.", "/c", `source changed: "/" -> "/."`},
		{"/.", "/d", "never built before in this store"},
	} {
		s := written(c.src + " " + c.dst)
		b.dockerfile = aboutDockerfile(&plan.Graph{Steps: []plan.Step{run, s}})
		if got := b.missReasons(s, of(c.src, c.dst)); len(got) != 1 || got[0] != c.want {
			t.Errorf("%s to %s: %q, want %q", c.src, c.dst, got, c.want)
		}
	}
}

func TestRecordsGoWithTheirSnapshots(t *testing.T) {
	b := explainer(t)
	s := step("[build 2/3] RUN make", "RUN make")
	id := b.made(t, s, opCause("exec", plan.Exec{Args: []string{"make"}}))
	b = b.next()
	m, err := filepath.Glob(filepath.Join(b.Root, "snapshots", "*", string(id)))
	if err != nil || len(m) != 1 {
		t.Fatal(m, err)
	}
	if err := os.RemoveAll(m[0]); err != nil {
		t.Fatal(err)
	}
	want := "it was built from something else before, of which nothing is recorded any more: the snapshot was pruned"
	if got := b.missReasons(s, opCause("exec", plan.Exec{Args: []string{"make all"}})); len(got) != 1 || got[0] != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestJournalsStaySmall(t *testing.T) {
	var j journal
	for i := range 5 * perStore {
		e := journalEntry{place{"s", i % 1000, fmt.Sprint(i)}, "exec", snapshot.Key(fmt.Sprintf("%064d", i))}
		j = j.with([]journalEntry{e}, perStore)
	}
	if len(j.Entries) != perStore || j.Entries[0].Text != fmt.Sprint(5*perStore-1) {
		t.Errorf("%d entries, newest %v", len(j.Entries), j.Entries[0])
	}
	j = journal{}
	for i := range 100 {
		j = j.with([]journalEntry{{place{"s", 1, "t"}, "exec", snapshot.Key(fmt.Sprintf("%064d", i))}}, perFile)
	}
	if len(j.Entries) != perStep {
		t.Errorf("%d entries of one step, want %d", len(j.Entries), perStep)
	}
}

func TestNamesOfStepsAreTakenApart(t *testing.T) {
	for name, want := range map[string]place{
		"[build 2/4] RUN make":              {Stage: "build", At: 2, Text: "RUN make"},
		"[2/4] RUN [ -e /a ] && b":          {At: 2, Text: "RUN [ -e /a ] && b"},
		"[linux/arm64 build 12/14] RUN x":   {Stage: "linux/arm64 build", At: 12, Text: "RUN x"},
		"[context base] OCI load":           {Text: "[context base] OCI load"},
		"[internal] load build context":     {Text: "[internal] load build context"},
		"merge (b, c)":                      {Text: "merge (b, c)"},
		"[auth] library/busybox:pull token": {Text: "[auth] library/busybox:pull token"},
	} {
		got, text := cutStepName(name)
		if got.Text = text; got != want {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
}
