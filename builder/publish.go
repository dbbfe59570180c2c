package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/files"
	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/policy"
	"github.com/cooper-build/cooper/builder/sign"
	"github.com/cooper-build/cooper/snapshot"
)

// An Output is where a finished image goes. It is one of [Layout], [Archive], [Stream], [DockerArchive], [Tree],
// [TreeTar] and [Nowhere].
type Output interface{ output() }

// Layout writes an OCI image layout directory.
type Layout struct{ Dir string }

// Archive writes an OCI image layout as one tar file.
type Archive struct{ File string }

// Stream writes the same tar to a writer.
type Stream struct{ To io.Writer }

// DockerArchive writes what docker load reads, to File or, when that is empty, to To.
type DockerArchive struct {
	File string
	To   io.Writer
}

// Tree writes the final root file system, with every file owned by the caller. That of an index has a directory for
// each platform, such as linux_arm64.
type Tree struct{ Dir string }

// TreeTar writes the final root file system as a tar, with the owners it has, to File or, when that is empty, to To.
type TreeTar struct {
	File string
	To   io.Writer
}

// Nowhere keeps the image out of everything but the cache.
type Nowhere struct{}

func (Layout) output()        {}
func (Archive) output()       {}
func (Stream) output()        {}
func (DockerArchive) output() {}
func (Tree) output()          {}
func (TreeTar) output()       {}
func (Nowhere) output()       {}

// sign signs the index, each manifest and the verdict on them.
func (b *build) sign(ctx context.Context, f *finished, findings []policy.Finding) ([]image.Artifact, error) {
	if b.Signer == nil {
		return nil, nil
	}
	verdict := sign.Verdict{Policy: b.Policy.Name(), PolicyDigest: b.Policy.Digest(), Sandbox: b.kind.Name(), Passed: true}
	for _, f := range findings {
		verdict.Findings = append(verdict.Findings, f.Rule+" "+string(f.Level)+": "+f.Message)
	}
	var artifacts []image.Artifact
	for _, d := range f.signed() {
		made, err := b.signOne(ctx, d, verdict)
		if err != nil {
			return nil, err
		}
		artifacts = append(artifacts, made...)
	}
	return artifacts, nil
}

// signed lists what gets signatures: whoever pulls one platform of an index sees only its manifest.
func (f *finished) signed() []ocispec.Descriptor {
	all := []ocispec.Descriptor{f.Image}
	for _, t := range f.Targets {
		if f.Index {
			all = append(all, t.Manifest)
		}
	}
	return all
}

func (b *build) signOne(ctx context.Context, d ocispec.Descriptor, verdict sign.Verdict) ([]image.Artifact, error) {
	at, err := b.signingTime(d, verdict)
	if err != nil {
		return nil, err
	}
	var artifacts []image.Artifact
	err = b.phase(ctx, "signing "+d.Digest.String(), func(ctx context.Context) error {
		made, err := sign.Attach(ctx, b.Signer, b.content, d, b.Names, verdict, at)
		for _, a := range made {
			artifacts = append(artifacts, image.Artifact{Subject: d.Digest, Descriptor: a.Descriptor, Tag: a.Tag, Referrer: a.Referrer})
		}
		return err
	})
	return artifacts, err
}

// signingTime is the epoch when there is one, else when the same was first signed with the same key: signatures are
// deterministic, so signing an image again gives the same artifacts and not one more set in the registry.
func (b *build) signingTime(d ocispec.Descriptor, v sign.Verdict) (time.Time, error) {
	if e := b.epoch(); e != nil {
		return *e, nil
	}
	signer, err := sign.Fingerprint(b.Signer.Public())
	if err != nil {
		return time.Time{}, err
	}
	key := newKey("signed").str(d.Digest.String()).str(signer.String()).value(b.Names).value(v).sum()
	var at time.Time
	ok, err := b.store.Fact(key, &at)
	if err != nil || ok {
		return at, err
	}
	at = time.Now().UTC()
	return at, b.store.SetFact(key, at, snapshot.OfBlob(d.Digest))
}

// treesOnly says that the end of the build are its steps, or what files they made.
func (b *build) treesOnly() bool { return b.NoImage && b.Policy.ForbidsNothing() }

// trees are the targets of a build without an image.
func (b *build) trees(ctx context.Context, g *plan.Graph, solved []value) (*finished, error) {
	f := &finished{Index: g.Index}
	for _, t := range g.Targets {
		root, err := b.snapshotOf(ctx, inputs{solved}.of(t.Result))
		if err != nil {
			return nil, err
		}
		p := t.Platform
		f.Targets = append(f.Targets, &assembled{Root: root, Manifest: ocispec.Descriptor{Platform: &p}})
	}
	return f, nil
}

// publish sends the image and its artifacts to every output, and its tags last.
func (b *build) publish(ctx context.Context, f *finished, artifacts []image.Artifact) error {
	p := image.Publication{Image: f.Image, Names: b.Names, Artifacts: artifacts}
	if b.CachedOnly && slices.ContainsFunc(b.Outputs, readsTree) {
		return ErrNotCached // reading files of other ids takes the namespace; nothing is written twice
	}
	for _, o := range b.Outputs {
		if err := b.output(ctx, o, f, p); err != nil {
			return &outputError{err, destinationOf(o)}
		}
	}
	if b.Push {
		for _, n := range b.Names {
			one := p
			one.Names = []string{n}
			if err := b.send(ctx, "pushing "+n, b.client.NewRegistrySink(), one); err != nil {
				return err
			}
		}
	}
	if len(b.Outputs) > 0 || b.Push {
		return nil
	}
	return b.send(ctx, "storing the image", image.NewStoreSink(b.content), p)
}

func readsTree(o Output) bool {
	switch o.(type) {
	case Tree, TreeTar:
		return true
	}
	return false
}

func (b *build) output(ctx context.Context, o Output, f *finished, p image.Publication) error {
	switch o := o.(type) {
	case Layout:
		return b.send(ctx, "exporting to OCI layout "+o.Dir, image.NewLayoutSink(o.Dir), p)
	case Archive:
		return b.send(ctx, "exporting to OCI archive "+o.File, image.NewArchiveSink(o.File), p)
	case Stream:
		return b.send(ctx, "writing an OCI archive", image.NewArchiveStream(o.To), p)
	case DockerArchive:
		if o.File == "" {
			return b.send(ctx, "writing a docker archive", image.NewDockerStream(o.To), p)
		}
		return b.send(ctx, "exporting to docker archive "+o.File, image.NewDockerSink(o.File), p)
	case Tree:
		return b.phase(ctx, "exporting files to "+o.Dir, func(ctx context.Context) error { return b.exportTree(ctx, f, o.Dir) })
	case TreeTar:
		return b.phase(ctx, "exporting files as a tar", func(ctx context.Context) error { return b.exportTar(ctx, f, o) })
	case Nowhere:
		return nil
	}
	return fmt.Errorf("no way to write to a %T", o)
}

func (b *build) send(ctx context.Context, name string, sink image.Sink, p image.Publication) error {
	return b.phase(ctx, name, func(ctx context.Context) error { return sink.Publish(ctx, b.content, p) })
}

func (b *build) exportTree(ctx context.Context, f *finished, dir string) error {
	for _, img := range f.Targets {
		to := dir
		if f.Index {
			to = filepath.Join(dir, platformDir(img))
		}
		if err := b.exportOne(ctx, img, to); err != nil {
			return fmt.Errorf("export to %s: %w", to, err)
		}
	}
	return nil
}

// platformDir is the directory that BuildKit's local exporter gives a platform.
func platformDir(img *assembled) string {
	return strings.ReplaceAll(platforms.Format(*img.Manifest.Platform), "/", "_")
}

func (b *build) exportOne(ctx context.Context, img *assembled, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	view, err := b.store.View(ctx, img.Root)
	if err != nil {
		return err
	}
	defer view.Close()
	all := whole("/")
	all.Owner = &plan.Owner{UID: os.Getuid(), GID: os.Getgid()}
	tree := func(plan.Ref) (files.Tree, error) { return shownBy(view), nil }
	if err := files.Apply(ctx, dir, []plan.Action{all}, tree, files.Options{Single: b.single}); err != nil {
		return err
	}
	for _, path := range img.Stripped {
		if err := dropPrivilege(dir, path); err != nil {
			return fmt.Errorf("take the privileges of /%s: %w", path, err)
		}
	}
	return nil
}

// dropPrivilege takes setuid, setgid and capabilities from a file beneath dir, and so from all names it has. A file
// that a later layer removed or replaced with something that cannot carry them has none.
func dropPrivilege(dir, path string) error {
	f, err := openIn(dir, path, unix.O_NOFOLLOW|unix.O_NONBLOCK)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := unix.Fremovexattr(int(f.Fd()), "security.capability"); err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOTSUP) {
		return err
	}
	return f.Chmod(info.Mode() &^ (os.ModeSetuid | os.ModeSetgid))
}
