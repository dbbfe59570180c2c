package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	passing = `{"Action":"run","Package":"example.com/a/b/store","Test":"TestA"}
{"Action":"output","Package":"example.com/a/b/store","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"example.com/a/b/store","Test":"TestA","Output":"--- PASS: TestA (0.00s)\n"}
{"Action":"pass","Package":"example.com/a/b/store","Test":"TestA"}
{"Action":"output","Package":"example.com/a/b/store","Output":"PASS\n"}
{"Action":"output","Package":"example.com/a/b/store","Output":"ok  \texample.com/a/b/store\t1.0s\n"}
{"Action":"pass","Package":"example.com/a/b/store"}
`
	failing = `{"Action":"output","Package":"example.com/a/b/run","Test":"TestB","Output":"=== RUN   TestB\n"}
{"Action":"output","Package":"example.com/a/b/run","Test":"TestB","Output":"    b_test.go:7: got 1, want 2\n"}
{"Action":"fail","Package":"example.com/a/b/run","Test":"TestB"}
{"Action":"output","Package":"example.com/a/b/run","Output":"FAIL\n"}
{"Action":"fail","Package":"example.com/a/b/run"}
`
	skipping = `{"Action":"output","Package":"example.com/a/b/run","Test":"TestC","Output":"    c_test.go:7: kernel lacks fsverity\n"}
{"Action":"skip","Package":"example.com/a/b/run","Test":"TestC"}
{"Action":"pass","Package":"example.com/a/b/run"}
`
	story = `{"Action":"output","Package":"example.com/a/b/run","Test":"TestS/deb","Output":"    testscript.go:609: WORK=$WORK\n"}
{"Action":"output","Package":"example.com/a/b/run","Test":"TestS/deb","Output":"        > [!many] skip 'kernel lacks patience'\n"}
{"Action":"skip","Package":"example.com/a/b/run","Test":"TestS/deb"}
{"Action":"pass","Package":"example.com/a/b/run"}
`
	crashing = `{"Action":"output","Package":"example.com/a/b/run","Output":"panic: in TestMain\n"}
{"Action":"fail","Package":"example.com/a/b/run"}
`
	unbuilt = `{"ImportPath":"example.com/a/b/run","Action":"build-output","Output":"run.go:1: syntax error\n"}
{"ImportPath":"example.com/a/b/run","Action":"build-fail"}
{"Action":"fail","Package":"example.com/a/b/run","FailedBuild":"example.com/a/b/run"}
`
)

func as(account, stream, exit string) string {
	return `{"Account":"` + account + `"}` + "\n" + stream + `{"Exit":` + exit + `}` + "\n"
}

func TestVerdict(t *testing.T) {
	for _, tt := range []struct {
		name, stream string
		strict       bool
		ok           bool
		last         string
		says         string
	}{
		{name: "all passed", stream: as("many", passing, "0") + as("single", passing, "0"), strict: true, ok: true, last: "2 passed, 0 failed, 0 skipped", says: "as single: 1 passed"},
		{name: "one account failed", stream: as("many", passing, "0") + as("single", passing+failing, "1"), last: "2 passed, 1 failed, 0 skipped", says: "got 1, want 2"},
		{name: "crash outside any test", stream: as("many", crashing, "1"), last: "0 passed, 1 failed, 0 skipped", says: "panic: in TestMain"},
		{name: "package does not build", stream: as("many", unbuilt, "1"), last: "0 passed, 1 failed, 0 skipped", says: "syntax error"},
		{name: "go test died without a word", stream: as("many", passing, "137"), last: "1 passed, 0 failed, 0 skipped", says: "did not finish (exit 137)"},
		{name: "stream ends early", stream: `{"Account":"many"}` + "\n" + passing, last: "1 passed, 0 failed, 0 skipped", says: "did not finish"},
		{name: "no stream at all", stream: "", last: "0 passed, 0 failed, 0 skipped"},
		{name: "allowed skip", stream: as("many", skipping, "0"), strict: true, ok: true, last: "0 passed, 0 failed, 1 skipped", says: "skipped as many: run.TestC: kernel lacks fsverity\n"},
		{name: "allowed skip of a story", stream: as("many", story, "0"), strict: true, ok: true, last: "0 passed, 0 failed, 1 skipped", says: "skipped as many: run.TestS/deb: kernel lacks patience\n"},
		{name: "skip allowed to the other account only", stream: as("single", skipping, "0"), strict: true, last: "0 passed, 0 failed, 1 skipped", says: "(not an allowed reason)"},
		{name: "the same when nobody is strict", stream: as("single", skipping, "0"), ok: true, last: "0 passed, 0 failed, 1 skipped", says: "(not an allowed reason)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			allow := filepath.Join(t.TempDir(), "allow")
			if err := os.WriteFile(allow, []byte("# why\n\nmany kernel lacks \\w+\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			ok, err := run(strings.NewReader(tt.stream), &out, allow, tt.strict)
			if err != nil {
				t.Fatal(err)
			}
			lines := strings.Split(strings.TrimSpace(out.String()), "\n")
			if ok != tt.ok || lines[len(lines)-1] != tt.last || !strings.Contains(out.String(), tt.says) {
				t.Errorf("got ok=%v, want %v; want last line %q and %q in:\n%s", ok, tt.ok, tt.last, tt.says, out.String())
			}
		})
	}
}

func TestPassingPackageIsOneLine(t *testing.T) {
	var out strings.Builder
	r := report{out: &out, running: map[string]*pkg{}}
	if err := r.read(strings.NewReader(passing)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("ok  \texample.com/a/b/store\t1.0s\n", out.String()); diff != "" {
		t.Errorf("output (-want +got):\n%s", diff)
	}
}
