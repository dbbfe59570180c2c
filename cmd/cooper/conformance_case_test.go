package main

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
)

// The sections of a case that are no files of the build.
const (
	prepareSection = "prepare.sh" // run in the directory of the files and removed before the build
	wantSection    = "BuildKit"   // what BuildKit made of the case, as make conformance recorded it
	oursSection    = "cooper"     // what cooper makes of it where that differs on purpose
)

// A conformanceCase is one file of testdata/conformance; docs/testing.md explains the format.
type conformanceCase struct {
	path  string // below testdata/conformance
	files []txtar.File
	want  string
	ours  string
	text  *txtar.Archive

	// What to build.
	context, file, target, platform, network, epoch, shmSize string
	buildArgs, labels, addHosts, ulimits                     []string
	secrets, contexts, bases                                 []pair

	// What to make of the outcome.
	fails   bool
	differs string // the row of docs/compatibility.md
	soon    string // why cooper cannot do it yet
}

// A pair is NAME=VALUE of an option, in the order of the case.
type pair struct{ name, value string }

// caseOptions sets one option each; the key is what stands before the colon.
func caseOptions(c *conformanceCase) map[string]func(string) error {
	return map[string]func(string) error{
		"context":       one(&c.context),
		"file":          one(&c.file),
		"target":        one(&c.target),
		"platform":      one(&c.platform),
		"network":       one(&c.network),
		"epoch":         one(&c.epoch),
		"shm-size":      one(&c.shmSize),
		"build-arg":     many(&c.buildArgs),
		"label":         many(&c.labels),
		"add-host":      many(&c.addHosts),
		"ulimit":        many(&c.ulimits),
		"secret":        paired(&c.secrets),
		"named-context": paired(&c.contexts),
		"base":          paired(&c.bases),
		"fails":         yes(&c.fails, "yes"),
		"differs":       one(&c.differs),
		"soon":          one(&c.soon),
	}
}

func one(to *string) func(string) error {
	return func(v string) error {
		if *to != "" || v == "" {
			return errors.New("one value expected")
		}
		*to = v
		return nil
	}
}

func many(to *[]string) func(string) error {
	return func(v string) error { *to = append(*to, v); return nil }
}

func paired(to *[]pair) func(string) error {
	return func(v string) error {
		name, value, ok := strings.Cut(v, "=")
		if !ok {
			return errors.New("NAME=VALUE expected")
		}
		*to = append(*to, pair{name, value})
		return nil
	}
}

func yes(to *bool, word string) func(string) error {
	return func(v string) error {
		if v != word {
			return fmt.Errorf("%q expected", word)
		}
		*to = true
		return nil
	}
}

// readCases reads every case, sorted by path.
func readCases(t *testing.T, root string) []*conformanceCase {
	t.Helper()
	var cases []*conformanceCase
	err := filepath.WalkDir(root, func(file string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		path, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		archive, err := txtar.ParseFile(file)
		if err != nil {
			return err
		}
		c, err := parseCase(path, archive)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		cases = append(cases, c)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return cases
}

func parseCase(path string, archive *txtar.Archive) (*conformanceCase, error) {
	if filepath.Ext(path) != ".txtar" {
		return nil, errors.New("only .txtar files belong here")
	}
	c := &conformanceCase{path: path, text: archive}
	if err := c.parseHeader(string(archive.Comment)); err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for _, f := range archive.Files {
		if seen[f.Name] {
			return nil, fmt.Errorf("two sections are named %s", f.Name)
		}
		seen[f.Name] = true
		switch f.Name {
		case wantSection:
			c.want = string(f.Data)
		case oursSection:
			c.ours = string(f.Data)
		default:
			c.files = append(c.files, f)
		}
	}
	return c, nil
}

// parseHeader reads what stands above the first section: lines of prose, which begin with #, and options.
func (c *conformanceCase) parseHeader(text string) error {
	options, prose := caseOptions(c), false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "#") {
			prose = true
			continue
		}
		if line == "" {
			continue
		}
		key, value, ok := strings.Cut(line, ":")
		set, known := options[key]
		if !ok || !known {
			return fmt.Errorf("%q is no option of a case", line)
		}
		if err := set(strings.TrimSpace(value)); err != nil {
			return fmt.Errorf("%s: %w", line, err)
		}
	}
	if !prose {
		return errors.New("a case begins with a sentence that says what it is about: # COPY of ...")
	}
	return nil
}

// name is the test's name: topic/behaviour.
func (c *conformanceCase) name() string { return strings.TrimSuffix(c.path, ".txtar") }

// remoteContext tells whether the context is a URL and no directory of the case.
func (c *conformanceCase) remoteContext() bool { return strings.Contains(c.context, "://") }

// unpack writes the files of the case and runs its prepare script. The placeholders stand for hosts of this run.
func (c *conformanceCase) unpack(t *testing.T, hosts *strings.Replacer) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "case")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range c.files {
		file := filepath.Join(dir, filepath.FromSlash(f.Name))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(hosts.Replace(string(f.Data))), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// A case may have directories that nobody may write in.
	t.Cleanup(func() {
		filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error { //nolint:errcheck // removal tells what is left
			if e != nil && e.IsDir() {
				os.Chmod(p, 0o700)
			}
			return nil
		})
	})
	defer c.setTimes(t, dir)
	script := filepath.Join(dir, prepareSection)
	if _, err := os.Stat(script); err != nil {
		return dir
	}
	cmd := exec.Command("sh", "-ec", "umask 022; . ./"+prepareSection)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", prepareSection, err, out)
	}
	if err := os.Remove(script); err != nil {
		t.Fatal(err)
	}
	return dir
}

// setTimes gives everything in a case one time, as whether a file is what a lower layer has depends on it. Each case has
// another time: BuildKit keeps contexts, and takes a file of equal name, size and time for the one that it has.
func (c *conformanceCase) setTimes(t *testing.T, dir string) {
	t.Helper()
	time := fmt.Sprintf("@%d", 1_500_000_000+crc32.ChecksumIEEE([]byte(c.path))%100_000_000)
	if out, err := exec.Command("find", dir, "-exec", "touch", "-h", "-d", time, "{}", "+").CombinedOutput(); err != nil {
		t.Fatalf("touch: %v\n%s", err, out)
	}
}

// record writes the case with its outcome into a copy of testdata/conformance.
func (c *conformanceCase) record(t *testing.T, root, want, ours string) {
	t.Helper()
	out := txtar.Archive{Comment: c.text.Comment}
	for _, f := range c.text.Files {
		if f.Name != wantSection && f.Name != oursSection {
			out.Files = append(out.Files, f)
		}
	}
	out.Files = append(out.Files, txtar.File{Name: wantSection, Data: []byte(want)})
	if c.differs != "" {
		out.Files = append(out.Files, txtar.File{Name: oursSection, Data: []byte(ours)})
	}
	file := filepath.Join(root, c.path)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, txtar.Format(&out), 0o644); err != nil {
		t.Fatal(err)
	}
}

// differencesOnPurpose are the first cells of the rows of docs/compatibility.md.
func differencesOnPurpose(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile("../../docs/compatibility.md")
	if err != nil {
		t.Fatal(err)
	}
	var rows []string
	for line := range strings.Lines(string(text)) {
		if cells := strings.Split(line, "|"); len(cells) > 2 {
			rows = append(rows, strings.TrimSpace(cells[1]))
		}
	}
	if !slices.Contains(rows, "what") {
		t.Fatal("docs/compatibility.md has no table of differences any more")
	}
	return rows
}
