package builder

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/remote"
	"github.com/cooper-build/cooper/snapshot"
	"github.com/cooper-build/cooper/snapshot/layer"
)

// once answers a question about a remote source once for a build, so that the Dockerfile, the context and every step
// see the same state of it.
func once[T any](b *build, kind string, op plan.Op, ask func() (T, error)) (T, error) {
	answer, _ := b.fetching.LoadOrStore(kind+" "+string(plan.Encode(op)), sync.OnceValues(ask))
	return answer.(func() (T, error))()
}

func (b *build) gitOf(op plan.Git) remote.Git {
	return remote.Git{
		Remote: op.Remote, Ref: op.Ref, Checksum: op.Checksum, Subdir: op.Subdir,
		KeepGitDir: op.KeepGitDir, SkipSubmodules: op.SkipSubmodules, CommitTime: op.CommitTime, FetchByCommit: op.FetchByCommit,
		AuthTokenSecret: op.TokenSecret, AuthHeaderSecret: op.HeaderSecret, SSH: op.SSH, KnownHosts: b.KnownHosts,
	}
}

func (b *build) commit(ctx context.Context, op plan.Git) (remote.Commit, error) {
	return once(b, "commit", op, func() (remote.Commit, error) { return b.remote.ResolveGit(ctx, b.gitOf(op)) })
}

// pullGit makes the snapshot of a commit's tree.
func (b *build) pullGit(ctx context.Context, s plan.Step, op plan.Git) (value, bool, error) {
	c, err := b.commit(ctx, op)
	if err != nil {
		return value{}, false, err
	}
	named := op
	named.Ref, named.Checksum = "", "" // ways to name the commit
	from := &cause{kind: "git", op: plan.Encode(named)}
	from.add("commit", c.Hash)
	if op.KeepGitDir {
		from.add("name of the commit", asJSON(c)) // its HEAD says how it was named
	}
	fetch := func(ctx context.Context, _ *watch) (*snapshot.Active, error) {
		return b.fill(ctx, func(dir string) error { return b.remote.Checkout(ctx, b.gitOf(op), c, dir, time.Now()) })
	}
	return b.cached(ctx, s, from, fetch, func(id snapshot.ID) (snapshot.ID, bool, error) {
		active, err := fetch(ctx, nil)
		if err != nil {
			return "", false, err
		}
		defer active.Discard()
		made, err := active.Commit(ctx, id)
		return made, true, err
	})
}

// fill begins a snapshot on nothing with what write leaves in a directory.
func (b *build) fill(ctx context.Context, write func(dir string) error) (*snapshot.Active, error) {
	active, err := b.store.Prepare(ctx, "")
	if err != nil {
		return nil, err
	}
	if err := write(active.Dir()); err != nil {
		active.Discard()
		return nil, err
	}
	return active, nil
}

func httpOf(op plan.HTTP) remote.HTTP {
	r := remote.HTTP{
		URL: op.URL, Checksum: op.Checksum, Filename: op.Filename,
		AuthHeaderSecret: op.HeaderSecret, Header: map[string]string{},
	}
	if op.Mode != nil {
		r.Perm = *op.Mode
	}
	for _, h := range op.Header {
		name, v, _ := strings.Cut(h, ": ")
		r.Header[name] = v
	}
	return r
}

// A download is a file as it was last fetched.
type download struct {
	ID snapshot.ID
	remote.Validators
	Modified *time.Time
}

// downloaded is what a URL gave the last time. What it depends on besides the server is part of the operation.
func downloaded(op plan.HTTP) snapshot.Key {
	return newKey("download").bytes(plan.Encode(op)).sum()
}

// pullHTTP makes the snapshot of a file that a server has. What is known is used without asking again if its checksum
// was given, else if the server says that it did not change.
func (b *build) pullHTTP(ctx context.Context, s plan.Step, op plan.HTTP) (value, bool, error) {
	r, ran, err := b.download(ctx, op, s.NoCache)
	if err == nil && !r.ran {
		b.verifyLater(s, r.ID, func(ctx context.Context, _ *watch) (*snapshot.Active, error) {
			active, _, _, err := b.fetchFile(ctx, op)
			return active, err
		})
	}
	return value{id: r.ID}, ran, b.explainFetch(s, r.ran, r.why, err)
}

type downloadResult struct {
	download
	ran bool
	why string // it was fetched
}

func (b *build) download(ctx context.Context, op plan.HTTP, again bool) (downloadResult, bool, error) {
	first := false
	r, err := once(b, "download", op, func() (downloadResult, error) {
		first = true
		return b.downloadNow(ctx, op, again)
	})
	return r, r.ran && first, err
}

func (b *build) downloadNow(ctx context.Context, op plan.HTTP, again bool) (downloadResult, error) {
	var known download
	ok, err := b.store.Fact(downloaded(op), &known)
	if err != nil {
		return downloadResult{}, err
	}
	why := "never fetched before into this store"
	if ok && !again && b.store.Has(known.ID) {
		why = "the server does not say that the file is what it was"
		same := op.Checksum != ""
		if !same {
			if same, err = b.remote.Unchanged(ctx, httpOf(op), known.Validators); err != nil {
				return downloadResult{}, err
			}
		}
		if same {
			return downloadResult{download: known}, nil
		}
	}
	if b.CachedOnly {
		return downloadResult{}, ErrNotCached
	}
	if again {
		why = "--no-cache was given"
	}
	b.executed.Add(1)
	active, got, modified, err := b.fetchFile(ctx, op)
	if err != nil {
		return downloadResult{}, err
	}
	defer active.Discard()
	d := download{Validators: got}
	if got.LastModified != "" {
		d.Modified = &modified
	}
	id := newKey("http").str(got.Digest.String()).str(got.Filename).value(d.Modified).value(op.Mode).value([]int{op.UID, op.GID}).sum()
	if d.ID, err = active.Commit(ctx, snapshot.ID(id)); err != nil {
		return downloadResult{}, err
	}
	if _, err := b.created(d.ID); err != nil {
		return downloadResult{}, err
	}
	return downloadResult{d, true, why}, b.store.SetFact(downloaded(op), d, snapshot.OfSnapshot(d.ID))
}

// fetchFile begins a snapshot with the file that a server has.
func (b *build) fetchFile(ctx context.Context, op plan.HTTP) (active *snapshot.Active, got remote.Validators, modified time.Time, err error) {
	active, err = b.fill(ctx, func(dir string) (err error) {
		if got, modified, err = b.remote.Download(ctx, httpOf(op), dir); err != nil {
			return err
		}
		return b.own(filepath.Join(dir, got.Filename), op.UID, op.GID)
	})
	return active, got, modified, err
}

// own gives a file an owner, or records it where there is one id only.
func (b *build) own(name string, uid, gid int) error {
	if uid == 0 && gid == 0 {
		return nil
	}
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return layer.SetOwner(f, uid, gid, b.single)
}

// receive makes the snapshot of the archive that the caller sends as context.
func (b *build) receive(ctx context.Context, s plan.Step, op plan.Upload) (value, bool, error) {
	id, err := once(b, "upload", op, func() (snapshot.ID, error) {
		if b.CachedOnly {
			return "", ErrNotCached // it can be read once
		}
		if b.Upload == nil {
			return "", errors.New("no archive was sent as the build context")
		}
		active, err := b.store.Prepare(ctx, "")
		if err != nil {
			return "", err
		}
		defer active.Discard()
		sum := digest.Canonical.Digester()
		if err := writeFile(filepath.Join(active.Dir(), op.Filename), io.TeeReader(contextReader{ctx, b.Upload}, sum.Hash())); err != nil {
			return "", fmt.Errorf("receive the build context: %w", err)
		}
		return active.Commit(ctx, snapshot.ID(newKey("upload").str(op.Filename).str(sum.Digest().String()).sum()))
	})
	return value{id: id}, true, b.explainFetch(s, true, "the archive is received with each build", err)
}

// writeFile writes a file of a fixed time: the archive is a means, not a part of any image.
func writeFile(name string, r io.Reader) (err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := io.Copy(f, r); err != nil {
		return err
	}
	return os.Chtimes(name, time.Unix(0, 0), time.Unix(0, 0))
}

// contextReader ends with its context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := context.Cause(c.ctx); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// ReadFile gives the planner a file of a tree that steps make: the Dockerfile of a remote context.
func (b *build) ReadFile(ctx context.Context, steps []plan.Step, of plan.Ref, path string, limit int64) ([]byte, error) {
	values, err := b.solve(ctx, &plan.Graph{Steps: steps})
	if err != nil {
		return nil, err
	}
	id, err := b.snapshotOf(ctx, inputs{values}.of(of))
	if err != nil {
		return nil, err
	}
	if b.CachedOnly {
		return nil, ErrNotCached
	}
	view, err := b.store.View(ctx, id)
	if err != nil {
		return nil, err
	}
	defer view.Close()
	f, err := openIn(view.Dir(), path, unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "read", Path: path, Err: errors.New("not a regular file")}
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

// ResolveRevision tells the planner the state of a git or http source.
func (b *build) ResolveRevision(ctx context.Context, op plan.Op) (plan.Revision, error) {
	switch op := op.(type) {
	case plan.Git:
		c, err := b.commit(ctx, op)
		if err != nil {
			return plan.Revision{}, err
		}
		object, err := b.remote.CommitObject(ctx, b.gitOf(op), c)
		return plan.Revision{Commit: object}, err
	case plan.HTTP:
		d, _, err := b.download(ctx, op, false)
		return plan.Revision{Modified: d.Modified}, err
	}
	return plan.Revision{}, fmt.Errorf("a %T has no revision", op)
}

// newRemote is a client whose credentials are the secrets and agents of the request.
func (b *build) newRemote() *remote.Client {
	return remote.New(remote.Options{
		Proxy:     b.Registry.Proxy,
		UserAgent: b.Registry.UserAgent,
		Secret:    b.secret,
		TempDir:   b.Root,
		Agent: func(id string) (remote.Agent, error) {
			a := b.agent(id)
			if a == nil {
				return nil, noAgent(id)
			}
			return a.Source.Agent()
		},
		NewHostKey: func(host, fingerprint string) {
			b.note(fmt.Sprintf("the ssh server %s is taken for what it says it is, with the key %s: nothing here knows better", host, fingerprint))
		},
	})
}

func noAgent(id string) error {
	id = cmp.Or(id, "default")
	return hinted{fmt.Errorf("ssh agent %q was not given", id), fmt.Sprintf("pass --ssh %s (the agent at $SSH_AUTH_SOCK) or --ssh %[1]s=KEY", id)}
}

// agent is the source of an ssh agent, nil when it was not given.
func (b *build) agent(id string) *Agent {
	i := slices.IndexFunc(b.Agents, func(a Agent) bool { return a.ID == cmp.Or(id, "default") })
	if i < 0 {
		return nil
	}
	return &b.Agents[i]
}
