package plan

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

func TestEqualDockerfilesInTwoDirectoriesEncodeEqually(t *testing.T) {
	files := map[string]string{
		"Dockerfile": lines(
			"FROM busybox AS a", "WORKDIR /w", "COPY src /src", "RUN --mount=type=cache,target=/c --mount=target=/t x",
			"FROM debian", "COPY --link --from=a /w /w", "ADD --chown=me x.tar /", "COPY <<E /e", "text", "E"),
		".dockerignore": "*.o\n",
	}
	one := mustMake(t, Request{Context: project(t, files)}, library())
	// another place in the file and another name do not change the work
	files["Other"] = "# a comment\n\n" + files["Dockerfile"]
	delete(files, "Dockerfile")
	dir := project(t, files)
	two := mustMake(t, Request{Context: dir, Dockerfile: dir + "/Other", Args: map[string]string{"HTTPS_PROXY": "http://p"}}, library())
	if len(one.Steps) != len(two.Steps) {
		t.Fatalf("%d steps and %d", len(one.Steps), len(two.Steps))
	}
	for i := range one.Steps {
		a, b := Encode(one.Steps[i].Op), Encode(two.Steps[i].Op)
		if !bytes.Equal(a, b) {
			t.Errorf("%s is rebuilt in another directory:\n%s\n%s", one.Steps[i].Name, a, b)
		}
		if !json.Valid(a) {
			t.Errorf("%s is no JSON: %s", one.Steps[i].Name, a)
		}
	}
}

// samples have every field set, and every kind of action.
func samples() []any {
	when := time.Unix(1, 2)
	owner := &Owner{UserName: "u", UID: 1, GroupName: "g", GID: 2, NamesFrom: 0}
	return []any{
		filled[Image](), filled[Local](), filled[Exec](), // a Merge and a Diff are nothing but references
		Files{Base: 0, Actions: []Action{
			filledCopy(owner, &when),
			Mkdir{Path: "p", Mode: os.ModePerm, MakeParents: true, Owner: owner, Timestamp: &when},
			Mkfile{Path: "p", Mode: os.ModePerm, Data: []byte("d"), Owner: owner, Timestamp: &when},
			Remove{Path: "p", AllowNotFound: true, Wildcard: true},
			Symlink{Old: "o", New: "n", Owner: owner, Timestamp: &when},
		}},
	}
}

func filledCopy(owner *Owner, when *time.Time) Copy {
	c := filled[Copy]()
	c.Owner, c.Mode, c.Timestamp = owner, &Mode{Bits: 1, Symbolic: "x"}, when
	return c
}

func filled[T any]() T {
	var v T
	fill(reflect.ValueOf(&v).Elem())
	return v
}

func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	case reflect.String:
		v.SetString("s")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Uint32:
		v.SetUint(1)
	case reflect.Int, reflect.Int64:
		if v.Type() != reflect.TypeFor[Ref]() {
			v.SetInt(1)
		}
	}
}

// A field that does not reach the encoding gives one cache key to two causes:
// the second build would get the result of the first.
func TestEveryFieldChangesTheEncoding(t *testing.T) {
	for _, op := range samples() {
		before := Encode(op.(Op))
		n := 0
		for path, changed := range mutations(reflect.ValueOf(op)) {
			n++
			if after := Encode(changed.Interface().(Op)); bytes.Equal(before, after) {
				t.Errorf("%T: a change of %s is not seen: a wrong cached result would be used\n%s", op, path, after)
			}
		}
		if n == 0 {
			t.Errorf("%T: nothing was changed", op)
		}
	}
}

func TestOnlyPlacesAndProxiesAreLeftOutOfTheEncoding(t *testing.T) {
	var left []string
	for _, op := range append(samples(), Copy{}, Mkdir{}, Mkfile{}, Remove{}, Symlink{}, Mount{}, Owner{}, Mode{}) {
		for _, f := range reflect.VisibleFields(reflect.TypeOf(op)) {
			if f.Tag.Get("encode") != "" {
				left = append(left, reflect.TypeOf(op).Name()+"."+f.Name)
			}
		}
	}
	if diff := cmp.Diff([]string{"Local.Dir", "Exec.Proxy"}, left); diff != "" {
		t.Errorf("fields that no key knows (-want +got):\n%s", diff)
	}
}

// mutations gives copies of v in each of which one leaf is another. References
// to steps are left alone: they are named by the caller.
func mutations(v reflect.Value) map[string]reflect.Value {
	all := map[string]reflect.Value{}
	collect := func(path string, sub reflect.Value, put func(reflect.Value) reflect.Value) {
		for p, m := range mutations(sub) {
			all[path+p] = put(m)
		}
	}
	if v.Type() == reflect.TypeFor[Ref]() {
		return nil
	}
	if v.Type() == reflect.TypeFor[time.Time]() {
		return map[string]reflect.Value{"": reflect.ValueOf(v.Interface().(time.Time).Add(1))}
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			f := v.Type().Field(i)
			if f.Tag.Get("encode") == "-" {
				continue
			}
			collect("."+f.Name, v.Field(i), func(m reflect.Value) reflect.Value {
				c := reflect.New(v.Type()).Elem()
				c.Set(v)
				c.Field(i).Set(m)
				return c
			})
		}
	case reflect.Slice:
		if v.Type().Elem() != reflect.TypeFor[Ref]() {
			all["[shorter]"] = v.Slice(0, v.Len()-1)
		}
		for i := range v.Len() {
			collect(fmt.Sprintf("[%d]", i), v.Index(i), func(m reflect.Value) reflect.Value {
				c := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
				reflect.Copy(c, v)
				c.Index(i).Set(m)
				return c
			})
		}
	case reflect.Pointer:
		all["(nil)"] = reflect.Zero(v.Type())
		collect("", v.Elem(), func(m reflect.Value) reflect.Value {
			p := reflect.New(v.Type().Elem())
			p.Elem().Set(m)
			return p
		})
	case reflect.Interface:
		return mutations(v.Elem())
	case reflect.String:
		all[""] = reflect.ValueOf(v.String() + "x").Convert(v.Type())
	case reflect.Bool:
		all[""] = reflect.ValueOf(!v.Bool())
	case reflect.Uint8, reflect.Uint32:
		all[""] = reflect.ValueOf(v.Uint() + 1).Convert(v.Type())
	default:
		all[""] = reflect.ValueOf(v.Int() + 1).Convert(v.Type())
	}
	return all
}

// Two mounts that change places read different trees at the same paths.
func TestEncodingTellsWhichInputIsUsedWhere(t *testing.T) {
	exec := func(a, b Ref) Op {
		return Exec{Root: 0, Mounts: []Mount{{From: a, Target: "/a"}, {From: b, Target: "/b"}}}
	}
	for _, pair := range [][2]Op{
		{exec(0, 1), exec(1, 0)},
		{exec(0, Scratch), exec(Scratch, 0)},
		{Merge{Inputs: []Ref{0, 1}}, Merge{Inputs: []Ref{0, 1, 0}}},
		{Files{Base: Scratch, Actions: []Action{Copy{From: 0}}}, Files{Base: 0, Actions: []Action{Copy{From: Scratch}}}},
	} {
		if bytes.Equal(Encode(pair[0]), Encode(pair[1])) {
			t.Errorf("%+v and %+v encode equally, though their inputs are the same set", pair[0], pair[1])
		}
	}
	if !bytes.Equal(Encode(exec(0, 1)), Encode(Exec{Root: 5, Mounts: []Mount{{From: 5, Target: "/a"}, {From: 9, Target: "/b"}}})) {
		t.Error("the numbers of steps are encoded: a step above changes every key below")
	}
}

func TestEncodingKeepsBytesThatAreNoText(t *testing.T) {
	a := Encode(Exec{Args: []string{"\xff"}})
	for _, arg := range []string{"\xfe", "�", `{"bytes":"/w=="}`} {
		if bytes.Equal(a, Encode(Exec{Args: []string{arg}})) {
			t.Errorf("%q encodes like a byte 0xff", arg)
		}
	}
}

func TestEncodingTellsKindsApart(t *testing.T) {
	seen := map[string]bool{}
	for _, op := range []Op{Image{}, Local{}, Exec{}, Files{}, Merge{}, Diff{}} {
		seen[string(Encode(op))] = true
	}
	if len(seen) != 6 {
		t.Errorf("two of 6 kinds encode equally: %v", seen)
	}
	if bytes.Equal(EncodeAction(Mkdir{Path: "x"}), EncodeAction(Remove{Path: "x"})) {
		t.Error("making and removing encode equally")
	}
}

func TestInputsAreListedOnce(t *testing.T) {
	got := Inputs(Files{Base: 3, Actions: []Action{
		Copy{From: 1, Owner: &Owner{UserName: "x", NamesFrom: 3}},
		Copy{From: Scratch}, Copy{From: 2, Owner: &Owner{NamesFrom: Scratch}}, Mkdir{Owner: &Owner{NamesFrom: 4}},
	}})
	if want := fmt.Sprint([]Ref{3, 1, 2, 4}); fmt.Sprint(got) != want {
		t.Errorf("inputs are %v, want %s", got, want)
	}
	if digest.FromBytes(Encode(Image{Ref: "a"})) == digest.FromBytes(Encode(Image{Ref: "b"})) {
		t.Error("two images encode equally")
	}
}
