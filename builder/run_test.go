package builder

import (
	"bytes"
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
	for range 31 {
		if _, err := out.Write(chunk); err != nil {
			t.Fatal(err)
		}
	}
	if kept := len(out.rest); kept > longestLine {
		t.Errorf("%d bytes of an endless line are kept in memory, want at most %d", kept, longestLine)
	}
	if out.flush(); n != 31<<16 {
		t.Errorf("%d bytes were shown, want %d", n, 31<<16)
	}
}

// A command that prints without end must fill neither the memory of the builder nor the log of a CI system, and what it
// printed last says why it failed.
func TestAFloodOfOutputIsClippedAndItsEndIsShown(t *testing.T) {
	const secret = "correct-horse-battery"
	for name, line := range map[string]string{"lines": secret + " and more\n", "no lines": strings.Repeat("x", 1000) + secret} {
		t.Run(name, func(t *testing.T) {
			var got bytes.Buffer
			b := &build{Request: Request{Secrets: []Secret{{ID: "k", Value: []byte(secret)}}}}
			b.events.watch = func(e Event) { got.Write(e.Data) }
			out, errOut := b.logs(&watch{b: b, step: "s"})
			chunk := []byte(strings.Repeat(line, 32<<10/len(line)))
			for range 3000 {
				out.Write(chunk)
				if kept := cap(out.rest) + cap(out.last); kept > 4<<20 {
					t.Fatalf("%d bytes are kept in memory", kept)
				}
			}
			out.Write([]byte("\nthe reason\n"))
			errOut.Write([]byte("the other stream\n"))
			out.flush()
			errOut.flush()
			if got.Len() < clipAfter || got.Len() > clipAfter+keepLast+1000 {
				t.Errorf("%d bytes are shown", got.Len())
			}
			text := got.String()
			if n := strings.Count(text, "\n[output clipped, log limit 2MiB reached]\n"); n != 1 {
				t.Errorf("it is said %d times that output is left out", n)
			}
			if !strings.Contains(text, "MiB of output left out]\n") || !strings.Contains(text, "\nthe reason\n") || !strings.Contains(text, "the other stream\n") {
				t.Errorf("what was printed last is not shown: ...%q", text[max(0, len(text)-200):])
			}
			for _, part := range []string{secret, secret[5:], secret[:5]} {
				if strings.Contains(text, part) {
					t.Errorf("the log holds %q of a secret", part)
				}
			}
		})
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
