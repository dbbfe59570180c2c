package testimage

import (
	"archive/tar"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
)

const (
	passwd = `root:x:0:0:root:/root:/bin/sh
app:x:1000:1000:app:/home/app:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
`
	group = `root:x:0:
tty:x:5:
app:x:1000:
nogroup:x:65534:
`
)

// fillBusybox writes the tree that Busybox documents. What is in it, and in which order, is a list; keep it one.
func fillBusybox(ctx context.Context, w *tar.Writer, _ string) error {
	program, err := staticBusybox()
	if err != nil {
		return err
	}
	return writeBusybox(ctx, w, program, program)
}

// writeBusybox takes the names of the applets from a busybox of this machine: Debian configures it alike for every architecture.
func writeBusybox(ctx context.Context, w *tar.Writer, program, native string) error {
	applets, err := appletsOf(ctx, native)
	if err != nil {
		return err
	}
	t := tree{w: w}
	t.dir("bin/", 0o755, 0)
	t.copy("bin/busybox", program)
	for _, name := range applets {
		t.link("bin/"+name, "busybox")
	}
	t.dir("dev/", 0o755, 0)
	t.dir("etc/", 0o755, 0)
	t.text("etc/group", group)
	t.text("etc/passwd", passwd)
	t.dir("home/", 0o755, 0)
	t.dir("home/app/", 0o755, 1000)
	t.dir("proc/", 0o755, 0)
	t.dir("root/", 0o700, 0)
	t.dir("run/", 0o755, 0)
	t.dir("sys/", 0o755, 0)
	t.dir("tmp/", 0o1777, 0)
	t.dir("usr/", 0o755, 0)
	t.dir("usr/bin/", 0o755, 0)
	t.link("usr/bin/env", "../../bin/busybox")
	t.dir("usr/sbin/", 0o755, 0)
	t.dir("var/", 0o755, 0)
	t.dir("var/tmp/", 0o1777, 0)
	return t.err
}

// staticBusybox finds a busybox that runs without a C library, as it must in an image that has none.
func staticBusybox() (string, error) {
	program, err := exec.LookPath("busybox")
	if err != nil {
		return "", fmt.Errorf("%w; install the package busybox-static, or run make deps", err)
	}
	f, err := elf.Open(program)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", program, err)
	}
	defer f.Close()
	if slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		return "", fmt.Errorf("%s needs shared libraries; install the package busybox-static, or run make deps", program)
	}
	return program, nil
}

func appletsOf(ctx context.Context, program string) ([]string, error) {
	out, err := exec.CommandContext(ctx, program, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list: %w", program, err)
	}
	names := slices.DeleteFunc(strings.Fields(string(out)), func(name string) bool { return name == "busybox" })
	if !slices.Contains(names, "sh") {
		return nil, errors.New(program + " --list names no sh")
	}
	slices.Sort(names)
	return names, nil
}

// tree writes entries until one fails; the rest are no-ops, so that a list of entries reads as a list.
type tree struct {
	w   *tar.Writer
	err error
}

func (t *tree) dir(name string, mode int64, owner int) {
	t.header(tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode, Uid: owner, Gid: owner})
}

func (t *tree) link(name, target string) {
	t.header(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777})
}

func (t *tree) text(name, content string) {
	t.header(tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(content)), Mode: 0o644})
	if t.err == nil {
		_, t.err = io.WriteString(t.w, content)
	}
}

func (t *tree) copy(name, from string) {
	b, err := os.ReadFile(from)
	if err != nil {
		t.err = errors.Join(t.err, err)
		return
	}
	t.header(tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(b)), Mode: 0o755})
	if t.err == nil {
		_, t.err = t.w.Write(b)
	}
}

func (t *tree) header(h tar.Header) {
	if t.err == nil {
		h.ModTime = epoch
		t.err = t.w.WriteHeader(&h)
	}
}
