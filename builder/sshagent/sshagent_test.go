package sshagent

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

func run(t testing.TB, env []string, name string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent"}, env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func must(t testing.TB, env []string, name string, args ...string) string {
	t.Helper()
	out, err := run(t, env, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func newKey(t testing.TB, kind, passphrase string, args ...string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "id_"+kind)
	must(t, nil, "ssh-keygen", append([]string{"-q", "-t", kind, "-N", passphrase, "-C", kind + " key", "-f", file}, args...)...)
	return file
}

// startAgent is the user's ssh-agent with some keys.
func startAgent(t testing.TB, keys ...string) string {
	t.Helper()
	socket := filepath.Join(shortDir(t), "agent")
	cmd := exec.Command("ssh-agent", "-D", "-a", socket)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for range 200 {
		if conn, err := net.Dial("unix", socket); err == nil {
			conn.Close()
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	for _, k := range keys {
		must(t, []string{"SSH_AUTH_SOCK=" + socket}, "ssh-add", "-q", k)
	}
	return socket
}

// shortDir is a place for sockets, whose names may have 108 bytes.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "a")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// serving runs Serve until the test ends, and checks that it ends.
func serving(t *testing.T, s *Source) (socket string, stop func()) {
	t.Helper()
	socket = filepath.Join(shortDir(t), "served")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	ended := false
	stop = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Serve does not end with its context")
		}
	}
	t.Cleanup(stop)
	return socket, stop
}

func TestServedAgentSignsAndNothingElse(t *testing.T) {
	ed, rsa, other := newKey(t, "ed25519", ""), newKey(t, "rsa", "", "-b", "2048"), newKey(t, "ecdsa", "")
	user := startAgent(t, ed, rsa)
	for name, tc := range map[string]struct {
		paths []string
		sock  string
	}{
		"default agent": {nil, user},
		"empty path":    {[]string{""}, user},
		"named socket":  {[]string{user}, ""},
		"key files":     {[]string{ed, rsa}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Open(tc.paths, tc.sock)
			if err != nil {
				t.Fatal(err)
			}
			before := runtime.NumGoroutine()
			socket, stop := serving(t, s)
			env := []string{"SSH_AUTH_SOCK=" + socket}
			list := must(t, env, "ssh-add", "-L")
			for _, k := range []string{ed, rsa} {
				pub, _ := os.ReadFile(k + ".pub")
				if !strings.Contains(list, strings.Fields(string(pub))[1]) {
					t.Errorf("the key %s is not listed:\n%s", k, list)
				}
				must(t, env, "ssh-add", "-T", k+".pub") // signs and verifies
			}
			for _, args := range [][]string{{other}, {"-d", ed + ".pub"}, {"-D"}, {"-e", "/nonexistent"}} {
				if out, err := run(t, env, "ssh-add", args...); err == nil {
					t.Errorf("a RUN step could change the user's agent: ssh-add %v: %s", args, out)
				}
			}
			conn, err := net.Dial("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			a := agent.NewClient(conn)
			if a.Lock([]byte("x")) == nil || a.Unlock([]byte("x")) == nil {
				t.Error("a RUN step could lock the user's agent")
			}
			if _, err := a.Extension("session-bind@openssh.com", []byte("x")); err == nil {
				t.Error("a RUN step could use extensions of the user's agent")
			}
			if again := must(t, env, "ssh-add", "-L"); again != list {
				t.Errorf("the keys are now\n%s", again)
			}
			stop() // with that connection open
			if _, err := a.List(); err == nil {
				t.Error("a connection outlives Serve")
			}
			for range 100 {
				if runtime.NumGoroutine() <= before {
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
			t.Errorf("%d goroutines are left of Serve", runtime.NumGoroutine()-before)
		})
	}
}

func TestAgentForThisProcess(t *testing.T) {
	key := newKey(t, "rsa", "", "-b", "2048")
	user := startAgent(t, key)
	for name, paths := range map[string][]string{"socket": {user}, "file": {key}} {
		t.Run(name, func(t *testing.T) {
			s, err := Open(paths, "")
			if err != nil {
				t.Fatal(err)
			}
			a, err := s.Agent()
			if err != nil {
				t.Fatal(err)
			}
			signers, err := a.Signers()
			if err != nil || len(signers) != 1 {
				t.Fatalf("%d signers, %v", len(signers), err)
			}
			for _, algorithm := range []string{ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSASHA512} {
				sig, err := signers[0].(ssh.AlgorithmSigner).SignWithAlgorithm(rand.Reader, []byte("data"), algorithm)
				if err != nil || sig.Format != algorithm {
					t.Fatalf("%s: %+v, %v", algorithm, sig, err)
				}
				if err := signers[0].PublicKey().Verify([]byte("data"), sig); err != nil {
					t.Error(err)
				}
			}
			if a.RemoveAll() == nil || a.Remove(signers[0].PublicKey()) == nil || a.Lock(nil) == nil || a.Unlock(nil) == nil || a.Add(agent.AddedKey{}) == nil {
				t.Error("the agent can be changed")
			}
		})
	}
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	key, locked := newKey(t, "ed25519", ""), newKey(t, "ed25519", "passphrase")
	pem := newKey(t, "rsa", "", "-b", "2048", "-m", "PEM")
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("not a key"), 0o600); err != nil {
		t.Fatal(err)
	}
	socket := startAgent(t)
	for _, tc := range []struct {
		name    string
		paths   []string
		sock    string
		want    string
		advises string
	}{
		{"no agent", nil, "", "there is no ssh agent", "SSH_AUTH_SOCK"},
		{"agent that ended", nil, dir + "/gone", "no such file", "SSH_AUTH_SOCK"},
		{"passphrase", []string{locked}, "", "protected by a passphrase", "ssh-add"},
		{"no key", []string{text}, "", "text", "private keys"},
		{"public key", []string{key + ".pub"}, "", ".pub", "private keys"},
		{"directory", []string{dir}, "", "neither a socket nor", ""},
		{"key and socket", []string{key, socket}, "", "an agent's socket", "two ids"},
		{"socket and key", []string{socket, key}, "", "an agent's socket", "two ids"},
		{"PEM", []string{pem}, "", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Open(tc.paths, tc.sock)
			if tc.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want %q", err, tc.want)
			}
			var h interface{ Hint() string }
			if tc.advises != "" && (!errors.As(err, &h) || !strings.Contains(h.Hint(), tc.advises)) {
				t.Errorf("%v\nhas no hint with %q", err, tc.advises)
			}
		})
	}
}

func TestServedAgentTakesNoNonsense(t *testing.T) {
	s, err := Open([]string{newKey(t, "ed25519", "")}, "")
	if err != nil {
		t.Fatal(err)
	}
	socket, _ := serving(t, s)
	for _, nonsense := range [][]byte{{0, 0, 0, 0}, {255, 255, 255, 255, 1}, {0, 0, 0, 2, 13, 0}, bytes.Repeat([]byte{0, 0, 0, 1, 13}, 100)} {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		conn.Write(nonsense)
		conn.(*net.UnixConn).CloseWrite()
		io.Copy(io.Discard, conn)
		conn.Close()
	}
	if out := must(t, []string{"SSH_AUTH_SOCK=" + socket}, "ssh-add", "-l"); !strings.Contains(out, "ED25519") {
		t.Errorf("afterwards: %s", out)
	}
}
