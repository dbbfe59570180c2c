package plan

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// canary is what an attacker wants to see in an error, an excerpt or a graph.
const canary = "root:secret-of-the-host"

// Each of these is a context that someone else wrote. The name of a test case
// says what lies where the frontend expects a Dockerfile or an ignore file.
func TestHostileContextFilesEndInAnErrorAndAreNotRead(t *testing.T) {
	outside := project(t, map[string]string{"passwd": canary + "\n", "sub/x": canary + "\n"})
	makers := map[string]func(path string) error{
		"fifo":               func(p string) error { return syscall.Mkfifo(p, 0o666) },
		"directory":          func(p string) error { return os.Mkdir(p, 0o755) },
		"absolute link":      func(p string) error { return os.Symlink(filepath.Join(outside, "passwd"), p) },
		"link to passwd":     func(p string) error { return os.Symlink("/etc/passwd", p) },
		"escaping link":      func(p string) error { return os.Symlink("../../../../../../../../etc/passwd", p) },
		"link to a device":   func(p string) error { return os.Symlink("/dev/zero", p) },
		"link to itself":     func(p string) error { return os.Symlink(filepath.Base(p), p) },
		"link to a fifo":     linkToFifo,
		"sparse gigabyte":    func(p string) error { return sparse(p, 1<<30) },
		"just over the size": func(p string) error { return sparse(p, maxFile+1) },
	}
	for kind, make := range makers {
		for _, name := range []string{"Dockerfile", ".dockerignore", "Dockerfile.dockerignore"} {
			t.Run(kind+" as "+name, func(t *testing.T) {
				dir := project(t, map[string]string{"Dockerfile": lines("FROM scratch", "COPY . /")})
				path := filepath.Join(dir, name)
				if err := os.RemoveAll(path); err != nil {
					t.Fatal(err)
				}
				if err := make(path); err != nil {
					t.Fatal(err)
				}
				err := failsInTime(t, dir)
				if leaked := err.Error() + err.Excerpt() + string(err.Where.Source); strings.Contains(leaked, canary) || strings.Contains(leaked, "root:") {
					t.Errorf("a file of the host was read and shown to the author of the context:\n%s", leaked)
				}
				if !strings.Contains(err.Error(), name) {
					t.Errorf("the error does not name %s: %v", name, err)
				}
				if err.Hint() == "" {
					t.Errorf("there is no hint: %v", err)
				}
			})
		}
	}
}

func linkToFifo(p string) error {
	if err := syscall.Mkfifo(filepath.Join(filepath.Dir(p), "pipe"), 0o666); err != nil {
		return err
	}
	return os.Symlink("pipe", p)
}

func sparse(p string, size int64) error {
	f, err := os.Create(p)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(size)
}

// failsInTime guards the whole suite: a plan that waits for a pipe never ends.
func failsInTime(t *testing.T, dir string) *Error {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		_, err := Make(t.Context(), Request{Context: dir}, library())
		done <- err
	}()
	select {
	case err := <-done:
		located, ok := err.(*Error)
		if !ok {
			t.Fatalf("the error is %v, so the file was accepted or ignored", err)
		}
		return located
	case <-time.After(time.Minute):
		t.Fatal("planning hangs: any context could stop a build machine")
		return nil
	}
}

// A context directory that is named with -f through a link of the context.
func TestDirectoryOfTheDockerfileCannotLeaveTheContext(t *testing.T) {
	outside := project(t, map[string]string{"Dockerfile": lines("FROM scratch", "COPY a /", "# "+canary)})
	dir := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(dir, "docker")); err != nil {
		t.Fatal(err)
	}
	err := mustFail(t, Request{Context: dir, Dockerfile: filepath.Join(dir, "docker", "Dockerfile")}, library())
	if strings.Contains(err.Error()+string(err.Where.Source), canary) {
		t.Errorf("a file outside the context was read through a link: %v", err)
	}
}

func TestIgnoreFileOfANamedContextIsGuardedToo(t *testing.T) {
	other := t.TempDir()
	if err := syscall.Mkfifo(filepath.Join(other, ".dockerignore"), 0o666); err != nil {
		t.Fatal(err)
	}
	dir := project(t, map[string]string{"Dockerfile": lines("FROM scratch", "COPY --from=other a /")})
	if _, err := Make(t.Context(), Request{Context: dir, Contexts: map[string]string{"other": other}}, library()); err == nil {
		t.Error("an ignore file that cannot be read was taken for none: what it leaves out would be copied")
	}
}

func TestLongDockerfilesAreNoProblem(t *testing.T) {
	var b strings.Builder
	b.WriteString("FROM busybox\n")
	for i := range 500 {
		fmt.Fprintf(&b, "RUN %d\n", i)
	}
	dir := project(t, map[string]string{"Dockerfile": b.String()})
	if g := mustMake(t, Request{Context: dir}, library()); len(g.Layers) != 500 {
		t.Errorf("%d layers", len(g.Layers))
	}
}

func FuzzMake(f *testing.F) {
	for _, seed := range []string{
		"", "\n", "#", "FROM scratch", "from busybox as x\nrun y", "FROM busybox\nRUN <<E\n#!/bin/sh\nE\nCOPY <<A <<-B /\n1\nA\n\t2\n\tB",
		"# syntax=docker/dockerfile:1\nFROM busybox", "# escape=`\nFROM busybox\nRUN a `\n b", "ARG A=busybox\nFROM $A\nARG A\nENV B=${A:-c}",
		"FROM busybox AS a\nFROM a\nCOPY --from=a --link / /\nCOPY --from=0 --parents --exclude=x a /./ b",
		"FROM busybox\nRUN --mount=type=cache,target=/c,uid=1 --mount=type=secret,id=x,env=Y --mount=type=ssh --network=none --security=insecure x",
		"FROM busybox\nADD https://x/y.git#z:w /\nADD --checksum=sha256:a http://x/y /\nUSER a:b\nWORKDIR w\nONBUILD RUN x",
		"FROM scratch\nCOPY --chown=a:b --chmod=u+x,g=u a b\nSHELL [\"a\"]\nHEALTHCHECK --interval=1s CMD x\nSTOPSIGNAL 9",
		"FROM --platform=$TARGETPLATFORM busybox\nVOLUME [\"/a\"]\nEXPOSE 1-3/udp\nLABEL a=b c=\"d e\"\nMAINTAINER x\nCMD [\"a\"]\nENTRYPOINT b",
		"{\"syntax\": \"x\"}", "//syntax=x\nFROM a", "#!/x\n# check=error=true;skip=all\nFROM busybox AS X", "FROM nosuch\nCOPY --from=nosuch2 a b",
		"FROM busybox\nCOPY \xff\xfe /\x00", "FROM busybox\nRUN --mount=from=busybox,source=/a,target=../b,rw x\nRUN --device=a.b/c=d x", "FROM scratch\nCOPY --chown=-1 a /",
	} {
		f.Add([]byte(seed))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, dockerfile []byte) {
		if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), dockerfile, 0o644); err != nil {
			t.Fatal(err)
		}
		g, err := Make(t.Context(), Request{Context: dir}, library())
		if err != nil {
			located, ok := err.(*Error)
			if !ok {
				t.Fatalf("the error is a %T: %v", err, err)
			}
			_, _, _ = located.Error(), located.Hint(), located.Excerpt()
			return
		}
		checkGraph(t, g)
		for _, s := range g.Steps {
			if len(Encode(s.Op)) == 0 {
				t.Errorf("%s encodes to nothing", s.Name)
			}
		}
	})
}
