package remote

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

// httpWire speaks the smart protocol: one request for each message.
type httpWire struct {
	c    *Client
	g    Git
	base *url.URL
	auth string
	body io.Closer // of the advertisement
}

func (c *Client) httpWire(g Git, at location) (wire, error) {
	w := &httpWire{c: c, g: g, base: at.url()}
	origin, err := parseLocation(g.Remote)
	if err != nil {
		return nil, err
	}
	if origin.covers(at) {
		w.auth = c.gitAuthorization(g, origin)
	}
	return w, nil
}

// gitAuthorization is the header for a repository, by the order in which BuildKit looks for its secrets.
func (c *Client) gitAuthorization(g Git, at location) string {
	for _, id := range []string{"." + at.host, ""} {
		if g.AuthHeaderSecret != "" {
			if v, ok := c.Secret(g.AuthHeaderSecret + id); ok {
				return string(v)
			}
		}
		if g.AuthTokenSecret != "" {
			if v, ok := c.Secret(g.AuthTokenSecret + id); ok {
				return "basic " + base64.StdEncoding.EncodeToString([]byte("x-access-token:"+strings.TrimRight(string(v), "\r\n")))
			}
		}
	}
	return ""
}

func (w *httpWire) advertisement(ctx context.Context) (*packets, error) {
	const service = "/info/refs"
	u := *w.base
	u.Path += service
	u.RawQuery = "service=git-upload-pack"
	resp, err := w.request(ctx, http.MethodGet, &u, "")
	if err != nil {
		return nil, err
	}
	w.body = resp.Body
	if ct := resp.Header.Get("Content-Type"); ct != "application/x-git-upload-pack-advertisement" {
		return nil, withHint(errors.New("there is no git repository that speaks the smart http protocol"), "check the address; a repository's often ends in .git")
	}
	// The server may have redirected to where the repository is now. Credentials stay where they were meant for.
	if now := resp.Request.URL; now.String() != u.String() {
		base := *now
		path, ok := strings.CutSuffix(base.Path, service)
		if !ok || now.RawQuery != u.RawQuery {
			return nil, fmt.Errorf("the server redirects to %s, which is no repository", redact(now.String()))
		}
		if !sameOrigin(now, w.base) {
			w.auth, base.User = "", nil
		}
		base.Path, base.RawPath, base.RawQuery = path, "", ""
		w.base = &base
	}
	return &packets{r: resp.Body}, nil
}

func (w *httpWire) send(ctx context.Context, message string) (*packets, io.Closer, error) {
	u := *w.base
	u.Path += "/git-upload-pack"
	resp, err := w.request(ctx, http.MethodPost, &u, message)
	if err != nil {
		return nil, nil, err
	}
	return &packets{r: resp.Body}, resp.Body, nil
}

func (w *httpWire) request(ctx context.Context, method string, u *url.URL, message string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader([]byte(message)))
	if err != nil {
		return nil, errors.New("not an address")
	}
	req.Header.Set("Git-Protocol", "version=2")
	req.Header.Set("User-Agent", "git/"+w.c.UserAgent) // some servers take anything else for a browser
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/x-git-upload-pack-request")
		req.Header.Set("Accept", "application/x-git-upload-pack-result")
	}
	if w.auth != "" {
		if err := authorize(req, w.auth); err != nil {
			return nil, err
		}
	}
	resp, err := w.c.do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		secret := w.g.AuthTokenSecret
		if secret == "" {
			secret = "GIT_AUTH_TOKEN"
		}
		return nil, withHint(fmt.Errorf("the server answered %s", resp.Status), statusHint(resp.StatusCode, secret))
	}
	return resp, nil
}

func (w *httpWire) Close() error {
	if w.body != nil {
		return w.body.Close()
	}
	return nil
}

// streamWire is one connection for the whole conversation.
type streamWire struct {
	p    *packets
	to   io.Writer
	stop func() // ends everything
}

func (w *streamWire) advertisement(context.Context) (*packets, error) { return w.p, nil }

func (w *streamWire) send(_ context.Context, message string) (*packets, io.Closer, error) {
	if _, err := io.WriteString(w.to, message); err != nil {
		return nil, nil, err
	}
	return w.p, io.NopCloser(nil), nil
}

func (w *streamWire) Close() error { w.stop(); return nil }

func (c *Client) tcpWire(ctx context.Context, at location) (wire, error) {
	conn, err := dialer().DialContext(ctx, "tcp", hostPort(at.url()))
	if err != nil {
		return nil, reachError(ctx, at.host, err)
	}
	release := context.AfterFunc(ctx, func() { conn.Close() })
	w := &streamWire{p: &packets{r: conn}, to: conn, stop: func() { release(); conn.Close() }}
	if _, err := io.WriteString(conn, packet("git-upload-pack %s\x00host=%s\x00\x00version=2\x00", at.path, at.host)); err != nil {
		w.stop()
		return nil, reachError(ctx, at.host, err)
	}
	return w, nil
}

// sshWire runs git-upload-pack on the server.
func (c *Client) sshWire(ctx context.Context, g Git, at location) (_ wire, err error) {
	addr := hostPort(at.url())
	config := &ssh.ClientConfig{User: "git"}
	if at.user != nil && at.user.Username() != "" {
		config.User = at.user.Username()
	}
	if config.HostKeyCallback, config.HostKeyAlgorithms, err = c.trust(g.KnownHosts, addr); err != nil {
		return nil, err
	}
	if g.SSH != "" {
		a, err := c.Agent(g.SSH)
		if err != nil {
			return nil, err
		}
		config.Auth = []ssh.AuthMethod{ssh.PublicKeysCallback(a.Signers)}
	}
	conn, err := dialer().DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, reachError(ctx, at.host, err)
	}
	release := context.AfterFunc(ctx, func() { conn.Close() })
	stop := func() { release(); conn.Close() }
	defer func() {
		if err != nil {
			stop()
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
		}
	}()
	if err := conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil { // time for the user to confirm the use of a key
		return nil, err
	}
	sc, channels, requests, err := ssh.NewClientConn(conn, addr, config)
	if err != nil {
		return nil, sshError(at, g, err)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	client := ssh.NewClient(sc, channels, requests)
	stop = func() { release(); client.Close() }
	session, err := client.NewSession()
	if err != nil {
		return nil, fmt.Errorf("ssh to %s: %w", at.host, err)
	}
	in, err := session.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := session.StdoutPipe()
	if err != nil {
		return nil, err
	}
	said := &tail{}
	session.Stderr = said
	_ = session.Setenv("GIT_PROTOCOL", "version=2") // a server that does not take it speaks version 0
	if err := session.Start("git-upload-pack " + shellQuote(at.sshPath())); err != nil {
		return nil, fmt.Errorf("ssh to %s: %w", at.host, err)
	}
	return &streamWire{p: &packets{r: &explained{out, session, said}}, to: in, stop: stop}, nil
}

// sshPath is how git passes the path on: one that begins with ~ is somebody's home.
func (l location) sshPath() string {
	if strings.HasPrefix(l.path, "/~") {
		return l.path[1:]
	}
	return l.path
}

func shellQuote(s string) string {
	return "'" + strings.NewReplacer("'", `'\''`, "!", `'\!'`).Replace(s) + "'"
}

func sshError(at location, g Git, err error) error {
	if h := (*hinted)(nil); errors.As(err, &h) {
		return h
	}
	err = fmt.Errorf("ssh to %s: %w", at.host, err)
	if !strings.Contains(err.Error(), "unable to authenticate") {
		return err
	}
	if g.SSH == "" {
		return withHint(err, "give the build an ssh agent: --ssh default")
	}
	return withHint(err, "ssh-add -l lists the keys the agent has; the server knows none of them")
}

// explained turns the end of a stream into the reason for it: what the program wrote to stderr.
type explained struct {
	io.Reader
	session *ssh.Session
	said    *tail
}

func (e *explained) Read(b []byte) (int, error) {
	n, err := e.Reader.Read(b)
	if err == io.EOF && n == 0 {
		_ = e.session.Wait() // until stderr is complete
		if said := e.said.text(); said != "" {
			return 0, serverSays([]byte(said))
		}
	}
	return n, err
}

// tail keeps the last words of a program.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, b...)
	t.b = t.b[max(0, len(t.b)-900):]
	return len(b), nil
}

func (t *tail) text() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.b))
}
