package plan

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	gatewaypb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	fstypes "github.com/tonistiigi/fsutil/types"
)

// session takes the place of BuildKit's session id. It is part of what the
// frontend emits, so it must be the same in every run.
const session = "cooper"

// client is the daemon as the frontend sees it. It executes nothing: a solved
// definition is kept, and files can be read of one that is a local directory.
type client struct {
	opts     map[string]string
	file     string // name of the Dockerfile
	worker   ocispec.Platform
	contexts contexts
	resolver Resolver
	seen     *seen
}

// seen is what the frontend asked for and said.
type seen struct {
	mu         sync.Mutex
	dockerfile []byte                              // set before anything is asked
	asked      map[string]func() (resolved, error) // one answer for each image
	images     map[string]resolved                 // by imageKey
	unreadable error                               // the first file that is there and must not be read
	unresolved string                              // the last image that was not found
}

type resolved struct {
	ref    string
	digest digest.Digest
	config []byte
}

var _ gateway.Client = (*client)(nil)

func imageKey(id string, p ocispec.Platform) string {
	return id + " " + platforms.FormatAll(platforms.Normalize(p))
}

func (c *client) BuildOpts() gateway.BuildOpts {
	return gateway.BuildOpts{
		Opts:      c.opts,
		SessionID: session,
		Workers:   []gateway.WorkerInfo{{Platforms: []ocispec.Platform{c.worker}}},
		Product:   "cooper",
		LLBCaps:   pb.Caps.CapSet(pb.Caps.All()),
		Caps:      gatewaypb.Caps.CapSet(gatewaypb.Caps.All()),
	}
}

// ResolveImageConfig asks the Resolver. The reference it gives back has the
// digest, because the frontend does not add it to images of named contexts.
func (c *client) ResolveImageConfig(ctx context.Context, ref string, opt sourceresolver.Opt) (string, digest.Digest, []byte, error) {
	if o := opt.OCILayoutOpt; o != nil {
		ask, ok := c.contexts.layouts[o.Store.StoreID]
		if !ok {
			return "", "", nil, fmt.Errorf("no OCI layout was given for %s", ref)
		}
		r, err := c.resolve(ctx, ask, o.Platform)
		if err != nil {
			return "", "", nil, err
		}
		c.keep(imageKey(o.Store.StoreID, c.platform(o.Platform)), r)
		return ref, r.digest, r.config, nil
	}
	var p *ocispec.Platform
	if opt.ImageOpt != nil {
		p = opt.ImageOpt.Platform
	}
	r, err := c.resolve(ctx, ref, p)
	if err != nil {
		return "", "", nil, err
	}
	c.keep(imageKey(r.ref, c.platform(p)), r)
	return r.ref, r.digest, r.config, nil
}

// resolve asks once for each image, so that two stages on one tag always stand
// on the same digest.
func (c *client) resolve(ctx context.Context, ref string, p *ocispec.Platform) (resolved, error) {
	platform := c.platform(p)
	key := imageKey(ref, platform)
	c.seen.mu.Lock()
	answer, ok := c.seen.asked[key]
	if !ok {
		answer = sync.OnceValues(func() (resolved, error) { return c.ask(ctx, ref, platform) })
		c.seen.asked[key] = answer
	}
	c.seen.mu.Unlock()
	return answer()
}

func (c *client) ask(ctx context.Context, ref string, p ocispec.Platform) (resolved, error) {
	dgst, config, err := c.resolver.ResolveImage(ctx, ref, p)
	if err != nil {
		c.seen.mu.Lock()
		defer c.seen.mu.Unlock()
		c.seen.unresolved = ref
		return resolved{}, err
	}
	r := resolved{ref: ref, digest: dgst, config: config}
	if dgst == "" {
		return r, nil
	}
	if err := dgst.Validate(); err != nil {
		return resolved{}, fmt.Errorf("digest of %s: %w", ref, err)
	}
	if strings.HasPrefix(ref, "oci-layout://") {
		bare, _, _ := strings.Cut(ref, "@")
		r.ref = bare + "@" + dgst.String()
		return r, nil
	}
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return resolved{}, fmt.Errorf("image name %q: %w", ref, err)
	}
	pinned, err := reference.WithDigest(named, dgst)
	if err != nil {
		return resolved{}, fmt.Errorf("image name %q: %w", ref, err)
	}
	r.ref = pinned.String()
	return r, nil
}

func (c *client) platform(p *ocispec.Platform) ocispec.Platform {
	if p == nil {
		return c.worker
	}
	return *p
}

func (c *client) keep(key string, r resolved) {
	c.seen.mu.Lock()
	defer c.seen.mu.Unlock()
	c.seen.images[key] = r
}

// Solve keeps the definition.
func (c *client) Solve(_ context.Context, req gateway.SolveRequest) (*gateway.Result, error) {
	if req.Frontend != "" {
		return nil, fmt.Errorf("frontend %q is not built in", req.Frontend)
	}
	res := gateway.NewResult()
	res.SetRef(&definition{Definition: req.Definition, client: c})
	return res, nil
}

// ResolveSourceMetadata is asked for the time of a remote source that is to be
// the SOURCE_DATE_EPOCH.
func (c *client) ResolveSourceMetadata(ctx context.Context, op *pb.SourceOp, _ sourceresolver.Opt) (*sourceresolver.MetaResponse, error) {
	none := &unsupported{
		what: fmt.Sprintf("%s has no time that could be the SOURCE_DATE_EPOCH", op.GetIdentifier()),
		hint: "give SOURCE_DATE_EPOCH as a number of seconds",
	}
	if err := refuseSource(op); err != nil {
		return nil, none
	}
	source, err := newDecoder(c).source(op, c.worker)
	if err != nil {
		return nil, err
	}
	meta := &sourceresolver.MetaResponse{Op: op}
	switch source.(type) {
	case Git:
		r, err := c.resolver.ResolveRevision(ctx, source)
		if err != nil {
			return nil, err
		}
		meta.Git = &sourceresolver.ResolveGitResponse{CommitObject: r.Commit}
	case HTTP:
		r, err := c.resolver.ResolveRevision(ctx, source)
		if err != nil {
			return nil, err
		}
		meta.HTTP = &sourceresolver.ResolveHTTPResponse{LastModified: r.Modified}
	case Upload:
		meta.HTTP = &sourceresolver.ResolveHTTPResponse{}
	default:
		return nil, none
	}
	return meta, nil
}

func (c *client) Inputs(context.Context) (map[string]llb.State, error) { return nil, nil }

func (c *client) NewContainer(context.Context, gateway.NewContainerRequest) (gateway.Container, error) {
	return nil, errors.New("a frontend cannot run containers")
}

// Warn is never called: Make takes the findings before they become text.
func (c *client) Warn(context.Context, digest.Digest, string, gateway.WarnOpts) error { return nil }

// definition is a solve that was asked for and not done.
type definition struct {
	*pb.Definition
	client *client
}

var _ gateway.Reference = (*definition)(nil)

// local finds the directory that the definition is, if it is one.
func (d *definition) local() (local, bool, error) {
	if len(d.GetDef()) != 2 { // the source and the result
		return local{}, false, nil
	}
	var op pb.Op
	if err := op.UnmarshalVT(d.Def[0]); err != nil {
		return local{}, false, fmt.Errorf("decode source: %w", err)
	}
	name, ok := strings.CutPrefix(op.GetSource().GetIdentifier(), "local://")
	if !ok {
		return local{}, false, nil
	}
	l, ok := d.client.contexts.locals[name]
	if !ok {
		return local{}, false, fmt.Errorf("no directory was given for %q", name)
	}
	return l, true, nil
}

// ReadFile reads in a directory itself, and has the resolver make any other tree.
func (d *definition) ReadFile(ctx context.Context, req gateway.ReadRequest) ([]byte, error) {
	l, ok, err := d.local()
	if err != nil {
		return nil, err
	}
	if !ok {
		return d.readMade(ctx, req)
	}
	b, err := l.read(req.Filename)
	if err != nil {
		d.client.seen.failed(err)
		return nil, err
	}
	if r := req.Range; r != nil {
		b = b[min(r.Offset, len(b)):]
		b = b[:min(r.Length, len(b))]
	}
	return b, nil
}

func (d *definition) readMade(ctx context.Context, req gateway.ReadRequest) ([]byte, error) {
	made := newDecoder(d.client)
	of, err := made.add(d.Definition)
	if err != nil {
		return nil, err
	}
	limit, offset := int64(maxFile), 0
	if r := req.Range; r != nil {
		limit, offset = int64(r.Offset+r.Length), r.Offset
	}
	b, err := d.client.resolver.ReadFile(ctx, made.steps, of, req.Filename, limit)
	if err != nil {
		return nil, err
	}
	return b[min(offset, len(b)):], nil
}

// failed remembers a file that is there but was refused: the frontend would go
// on as if there were no .dockerignore, and build with what it must leave out.
func (s *seen) failed(err error) {
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unreadable == nil {
		s.unreadable = err
	}
}

// StatFile is asked for the size, before a file is read.
func (d *definition) StatFile(_ context.Context, req gateway.StatRequest) (*fstypes.Stat, error) {
	l, ok, err := d.local()
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, errors.New("the size is not known before it is read")
	}
	n, err := l.size(req.Path)
	if err != nil {
		d.client.seen.failed(err)
		return nil, err
	}
	return &fstypes.Stat{Path: req.Path, Size: n}, nil
}

func (d *definition) ReadDir(context.Context, gateway.ReadDirRequest) ([]*fstypes.Stat, error) {
	return nil, errors.New("a frontend cannot list directories")
}

func (d *definition) Evaluate(context.Context) error { return nil }

func (d *definition) ToState() (llb.State, error) {
	op, err := llb.NewDefinitionOp(d.Definition)
	if err != nil {
		return llb.State{}, err
	}
	return llb.NewState(op), nil
}
