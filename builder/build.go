// Package builder runs a build: it plans a Dockerfile, answers each step from the cache or runs it in a
// sandbox over a snapshot, assembles the image, judges it by policy, signs it and publishes it.
//
// It knows the order of things and nothing of how they are done: LLB stays in plan, registries in image,
// keys in sign, overlay mounts in snapshot, namespaces in sandbox. Build is the whole story.
package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/singleflight"

	"github.com/cooper-build/cooper/builder/files"
	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/policy"
	"github.com/cooper-build/cooper/builder/remote"
	"github.com/cooper-build/cooper/builder/sign"
	"github.com/cooper-build/cooper/builder/sshagent"
	"github.com/cooper-build/cooper/sandbox"
	"github.com/cooper-build/cooper/sandbox/egress"
	"github.com/cooper-build/cooper/sandbox/emulate"
	"github.com/cooper-build/cooper/sandbox/userns"
	"github.com/cooper-build/cooper/snapshot"
	"github.com/cooper-build/cooper/snapshot/layer"
)

// A Request is everything a build depends on. The zero value of every optional field is its default.
type Request struct {
	Plan     plan.Request
	Upload   io.Reader // the archive that is the context, when Plan.Context is [plan.Uploaded]
	Registry image.ClientOptions
	Root     string // the store's directory; created when missing

	Names       []string // normalised image names, each with its tag
	Annotations []Annotation
	Outputs     []Output // none: the image stays in the store under its names
	Push        bool     // also send the image to the registry of each name

	// Compression is that of our layers, and with ForceCompression also of those of the base, which otherwise stay as they
	// came.
	Compression      layer.Compression
	ForceCompression bool

	// NoImage says that nobody wants to know of an image: there is no output that carries one, nor anybody who asks for its
	// digest. None is made then, and no layer is kept: policy looks at them, unless it has nothing to look for.
	NoImage bool

	Policy  *policy.Policy
	Signer  sign.Signer // nil: unsigned
	Secrets []Secret
	Agents  []Agent
	Allow   Entitlements

	// Egress is what a RUN on the default network may connect to; empty is everything but what [egress] refuses by
	// default, this machine first of all. What Policy closes stays so.
	Egress []egress.Rule

	// Limits bound each RUN. They are no part of a step's cause: a step that ended within them gave what it gives without.
	Limits sandbox.Limits

	// Sandbox is what [userns.Enter] was asked for, which a CachedOnly build has to know as well; 0 is the best there is.
	Sandbox userns.Kind

	KnownHosts string // which keys ssh servers have, in the form of known_hosts(5)

	// Emulators are the directories in which QEMU is looked for when a RUN is for another architecture.
	Emulators []string

	// CachedOnly makes Build answer from the store alone and return ErrNotCached when a step would have to
	// run. It needs no user namespace, so a build without changes never enters one.
	CachedOnly bool
	Jobs       int // steps at a time; 0: two per processor and at least four, as steps also wait for disk and network

	// KeepStorage is how many bytes the store may take once the build has ended: more makes it remove what was used
	// least recently. 0: a tenth of its file system, more on a small one; negative: any number.
	KeepStorage int64

	// VerifyCache makes every step again that the store answered, and compares. The result stays what the store had.
	VerifyCache bool

	// Explain reports for every step why it ran, or that it did not have to: an Explained event each.
	Explain bool

	Events func(Event) // called from one goroutine at a time; nil: nobody watches
}

// A Secret is a value that RUN --mount=type=secret may read and that must not appear anywhere else.
type Secret struct {
	ID    string
	Value []byte
}

// An Agent is an ssh agent that RUN --mount=type=ssh and git sources may use to sign.
type Agent struct {
	ID     string
	Source *sshagent.Source
}

// Entitlements are what a Dockerfile gets only when the user allows it.
type Entitlements struct {
	NetworkHost      bool // RUN --network=host
	SecurityInsecure bool // RUN --security=insecure
}

// A Result is a finished build.
type Result struct {
	Image    ocispec.Descriptor   // the manifest, or the index
	Config   ocispec.Descriptor   // of the only image; zero when there is an index
	Targets  []ocispec.Descriptor // the manifests, in the order of the request's platforms
	Findings []policy.Finding     // what policy found and did not deny
	Warnings []plan.Warning       // of the build checks
	Executed int                  // steps that had to run
	Sandbox  userns.Kind          // what a RUN is kept in here
	Verified []Verified           // what VerifyCache found
}

// ErrNotCached is returned for a CachedOnly request that the store cannot answer.
var ErrNotCached = errors.New("not in the cache")

// Build builds, judges, signs and publishes one image. A nil error means every output is complete; a
// *plan.Error names the Dockerfile lines at fault; a *DeniedError lists what policy refused, and nothing has
// been written to any output then. A full build must run inside [userns.Enter].
func Build(ctx context.Context, r Request) (result *Result, err error) {
	if r.CachedOnly && r.VerifyCache {
		return nil, ErrNotCached
	}
	b, err := open(r)
	if err != nil {
		return nil, err
	}
	defer func() { err = b.aboutSpace(ctx, errors.Join(err, b.end(ctx, result, err == nil))) }()

	if b.look(); b.unmade && r.CachedOnly {
		return nil, ErrNotCached
	}
	graph, err := plan.Make(ctx, r.Plan, b)
	if err != nil {
		return nil, err
	}
	if r.Explain {
		b.dockerfile = aboutDockerfile(graph)
	}
	b.Plan.Epoch = graph.Epoch // the Dockerfile may set it, too
	b.warn(graph.Warnings)
	if err := b.allow(graph); err != nil {
		return nil, err
	}
	if err := b.allowSandbox(graph); err != nil {
		return nil, err
	}
	solved, err := b.solve(ctx, graph)
	if err != nil {
		return nil, err
	}
	verified, err := b.verifyHits(ctx)
	if err != nil {
		return nil, err
	}
	if b.treesOnly() {
		done, err := b.trees(ctx, graph, solved)
		if err != nil {
			return nil, err
		}
		return b.withoutImage(ctx, graph, done, nil, verified)
	}
	images, findings, err := b.judge(ctx, graph, solved)
	if err != nil {
		return nil, err
	}
	if b.NoImage {
		return b.withoutImage(ctx, graph, &finished{Index: graph.Index, Targets: images}, findings, verified)
	}
	done, err := b.combine(graph, images)
	if err != nil {
		return nil, err
	}
	artifacts, err := b.sign(ctx, done, findings)
	if err != nil {
		return nil, err
	}
	if err := b.publish(ctx, done, artifacts); err != nil {
		return nil, err
	}
	result = b.result(graph, done, findings)
	result.Verified = verified
	return result, nil
}

// withoutImage ends a build of which nobody wants an image.
func (b *build) withoutImage(ctx context.Context, g *plan.Graph, f *finished, findings []policy.Finding, verified []Verified) (*Result, error) {
	if err := b.publish(ctx, f, nil); err != nil {
		return nil, err
	}
	if b.Signer != nil {
		b.events.send(Event{Kind: Warned, Warning: &Warning{Rule: "Signing", Message: "nothing is signed: no output has an image that a signature could be of"}})
	}
	return &Result{Findings: findings, Warnings: g.Warnings, Executed: int(b.executed.Load()), Verified: verified, Sandbox: b.kind}, nil
}

// Ask answers a question about the Dockerfile of a request instead of building it.
func Ask(ctx context.Context, r Request, q plan.Question) (answer *plan.Answer, err error) {
	b, err := open(r)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	return plan.Ask(ctx, r.Plan, q, b)
}

func (b *build) result(g *plan.Graph, f *finished, findings []policy.Finding) *Result {
	r := &Result{Image: f.Image, Findings: findings, Warnings: g.Warnings, Executed: int(b.executed.Load()), Sandbox: b.kind}
	for _, img := range f.Targets {
		r.Targets = append(r.Targets, img.Manifest)
	}
	if !g.Index {
		r.Config = f.Targets[0].Blobs[0]
	}
	return r
}

// build is the state of one call of Build. Steps read it and report to it; none of them changes another's.
type build struct {
	Request
	bound   *egress.Bound // the policy's, of what a RUN may connect to
	store   *snapshot.Store
	content *image.Layout // blobs and local tags, beside the snapshots
	client  *image.Client
	hashes  *files.HashCache
	kind    userns.Kind
	single  bool         // one id only: ownership is recorded, not applied
	seen    snapshot.Key // of the Dockerfile, if it is at hand
	ends    []string     // what builds of it made of the layers
	fresh   bool         // no build of it has come to its end
	unmade  bool         // none of those that have makes what this one does
	scan    policy.ScanOptions
	scanKey string // stands for the values of the secrets in keys of scan results

	sources sync.Map // each an *image.Source, resolved once per build, by reference and platform and by digest

	flights    singleflight.Group // what several may want at once
	layerSlots chan struct{}      // taken while a base layer is unpacked

	remote   *remote.Client
	emulator *emulate.Emulator
	fetching sync.Map // what git and http sources were found to be, by operation

	counters
	events eventSink
	notes  sync.Map // of the sandbox, that were told
	told   sync.Map // the ids of steps that the watcher knows

	notebook   *notebook
	dockerfile dockerfile // for explanations, once it is planned
	explained  sync.Map   // the ids of steps that were

	hitsMu sync.Mutex
	hits   []hit // to be made again
}

func open(r Request) (*build, error) {
	m, inside := userns.Inside()
	if !inside {
		if !r.CachedOnly {
			return nil, errors.New("a build runs inside a user namespace: call userns.Enter first")
		}
		var err error
		if m, err = userns.Plan(userns.Options{Only: r.Sandbox}); err != nil {
			return nil, err
		}
	}
	if err := r.Compression.Check(); err != nil {
		return nil, err
	}
	if r.Jobs == 0 {
		r.Jobs = max(4, 2*runtime.NumCPU())
	}
	if r.Policy == nil {
		p, err := policy.Profile("default")
		if err != nil {
			return nil, err
		}
		r.Policy = p
	}
	bound, err := egressBound(r.Policy)
	if err != nil {
		return nil, err
	}
	store, err := snapshot.Open(r.Root, snapshot.Options{IDMap: m.String(), Single: m.Kind == userns.Single, Copying: m.Kind == userns.Chroot})
	if err != nil {
		return nil, err
	}
	content, err := image.CreateLayout(filepath.Join(r.Root, "content"))
	if err != nil {
		return nil, err
	}
	r.Registry.Documents = documents{store}
	b := &build{
		Request:    r,
		bound:      bound,
		store:      store,
		content:    content,
		client:     image.NewClient(r.Registry),
		kind:       m.Kind,
		single:     m.Kind == userns.Single,
		layerSlots: make(chan struct{}, min(r.Jobs, pullsAtOnce)),

		events: eventSink{watch: r.Events},
	}
	for _, secret := range r.Secrets {
		b.scan.Secrets = append(b.scan.Secrets, policy.Secret{ID: secret.ID, Value: secret.Value})
	}
	b.remote, b.emulator = b.newRemote(), emulate.New(r.Emulators)
	b.notebook = b.newNotebook()
	if b.scanKey, err = b.scan.Key(); err != nil {
		return nil, err
	}
	b.hashes, err = b.loadHashes()
	return b, err
}

// end closes the store and keeps it within its limit, but for the image that was just made. A build that succeeded stays one
// when that fails.
func (b *build) end(ctx context.Context, r *Result, succeeded bool) error {
	if succeeded && !b.CachedOnly {
		b.see()
	}
	if err := b.close(); err != nil || !succeeded || b.CachedOnly { // which added nothing
		return err
	}
	if err := b.trim(ctx, r.Image.Digest); err != nil {
		b.events.send(Event{Kind: Warned, Warning: &Warning{Rule: "Storage", Message: fmt.Sprintf("the store could not be kept within its limit: %v", err)}})
	}
	return nil
}

// close makes what was built survive a loss of power, and keeps what was learnt about the context's files; losing
// that only costs time.
func (b *build) close() error {
	b.saveHashes()
	b.saveJournals()
	b.remote.Close()
	_ = b.store.Grow(b.content.Written()) // an estimate
	return errors.Join(b.emulator.Close(), b.content.Close(), b.store.Close())
}

// epoch is the time that nothing in the image may be younger than, nil when the user set none.
func (b *build) epoch() *time.Time { return b.Plan.Epoch }

// secret returns the value of a build secret.
func (b *build) secret(id string) ([]byte, bool) {
	for _, s := range b.Secrets {
		if s.ID == id {
			return s.Value, true
		}
	}
	return nil, false
}

func (b *build) loadHashes() (*files.HashCache, error) {
	dir, err := filepath.Abs(b.Plan.Context)
	if err != nil {
		return nil, err
	}
	var saved []byte
	if _, err := b.store.Fact(hashesKey(dir), &saved); err != nil {
		return nil, fmt.Errorf("read remembered context hashes: %w", err)
	}
	return files.LoadHashCache(saved), nil
}

func (b *build) saveHashes() {
	dir, err := filepath.Abs(b.Plan.Context)
	if err != nil {
		return
	}
	if saved, changed := b.hashes.Save(); changed {
		_ = b.store.SetFact(hashesKey(dir), saved) // best effort: the next build reads the files again
	}
}
