package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestMain lets the test binary be the process that measures, as bench itself is.
func TestMain(m *testing.M) {
	if len(os.Args) > 3 && os.Args[1] == "measure" {
		status, err := measureChild(os.Args[2], os.Args[4:])
		if err != nil {
			os.Stderr.WriteString(err.Error())
			status = 125
		}
		os.Exit(status)
	}
	os.Exit(m.Run())
}

const buildkitLog = `#1 [internal] load build definition from Dockerfile
#1 DONE 0.0s
#3 [internal] load .dockerignore
#4 [a 1/2] FROM 127.0.0.1:5000/busybox:latest
#4 CACHED
#5 [a 2/2] RUN one
#5 CACHED
#6 [stage-1 2/3] COPY --from=a /x /
#6 DONE 0.1s
#7 [stage-1 3/3] RUN two
#7 DONE 0.1s
`

const buildahOutput = `STEP 1/4: FROM busybox
STEP 2/4: ARG A
--> Using cache 11
--> 11
STEP 3/4: RUN one
--> Using cache 22
--> 22
STEP 4/4: COPY x /
--> 33
`

const buildahStages = `[2/2] STEP 1/2: FROM busybox
[1/2] STEP 2/2: RUN one
[2/2] STEP 2/2: RUN two
[1/2] --> Using cache 11
[2/2] --> 22
`

func TestStepsThatRanAreToldFromThoseThatWereKnown(t *testing.T) {
	for _, c := range []struct {
		name       string
		count      func(string) (int, int)
		log        string
		steps, ran int
	}{
		{"progress", progressSteps, buildkitLog, 3, 2},
		{"Buildah", buildahSteps, buildahOutput, 2, 1},
		{"Buildah, stages at a time", buildahSteps, buildahStages, 2, 1},
	} {
		if steps, ran := c.count(c.log); steps != c.steps || ran != c.ran {
			t.Errorf("%s: ran %d of %d steps, want %d of %d", c.name, ran, steps, c.ran, c.steps)
		}
	}
}

func TestFigureCountsWhatOrphansDo(t *testing.T) {
	// The shell ends at once and leaves a process that takes memory, which is as good as time and does not depend on the machine.
	work := `(head -c 60000000 /dev/zero | tail -c 60000000 >/dev/null) &`
	f, err := measure(t.Context(), command{args: []string{"sh", "-c", work}, env: os.Environ()}, filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	if f.PeakRSS < 50e6 {
		t.Errorf("the peak is %d bytes: what the orphan used is not counted", f.PeakRSS)
	}
}

func TestFailureIsNoFigure(t *testing.T) {
	_, err := measure(t.Context(), command{args: []string{"sh", "-c", "echo why; exit 3"}, env: os.Environ()}, filepath.Join(t.TempDir(), "log"))
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || !strings.Contains(err.Error(), "why") {
		t.Errorf("got %v, want the exit code and the end of the log", err)
	}
}

func TestStatOfANameWithParentheses(t *testing.T) {
	p, err := parseStat("7 (a) (b c) S 3 7 7 0 -1 0 1 2 3 4 10 20 30 40 20 0 1")
	if err != nil {
		t.Fatal(err)
	}
	want := process{pid: 7, parent: 3, name: "a) (b c", cpu: time.Second}
	if p != want {
		t.Errorf("got %+v, want %+v", p, want)
	}
}

func TestPageKeepsWhatIsWrittenByHand(t *testing.T) {
	page := filepath.Join(t.TempDir(), "page.md")
	r := record{Cases: map[string]measured{"no-change": {Results: []result{
		{Builder: "cooper", Figures: []figure{{Wall: 30 * time.Millisecond, CPU: 20 * time.Millisecond, PeakRSS: 130e6}}},
		{Builder: "BuildKit", Figures: []figure{{Wall: 300 * time.Millisecond}, {Wall: 100 * time.Millisecond}, {Wall: 100 * time.Millisecond}}},
		{Builder: "Podman", Failure: "it | broke"},
	}}}}
	if err := r.writePage(page); err != nil {
		t.Fatal(err)
	}
	b, _ := os.ReadFile(page)
	text := strings.Replace(string(b), "Nothing yet.", "All of it in sync.", 1)
	if err := os.WriteFile(page, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := r.writePage(page); err != nil {
		t.Fatal(err)
	}
	b, _ = os.ReadFile(page)
	if string(b) != text {
		t.Errorf("the page changed when nothing but the hand-written part had:\n%s", b)
	}
	for _, want := range []string{
		"| no-change rebuild, 30 steps | at most 0.4x BuildKit | 0.3x (30 ms : 100 ms) | yes |",
		"| no-change rebuild, 30 steps | at most 0.1x Podman | not measured | – |",
		"| peak memory in any of these | at most 120 MB | 130 MB (no-change rebuild, 30 steps) | **no** |",
		"| BuildKit | 3 | 100 ms (100 ms–300 ms) | 0 ms | 0 MB | 0.3x |",
		`| Podman | | fails: it \| broke |`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the page has no line %s\n%s", want, text)
		}
	}
}

func TestContentsAreTheSameEveryTime(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	for _, dir := range []string{a, b} {
		if err := writeTree(dir+"/tree", 250, 100_000); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("diff", "-r", a, b).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if n, _ := filepath.Glob(a + "/tree/*/*"); len(n) != 250 {
		t.Errorf("%d files, want 250", len(n))
	}
}
