package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"
	"unicode"

	_ "crypto/sha256" // the algorithms a checksum may name
	_ "crypto/sha512"

	"github.com/opencontainers/go-digest"
)

// HTTP is one file on a web server, as the Dockerfile asks for it.
type HTTP struct {
	URL      string
	Checksum digest.Digest // "" accepts any bytes
	Filename string        // "" takes the server's, then the address's, then "download"
	Perm     fs.FileMode   // 0 means 0600
	UID, GID int

	// AuthHeaderSecret names the secret that is the Authorization header. Without one, the secrets HTTP_AUTH_HEADER_<host> and
	// HTTP_AUTH_TOKEN_<host> are used where they exist.
	AuthHeaderSecret string
	Header           map[string]string // of it, Accept and User-Agent are sent
}

// Validators are what the caller remembers of a file, so that Unchanged can spare the next download.
type Validators struct {
	ETag         string
	LastModified string // as the server wrote it
	Digest       digest.Digest
	Filename     string
}

// Unchanged asks whether a file is still the one that was downloaded before. False with no error means that a Download will tell: the
// file has changed, or the server does not say. As in BuildKit only an ETag counts, because a time has too few digits to rely on.
func (c *Client) Unchanged(ctx context.Context, h HTTP, known Validators) (bool, error) {
	if known.ETag == "" || known.Digest == "" || (h.Checksum != "" && h.Checksum != known.Digest) {
		return false, nil
	}
	req, err := c.request(ctx, http.MethodHead, h)
	if err != nil {
		return false, err
	}
	req.Header.Set("If-None-Match", known.ETag)
	req.Header.Set("Accept-Encoding", "gzip") // as a GET will, or the server may answer with the ETag of another encoding
	resp, err := c.do(req)
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	if err != nil {
		return false, nil // some servers cut the connection on HEAD
	}
	defer resp.Body.Close()
	etag := resp.Header.Get("ETag")
	switch resp.StatusCode {
	case http.StatusNotModified:
		// Asked about a single ETag, some servers leave it out of the answer.
		return (etag == "" || sameETag(etag, known.ETag)) && fileName(h, resp, known.Filename) == known.Filename, nil
	case http.StatusOK:
		return sameETag(etag, known.ETag) && fileName(h, resp, "") == known.Filename, nil
	}
	return false, nil
}

func sameETag(a, b string) bool {
	return strings.TrimPrefix(a, "W/") == strings.TrimPrefix(b, "W/")
}

// Download writes the file into dir, and nothing else. A nil error means that it is there under Validators.Filename with its permissions,
// owner and modification time, which is the server's or else 1970, and that it has the checksum. After an error dir is as it was.
func (c *Client) Download(ctx context.Context, h HTTP, dir string) (v Validators, modified time.Time, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", redact(h.URL), err)
		}
	}()
	req, err := c.request(ctx, http.MethodGet, h)
	if err != nil {
		return v, modified, err
	}
	resp, err := c.do(req)
	if err != nil {
		return v, modified, err
	}
	defer resp.Body.Close()
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return v, modified, withHint(fmt.Errorf("the server answered %s", resp.Status), statusHint(resp.StatusCode, "HTTP_AUTH_TOKEN_"+req.URL.Hostname()))
	}
	modified = time.Unix(0, 0)
	if t, err := http.ParseTime(resp.Header.Get("Last-Modified")); err == nil {
		modified = t
	}
	v = Validators{
		ETag:         resp.Header.Get("ETag"),
		LastModified: resp.Header.Get("Last-Modified"),
		Filename:     fileName(h, resp, ""),
	}
	v.Digest, err = c.save(ctx, h, resp, dir, v.Filename, modified)
	return v, modified, err
}

func statusHint(code int, secret string) string {
	switch code {
	case http.StatusUnauthorized, http.StatusForbidden:
		return "the server wants credentials, or others than it was given: --secret id=" + secret + ",env=NAME"
	case http.StatusNotFound, http.StatusGone:
		return "check the address; some servers also answer so to those who may not read it (--secret id=" + secret + ",env=NAME)"
	case http.StatusProxyAuthRequired:
		return "the proxy wants credentials; put them into the proxy variable"
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return "the server is busy; try again later"
	}
	return ""
}

func (c *Client) request(ctx context.Context, method string, h HTTP) (*http.Request, error) {
	u, err := url.Parse(h.URL)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		return nil, errors.New("not an http:// or https:// address")
	}
	if h.Checksum != "" {
		if err := h.Checksum.Validate(); err != nil {
			return nil, fmt.Errorf("checksum %q: %w", h.Checksum, err)
		}
	}
	u.Fragment = ""
	req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return nil, err
	}
	for name, value := range h.Header {
		switch name = http.CanonicalHeaderKey(name); name {
		case "Accept", "User-Agent": // as BuildKit: any other could carry a secret into a cache key
			req.Header.Set(name, value)
		}
	}
	if h.AuthHeaderSecret != "" {
		value, ok := c.Secret(h.AuthHeaderSecret)
		if !ok {
			return nil, withHint(fmt.Errorf("the secret %s is not given", h.AuthHeaderSecret), "--secret id="+h.AuthHeaderSecret+",env=NAME")
		}
		return req, authorize(req, string(value))
	}
	if value, ok := c.Secret("HTTP_AUTH_TOKEN_" + u.Hostname()); ok {
		return req, authorize(req, "Bearer "+string(value))
	}
	if value, ok := c.Secret("HTTP_AUTH_HEADER_" + u.Hostname()); ok {
		return req, authorize(req, string(value))
	}
	return req, nil
}

// authorize sets the header. The http package's own complaint about a bad value would quote the secret.
func authorize(req *http.Request, value string) error {
	value = strings.TrimRight(value, "\r\n") // files of secrets end in a newline
	if strings.ContainsFunc(value, unicode.IsControl) {
		return errors.New("the secret for the Authorization header has control characters in it")
	}
	req.Header.Set("Authorization", value)
	return nil
}

// save streams the body into a file with a name of ours and renames it when it is complete and good.
func (c *Client) save(ctx context.Context, h HTTP, resp *http.Response, dir, name string, modified time.Time) (_ digest.Digest, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	defer root.Close()
	const partial = ".cooper-download"
	f, err := root.OpenFile(partial, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	defer func() {
		f.Close()
		if err != nil {
			root.Remove(partial)
		}
	}()
	// What a cache remembers is SHA-256, whatever the Dockerfile's checksum is.
	sums := []digest.Digester{digest.SHA256.Digester()}
	if h.Checksum != "" && h.Checksum.Algorithm() != digest.SHA256 {
		sums = append(sums, h.Checksum.Algorithm().Digester())
	}
	to := []io.Writer{f}
	for _, s := range sums {
		to = append(to, s.Hash())
	}
	n, err := io.Copy(io.MultiWriter(to...), io.LimitReader(resp.Body, c.Limits.Bytes+1))
	switch {
	case ctx.Err() != nil:
		return "", context.Cause(ctx)
	case err != nil:
		return "", fmt.Errorf("after %d bytes: %w", n, err)
	case n > c.Limits.Bytes:
		return "", fmt.Errorf("more than %d bytes", c.Limits.Bytes)
	}
	if got := sums[len(sums)-1].Digest(); h.Checksum != "" && got != h.Checksum {
		return "", withHint(fmt.Errorf("digest mismatch: got %s, the checksum is %s", got, h.Checksum),
			"the file is not the one the Dockerfile was written for; if it is meant to be, change --checksum")
	}
	if h.UID != 0 || h.GID != 0 {
		if err := f.Chown(h.UID, h.GID); err != nil {
			return "", err
		}
	}
	perm := h.Perm
	if perm == 0 {
		perm = 0o600
	}
	if err := f.Chmod(perm); err != nil { // after chown, which takes setuid away
		return "", err
	}
	if err := f.Close(); err != nil {
		return "", err
	}
	if err := root.Chtimes(partial, modified, modified); err != nil {
		return "", err
	}
	if err := root.Rename(partial, name); err != nil {
		return "", err
	}
	return sums[0].Digest(), nil
}

// fileName is BuildKit's answer to what the file is called. An answer without a body need not repeat the name, so it may be known.
func fileName(h HTTP, resp *http.Response, known string) string {
	if h.Filename != "" {
		return safeName(h.Filename)
	}
	if _, params, err := mime.ParseMediaType(resp.Header.Get("Content-Disposition")); err == nil {
		if n := params["filename"]; n != "" && !strings.HasSuffix(n, "/") {
			return safeName(filepath.Base(n))
		}
	}
	if known != "" {
		return known
	}
	if u, err := url.Parse(h.URL); err == nil {
		return safeName(path.Base(u.Path))
	}
	return safeName("")
}

func safeName(s string) string {
	name := filepath.Base(strings.TrimSpace(s))
	if name == "." || name == ".." || name == "/" || strings.ContainsFunc(name, unicode.IsControl) {
		return "download"
	}
	return name
}
