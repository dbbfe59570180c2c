//go:build ladder

package ladder

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/testimage"
)

// script runs in each place. An image is NAME:BASE.
const script = `
cd /volume
build() { log=$1; shift; cooper build --policy none --progress plain "$@" > $log.log 2>&1; echo $? > $log.code; }
cooper doctor --root /volume/store > doctor.log 2>&1; echo $? > doctor.code
for image in $1; do
  name=${image%:*}
  build $name --root /volume/store --secret id=token,env=CANARY --metadata-file /volume/$name.json --build-context base=oci-layout:///bases/${image#*:}:latest --build-context packages=/packages -o type=oci,dest=/volume/$name,tar=false /context/$name
done
build reach --root /volume/store --build-context base=oci-layout:///bases/debian:latest /context/reach
build strict --root /volume/store --policy strict --build-context base=oci-layout:///bases/busybox:latest /context/simple
build insecure --root /volume/store --allow security.insecure --build-context base=oci-layout:///bases/busybox:latest /context/insecure
build home --build-context base=oci-layout:///bases/busybox:latest /context/simple
`

func TestEveryPlaceBuildsTheSame(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("only root can stand up the places of a builder: make test-ladder")
	}
	s := newSite(t)
	want := map[string]string{}
	s.buildAs(t, accounts[0], func(name, digest string) { want[name] = digest })
	same := func(t *testing.T) func(name, digest string) {
		return func(name, digest string) {
			t.Logf("%s %s", name, digest)
			if digest != want[name] {
				t.Errorf("%s is %s, and %s where %s builds it", name, digest, want[name], accounts[0].name)
			}
		}
	}
	for _, a := range accounts[1:] {
		t.Run(a.name, func(t *testing.T) {
			t.Parallel()
			s.buildAs(t, a, same(t))
		})
	}
	for _, p := range places {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			work := s.visit(t, p)
			checkDoctor(t, p, work)
			for _, image := range imagesFor(p.packages) {
				if !built(t, work, image.name, p.fails) {
					continue
				}
				got := digest(t, filepath.Join(work, image.name))
				switch reason := p.differs[image.name]; {
				case reason == "":
					same(t)(image.name, got)
				case got == want[image.name]:
					t.Errorf("%s is the same here, though it %s: it differs no longer", image.name, reason)
				}
			}
			if built(t, work, "reach", p.fails) {
				checkReach(t, p, work)
				checkRecord(t, p, work)
			}
			built(t, work, "insecure", cmp.Or(p.fails, p.insecureFails))
			built(t, work, "home", cmp.Or(p.fails, p.homeFails))
		})
	}
}

// checkDoctor compares what cooper doctor said with what builds do.
func checkDoctor(t *testing.T, p place, work string) {
	t.Helper()
	report := read(t, work, "doctor.log")
	first, _, _ := strings.Cut(report, "\n")
	if !strings.Contains(first, p.rung) || strings.Contains(first, "(rung 4)") != (p.fails == "" && p.seesProc()) {
		t.Errorf("the doctor says %q, want %s:\n%s", first, p.rung, report)
	}
	if code, want := read(t, work, "doctor.code"), map[bool]string{true: "0\n", false: "1\n"}[p.fails == ""]; code != want {
		t.Errorf("the doctor's exit code is %q, want %q:\n%s", code, want, report)
	}
}

// built reports whether a build succeeded. If it should not have, or failed for another reason than it should have, so does the test.
func built(t *testing.T, work, name, fails string) bool {
	t.Helper()
	log, code := read(t, work, name+".log"), read(t, work, name+".code")
	switch {
	case code == "0\n" && fails == "":
		return true
	case code == "0\n":
		t.Errorf("%s could be built here: this place can do more than the test knows", name)
	case fails == "" || !strings.Contains(log, fails):
		t.Errorf("build of %s: exit code %swant an error only if it has %q:\n%s", name, code, fails, log)
	}
	return false
}

// checkReach reads what a RUN found of the builder, whose processes it sees where /proc is covered.
func checkReach(t *testing.T, p place, work string) {
	t.Helper()
	log := read(t, work, "reach.log")
	if !regexp.MustCompile(`(?m)^#\d+ [\d.]+ looked$`).MatchString(log) {
		t.Errorf("the command did not look to the end; or it killed the builder:\n%s", log)
	}
	if saw := regexp.MustCompile(`(?m)^#\d+ [\d.]+ saw `).MatchString(log); saw != p.seesProc() {
		t.Errorf("the command saw the builder: %v, want %v:\n%s", saw, p.seesProc(), log)
	}
	if got := regexp.MustCompile(`(?m)^#\d+ [\d.]+ REACHED .*$`).FindAllString(log, -1); got != nil {
		t.Errorf("a command got hold of the builder:\n%s", strings.Join(got, "\n"))
	}
}

// checkRecord looks whether what the commands were kept in is told, judged and, with the secret that they had, gone.
func checkRecord(t *testing.T, p place, work string) {
	t.Helper()
	var told map[string]any
	check(t, json.Unmarshal([]byte(read(t, work, "simple.json")), &told))
	want := map[string]string{"rung 1": "root", "rung 2": "subids", "rung 3": "single", "rung 5": "chroot"}[p.rung]
	if told["cooper.sandbox"] != want {
		t.Errorf("the metadata file has sandbox %v, want %s", told["cooper.sandbox"], want)
	}
	warned := strings.Contains(read(t, work, "simple.log"), "RUN has no namespaces here")
	if inChroot := p.rung == "rung 5"; warned != inChroot {
		t.Errorf("a warning that a RUN has no namespaces: %v, want %v", warned, inChroot)
	}
	log := read(t, work, "strict.log")
	if denied := strings.Contains(log, "P67"); read(t, work, "strict.code") != "3\n" || denied != (p.rung == "rung 5") || denied && strings.Contains(log, "RUN echo made") {
		t.Errorf("under the profile strict the sandbox is denied, before anything runs: %v:\n%s", denied, log)
	}
	if out, err := exec.Command("grep", "-rlF", "secret-of-the-builder", filepath.Join(work, "store")).CombinedOutput(); err == nil || len(out) > 0 {
		t.Errorf("the store holds the value of a secret:\n%s", out)
	}
}

// A site is where the places are put up.
type site struct {
	dir      string
	cooper   string
	runc     string
	contexts string
	packages string
	bases    map[string]string
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{
		dir: t.TempDir(), cooper: os.Getenv("COOPER_TEST_BINARY"), runc: os.Getenv("COOPER_TEST_RUNC"), contexts: os.Getenv("COOPER_TEST_CONTEXTS"),
		packages: os.Getenv("COOPER_TEST_PACKAGES"),
		bases:    map[string]string{"busybox": testimage.Busybox(t), "debian": testimage.Debian(t)},
	}
	if s.cooper == "" || s.runc == "" || s.contexts == "" || s.packages == "" {
		t.Fatal("COOPER_TEST_BINARY, COOPER_TEST_RUNC, COOPER_TEST_CONTEXTS and COOPER_TEST_PACKAGES are not set: make test-ladder")
	}
	writeArchive(t, filepath.Join(s.contexts, "syntax/owners.tar"))
	// t.TempDir's parents are for their owner alone.
	for d := s.dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		check(t, os.Chmod(d, 0o755))
	}
	rootfs := filepath.Join(s.dir, "rootfs")
	check(t, os.Mkdir(rootfs, 0o755))
	command(t, "tar", "-xzf", layer(t, s.bases["debian"]), "-C", rootfs)
	command(t, "cp", s.cooper, filepath.Join(rootfs, "usr/local/bin/cooper"))
	command(t, "cp", "/usr/bin/newuidmap", "/usr/bin/newgidmap", filepath.Join(rootfs, "usr/bin"))
	appendTo(t, filepath.Join(rootfs, "etc/passwd"), fmt.Sprintf("builder:x:%[1]d:%[1]d::/volume/home:/bin/sh\n", builder))
	appendTo(t, filepath.Join(rootfs, "etc/group"), fmt.Sprintf("builder:x:%d:\n", builder))
	for _, file := range []string{"etc/subuid", "etc/subgid"} {
		appendTo(t, filepath.Join(rootfs, file), "builder:2000000:65536\n")
	}
	for _, d := range []string{"work", "bases/busybox", "bases/debian", "context", "packages"} {
		check(t, os.MkdirAll(filepath.Join(rootfs, d), 0o755))
	}
	return s
}

// visit stands up a place, runs the script in it, takes it down, and returns its volume.
func (s *site) visit(t *testing.T, p place) (work string) {
	t.Helper()
	dir, err := os.MkdirTemp(s.dir, "place-")
	check(t, err)
	check(t, os.Chmod(dir, 0o755))
	sub := map[string]string{}
	for _, name := range []string{"upper", "overlay-work", "root", "work", "work/home", "bundle"} {
		sub[name] = filepath.Join(dir, name)
		check(t, os.Mkdir(sub[name], 0o755))
	}
	owner := int(p.uid)
	if p.userNamespace {
		owner += firstID
		check(t, os.Chown(sub["upper"], firstID, firstID))
		check(t, os.Chown(sub["overlay-work"], firstID, firstID))
	}
	for _, name := range []string{"work", "work/home"} {
		check(t, os.Chown(sub[name], owner, owner))
	}
	lower := filepath.Join(s.dir, "rootfs")
	if p.userNamespace {
		lower = s.shifted(t, dir)
	}
	check(t, unix.Mount("overlay", sub["root"], "overlay", 0, "lowerdir="+lower+",upperdir="+sub["upper"]+",workdir="+sub["overlay-work"]))
	t.Cleanup(func() { check(t, unix.Unmount(sub["root"], unix.MNT_DETACH)) })
	for _, h := range []struct{ program, capability string }{{"newuidmap", "cap_setuid=ep"}, {"newgidmap", "cap_setgid=ep"}} {
		file := filepath.Join(sub["root"], "usr/bin", h.program)
		switch {
		case p.fileCaps:
			check(t, os.Chmod(file, 0o755))
			command(t, "setcap", h.capability, file)
		case p.setuid:
			check(t, os.Chmod(file, os.ModeSetuid|0o755))
		default:
			check(t, os.Remove(file))
		}
	}
	var mounts []specs.Mount
	for at, source := range map[string]string{"/context": s.contexts, "/packages": s.packages, "/bases/busybox": s.bases["busybox"], "/bases/debian": s.bases["debian"]} {
		mounts = append(mounts, specs.Mount{Destination: at, Type: "bind", Source: source, Options: []string{"rbind", "ro"}})
	}
	var names []string
	for _, image := range imagesFor(p.packages) {
		names = append(names, image.name+":"+image.base)
	}
	config, err := json.Marshal(p.spec(sub["root"], sub["work"], mounts, []string{"/bin/sh", "-c", script, "sh", strings.Join(names, " ")}))
	check(t, err)
	check(t, os.WriteFile(filepath.Join(sub["bundle"], "config.json"), config, 0o644))
	var out bytes.Buffer
	run := exec.Command(s.runc, "--root", filepath.Join(dir, "state"), "run", "--bundle", sub["bundle"], filepath.Base(dir))
	run.Stdout, run.Stderr = &out, &out
	run.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := run.Run(); err != nil {
		t.Fatalf("runc: %v\n%s", err, out.String())
	}
	return sub["work"]
}

// shifted shows the root file system with the owners that it has in a pod's user namespace, as kubelets do it.
func (s *site) shifted(t *testing.T, dir string) string {
	t.Helper()
	at := filepath.Join(dir, "shifted")
	check(t, os.Mkdir(at, 0o755))
	holder := exec.Command("sleep", "infinity")
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: firstID, Size: 65536}}
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids, Pdeathsig: syscall.SIGKILL}
	check(t, holder.Start())
	defer func() { holder.Process.Kill(); holder.Wait() }()
	namespace, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", holder.Process.Pid))
	check(t, err)
	defer namespace.Close()
	tree, err := unix.OpenTree(unix.AT_FDCWD, filepath.Join(s.dir, "rootfs"), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	check(t, err)
	defer unix.Close(tree)
	check(t, unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(namespace.Fd())}))
	check(t, unix.MoveMount(tree, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH))
	t.Cleanup(func() { check(t, unix.Unmount(at, unix.MNT_DETACH)) })
	return at
}

func digest(t *testing.T, layout string) string {
	t.Helper()
	return onlyDescriptor(t, filepath.Join(layout, "index.json"), "manifests")
}

// layer is the file of the only layer of the only image of a layout.
func layer(t *testing.T, layout string) string {
	t.Helper()
	blob := func(digest string) string {
		return filepath.Join(layout, "blobs", strings.ReplaceAll(digest, ":", "/"))
	}
	return blob(onlyDescriptor(t, blob(digest(t, layout)), "layers"))
}

func onlyDescriptor(t *testing.T, file, list string) string {
	t.Helper()
	var document map[string]json.RawMessage
	check(t, json.Unmarshal([]byte(read(t, file)), &document))
	var descriptors []struct {
		Digest string `json:"digest"`
	}
	check(t, json.Unmarshal(document[list], &descriptors))
	if len(descriptors) != 1 {
		t.Fatalf("%s has %d %s, want 1", file, len(descriptors), list)
	}
	return descriptors[0].Digest
}

func read(t *testing.T, path ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(path...))
	check(t, err)
	return string(b)
}

func appendTo(t *testing.T, file, text string) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	check(t, err)
	_, err = f.WriteString(text)
	check(t, errors.Join(err, f.Close()))
}

func command(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// The profile for nodes is what the places were tried with.
func TestProfileIsTheOneThatWasTried(t *testing.T) {
	const file = "../../docs/seccomp.json"
	want, err := json.MarshalIndent(profile(), "", "\t")
	check(t, err)
	want = append(want, '\n')
	if os.Getenv("COOPER_TEST_RECORD") != "" {
		check(t, os.WriteFile(file, want, 0o644))
	}
	if got := read(t, file); got != string(want) {
		t.Errorf("%s is not what the tests use; COOPER_TEST_RECORD=1 make test-ladder writes it", file)
	}
}
