package snapshot

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/opencontainers/go-digest"

	"github.com/cooper-build/cooper/ahead"
	"github.com/cooper-build/cooper/snapshot/layer"
)

// maxTrailer bounds what may follow a layer's end-of-archive mark. It is part of the DiffID, so it has
// to be read; tools pad to 10 KiB.
const maxTrailer = 64 << 20

// ChainID is the OCI chain id of a layer on top of a chain, or of a first layer for parent "".
func ChainID(parent ID, diffID digest.Digest) ID {
	if parent == "" {
		return ID(diffID)
	}
	return ID(digest.FromString(string(parent) + " " + string(diffID)))
}

// Unpacked is a layer that was unpacked and verified, on its way to be a snapshot. The layers below need
// not be there before Commit, so those of an image can be unpacked at the same time. It ends by exactly
// one of Commit, On and Discard, and belongs to one goroutine.
type Unpacked struct {
	active  *Active
	diffID  digest.Digest
	implied *layer.Implied
}

// Unpack unpacks an uncompressed layer stream. The stream is read to its end and must have the digest
// diffID; else, or when it is cut short, the store is as before.
func (s *Store) Unpack(ctx context.Context, diffID digest.Digest, tar io.Reader) (*Unpacked, error) {
	if err := diffID.Validate(); err != nil || diffID.Algorithm() != digest.SHA256 {
		return nil, fmt.Errorf("import layer: %.80q is no SHA-256 digest", string(diffID))
	}
	a, _, err := s.begin("")
	if err != nil {
		return nil, fmt.Errorf("import layer: %w", err)
	}
	u := &Unpacked{active: a, diffID: diffID}
	if err := u.fill(ctx, tar); err != nil {
		u.Discard()
		return nil, err
	}
	return u, nil
}

func (u *Unpacked) fill(ctx context.Context, tar io.Reader) error {
	hash := sha256.New()
	stream := ahead.New(io.TeeReader(tar, hash)) // hashes what comes next while this is unpacked
	defer stream.Close()
	var err error
	u.implied, err = layer.Unpack(ctx, u.active.upper(), stream, layer.UnpackOptions{Single: u.active.store.single})
	if err != nil {
		return fmt.Errorf("import layer %s: %w", u.diffID, err)
	}
	n, err := io.CopyN(io.Discard, stream, maxTrailer+1)
	if n > maxTrailer {
		return fmt.Errorf("import layer %s: more than %d bytes follow the end of the archive", u.diffID, maxTrailer)
	}
	if !errors.Is(err, io.EOF) {
		return fmt.Errorf("import layer %s: %w", u.diffID, err)
	}
	if got := asDigest(hash); got != u.diffID {
		return fmt.Errorf("import layer: its content is %s, the image promised %s", got, u.diffID)
	}
	return nil
}

// Commit makes the layer the snapshot on parent, or on nothing for "", and returns its chain id. When
// the store has that already, this one is dropped.
func (u *Unpacked) Commit(ctx context.Context, parent ID) (ID, error) {
	if err := u.land(parent); err != nil {
		u.Discard()
		return "", fmt.Errorf("import layer %s: %w", u.diffID, err)
	}
	return u.active.commit(ctx, ChainID(parent, u.diffID), meta{}, nil)
}

// land gives the directories that the layer says nothing about the attributes of those on parent.
func (u *Unpacked) land(parent ID) error {
	lower, err := u.active.place(parent)
	if err != nil {
		return err
	}
	if err := u.implied.Inherit(lower); err != nil {
		return err
	}
	if len(lower) == 0 || !u.implied.Root() {
		return nil
	}
	return layer.CopyAttributes(u.active.upper(), lower[0])
}

// On ends the layer as an Active on parent instead, for somebody who compares it. Nothing is mounted.
func (u *Unpacked) On(parent ID) (*Active, error) {
	if err := u.land(parent); err != nil {
		u.Discard()
		return nil, fmt.Errorf("unpack layer %s: %w", u.diffID, err)
	}
	return u.active, nil
}

// Discard forgets the layer. After Commit or Discard it does nothing.
func (u *Unpacked) Discard() error { return u.active.Discard() }

// WriteLayer writes the uncompressed layer that is id's own change set.
func (s *Store) WriteLayer(ctx context.Context, id ID, w io.Writer, o layer.DiffOptions) error {
	m, err := s.use(id)
	if err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	if m.Of != "" {
		id = m.Of
		if m, err = s.use(id); err != nil {
			return fmt.Errorf("write layer: %w", err)
		}
	}
	return s.writeLayer(ctx, filepath.Join(s.dir(id), "fs"), m.Parent, w, o)
}

func (s *Store) writeLayer(ctx context.Context, upper string, parent ID, w io.Writer, o layer.DiffOptions) error {
	below, err := s.layers(parent)
	if err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	o.Single = s.single
	o.Base = ""
	if len(below) > 0 {
		o.Base = below[0]
	}
	return layer.Diff(ctx, upper, w, o)
}

// ChangeSet returns the directory that is id's own change set, for somebody who makes links to its files. It stays until
// Close, and nothing in it may be changed.
func (s *Store) ChangeSet(id ID) (string, error) {
	m, err := s.use(id)
	if err != nil {
		return "", fmt.Errorf("change set: %w", err)
	}
	if m.Of != "" {
		id = m.Of
	}
	return filepath.Join(s.dir(id), "fs"), nil
}

// Squash makes one snapshot on base, or on nothing for "", whose change set equals those of ids in
// their order.
func (s *Store) Squash(ctx context.Context, base ID, ids []ID, as ID) (ID, error) {
	if s.Has(as) {
		return as, nil
	}
	a, lower, err := s.begin(base)
	if err != nil {
		return "", fmt.Errorf("squash snapshots: %w", err)
	}
	defer a.Discard()
	for _, id := range ids {
		if err := s.apply(ctx, a.upper(), lower, id); err != nil {
			return "", fmt.Errorf("squash snapshots: %w", err)
		}
	}
	if err := layer.DropIdleWhiteouts(a.upper(), lower); err != nil {
		return "", fmt.Errorf("squash snapshots: %w", err)
	}
	return a.Commit(ctx, as)
}

// apply applies the change set of id to a directory by way of its layer stream.
func (s *Store) apply(ctx context.Context, dir string, lower []string, id ID) error {
	r, w := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		w.CloseWithError(s.WriteLayer(ctx, id, w, layer.DiffOptions{}))
	}()
	implied, err := layer.Unpack(ctx, dir, r, layer.UnpackOptions{Single: s.single})
	r.Close()
	<-written
	if err != nil {
		return err
	}
	return implied.Inherit(lower)
}

// Reroot makes a snapshot on parent whose change set is that of id. No file is copied.
func (s *Store) Reroot(ctx context.Context, id ID, parent ID, as ID) (ID, error) {
	if s.Has(as) {
		return as, nil
	}
	m, err := s.use(id)
	if err != nil {
		return "", fmt.Errorf("reroot snapshot: %w", err)
	}
	of, made := id, m.Made
	if m.Of != "" {
		of, made = m.Of, m.OfMade
	}
	a, _, err := s.begin(parent)
	if err != nil {
		return "", fmt.Errorf("reroot snapshot: %w", err)
	}
	defer a.Discard()
	if err := s.keepRoot(a, of); err != nil {
		return "", fmt.Errorf("reroot snapshot: %w", err)
	}
	return a.commit(ctx, as, meta{Made: rand.Text(), Of: of, OfMade: made}, nil)
}

// keepRoot gives a's root the attributes of a change set that changed the root's.
func (s *Store) keepRoot(a *Active, of ID) error {
	m, err := s.use(of)
	if err != nil {
		return err
	}
	below, err := s.layers(m.Parent)
	if err != nil {
		return err
	}
	var base string
	if len(below) > 0 {
		base = below[0]
	}
	root := filepath.Join(s.dir(of), "fs")
	changed, err := layer.RootChanged(root, base)
	if err != nil || !changed {
		return err
	}
	return layer.CopyAttributes(a.upper(), root)
}
