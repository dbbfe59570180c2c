package testimage

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// debianPorts are the names that Debian has for architectures that Go knows by others.
var debianPorts = map[string]string{
	"386": "i386", "amd64": "amd64", "arm": "armhf", "arm64": "arm64", "mips64le": "mips64el", "ppc64le": "ppc64el", "s390x": "s390x",
}

// foreignBusybox returns what fills a base with the busybox of another Debian port. The machine's own apt and dpkg learn nothing of
// that port: package lists and package stay beneath scratch.
func foreignBusybox(port string) func(context.Context, *tar.Writer, string) error {
	return func(ctx context.Context, w *tar.Writer, scratch string) error {
		native, err := staticBusybox()
		if err != nil {
			return err
		}
		program, err := downloadBusybox(ctx, port, scratch)
		if err != nil {
			return fmt.Errorf("busybox of the Debian port %s: %w", port, err)
		}
		return writeBusybox(ctx, w, program, native)
	}
}

func downloadBusybox(ctx context.Context, port, scratch string) (string, error) {
	apt := filepath.Join(scratch, "apt")
	for _, dir := range []string{"state/lists/partial", "cache/archives/partial", "sources", "unpacked"} {
		if err := os.MkdirAll(filepath.Join(apt, dir), 0o755); err != nil {
			return "", err
		}
	}
	if err := os.WriteFile(filepath.Join(apt, "status"), nil, 0o644); err != nil {
		return "", err
	}
	if err := foreignSources(port, filepath.Join(apt, "sources")); err != nil {
		return "", err
	}
	options := []string{"-qq",
		"-oAPT::Architecture=" + port, "-oAPT::Architectures=" + port, "-oAPT::Sandbox::User=",
		"-oDir::State=" + apt + "/state", "-oDir::State::status=" + apt + "/status", "-oDir::Cache=" + apt + "/cache",
		"-oDir::Etc::sourcelist=/dev/null", "-oDir::Etc::sourceparts=" + apt + "/sources",
		"-oAcquire::Languages=none", "-oDebug::NoLocking=1",
	}
	// One list of several may fail, of a suite that has no busybox to begin with.
	updateErr := runIn(ctx, apt, "apt-get", append(options, "update")...)
	if err := runIn(ctx, apt, "apt-get", append(options, "download", "busybox-static")...); err != nil {
		return "", errors.Join(updateErr, err)
	}
	packages, err := filepath.Glob(filepath.Join(apt, "*.deb"))
	if err != nil || len(packages) != 1 {
		return "", errors.Join(err, fmt.Errorf("apt-get download left %q", packages))
	}
	if err := runIn(ctx, apt, "dpkg-deb", "--extract", packages[0], filepath.Join(apt, "unpacked")); err != nil {
		return "", err
	}
	return firstOf(filepath.Join(apt, "unpacked/bin/busybox"), filepath.Join(apt, "unpacked/usr/bin/busybox"))
}

// foreignSources fills a directory of apt sources. Debian's servers have all ports; Ubuntu keeps most of its own on others.
func foreignSources(port, dir string) error {
	suite, err := releaseName()
	if err != nil {
		return err
	}
	release, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return err
	}
	if bytes.Contains(release, []byte("\nID=ubuntu\n")) {
		server := "http://ports.ubuntu.com/ubuntu-ports"
		if port == "amd64" || port == "i386" {
			server = "http://archive.ubuntu.com/ubuntu"
		}
		line := fmt.Sprintf("deb [signed-by=/usr/share/keyrings/ubuntu-archive-keyring.gpg] %s %s main universe\n", server, suite)
		return os.WriteFile(filepath.Join(dir, "ubuntu.list"), []byte(line), 0o644)
	}
	sources, err := packageSources(suite)
	if err != nil {
		return err
	}
	for _, file := range sources {
		if err := os.Symlink(file, filepath.Join(dir, filepath.Base(file))); err != nil {
			return err
		}
	}
	return nil
}

func runIn(ctx context.Context, dir, program string, args ...string) error {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", program, err, bytes.TrimSpace(out))
	}
	return nil
}

func firstOf(files ...string) (string, error) {
	for _, file := range files {
		if _, err := os.Stat(file); err == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("none of %q is there", files)
}
