package testimage

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// debianWith returns what writes what mmdebstrap makes, with some packages more, and without what belongs to the machine that made it.
func debianWith(packages ...string) func(context.Context, *tar.Writer, string) error {
	return func(ctx context.Context, w *tar.Writer, scratch string) error {
		made := filepath.Join(scratch, "debian.tar")
		if err := debootstrap(ctx, made, packages); err != nil {
			return err
		}
		f, err := os.Open(made)
		if err != nil {
			return err
		}
		defer f.Close()
		return copyTree(w, tar.NewReader(bufio.NewReaderSize(f, 1<<20)))
	}
}

func debootstrap(ctx context.Context, tarFile string, packages []string) error {
	mode, err := bootstrapMode()
	if err != nil {
		return err
	}
	suite, err := releaseName()
	if err != nil {
		return err
	}
	sources, err := packageSources(suite)
	if err != nil {
		return err
	}
	args := []string{"--mode=" + mode, "--variant=minbase", "--format=tar"}
	for _, opt := range aptOptions(ctx) {
		args = append(args, "--aptopt="+opt)
	}
	if len(packages) > 0 {
		args = append(args, "--include="+strings.Join(packages, ","))
	}
	args = append(append(args, suite, tarFile), sources...)
	cmd := exec.CommandContext(ctx, "mmdebstrap", args...)
	cmd.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", epoch.Unix()))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("mmdebstrap: %w\n%s", err, bytes.TrimSpace(out))
	}
	return nil
}

// bootstrapMode refuses the one place where mmdebstrap cannot work: the user namespace of a test, where device nodes and nested
// mappings fail late and with riddles.
func bootstrapMode() (string, error) {
	if os.Geteuid() != 0 {
		return "unshare", nil
	}
	ids, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return "", err
	}
	if !slices.Equal(strings.Fields(string(ids)), []string{"0", "0", "4294967295"}) {
		return "", errors.New("not possible inside a user namespace; run make bases first")
	}
	return "root", nil
}

func releaseName() (string, error) {
	b, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_CODENAME="); ok {
			return strings.Trim(name, `"`), nil
		}
	}
	return "", errors.New("/etc/os-release names no VERSION_CODENAME: not a Debian or Ubuntu release")
}

// packageSources lists the apt source files of the distribution itself: those that name its main component for this release. Third
// parties' sources would need their keys and say nothing about the base.
func packageSources(suite string) ([]string, error) {
	files, err := filepath.Glob("/etc/apt/sources.list.d/*")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, file := range append([]string{"/etc/apt/sources.list"}, files...) {
		if ext := filepath.Ext(file); ext != ".list" && ext != ".sources" {
			continue
		}
		b, err := os.ReadFile(file)
		if err != nil {
			continue // apt says so itself when a file it needs is missing
		}
		words := strings.Fields(withoutComments(string(b)))
		if slices.Contains(words, suite) && slices.Contains(words, "main") {
			found = append(found, file)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("no file under /etc/apt names the package sources of %s", suite)
	}
	return found, nil
}

func withoutComments(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		if !strings.HasPrefix(strings.TrimSpace(line), "#") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// aptOptions returns the machine's settings without which its mirror is not reachable or not accepted: proxies, and the leave to use
// a mirror that stands still. They stay in the image, where apt-get needs them too.
func aptOptions(ctx context.Context) []string {
	out, err := exec.CommandContext(ctx, "apt-config", "dump", "Acquire").Output()
	if err != nil {
		return nil
	}
	var opts []string
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(line)
		name, _, _ := strings.Cut(line, " ")
		if strings.HasSuffix(name, "::Proxy") || strings.HasPrefix(name, "Acquire::Check-") {
			opts = append(opts, line)
		}
	}
	return opts
}

// copyTree copies entries with clean names and fixed times. Device nodes and the maker's resolver and host name stay behind, as in
// the Debian images that registries serve.
func copyTree(w *tar.Writer, r *tar.Reader) error {
	for {
		h, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		name := path.Clean(h.Name)
		if name == "." || name == "etc/resolv.conf" || name == "etc/hostname" || strings.HasPrefix(name, "dev/") {
			continue
		}
		h.Name = name
		if h.Typeflag == tar.TypeDir {
			h.Name += "/"
		}
		if h.Typeflag == tar.TypeLink {
			h.Linkname = path.Clean(h.Linkname)
		}
		h.ModTime = epoch
		h.Uname, h.Gname = "", ""
		if err := w.WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if _, err := io.Copy(w, r); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
}
