package remote

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha1"
	"encoding/base64"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// Real repositories, made and served by the git program.

// gitEnv keeps the machine's own configuration out.
func gitEnv() []string {
	return append(os.Environ(), "HOME=/nonexistent", "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_TERMINAL_PROMPT=0",
		"GIT_AUTHOR_NAME=A", "GIT_AUTHOR_EMAIL=a@example.com", "GIT_COMMITTER_NAME=C", "GIT_COMMITTER_EMAIL=c@example.com",
		"GIT_AUTHOR_DATE=1700000000 +0100", "GIT_COMMITTER_DATE=1700000001 +0100")
}

// git runs the program and returns what it prints.
func git(t testing.TB, dir string, args ...string) string {
	t.Helper()
	return gitIn(t, dir, nil, args...)
}

func gitIn(t testing.TB, dir string, in []byte, args ...string) string {
	t.Helper()
	return strings.TrimSpace(gitRaw(t, dir, string(in), args...))
}

func gitRaw(t testing.TB, dir, in string, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir, cmd.Env, cmd.Stdin = dir, gitEnv(), strings.NewReader(in)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, said.String())
	}
	return out.String()
}

func write(t testing.TB, name, text string, perm fs.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), perm); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(name, perm); err != nil {
		t.Fatal(err)
	}
}

// newRepo is an empty repository DIR/NAME with a branch main.
func newRepo(t testing.TB, dir, name string, args ...string) string {
	t.Helper()
	repo := filepath.Join(dir, name)
	git(t, dir, append(append([]string{"init", "-q", "-b", "main"}, args...), repo)...)
	return repo
}

func commitAll(t testing.TB, repo, message string) string {
	t.Helper()
	git(t, repo, "add", "-A")
	git(t, repo, "commit", "-q", "--allow-empty", "-m", message)
	return git(t, repo, "rev-parse", "HEAD")
}

// sample is a repository with all kinds of files and refs.
func sample(t testing.TB, dir, name string, args ...string) string {
	t.Helper()
	repo := newRepo(t, dir, name, args...)
	write(t, repo+"/README", "first\n", 0o644)
	commitAll(t, repo, "first")
	git(t, repo, "tag", "light")
	git(t, repo, "tag", "-a", "-m", "annotated", "v1")
	git(t, repo, "update-ref", "refs/pull/1/head", "HEAD")
	var big strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&big, "line %d of many\n", i)
	}
	write(t, repo+"/big", big.String(), 0o644)
	write(t, repo+"/empty", "", 0o644)
	write(t, repo+"/bin/run me", "#!/bin/sh\n", 0o755)
	write(t, repo+"/a/deep/place/ünï", "x", 0o644)
	write(t, repo+"/a.b", "sorts between a and a/", 0o644)
	if err := os.Symlink("../README", repo+"/a/link"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", repo+"/absolute"); err != nil {
		t.Fatal(err)
	}
	commitAll(t, repo, "second")
	git(t, repo, "branch", "both", "HEAD~1")
	git(t, repo, "tag", "both", "HEAD")
	write(t, repo+"/big", big.String()+"and one more\n", 0o644)
	write(t, repo+"/copy of big", "before\n"+big.String(), 0o644) // so that the pack has deltas
	commitAll(t, repo, "third")
	git(t, repo, "repack", "-q", "-adf")
	return repo
}

// serveHTTP serves the repositories in dir by git's own program. around may look at or answer a request first.
func serveHTTP(t testing.TB, dir string, around func(http.Handler) http.Handler) *httptest.Server {
	t.Helper()
	h := backend(t, dir)
	if around != nil {
		h = around(h)
	}
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s
}

func backend(t testing.TB, dir string) http.Handler {
	t.Helper()
	return &cgi.Handler{
		Path: filepath.Join(git(t, dir, "--exec-path"), "git-http-backend"),
		Env: []string{"GIT_PROJECT_ROOT=" + dir, "GIT_HTTP_EXPORT_ALL=1", "HOME=/nonexistent", "GIT_CONFIG_NOSYSTEM=1",
			"GIT_CONFIG_GLOBAL=/dev/null"},
		Stderr: io.Discard,
	}
}

// oldProtocol makes a server of version 0.
func oldProtocol(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Del("Git-Protocol")
		h.ServeHTTP(w, r)
	})
}

// listen accepts connections until the test is over.
func listen(t testing.TB, answer func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go answer(conn)
		}
	}()
	return l.Addr().String()
}

func uploadPack(repo, protocol string, in io.Reader, out, said io.Writer) error {
	cmd := exec.Command("git", "upload-pack", repo)
	cmd.Env = append(gitEnv(), "GIT_PROTOCOL="+protocol)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	go func() { io.Copy(stdin, in); stdin.Close() }()
	cmd.Stdout, cmd.Stderr = out, said
	return cmd.Run()
}

// serveGit is a git daemon for dir.
func serveGit(t testing.TB, dir string) string {
	return listen(t, func(conn net.Conn) {
		defer conn.Close()
		r := bufio.NewReader(conn)
		p := &packets{r: r}
		b, _, err := p.next()
		if err != nil {
			return
		}
		words := strings.Split(string(b), "\x00")
		_, path, _ := strings.Cut(words[0], " ")
		uploadPack(dir+path, words[len(words)-2], r, conn, io.Discard)
	})
}

type sshHost struct {
	addr, knownHosts string
	user             ssh.Signer
	agent            agent.Agent
	ran              chan string
}

// serveSSH is an ssh server that runs git upload-pack in dir, for one user key.
func serveSSH(t testing.TB, dir string, takeEnv bool) *sshHost {
	t.Helper()
	newKey := func() (ed25519.PrivateKey, ssh.Signer) {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		s, err := ssh.NewSignerFromKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return key, s
	}
	_, hostKey := newKey()
	userKey, user := newKey()
	h := &sshHost{user: user, agent: agent.NewKeyring(), ran: make(chan string, 100)}
	if err := h.agent.Add(agent.AddedKey{PrivateKey: userKey}); err != nil {
		t.Fatal(err)
	}
	config := &ssh.ServerConfig{PublicKeyCallback: func(c ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		if c.User() != "git" || !bytes.Equal(key.Marshal(), user.PublicKey().Marshal()) {
			return nil, fmt.Errorf("go away")
		}
		return nil, nil
	}}
	config.AddHostKey(hostKey)
	h.addr = listen(t, func(conn net.Conn) {
		defer conn.Close()
		sc, channels, requests, err := ssh.NewServerConn(conn, config)
		if err != nil {
			return
		}
		defer sc.Close()
		go ssh.DiscardRequests(requests)
		for ch := range channels {
			channel, requests, err := ch.Accept()
			if err != nil {
				return
			}
			protocol := ""
			for r := range requests {
				switch r.Type {
				case "env":
					var kv struct{ Name, Value string }
					ssh.Unmarshal(r.Payload, &kv)
					if takeEnv {
						protocol = kv.Value
					}
					r.Reply(takeEnv, nil)
				case "exec":
					var c struct{ Command string }
					ssh.Unmarshal(r.Payload, &c)
					h.ran <- c.Command
					r.Reply(true, nil)
					path := strings.Trim(strings.TrimPrefix(c.Command, "git-upload-pack "), "'")
					go func() {
						status := struct{ Status uint32 }{}
						if uploadPack(filepath.Join(dir, path), protocol, channel, channel, channel.Stderr()) != nil {
							status.Status = 128
						}
						channel.SendRequest("exit-status", false, ssh.Marshal(status))
						channel.Close()
					}()
				}
			}
		}
	})
	host, port, _ := net.SplitHostPort(h.addr)
	h.knownHosts = fmt.Sprintf("[%s]:%s %s", host, port, ssh.MarshalAuthorizedKey(hostKey.PublicKey()))
	return h
}

// tree lists what is in a directory, without .git: type, mode, path, content.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		if d.Name() == ".git" {
			if d.IsDir() {
				return filepath.SkipDir
			}
			return nil
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		text := ""
		switch {
		case fi.Mode()&fs.ModeSymlink != 0:
			text, err = os.Readlink(p)
			all[rel] = "link " + text
			return err
		case fi.Mode().IsRegular():
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			text = string(b)
		}
		all[rel] = fi.Mode().String() + " " + text
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func heap() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// hashed is a host as ssh-keygen -H writes it.
func hashed(host string) string {
	h := hmac.New(sha1.New, []byte("salt"))
	h.Write([]byte(host))
	return "|1|" + base64.StdEncoding.EncodeToString([]byte("salt")) + "|" + base64.StdEncoding.EncodeToString(h.Sum(nil))
}
