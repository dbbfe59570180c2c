// Testreport reads what go test -json prints, once for every account that ran the tests, and prints it as go test does, followed by
// what a reader must not miss: how many tests each account passed, and every skip with its reason.
//
// Between the streams of go test it expects lines of its caller: {"Account":"NAME"} before each and {"Exit":N} after it. It exits 1
// when a test failed or a go test did; with -strict also when a test was skipped for a reason that the file of -allow does not name.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
)

func main() {
	allow := flag.String("allow", "", "`file` with the reasons for which a test may be skipped")
	strict := flag.Bool("strict", false, "fail on a skip that is not allowed")
	flag.Parse()
	ok, err := run(os.Stdin, os.Stdout, *allow, *strict)
	if err != nil {
		fmt.Fprintln(os.Stderr, "testreport:", err)
		os.Exit(2)
	}
	if !ok {
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer, allowFile string, strict bool) (bool, error) {
	var allowed []rule
	if allowFile != "" {
		b, err := os.ReadFile(allowFile)
		if err != nil {
			return false, err
		}
		if allowed, err = parseAllowed(string(b)); err != nil {
			return false, fmt.Errorf("%s: %w", allowFile, err)
		}
	}
	r := report{out: out, running: map[string]*pkg{}}
	if err := r.read(in); err != nil {
		return false, err
	}
	return r.summarise(allowed, strict), nil
}

// event is a line of the stream: one of go test's (see go doc test2json), of go build's, or of our caller's.
type event struct {
	Action, Package, Test, Output, ImportPath, FailedBuild string
	Account                                                string
	Exit                                                   *int
}

type report struct {
	out      io.Writer
	accounts []*account
	running  map[string]*pkg
}

type account struct {
	name                    string
	passed, failed, skipped int
	skips                   []skip
	exit                    int
	ended                   bool
}

type skip struct{ account, test, reason string }

// pkg collects the output of a package until it ends, so that packages that run at the same time do not interleave.
type pkg struct {
	tests  []*test // in the order in which they first spoke; "" is the package's own output
	failed int
}

type test struct{ name, result, output string }

func (r *report) read(in io.Reader) error {
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			r.line(line)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (r *report) line(line []byte) {
	var e event
	if json.Unmarshal(line, &e) != nil {
		r.out.Write(line) // go itself speaks plainly when it cannot start
		return
	}
	switch {
	case e.Account != "":
		r.accounts = append(r.accounts, &account{name: e.Account})
		fmt.Fprintf(r.out, "=== as %s\n", e.Account)
	case e.Exit != nil:
		r.current().exit, r.current().ended = *e.Exit, true
	case e.Action == "build-output":
		io.WriteString(r.out, e.Output)
	case e.Package != "":
		r.test(e)
	}
}

func (r *report) current() *account {
	if len(r.accounts) == 0 {
		r.accounts = append(r.accounts, &account{name: "this user"})
	}
	return r.accounts[len(r.accounts)-1]
}

func (r *report) test(e event) {
	p := r.running[e.Package]
	if p == nil {
		p = &pkg{}
		r.running[e.Package] = p
	}
	t := p.test(e.Test)
	switch e.Action {
	case "output":
		t.output += e.Output
	case "pass", "fail", "skip":
		t.result = e.Action
		if e.Test == "" {
			r.ended(e, p)
			return
		}
		r.count(e, p, t)
	}
}

func (p *pkg) test(name string) *test {
	i := slices.IndexFunc(p.tests, func(t *test) bool { return t.name == name })
	if i < 0 {
		i = len(p.tests)
		p.tests = append(p.tests, &test{name: name})
	}
	return p.tests[i]
}

func (r *report) count(e event, p *pkg, t *test) {
	a := r.current()
	switch e.Action {
	case "pass":
		a.passed++
	case "fail":
		a.failed++
		p.failed++
	case "skip":
		a.skipped++
		a.skips = append(a.skips, skip{a.name, short(e.Package) + "." + e.Test, reason(t.output)})
	}
}

// ended prints a package that is done: the tests that did not pass, then what the package itself said.
func (r *report) ended(e event, p *pkg) {
	delete(r.running, e.Package)
	if e.Action == "fail" && p.failed == 0 {
		r.current().failed++ // it did not build, or ended outside any test
	}
	for _, t := range p.tests {
		if t.name != "" && t.result != "pass" && t.result != "skip" {
			io.WriteString(r.out, without(t.output, "=== "))
		}
	}
	io.WriteString(r.out, without(p.test("").output, "PASS"))
}

func without(output, prefix string) string {
	var b strings.Builder
	for line := range strings.Lines(output) {
		if !strings.HasPrefix(line, prefix) {
			b.WriteString(line)
		}
	}
	return b.String()
}

func short(importPath string) string {
	parts := strings.SplitN(importPath, "/", 4)
	return parts[len(parts)-1]
}

// reason is what a skipped test logged last; a story tells it in its skip command.
func reason(output string) string {
	if told := regexp.MustCompile(`(?m)^\s*> .*\bskip '(.*)'$`).FindAllStringSubmatch(output, -1); len(told) > 0 {
		return told[len(told)-1][1]
	}
	logged := regexp.MustCompile(`(?m)^\s*\S+\.go:\d+: (.*)$`).FindAllStringSubmatch(output, -1)
	if len(logged) == 0 {
		return "no reason given"
	}
	return logged[len(logged)-1][1]
}

// rule allows an account to skip tests for a reason that matches.
type rule struct {
	account string
	reason  *regexp.Regexp
}

// parseAllowed reads lines of an account (or "*") and a regular expression for the whole reason.
func parseAllowed(text string) ([]rule, error) {
	var rules []rule
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		account, pattern, ok := strings.Cut(line, " ")
		if !ok {
			return nil, fmt.Errorf("%q has no reason after the account", line)
		}
		re, err := regexp.Compile("^(?:" + strings.TrimSpace(pattern) + ")$")
		if err != nil {
			return nil, err
		}
		rules = append(rules, rule{account, re})
	}
	return rules, nil
}

func (s skip) allowed(rules []rule) bool {
	return slices.ContainsFunc(rules, func(r rule) bool {
		return (r.account == "*" || r.account == s.account) && r.reason.MatchString(s.reason)
	})
}

// summarise prints the counts and reports whether all is well.
func (r *report) summarise(allowed []rule, strict bool) bool {
	var total account
	ok := len(r.accounts) > 0
	fmt.Fprintln(r.out)
	for _, a := range r.accounts {
		for _, s := range a.skips {
			note := ""
			if !s.allowed(allowed) {
				note = " (not an allowed reason)"
				ok = ok && !strict
			}
			fmt.Fprintf(r.out, "skipped as %s: %s: %s%s\n", s.account, s.test, s.reason, note)
		}
	}
	for _, a := range r.accounts {
		fmt.Fprintf(r.out, "as %s: %d passed, %d failed, %d skipped\n", a.name, a.passed, a.failed, a.skipped)
		if a.failed > 0 || a.exit != 0 || !a.ended {
			ok = false
		}
		if a.failed == 0 && (a.exit != 0 || !a.ended) {
			fmt.Fprintf(r.out, "as %s: go test did not finish (exit %d)\n", a.name, a.exit)
		}
		total.passed += a.passed
		total.failed += a.failed
		total.skipped += a.skipped
	}
	fmt.Fprintf(r.out, "%d passed, %d failed, %d skipped\n", total.passed, total.failed, total.skipped)
	return ok
}
