package remote

import (
	"errors"
	"fmt"
	"net/url"
	"path"
	"regexp"
	"strings"
	"unicode"
)

// location is where a git repository is. An scp style name (git@host:path) is an ssh address with a path below the home directory.
type location struct {
	text   string // as it was given
	scheme string // http, https, ssh or git
	user   *url.Userinfo
	host   string // with the port, if it was given
	path   string
	scp    bool
}

var (
	anyScheme = regexp.MustCompile(`^[a-zA-Z0-9+.-]+:(//|:)`) // with the remote helpers of git, such as ext::
	scpStyle  = regexp.MustCompile(`^([a-zA-Z0-9-_]+)@([a-zA-Z0-9-.]+):(.*)$`)
)

func parseLocation(remote string) (location, error) {
	l, err := locate(remote)
	if err != nil {
		return l, withHint(fmt.Errorf("git repository %q: %w", redact(remote), err),
			"a repository is named https://HOST/PATH, ssh://USER@HOST/PATH, git@HOST:PATH or git://HOST/PATH")
	}
	return l, nil
}

func locate(remote string) (location, error) {
	if strings.ContainsFunc(remote, unicode.IsControl) {
		return location{}, errors.New("control characters in the address")
	}
	if m := scpStyle.FindStringSubmatch(remote); m != nil && !anyScheme.MatchString(remote) {
		l := location{text: remote, scheme: "ssh", user: url.User(m[1]), host: m[2], path: m[3], scp: true}
		return l, l.check()
	}
	text := remote
	if !anyScheme.MatchString(remote) {
		if strings.HasPrefix(remote, "/") || strings.HasPrefix(remote, ".") || strings.HasPrefix(remote, "-") {
			return location{}, errors.New("not an address but a path")
		}
		text = "https://" + remote
	}
	u, err := url.Parse(text)
	if err != nil {
		return location{}, errors.New("not an address") // the error would repeat the credentials in it
	}
	l := location{text: text, scheme: strings.ToLower(u.Scheme), user: u.User, host: u.Host, path: u.Path}
	switch l.scheme {
	case "http", "https", "ssh", "git":
	default:
		return l, fmt.Errorf("%q is not a way to fetch from a server", l.scheme)
	}
	if u.RawQuery != "" || u.Fragment != "" {
		return l, errors.New("the address still has a query or fragment")
	}
	return l, l.check()
}

func (l location) check() error {
	name := (&url.URL{Host: l.host}).Hostname()
	switch {
	case name == "", strings.HasPrefix(name, "-"):
		return errors.New("no host in the address")
	case strings.Trim(l.path, "/") == "":
		return errors.New("no path in the address")
	case strings.HasPrefix(l.path, "-"): // would be an option of the program that serves it
		return errors.New("the path begins with -")
	}
	return nil
}

func (l location) String() string { return redact(l.text) }

// url is the address without what git does not send: http's base for requests.
func (l location) url() *url.URL {
	return &url.URL{Scheme: l.scheme, User: l.user, Host: l.host, Path: strings.TrimSuffix(l.path, "/")}
}

// covers says whether credentials for l are meant for other, by git's rule for http.<url>.extraheader: the same server, and the path or one
// below it. For GitHub it is the whole server, as BuildKit does, so that private submodules work.
func (l location) covers(other location) bool {
	if l.scheme != other.scheme || !sameOrigin(l.url(), other.url()) {
		return false
	}
	if host := strings.ToLower(l.host); l.scheme == "https" && (host == "github.com" || host == "www.github.com") {
		return true
	}
	base, p := strings.TrimSuffix(l.path, "/"), path.Clean(other.path)
	return p == path.Clean(base) || strings.HasPrefix(p, path.Clean(base)+"/")
}

// join resolves the url of a submodule, which may be relative to its parent's. It never leaves the parent's server.
func (l location) join(submodule string) (location, error) {
	if strings.HasPrefix(submodule, "-") {
		return location{}, errors.New("the url begins with -")
	}
	if !strings.HasPrefix(submodule, "./") && !strings.HasPrefix(submodule, "../") {
		if !anyScheme.MatchString(submodule) && !scpStyle.MatchString(submodule) {
			return location{}, errors.New("the url is a path, and there is nothing but servers to fetch from")
		}
		return parseLocation(submodule)
	}
	parts := strings.Split(strings.Trim(l.path, "/"), "/")
	for {
		if rest, ok := strings.CutPrefix(submodule, "./"); ok {
			submodule = rest
		} else if rest, ok := strings.CutPrefix(submodule, "../"); ok {
			if len(parts) == 0 {
				return location{}, fmt.Errorf("the url climbs out of %s", l.host)
			}
			submodule, parts = rest, parts[:len(parts)-1]
		} else {
			break
		}
	}
	for _, part := range append(parts, strings.Split(submodule, "/")...) {
		if part == ".." || part == "." {
			return location{}, errors.New("the url has dots in the middle")
		}
	}
	j := l
	j.path = strings.Join(append(parts, strings.TrimSuffix(submodule, "/")), "/")
	if strings.HasPrefix(l.path, "/") {
		j.path = "/" + j.path
	}
	if j.scp {
		j.text = j.user.Username() + "@" + j.host + ":" + j.path
	} else {
		j.text = j.url().String()
	}
	if strings.ContainsFunc(j.text, unicode.IsControl) {
		return location{}, errors.New("control characters in the url")
	}
	return j, j.check()
}

// redact hides user and password, as BuildKit does where it prints an address or leaves it in an image.
func redact(s string) string {
	u, err := url.Parse(s)
	if err != nil || u.User == nil {
		if at := strings.LastIndex(s, "@"); err != nil && at >= 0 && strings.Contains(s, "://") {
			return s[:strings.Index(s, "://")+3] + "xxxxx" + s[at:]
		}
		return s
	}
	if _, has := u.User.Password(); has {
		u.User = url.UserPassword("xxxxx", "xxxxx")
	} else if u.User.Username() != "" {
		u.User = url.User("xxxxx")
	}
	return u.String()
}
