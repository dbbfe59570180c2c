// Package remote fetches what a build takes from git and http servers: it answers what a reference means now, and fills an empty
// directory with it.
//
// It knows nothing of plans, snapshots or caches, and starts no program: git's protocol (version 2, and 0 where a server is older) and its
// file formats are spoken here, over http, ssh and git://. Servers and repositories are strangers. What they send is bounded by Limits, is
// checked against its hash, and reaches the disk only through an os.Root; hooks, filters, attributes and LFS are never acted upon.
//
// A Client may be used by many goroutines at once, and keeps idle connections until Close.
package remote

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// Agent is an ssh agent, of which listing and signing are used.
type Agent = agent.Agent

// Options are what a Client needs of its surroundings. The zero value uses no proxy, no secrets, no agents and the system's certificates.
type Options struct {
	Proxy     func(*http.Request) (*url.URL, error) // nil: none
	UserAgent string

	// Secret answers with the value of a build secret, for the Authorization header.
	Secret func(id string) ([]byte, bool)
	// Agent answers with an ssh agent; its error says how the user gives one.
	Agent func(id string) (Agent, error)
	// NewHostKey is told of an ssh host that Git.KnownHosts does not list. The key is taken for this Client's life.
	// nil: such a host is refused.
	NewHostKey func(host, fingerprint string)

	RootCAs *x509.CertPool // nil: the system's
	TempDir string         // where packs wait while they are checked out; "" is the system's
	Limits  Limits
}

// Limits keep a hostile server from filling memory or disk. A zero field means the default.
type Limits struct {
	Bytes   int64 // of one pack, of the files of one checkout, and of one download: 64 GiB
	Object  int64 // of an object that has to be in memory as a whole, such as a tree, or a blob stored as a delta: 512 MiB
	Objects int   // in one pack: 10 million
	Refs    int   // that a server advertises: 2 million
	Entries int   // files, links and directories of one checkout, so that a tree of trees of trees ends: 4 million
	Depth   int   // of directories: 256
	Modules int   // submodules of one checkout, all levels together: 1024
	Nesting int   // submodules within submodules: 16
}

func (l Limits) orDefault() Limits {
	d := Limits{64 << 30, 512 << 20, 10e6, 2e6, 4e6, 256, 1024, 16}
	set(&d.Bytes, l.Bytes)
	set(&d.Object, l.Object)
	set(&d.Objects, l.Objects)
	set(&d.Refs, l.Refs)
	set(&d.Entries, l.Entries)
	set(&d.Depth, l.Depth)
	set(&d.Modules, l.Modules)
	set(&d.Nesting, l.Nesting)
	return d
}

func set[T int | int64](to *T, v T) {
	if v != 0 {
		*to = v
	}
}

// Client talks to git and http servers.
type Client struct {
	Options
	http *http.Client

	mu       sync.Mutex
	hostKeys map[string]ssh.PublicKey // taken on first use, see Options.NewHostKey
}

// New makes a Client. It does not use the network.
func New(o Options) *Client {
	if o.UserAgent == "" {
		o.UserAgent = "cooper"
	}
	if o.Secret == nil {
		o.Secret = func(string) ([]byte, bool) { return nil, false }
	}
	if o.Agent == nil {
		o.Agent = func(id string) (Agent, error) { return nil, fmt.Errorf("no ssh agent %q", id) }
	}
	o.Limits = o.Limits.orDefault()
	return &Client{
		Options: o,
		http: &http.Client{
			CheckRedirect: checkRedirect,
			Transport: &http.Transport{
				Proxy:                 o.Proxy,
				DialContext:           dialer().DialContext,
				TLSClientConfig:       &tls.Config{RootCAs: o.RootCAs},
				TLSHandshakeTimeout:   20 * time.Second,
				ResponseHeaderTimeout: 2 * time.Minute, // a git server counts objects before it answers
				IdleConnTimeout:       30 * time.Second,
				ForceAttemptHTTP2:     true,
			},
		},
		hostKeys: map[string]ssh.PublicKey{},
	}
}

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func dialer() *net.Dialer { return &net.Dialer{Timeout: 30 * time.Second} }

const maxRedirects = 10

// checkRedirect keeps credentials at the origin they were given for. The standard library would still send them to subdomains.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return fmt.Errorf("more than %d redirects", maxRedirects)
	}
	if s := req.URL.Scheme; s != "http" && s != "https" {
		return fmt.Errorf("redirect to a %q address", s)
	}
	for _, earlier := range via {
		if !sameOrigin(earlier.URL, req.URL) {
			req.Header.Del("Authorization")
		}
	}
	return nil
}

func sameOrigin(a, b *url.URL) bool {
	return a.Scheme == b.Scheme && strings.EqualFold(hostPort(a), hostPort(b))
}

func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443", "ssh": "22", "git": "9418"}[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// do sends a request and explains what stands in the way.
func (c *Client) do(req *http.Request) (*http.Response, error) {
	if req.Header.Get("User-Agent") == "" {
		req.Header.Set("User-Agent", c.UserAgent)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, reachError(req.Context(), req.URL.Host, err)
	}
	return resp, nil
}

// reachError says why a server could not be asked. The error of the http package repeats the address, which may hold credentials.
func reachError(ctx context.Context, host string, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	var (
		unknown  x509.UnknownAuthorityError
		name     x509.HostnameError
		invalid  x509.CertificateInvalidError
		record   tls.RecordHeaderError
		dns      *net.DNSError
		op       *net.OpError
		hint     string
		tlsError *tls.CertificateVerificationError
	)
	switch {
	case errors.As(err, &unknown):
		hint = "the server's certificate was not made by an authority this machine trusts; add that authority to the system's certificates"
	case errors.As(err, &name), errors.As(err, &invalid), errors.As(err, &tlsError):
		hint = "the server's certificate is not valid for it; check the address and this machine's clock"
	case errors.As(err, &record):
		hint = "the server does not speak TLS there; is it http:// instead of https://?"
	case errors.As(err, &dns):
		hint = "check the host name, the network, and the proxy variables"
	case errors.As(err, &op):
		return withHint(fmt.Errorf("%s is unreachable: %w", host, err), "check the address, the network, and the proxy variables")
	}
	return withHint(fmt.Errorf("%s: %w", host, err), hint)
}

// hinted is an error with one next step.
type hinted struct {
	error
	hint string
}

func (h *hinted) Unwrap() error { return h.error }

// Hint is the next step.
func (h *hinted) Hint() string { return h.hint }

func withHint(err error, hint string) error {
	if hint == "" {
		return err
	}
	return &hinted{err, hint}
}
