package builder

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cooper-build/cooper/builder/plan"
)

func TestLogsCarryWholeLinesWithoutSecrets(t *testing.T) {
	var got []string
	b := &build{Request: Request{Secrets: []Secret{{ID: "k", Value: []byte("-----BEGIN\nhunter22\n")}}}}
	b.events.watch = func(e Event) { got = append(got, string(e.Data)) }
	out, _ := b.logs(&watch{b: b, step: "s"})
	for _, part := range []string{"one", " line\ntoken=hun", "ter22\n-----BEGIN x\nlast"} {
		if _, err := out.Write([]byte(part)); err != nil {
			t.Fatal(err)
		}
	}
	out.flush()
	want := []string{"one line\n", "token=***\n*** x\n", "last"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("log events; a secret that shows up here is in every CI log (-want +got):\n%s", d)
	}
}

func TestASecretInALineWithoutEndIsMaskedWhereverItIsCut(t *testing.T) {
	const secret = "correct-horse-battery"
	for cut := range len(secret) {
		var got strings.Builder
		b := &build{Request: Request{Secrets: []Secret{{ID: "k", Value: []byte(secret)}}}}
		b.events.watch = func(e Event) { got.Write(e.Data) }
		out, _ := b.logs(&watch{b: b, step: "s"})
		for _, part := range []string{strings.Repeat("x", 2*longestLine), secret[:cut], secret[cut:], strings.Repeat("y", 2*longestLine)} {
			if _, err := out.Write([]byte(part)); err != nil {
				t.Fatal(err)
			}
		}
		out.flush()
		want := strings.Repeat("x", 2*longestLine) + "***" + strings.Repeat("y", 2*longestLine)
		if got.String() != want {
			t.Fatalf("cut at %d: the log has %d bytes, want %d; it holds the secret: %v", cut, got.Len(), len(want), strings.Contains(got.String(), secret))
		}
	}
}

func TestALineWithoutEndIsNotKeptForever(t *testing.T) {
	var n int
	b := &build{}
	b.events.watch = func(e Event) { n += len(e.Data) }
	out, _ := b.logs(&watch{b: b, step: "s"})
	chunk := []byte(strings.Repeat("x", 1<<16))
	for range 64 {
		if _, err := out.Write(chunk); err != nil {
			t.Fatal(err)
		}
	}
	if kept := len(out.rest); kept > longestLine {
		t.Errorf("%d bytes of an endless line are kept in memory, want at most %d", kept, longestLine)
	}
	if out.flush(); n != 64<<16 {
		t.Errorf("%d bytes were shown, want %d", n, 64<<16)
	}
}

func TestProxySettingsDoNotReplaceTheEnvironments(t *testing.T) {
	got := withProxy([]string{"PATH=/bin", "http_proxy=mine"}, plan.Proxy{HTTP: "http://p"})
	want := []string{"PATH=/bin", "http_proxy=mine", "HTTP_PROXY=http://p"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("environment (-want +got):\n%s", d)
	}
}

func TestKeysOfDifferentPartsDiffer(t *testing.T) {
	a := newKey("k").str("ab").str("c").sum()
	if b := newKey("k").str("a").str("bc").sum(); a == b {
		t.Errorf("two lists of parts have one key: a step would be answered with another step's result")
	}
	if b := newKey("kab").str("").str("c").sum(); a == b {
		t.Errorf("kind and parts run together")
	}
}
