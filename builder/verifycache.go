package builder

import (
	"archive/tar"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/snapshot"
	"github.com/cooper-build/cooper/snapshot/layer"
)

// A step whose result depends on more than its cause - the time, a random number, the order of a directory - gives
// another result when it runs again, and nobody notices as long as the store has the first. So does a store that was
// tampered with. VerifyCache finds both: each step that hit is made again from the same inputs, beside the store, and the
// two change sets are compared. The build goes on with what the store had.

// Verified is what came of making one step again.
type Verified struct {
	Name        string
	Line        int          // in the Dockerfile, 0 if there is none
	Differences []Difference // but for times; the first of them
	More        int          // differences that are not listed
	Times       int          // paths of which only the times differ
	Failed      error        // it could not be made again
	Unavailable bool         // because its source could not be reached, which says nothing about the result
}

// Same reports whether the step gave what the store has, times aside.
func (v Verified) Same() bool { return len(v.Differences) == 0 && v.Failed == nil }

// A Difference is one path that is not the same.
type Difference struct {
	Path string
	What string // such as "content, mode"
}

// fewDifferences is how many paths are listed of one step.
const fewDifferences = 10

// A rerun makes a step again and leaves the result to its caller to end.
type rerun func(ctx context.Context, w *watch) (*snapshot.Active, error)

// A hit is a step that the store answered.
type hit struct {
	step  plan.Step
	id    snapshot.ID
	again rerun
}

func (b *build) verifyLater(s plan.Step, id snapshot.ID, again rerun) {
	if !b.VerifyCache {
		return
	}
	b.hitsMu.Lock()
	defer b.hitsMu.Unlock()
	if !slices.ContainsFunc(b.hits, func(h hit) bool { return h.step.ID == s.ID && h.id == id }) {
		b.hits = append(b.hits, hit{s, id, again})
	}
}

// verifyHits makes all hits again, as many at a time as steps run. They do not wait for one another: the inputs of each
// are in the store.
func (b *build) verifyHits(ctx context.Context) ([]Verified, error) {
	found := make([]Verified, len(b.hits))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(b.Jobs)
	for i, h := range b.hits {
		group.Go(func() error {
			var err error
			found[i], err = b.verifyHit(ctx, h)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	slices.SortStableFunc(found, func(a, b Verified) int { return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Name, b.Name)) })
	return joinNames(found), nil
}

// joinNames makes one of what has one name: the layers of an image, and the source and the copy of an ADD.
func joinNames(all []Verified) []Verified {
	var out []Verified
	for _, v := range all {
		i := slices.IndexFunc(out, func(o Verified) bool { return o.Name == v.Name })
		if i < 0 {
			out = append(out, v)
			continue
		}
		o := &out[i]
		o.Differences, o.More, o.Times = append(o.Differences, v.Differences...), o.More+v.More, o.Times+v.Times
		switch {
		case v.Failed == nil:
		case o.Failed == nil:
			o.Failed, o.Unavailable = v.Failed, v.Unavailable
		default:
			o.Failed, o.Unavailable = errors.Join(o.Failed, v.Failed), o.Unavailable && v.Unavailable
		}
	}
	return out
}

func (b *build) verifyHit(ctx context.Context, h hit) (Verified, error) {
	v := Verified{Name: h.step.Name, Line: h.step.Where.Line()}
	w := &watch{b: b, step: "verify " + h.step.ID + string(h.id), name: "verify " + h.step.Name}
	w.send(Event{Kind: Started})
	defer func() { w.send(Event{Kind: Done}) }()
	active, err := h.again(ctx, w)
	if ctx.Err() != nil {
		if err == nil {
			active.Discard()
		}
		return v, context.Cause(ctx)
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return v, located(h.step, err) // the machine's fault, not the step's
	}
	if err != nil {
		v.Failed = err
		switch h.step.Op.(type) {
		case plan.Git, plan.HTTP:
			v.Unavailable = true
		}
		return v, nil
	}
	defer active.Discard()
	if err := active.Freeze(ctx); err != nil {
		return v, err
	}
	return v, b.compare(ctx, &v, h.id, active)
}

func (b *build) compare(ctx context.Context, v *Verified, id snapshot.ID, active *snapshot.Active) error {
	o := layer.DiffOptions{Epoch: b.epoch()}
	before, err := entriesOf(func(w io.Writer) error { return b.store.WriteLayer(ctx, id, w, o) })
	if err != nil {
		return err
	}
	now, err := entriesOf(func(w io.Writer) error { return active.WriteLayer(ctx, w, o) })
	if err != nil {
		return err
	}
	mask, _ := b.masker()
	for _, name := range union(before, now) {
		was, had := before[name]
		is, has := now[name]
		var what string
		switch {
		case !has:
			what = "only in the store"
		case !had:
			what = "only when made again"
		default:
			what = strings.Join(was.differ(is), ", ")
		}
		switch {
		case what == "":
		case what == timeOnly:
			v.Times++
		case len(v.Differences) == fewDifferences:
			v.More++
		default:
			v.Differences = append(v.Differences, Difference{string(mask([]byte("/" + name))), what})
		}
	}
	return nil
}

const timeOnly = "time"

// A layerEntry is what one entry of a layer says.
type layerEntry struct {
	kind         byte
	mode         int64
	uid, gid     int
	link         string
	major, minor int64
	time         int64
	attributes   map[string]string
	sum          [sha256.Size]byte
}

// entriesOf reads the layer that write writes.
func entriesOf(write func(io.Writer) error) (map[string]layerEntry, error) {
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.CloseWithError(write(w))
	}()
	entries, err := readEntries(tar.NewReader(r))
	if err == nil {
		_, err = io.Copy(io.Discard, r)
	}
	r.CloseWithError(err)
	<-done
	return entries, err
}

func readEntries(t *tar.Reader) (map[string]layerEntry, error) {
	entries := map[string]layerEntry{}
	buffer := make([]byte, 256<<10)
	for {
		h, err := t.Next()
		if err == io.EOF {
			return entries, nil
		}
		if err != nil {
			return nil, err
		}
		e := layerEntry{
			kind: h.Typeflag, mode: h.Mode, uid: h.Uid, gid: h.Gid, link: h.Linkname, major: h.Devmajor, minor: h.Devminor,
			time: h.ModTime.UnixNano(), attributes: map[string]string{},
		}
		for name, value := range h.PAXRecords {
			if strings.HasPrefix(name, "SCHILY.xattr.") {
				e.attributes[name] = value
			}
		}
		sum := sha256.New()
		if _, err := io.CopyBuffer(sum, struct{ io.Reader }{t}, buffer); err != nil {
			return nil, err
		}
		sum.Sum(e.sum[:0])
		entries[path.Clean(h.Name)] = e
	}
}

// differ names what is not the same.
func (e layerEntry) differ(o layerEntry) []string {
	var what []string
	for _, c := range []struct {
		name string
		same bool
	}{
		{"type", e.kind == o.kind && e.major == o.major && e.minor == o.minor},
		{"content", e.sum == o.sum},
		{"link target", e.link == o.link},
		{"mode", e.mode == o.mode},
		{"owner", e.uid == o.uid && e.gid == o.gid},
		{"attributes", maps.Equal(e.attributes, o.attributes)},
		{timeOnly, e.time == o.time},
	} {
		if !c.same {
			what = append(what, c.name)
		}
	}
	return what
}

// unpackAgain makes a base layer again from its blob, which is verified while it is read.
func (b *build) unpackAgain(l sourceLayer) rerun {
	return func(ctx context.Context, _ *watch) (*snapshot.Active, error) {
		blob, err := b.content.Open(l.blob)
		if err != nil {
			return nil, err
		}
		defer blob.Close()
		stream, err := layer.Decompress(blob)
		if err != nil {
			return nil, err
		}
		defer stream.Close()
		unpacked, err := b.store.Unpack(ctx, l.diffID, stream)
		if err != nil {
			return nil, err
		}
		return unpacked.On(l.below)
	}
}

// emptyCaches gives cache mounts directories of this RUN alone: a result must not depend on what a cache holds, and the
// caches stay what they are.
func (m *mounter) emptyCaches(_ context.Context, mounts []plan.Mount) error {
	m.caches = map[string]string{}
	for _, p := range mounts {
		if p.Kind != plan.MountCache || m.caches[p.ID] != "" {
			continue
		}
		dir := filepath.Join(m.dir, fmt.Sprintf("cache%d", len(m.caches)))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		m.caches[p.ID] = dir
	}
	return nil
}
