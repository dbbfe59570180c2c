package arch

import (
	"bufio"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestEveryRuleCanFail checks a module that breaks each rule once. Its files say in "// want" comments what must be found on their
// line, and nothing else may be.
func TestEveryRuleCanFail(t *testing.T) {
	const dir = "testdata/house"
	found, err := Check(dir, Rules{
		Module: "example.com/house",
		Own: map[string][]string{
			"cmd/tool": {"upper"},
			"upper":    {"lower"},
			"lower":    nil,
			"state":    nil,
		},
		Foreign: []Foreign{
			{"example.org/big", []string{"lower"}, "it is heavy"},
			{"example.org/big/door", []string{"cmd/..."}, "guests enter there"},
		},
		Calls: []Call{
			{"os", "Exit", "it ends the process", []Except{{"lower.Child.Run", "it is a program of its own"}}},
			{"fmt", "Print*", "it prints", nil},
			{"", "panic", "it ends the process", nil},
		},
		Callers: []string{"cmd/..."},
	})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range found {
		got = append(got, f.String())
	}
	for place, wants := range wanted(t, dir) {
		for _, want := range wants {
			i := slices.IndexFunc(got, func(s string) bool {
				return strings.HasPrefix(s, place+": ") && strings.Contains(s, want)
			})
			if i < 0 {
				t.Errorf("%s: nothing found that says %q: the rule cannot fail", place, want)
				continue
			}
			got = slices.Delete(got, i, i+1)
		}
	}
	for _, s := range got {
		t.Errorf("found without reason: %s", s)
	}
}

// wanted reads the // want "..." comments beneath dir, by file:line.
func wanted(t *testing.T, dir string) map[string][]string {
	t.Helper()
	quoted := regexp.MustCompile(`"([^"]*)"`)
	wants := map[string][]string{}
	err := filepath.WalkDir(dir, func(file string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		rel, _ := filepath.Rel(dir, file)
		lines := bufio.NewScanner(f)
		for n := 1; lines.Scan(); n++ {
			if _, comment, ok := strings.Cut(lines.Text(), "// want "); ok {
				for _, m := range quoted.FindAllStringSubmatch(comment, -1) {
					place := fmt.Sprintf("%s:%d", rel, n)
					wants[place] = append(wants[place], m[1])
				}
			}
		}
		return lines.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(wants) < 10 {
		t.Fatalf("only %d lines with // want in %s", len(wants), dir)
	}
	return wants
}

func TestLongestPathDecidesWhereADependencyIsAtHome(t *testing.T) {
	r := Rules{Foreign: []Foreign{{Path: "a/b", Why: "short"}, {Path: "a/b/c", Why: "long"}}}
	got := map[string]string{}
	for _, target := range []string{"a", "a/b", "a/bb", "a/b/x", "a/b/c", "a/b/c/d"} {
		f, _ := r.home(target)
		got[target] = f.Why
	}
	want := map[string]string{"a": "", "a/b": "short", "a/bb": "", "a/b/x": "short", "a/b/c": "long", "a/b/c/d": "long"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rule by import path (-want +got):\n%s", diff)
	}
}
