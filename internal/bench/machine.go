package main

import (
	"debug/buildinfo"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// machine describes where the figures are from: a line for each thing that they depend on.
func machine(p programs, work string) []string {
	return []string{
		fmt.Sprintf("processor: %s, %d online", field("/proc/cpuinfo", "model name"), runtime.NumCPU()),
		"memory: " + field("/proc/meminfo", "MemTotal"),
		"kernel: " + firstLine("uname", "-srm"),
		"system: " + strings.Trim(field("/etc/os-release", "PRETTY_NAME"), `"`),
		"file system of the stores: " + firstLine("findmnt", "--noheadings", "--output", "FSTYPE,OPTIONS", "--target", work),
		"BuildKit: " + moduleVersion(filepath.Join(p.buildkit, "buildkitd"), "github.com/moby/buildkit"),
		firstLine(filepath.Join(p.buildkit, "rootlesskit"), "--version"),
		firstLine(filepath.Join(p.buildkit, "runc"), "--version"),
		firstLine("buildah", "--version"),
		firstLine("podman", "--version"),
		"registry: " + firstLine("docker-registry", "--version"),
	}
}

// field is what a file says after a name and a colon or an equals sign.
func field(file, name string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return "not known"
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, name); ok {
			return strings.TrimSpace(strings.TrimLeft(v, " \t:="))
		}
	}
	return "not known"
}

// moduleVersion is that of a module in a program; buildkitd does not know its own when it is built as a module.
func moduleVersion(program, module string) string {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return err.Error()
	}
	for _, m := range info.Deps {
		if m.Path == module {
			return m.Version + ", " + info.GoVersion
		}
	}
	return "not known"
}

func firstLine(program string, args ...string) string {
	out, err := exec.Command(program, args...).CombinedOutput()
	if err != nil {
		return fmt.Sprintf("%s: %v", filepath.Base(program), err)
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return strings.Join(strings.Fields(line), " ")
}

// load is the load average of the last minute, which says whether others were using the machine.
func load() float64 {
	var info syscall.Sysinfo_t
	if err := syscall.Sysinfo(&info); err != nil {
		return 0
	}
	return float64(info.Loads[0]) / 65536
}
