package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// A PlainHTTPError refuses to talk without encryption to a host for which nobody allowed it.
type PlainHTTPError struct{ Host string }

func (e *PlainHTTPError) Error() string {
	return fmt.Sprintf("plain http to %s is not allowed", e.Host)
}

// Hint names the next step.
func (e *PlainHTTPError) Hint() string {
	return "let the registry speak https, or allow plain http for this host and port: --plain-http " + e.Host
}

// A guard is what every request passes last, whoever made it: a registry call, a token exchange, or a
// redirect. Here, and only here, it is decided that nothing leaves in the clear.
type guard struct {
	inner     http.RoundTripper
	plainHTTP func(host string) bool
	userAgent string
}

func (g *guard) RoundTrip(in *http.Request) (*http.Response, error) {
	if in.URL.Scheme != "https" && !(in.URL.Scheme == "http" && g.plainHTTP(in.URL.Host)) {
		if in.Body != nil {
			in.Body.Close()
		}
		return nil, &PlainHTTPError{in.URL.Host}
	}
	req := in.Clone(in.Context())
	if g.userAgent != "" {
		req.Header.Set("User-Agent", g.userAgent)
	}
	if in.GetBody != nil && in.Body != nil {
		// The bearer transport sends a request twice when its token was too old; each time needs a
		// body from its beginning.
		body, err := in.GetBody()
		if err != nil {
			return nil, err
		}
		in.Body.Close()
		req.Body = body
	}
	return g.inner.RoundTrip(req)
}

func newTransport(o ClientOptions) *http.Transport {
	dialer := &net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second, Control: refuseLinkLocal}
	t := &http.Transport{
		Proxy:                 o.Proxy,
		DialContext:           dialer.DialContext,
		ForceAttemptHTTP2:     true,
		MaxIdleConns:          50,
		MaxIdleConnsPerHost:   8,
		IdleConnTimeout:       30 * time.Second,
		TLSHandshakeTimeout:   15 * time.Second,
		ResponseHeaderTimeout: 2 * time.Minute, // a registry may verify a large blob before it answers
		ExpectContinueTimeout: time.Second,
		DisableCompression:    true, // a digest is of the bytes as they are stored
	}
	if o.RootCAs != nil {
		t.TLSClientConfig = tlsConfig(o.RootCAs)
	}
	return t
}

// refuseLinkLocal keeps a registry, a token realm or a redirect from naming the metadata service of a
// cloud, also through a DNS name: no image lies on a link-local address.
func refuseLinkLocal(_, address string, _ syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	if a := ap.Addr().Unmap(); a.IsLinkLocalUnicast() || a == netip.MustParseAddr("fd00:ec2::254") {
		return fmt.Errorf("%s is a link-local address, where no registry is", address)
	}
	return nil
}

func isLoopback(hostport string) bool {
	host := (&url.URL{Host: hostport}).Hostname()
	if host == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.Unmap().IsLoopback()
}

// isPrivate reports whether a host names, without asking DNS, what only this machine or its network reaches.
func isPrivate(hostport string) bool {
	host, _, _ := strings.Cut((&url.URL{Host: hostport}).Hostname(), "%")
	host = strings.TrimSuffix(host, ".")
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return true
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		// Some resolvers take 127.1, 0x7f000001 and 2130706433 for addresses. No name ends in a number.
		_, err := strconv.ParseUint(host[strings.LastIndexByte(host, '.')+1:], 0, 64)
		return err == nil
	}
	a = a.Unmap()
	return a.IsLoopback() || a.IsPrivate() || a.IsLinkLocalUnicast() || a.IsUnspecified()
}

// checkTarget judges where a registry wants to send us: not from the world into our own network.
func checkTarget(registry string, to *url.URL) error {
	if to.Scheme != "https" && to.Scheme != "http" {
		return fmt.Errorf("%s leads to %.100q", registry, to.Redacted())
	}
	if to.Host != registry && isPrivate(to.Host) && !isPrivate(registry) {
		return fmt.Errorf("%s leads to the private address %s", registry, to.Host)
	}
	return nil
}

func redirectPolicy(registry string) func(*http.Request, []*http.Request) error {
	return func(req *http.Request, via []*http.Request) error {
		if len(via) >= 10 {
			return errors.New("stopped after 10 redirects")
		}
		return checkTarget(registry, req.URL)
	}
}

// A statusError is an answer of a registry that is not the one we hoped for.
type statusError struct {
	answer     *transport.Error
	retryAfter time.Duration
	missing    bool // what was asked for is not there, as opposed to the registry
}

func (e *statusError) Error() string { return e.answer.Error() }

func (e *statusError) Unwrap() error {
	if e.missing {
		return ErrNotFound
	}
	return e.answer
}

// Hint names the next step.
func (e *statusError) Hint() string {
	switch e.answer.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return "log in to the registry (docker login writes the config.json that is read), and check that the repository exists and is yours"
	case http.StatusTooManyRequests:
		return "the registry limits how often it is asked; wait, log in, or use a mirror"
	}
	return ""
}

// checkStatus returns nil for an expected status; otherwise it reads and closes the answer.
func checkStatus(resp *http.Response, want ...int) error {
	err := transport.CheckError(resp, want...)
	if err == nil {
		return nil
	}
	resp.Body.Close()
	var answer *transport.Error
	if !errors.As(err, &answer) {
		return err
	}
	seconds, _ := strconv.ParseUint(resp.Header.Get("Retry-After"), 10, 16)
	return &statusError{answer, time.Duration(seconds) * time.Second, answer.StatusCode == http.StatusNotFound}
}

// errStalled ends a transfer on which nothing moves any more.
var errStalled = errors.New("nothing arrived for too long")

// temporary reports whether the same request may succeed in a moment.
func temporary(err error) bool {
	var status *statusError
	var timeout net.Error
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return false
	case errors.Is(err, errStalled):
		return true
	case errors.As(err, &status):
		switch status.answer.StatusCode {
		case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError,
			http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
			return true
		}
		return false
	case errors.As(err, &timeout) && timeout.Timeout():
		return true
	}
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) ||
		errors.Is(err, syscall.EPIPE) || errors.Is(err, net.ErrClosed)
}

// patience is how often and how long a temporary failure is waited for.
type patience struct {
	tries int
	first time.Duration // doubled each time
	limit time.Duration // also of what a registry may ask for in Retry-After
	stall time.Duration // a transfer on which nothing moves for so long has failed
}

var usualPatience = patience{tries: 5, first: 250 * time.Millisecond, limit: 15 * time.Second, stall: time.Minute}

// retry calls f until it succeeds, fails for good, or was tried often enough.
func (p patience) retry(ctx context.Context, f func() error) error {
	for try := 1; ; try++ {
		err := f()
		if err == nil || try >= p.tries || !temporary(err) {
			return err
		}
		if waitErr := p.wait(ctx, try, err); waitErr != nil {
			return errors.Join(waitErr, err)
		}
	}
}

// wait lets the time before the next try pass, or returns the cause when ctx ends.
func (p patience) wait(ctx context.Context, try int, failure error) error {
	pause := p.first << (try - 1)
	pause += time.Duration(rand.Int64N(int64(pause)/4 + 1))
	var status *statusError
	if errors.As(failure, &status) {
		pause = max(pause, status.retryAfter)
	}
	timer := time.NewTimer(min(pause, p.limit))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// A watch ends a request on which nothing moves any more.
type watch struct {
	ctx    context.Context // of the request
	cancel context.CancelCauseFunc
	timer  *time.Timer
	stall  time.Duration
}

func newWatch(parent context.Context, stall time.Duration) *watch {
	ctx, cancel := context.WithCancelCause(parent)
	w := &watch{ctx: ctx, cancel: cancel, stall: stall}
	w.timer = time.AfterFunc(stall, func() { cancel(errStalled) })
	w.timer.Stop()
	return w
}

// explain replaces the error of a request that the watch ended.
func (w *watch) explain(err error) error {
	if err != nil && err != io.EOF && context.Cause(w.ctx) != nil {
		return context.Cause(w.ctx)
	}
	return err
}

func (w *watch) end() {
	w.timer.Stop()
	w.cancel(nil)
}

// watchedAnswer is the body of an answer. The time counts while we wait for the registry, not while our
// reader is busy.
type watchedAnswer struct {
	io.ReadCloser
	w *watch
}

func (b watchedAnswer) Read(p []byte) (int, error) {
	b.w.timer.Reset(b.w.stall)
	n, err := b.ReadCloser.Read(p)
	b.w.timer.Stop()
	return n, b.w.explain(err)
}

func (b watchedAnswer) Close() error {
	err := b.ReadCloser.Close()
	b.w.end()
	return err
}

// watchedUpload is the body of a request. The time counts between two reads, while the transport waits for
// the registry to take what it was given.
type watchedUpload struct {
	io.ReadCloser
	w *watch
}

func (b watchedUpload) Read(p []byte) (int, error) {
	b.w.timer.Stop()
	n, err := b.ReadCloser.Read(p)
	if err == nil {
		b.w.timer.Reset(b.w.stall)
	}
	return n, err
}

func (b watchedUpload) Close() error {
	b.w.timer.Stop() // from here on the transport limits how long it waits for an answer
	return b.ReadCloser.Close()
}
