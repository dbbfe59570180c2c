package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// Git is a commit of a repository on a server, as the Dockerfile or the command line names it.
type Git struct {
	Remote   string // https://, http://, ssh:// or git://HOST/PATH, or git@HOST:PATH; never a path of this machine
	Ref      string // a branch, tag, full ref or whole commit hash; "" is the remote's default branch
	Checksum string // the beginning of the hash of the commit or the annotated tag
	Subdir   string // what becomes of it is the content of this directory

	KeepGitDir     bool // with .git; a Subdir never has one
	SkipSubmodules bool
	CommitTime     bool // files get the time of the commit
	FetchByCommit  bool // Checksum is the commit, whatever Ref is on the server

	// The secrets <id>.<host> and <id> are looked for: a whole Authorization header, or a token that goes with it as a password.
	AuthHeaderSecret, AuthTokenSecret string

	SSH        string // id of the ssh agent; "" is none
	KnownHosts string // text of a known_hosts file; for a host that it does not list see Options.NewHostKey
}

// Commit is what a Git means at a time.
type Commit struct {
	Ref  string // in full, refs/heads/main; the hash where the Git gives one
	Hash string // the commit; where Git.Ref is a hash, that hash, which may turn out to be an annotated tag's
	Tag  string // the annotated tag that Ref is, or ""
}

// ResolveGit asks the server what g means now. Where g has a whole commit hash it needs no network, as in BuildKit, so that the answer
// says nothing of whether the commit exists.
func (c *Client) ResolveGit(ctx context.Context, g Git) (_ Commit, err error) {
	defer func() { err = c.explain(ctx, g.Remote, err) }()
	at, err := parseLocation(g.Remote)
	if err != nil {
		return Commit{}, err
	}
	if strings.HasPrefix(g.Ref, "-") || strings.ContainsAny(g.Ref, " \n\x00") {
		return Commit{}, fmt.Errorf("%q is not a ref", g.Ref)
	}
	if isCommit(g.Ref) {
		return Commit{Ref: g.Ref, Hash: g.Ref}, g.verify(g.Ref)
	}
	if g.FetchByCommit {
		if !isCommit(g.Checksum) {
			return Commit{}, errors.New("to fetch by commit, the checksum has to be a whole commit hash")
		}
		ref := g.Ref
		switch {
		case ref == "":
			ref = g.Checksum
		case !strings.HasPrefix(ref, "refs/"):
			ref = "refs/heads/" + ref
		}
		return Commit{Ref: ref, Hash: g.Checksum}, nil
	}
	s, err := c.connect(ctx, g, at)
	if err != nil {
		return Commit{}, err
	}
	defer s.Close()
	r, err := s.find(ctx, g.Ref)
	if err != nil {
		return Commit{}, err
	}
	commit := Commit{Ref: r.name, Hash: r.id.String()}
	if r.peeled != "" {
		commit.Hash, commit.Tag = r.peeled.String(), r.id.String()
	}
	return commit, g.verify(commit.Tag, commit.Hash)
}

func (g Git) verify(hashes ...string) error {
	var have []string
	for _, h := range hashes {
		if strings.HasPrefix(h, g.Checksum) {
			return nil
		}
		if h != "" {
			have = append(have, h)
		}
	}
	return withHint(fmt.Errorf("expected checksum to match %s, got %s", g.Checksum, strings.Join(have, " or ")),
		"the ref is not what the Dockerfile was written for; if it is meant to be, change the checksum")
}

// find is what a ref means on the server. Of a branch and a tag of the same name it is the branch, and refs/<name> before both.
func (s *server) find(ctx context.Context, name string) (ref, error) {
	if name == "" {
		return s.defaultBranch(ctx)
	}
	candidates := []string{
		"refs/" + strings.TrimPrefix(name, "refs/"),
		"refs/heads/" + strings.TrimPrefix(name, "refs/heads/"),
		"refs/tags/" + strings.TrimPrefix(name, "refs/tags/"),
	}
	refs, err := s.refs(ctx, candidates...)
	if err != nil {
		return ref{}, err
	}
	for _, want := range candidates {
		for _, r := range refs {
			if r.name == want {
				return r, nil
			}
		}
	}
	hint := "git ls-remote " + s.at.String() + " lists what there is"
	if strings.Trim(name, "0123456789abcdef") == "" && len(name) >= 7 {
		hint = "the beginning of a commit hash names nothing on a server; give the whole hash"
	}
	return ref{}, withHint(fmt.Errorf("the repository has no ref %s", name), hint)
}

func (s *server) defaultBranch(ctx context.Context) (ref, error) {
	refs, err := s.refs(ctx, "HEAD", "refs/heads/")
	if err != nil {
		return ref{}, err
	}
	byName := map[string]ref{}
	for _, r := range refs {
		byName[r.name] = r
	}
	head, ok := byName["HEAD"]
	if ok && head.target == "" && !s.v2 { // old servers do not say which branch it is; git guesses like this
		for _, r := range append([]ref{byName["refs/heads/master"], byName["refs/heads/main"]}, refs...) {
			if r.id == head.id && strings.HasPrefix(r.name, "refs/heads/") {
				return r, nil
			}
		}
	}
	if r, ok := byName[head.target]; ok {
		return r, nil
	}
	return ref{}, withHint(errors.New("the repository has no default branch"), "name a branch: "+s.at.String()+"#main")
}

// CommitObject is the commit itself, as git stores it; its committer line holds its time. Where the server can leave out the files, it does.
func (c *Client) CommitObject(ctx context.Context, g Git, commit Commit) (_ []byte, err error) {
	defer func() { err = c.explain(ctx, g.Remote, err) }()
	at, err := parseLocation(g.Remote)
	if err != nil {
		return nil, err
	}
	f, err := c.tempFile()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	id, err := parseOID(commit.Hash)
	if err != nil {
		return nil, err
	}
	p, err := c.fetch(ctx, g, at, id, true, f)
	if err != nil {
		return nil, err
	}
	_, raw, err := p.commit(id)
	return raw, err
}

// tempFile is a file without a name: it goes with the process.
func (c *Client) tempFile() (*os.File, error) {
	f, err := os.CreateTemp(c.TempDir, "cooper-pack-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// fetch gets one object without history, with all that belongs to it. A server that gives away only what its refs point at is asked for its
// branches and tags with their history instead, as git does.
func (c *Client) fetch(ctx context.Context, g Git, at location, id oid, bare bool, f *os.File) (*pack, error) {
	p, err := c.fetchOnce(ctx, g, at, id, bare, f)
	if err == nil || !refuses(err) {
		return p, err
	}
	if err := f.Truncate(0); err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	s, err := c.connect(ctx, g, at)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	refs, err := s.refs(ctx, "refs/heads/", "refs/tags/")
	if err != nil {
		return nil, err
	}
	r := request{bare: bare}
	seen := map[oid]bool{}
	for _, f := range refs {
		if wanted := strings.HasPrefix(f.name, "refs/heads/") || strings.HasPrefix(f.name, "refs/tags/"); wanted && !seen[f.id] {
			seen[f.id] = true
			r.want = append(r.want, f.id)
		}
	}
	if len(r.want) > 0 {
		if p, err = s.fetch(ctx, r, f); err != nil {
			return nil, err
		}
		if _, ok := p.byID[id]; ok {
			return p, nil
		}
	}
	return nil, fmt.Errorf("no branch or tag of the repository has the commit %v", id)
}

func (c *Client) fetchOnce(ctx context.Context, g Git, at location, id oid, bare bool, f *os.File) (*pack, error) {
	s, err := c.connect(ctx, g, at)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	if len(id) != s.size {
		return nil, fmt.Errorf("%v cannot be a commit of a repository that names objects by %d bytes", id, s.size)
	}
	if !s.v2 && !s.advertises(id) {
		return nil, remoteError("not our ref") // asking would only end the connection
	}
	p, err := s.fetch(ctx, request{want: []oid{id}, shallow: true, bare: bare}, f)
	if err != nil {
		return nil, err
	}
	if _, ok := p.byID[id]; !ok {
		return nil, fmt.Errorf("the server did not send %v", id)
	}
	return p, nil
}

func (s *server) advertises(id oid) bool {
	for _, word := range []string{"allow-tip-sha1-in-want", "allow-reachable-sha1-in-want", "allow-any-sha1-in-want"} {
		if _, ok := s.can[word]; ok {
			return true
		}
	}
	for _, r := range s.known {
		if r.id == id {
			return true
		}
	}
	return false
}

// commit follows annotated tags to the commit.
func (p *pack) commit(id oid) (oid, []byte, error) {
	for range 16 {
		i, ok := p.byID[id]
		if !ok || p.packed[i].typ != tagObject {
			raw, err := p.read(id, commitObject)
			return id, raw, err
		}
		raw, err := p.content(i)
		if err != nil {
			return "", nil, err
		}
		v, err := field(raw, "object")
		if err != nil {
			return "", nil, err
		}
		if id, err = parseOID(v); err != nil {
			return "", nil, err
		}
	}
	return "", nil, errors.New("a tag of a tag of a tag, without end")
}

// explain adds which repository it was, and lets a cancelled context speak for what its end broke.
func (c *Client) explain(ctx context.Context, remote string, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return fmt.Errorf("git %s: %w", redact(remote), err)
}
