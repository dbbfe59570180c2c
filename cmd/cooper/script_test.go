package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cooper-build/cooper/internal/testimage"
	"github.com/cooper-build/cooper/sandbox/userns"
)

// TestMain makes the test binary the program under test: as "cooper" it is cooper, and cooper's children, which run the same
// executable again, find their entry points here as they do in main.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"cooper":      func() { os.Exit(run(os.Args[1:])) },
		"remove-tree": func() { os.Exit(removeTree(os.Args[1])) },

		"flip-bits-inside": func() { os.Exit(flipBitsInside(os.Args[1])) },
		"with-disk":        func() { os.Exit(withDisk(os.Args[1], os.Args[2], os.Args[3:])) },
	})
}

// TestStories runs testdata/script; docs/testing.md says what a story may use.
func TestStories(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                "../../testdata/script",
		Setup:              setUp,
		RequireUniqueNames: true,
		Condition:          condition,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":           exits,
			"same-digest":     sameDigest,
			"layer-files":     layerFiles,
			"show-config":     showConfig,
			"blob-bytes":      blobBytes,
			"each-tampered":   eachTampered,
			"docker-registry": dockerRegistry,
			"debian-base":     base("debian", "DEBIAN"),
			"multi-base":      base("multi", "MULTI"),
			"clients-base":    base("clients", "CLIENTS"),
			"client-servers":  clientServers,
			"git-server":      gitRepositories,
			"http-server":     httpFiles,
			"flip-bits":       flipBits,
		},
	})
}

// setUp gives each story a home, a store and a registry of its own.
func setUp(env *testscript.Env) error {
	t := env.T().(testing.TB)
	home := filepath.Join(env.WorkDir, "home")
	data := filepath.Join(env.WorkDir, ".data")
	if err := os.MkdirAll(home, 0o755); err != nil {
		return err
	}
	// A store holds files of subordinate ids, and directories that the kernel made unreadable for overlay mounts: only root of the
	// namespace can remove it.
	env.Defer(func() {
		if out, err := exec.Command("remove-tree", data).CombinedOutput(); err != nil {
			t.Errorf("remove the store: %v\n%s", err, out)
		}
	})
	busybox := testimage.Busybox(t)
	env.Setenv("HOME", home)
	env.Setenv("XDG_DATA_HOME", data)
	env.Setenv("BUSYBOX", busybox)
	env.Setenv("REGISTRY", testimage.Serve(t, busybox))
	env.Setenv("COOPER_PASSPHRASE", "")
	env.Setenv("GORACE", os.Getenv("GORACE"))
	env.Setenv("COSIGN", os.Getenv("COOPER_TEST_COSIGN"))
	demo, err := filepath.Abs("../../testdata/demo")
	env.Setenv("DEMO", demo)
	return err
}

// condition knows [cosign], set when CI has installed it, and [many], set for an account with subordinate ids.
func condition(name string) (bool, error) {
	switch name {
	case "cosign":
		return os.Getenv("COOPER_TEST_COSIGN") != "", nil
	case "many":
		ids, err := userns.Plan(userns.Options{})
		return err == nil && ids.Kind != userns.Single, err
	}
	return false, fmt.Errorf("unknown condition %q", name)
}

func removeTree(dir string) int {
	if _, inside := userns.Inside(); !inside {
		code, err := userns.Enter(context.Background(), os.Args, os.Environ(), userns.Options{})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		return code
	}
	if err := os.RemoveAll(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// exits runs a program that must end with the given code: "exits 3 cooper build ...".
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARG...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// base puts the layout directory of a base into a variable; only stories that ask for it wait for its making.
func base(name, variable string) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		if neg || len(args) != 0 {
			ts.Fatalf("usage: %s-base", name)
		}
		dir, err := testimage.Bases()[name].Ensure(context.Background())
		ts.Check(err)
		ts.Setenv(variable, dir)
	}
}

// dockerRegistry starts Debian's registry on a free port of loopback and puts its host:port into $DOCKER_REGISTRY.
func dockerRegistry(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: docker-registry")
	}
	host := freePort(ts)
	dir := ts.MkAbs("docker-registry")
	ts.Check(os.MkdirAll(dir, 0o755))
	config := filepath.Join(dir, "config.yml")
	ts.Check(os.WriteFile(config, fmt.Appendf(nil, "version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: %s}\n", dir, host), 0o644))
	var log strings.Builder
	server := exec.Command("docker-registry", "serve", config)
	server.Stdout, server.Stderr = &log, &log
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ts.Check(server.Start())
	ts.Defer(func() {
		server.Process.Kill()
		server.Wait()
	})
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		c, err := net.Dial("tcp", host)
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(deadline) {
			ts.Fatalf("docker-registry does not answer on %s: %v\n%s", host, err, log.String())
		}
	}
	ts.Setenv("DOCKER_REGISTRY", host)
}

func freePort(ts *testscript.TestScript) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	defer l.Close()
	return l.Addr().String()
}
