package main

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cooper-build/cooper/internal/testimage"
	"github.com/cooper-build/cooper/sandbox/userns"
)

// flipBits flips a bit of one key, one meta, one blob, and one file of every snapshot: "flip-bits STORE".
func flipBits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: flip-bits STORE")
	}
	ts.Check(ts.Exec("flip-bits-inside", args[0]))
}

// flipBitsInside does it as root of the user namespace, who alone can write to all files.
func flipBitsInside(store string) int {
	if _, inside := userns.Inside(); !inside {
		code, err := userns.Enter(context.Background(), os.Args, os.Environ(), userns.Options{})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		return code
	}
	done := map[string]bool{}
	err := filepath.WalkDir(store, func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		kind, rest, _ := strings.Cut(strings.TrimPrefix(name, store+"/"), "/")
		switch {
		case kind == "snapshots" && strings.Contains(rest, "/fs/"):
			kind, _, _ = strings.Cut(rest, "/fs/") // one file of each
		case kind == "content" && !strings.HasPrefix(rest, "blobs/"), kind != "keys" && kind != "content":
			return nil
		}
		data, err := os.ReadFile(name)
		if err != nil || done[kind] || len(data) == 0 {
			return err
		}
		done[kind] = true
		data[len(data)/2] ^= 1
		f, err := os.OpenFile(name, os.O_WRONLY, 0) // not a new file: its size, owner and mode stay
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.Write(data)
		return err
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// TestBuildsPrunesAndKillsAtOnce runs builds on a store on which another process prunes everything all the time, while a third
// one's builds are killed. Every build must succeed and give the image that a store of its own gives.
func TestBuildsPrunesAndKillsAtOnce(t *testing.T) {
	const rounds = 12
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(killedDockerfile), 0o644); err != nil {
		t.Fatal(err)
	}
	base := testimage.Busybox(t)
	command := func(store string, args ...string) (*exec.Cmd, *bytes.Buffer) {
		cmd := exec.Command("cooper", append([]string{"--root", store}, args...)...)
		cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=1700000000")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		return cmd, &stderr
	}
	building := func(store string, more ...string) (*exec.Cmd, *bytes.Buffer) {
		args := []string{"build", "-q", "--build-context", "base=oci-layout://" + base + ":latest", "-t", "pruned:1"}
		return command(store, append(append(args, more...), dir)...)
	}
	build := func(store string) string {
		t.Helper()
		cmd, stderr := building(store)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("build: %v\n%s", err, stderr)
		}
		return strings.TrimSpace(string(out))
	}
	began := time.Now()
	want := build(newStore(t))
	whole := time.Since(began)
	store := newStore(t)
	stop, pruned := make(chan struct{}), make(chan error, 1)
	go func() {
		defer close(pruned)
		for {
			select {
			case <-stop:
				return
			default:
			}
			cmd, stderr := command(store, "prune", "--all", "--force")
			if err := cmd.Run(); err != nil {
				pruned <- fmt.Errorf("%w: %s", err, stderr)
				return
			}
		}
	}()
	for range rounds {
		victim, _ := building(store, "--no-cache")
		if err := victim.Start(); err != nil {
			t.Fatal(err)
		}
		killed := make(chan struct{})
		go func() {
			time.Sleep(rand.N(whole))
			victim.Process.Kill()
			victim.Wait()
			close(killed)
		}()
		if got := build(store); got != want {
			t.Errorf("beside a prune the build gives %s, want %s", got, want)
		}
		<-killed
	}
	close(stop)
	if err := <-pruned; err != nil {
		t.Errorf("prune: %v", err)
	}
	if cmd, stderr := command(store, "store", "verify"); true {
		if out, err := cmd.Output(); err != nil {
			t.Errorf("verify: %v\n%s%s", err, out, stderr)
		}
	}
	if got := build(store); got != want {
		t.Errorf("the next build gives %s, want %s", got, want)
	}
}
