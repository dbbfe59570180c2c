package builder

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/snapshot"
)

// Limits say what Prune may remove. The zero value lets it remove all that it can without touching tagged images
// and the snapshots that they were made from.
type Limits struct {
	// Keep is how many bytes on disk may stay: the least recently used goes until no more are left. 0: as little as possible.
	Keep  int64
	All   bool          // also tagged images, what they were made from, and the quarantine
	Types []string      // of items, only these; none: every type
	Age   time.Duration // only what was not used for so long

	when  int64           // nothing goes while no more than this is there
	made  []digest.Digest // images that count as tagged
	young time.Duration   // an untagged image that was used since goes last, and only if that is enough
}

// A Pruned is what Prune did.
type Pruned struct {
	Removed []Item
	Freed   int64 // bytes on disk
	Left    int64
	Kept    int64 // of Left: the blobs of images that are tagged or were just made
	InUse   int   // items that would have gone if nobody used them
	Foreign int   // and those with files of subordinate ids that the user has no longer
}

// Prune removes the least recently used things from the store at root, never what a running build uses, and waits
// for no build. It must run inside [userns.Enter].
func Prune(ctx context.Context, root string, l Limits) (p *Pruned, err error) {
	if err := snapshot.CheckWritable(root); err != nil {
		return nil, err
	}
	h, err := keepHouse(root)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	free, err := h.store.Prune(ctx)
	if err != nil {
		return nil, err
	}
	defer free()
	return h.prune(ctx, l)
}

// justMade is for how long the limit of another build spares an untagged image, if there is a way: who has just made it may be
// about to use it.
const justMade = 2 * time.Minute

// trim keeps the store within its limit after a build that made some images. It is cheap as long as the store is thought to be.
func (b *build) trim(ctx context.Context, made ...digest.Digest) error {
	limit := b.KeepStorage
	if limit < 0 {
		return nil
	}
	if limit == 0 {
		var st unix.Statfs_t
		if err := unix.Statfs(b.Root, &st); err != nil {
			return fmt.Errorf("size of the file system of %s: %w", b.Root, err)
		}
		limit = defaultLimit(int64(st.Blocks) * int64(st.Bsize))
	}
	if disk, ok := b.store.Estimate(); ok && disk <= limit {
		return nil
	}
	h, err := keepHouse(b.Root)
	if err != nil {
		return err
	}
	free, ok, err := h.store.TryPrune()
	if err == nil && ok { // else another process is at it
		// A little more than asked for, so that not every build has to do it.
		var p *Pruned
		p, err = h.prune(ctx, Limits{Keep: limit - limit/10, when: limit, made: made, young: justMade})
		free()
		if err == nil && p.Left > limit {
			b.events.send(Event{Kind: Warned, Warning: &Warning{Rule: "Storage", Message: p.beyond(limit)}})
		}
	}
	return errors.Join(err, h.close())
}

// beyond says what holds the space in a store that could not be kept within its limit, and what helps.
func (p *Pruned) beyond(limit int64) string {
	size := func(n int64) string { return units.HumanSize(float64(n)) }
	what := fmt.Sprintf("the store takes %s, more than its limit of %s", size(p.Left), size(limit))
	if p.Kept > 0 {
		what += fmt.Sprintf("; tagged images and the one just made hold %s, which 'cooper prune --all' removes", size(p.Kept))
	}
	if p.InUse > 0 {
		what += fmt.Sprintf("; %d items are used by running builds", p.InUse)
	}
	return what + "; --keep-storage sets the limit"
}

// defaultLimit is a tenth of a file system. On a small one that would leave no build anything: there it is 2 GB, or half.
func defaultLimit(size int64) int64 { return max(size/10, min(2_000_000_000, size/2)) }

// A pruning is one run of prune.
type pruning struct {
	*housekeeper
	Limits
	inv    *inventory
	pruner *snapshot.Pruner
	blobs  *image.Remover
	before time.Time
	result Pruned
}

func (h *housekeeper) prune(ctx context.Context, l Limits) (*Pruned, error) {
	inv, err := h.inventory(ctx, l.made...)
	if err != nil {
		return nil, err
	}
	p := &pruning{
		housekeeper: h, Limits: l, inv: inv, pruner: h.store.Pruner(), blobs: h.content.Remover(), before: time.Now().Add(-l.Age),
	}
	p.result.Left = inv.total()
	if p.result.Left > l.when {
		if err := p.run(ctx); err != nil {
			return &p.result, err
		}
	}
	for _, b := range inv.blobs {
		if b.kept {
			p.result.Kept += b.Size.Disk
		}
	}
	return &p.result, h.store.Measured(p.result.Left)
}

func (p *pruning) run(ctx context.Context) error {
	// What nothing can find any more goes first, however much space there is.
	if err := p.each(ctx, func(i *Item) bool { return i.Unusable }, false); err != nil {
		return err
	}
	if err := p.freeBlobs(ctx); err != nil {
		return err
	}
	if err := p.store.DropKeys(); err != nil {
		return err
	}
	// Then what can be copied again.
	if err := p.each(ctx, func(i *Item) bool { return i.Type == TypeTree }, true); err != nil {
		return err
	}
	if err := p.each(ctx, func(i *Item) bool { return p.ordinary(i) && !p.isYoung(i) }, true); err != nil {
		return err
	}
	if !p.All && p.Keep == 0 {
		return p.finish(ctx)
	}
	// A limit that is still exceeded takes what images were made from, too: they can be pushed without.
	if err := p.each(ctx, func(i *Item) bool { return p.All || i.fromImage }, true); err != nil {
		return err
	}
	if err := p.freeBlobs(ctx); err != nil {
		return err
	}
	if p.youngSuffice() {
		if err := p.each(ctx, p.isYoung, true); err != nil {
			return err
		}
	}
	return p.finish(ctx)
}

// ordinary reports whether no tagged image would miss an item.
func (p *pruning) ordinary(i *Item) bool {
	return !i.fromImage && (i.Type != TypeImage || i.untagged) && i.Type != TypeQuarantine
}

func (p *pruning) isYoung(i *Item) bool {
	return i.untagged && p.young > 0 && time.Since(i.LastUsed) < p.young
}

// youngSuffice reports whether the limit can be met by the images that were just made: else they would go for nothing.
func (p *pruning) youngSuffice() bool {
	left := p.result.Left
	for _, b := range p.inv.blobs {
		if !b.kept && !b.InUse && p.inv.ties[b.digest] == 0 {
			left -= b.Size.Disk
		}
	}
	return left <= p.Keep
}

func (p *pruning) finish(ctx context.Context) error {
	return errors.Join(p.freeBlobs(ctx), p.store.DropKeys())
}

func (p *pruning) enough() bool { return p.Keep > 0 && p.result.Left <= p.Keep }

// each removes the items that fit, least recently used first, until enough is free.
func (p *pruning) each(ctx context.Context, fits func(*Item) bool, limited bool) error {
	var candidates []*Item
	for _, i := range p.inv.items {
		if fits(i) && i.Type != TypeBlob && p.asked(i) {
			candidates = append(candidates, i)
		}
	}
	// What stands on something goes before it: it was used no later, and is higher.
	slices.SortStableFunc(candidates, func(a, b *Item) int {
		return cmp.Or(a.LastUsed.Compare(b.LastUsed), cmp.Compare(b.height(), a.height()))
	})
	for _, i := range candidates {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if limited && p.enough() {
			return nil
		}
		if err := p.remove(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

func (i *Item) height() int {
	var n int
	i.below(func(*Item) { n++ })
	return n
}

// asked reports whether the filters let an item go.
func (p *pruning) asked(i *Item) bool {
	if len(p.Types) > 0 && !slices.Contains(p.Types, i.Type) {
		return false
	}
	// A time in the future counts as now. Facts that nothing can find have no use that could count.
	return p.Age == 0 || i.LastUsed.Before(p.before) || i.Unusable && i.Type == TypeFact
}

func (p *pruning) remove(ctx context.Context, i *Item) error {
	if i.InUse {
		p.result.InUse++
		return nil
	}
	switch i.Type {
	case TypeImage:
		return p.forget(i)
	case TypeFact:
		if !i.Unusable && len(i.entry.About) > 0 { // it goes with what it is about
			return nil
		}
	case TypeSnapshot:
		if i.above > 0 {
			return nil
		}
	case TypeQuarantine:
		if i.digest != "" {
			if err := p.content.EmptyQuarantine(); err != nil {
				return err
			}
			p.gone(i)
			return nil
		}
	}
	ok, err := p.pruner.Remove(i.entry)
	if errors.Is(err, snapshot.ErrForeign) {
		p.result.Foreign++
		return nil
	}
	if err != nil {
		return err
	}
	if !ok {
		p.result.InUse++
		return nil
	}
	p.gone(i)
	if i.Type != TypeSnapshot {
		return nil
	}
	for _, below := range i.parents {
		below.above--
	}
	var orphans []digest.Digest
	for _, d := range i.blobs {
		if p.inv.ties[d]--; p.inv.ties[d] == 0 {
			orphans = append(orphans, d)
		}
	}
	return p.dropWith(i, orphans)
}

// dropWith removes the facts about a snapshot that is gone, and the blobs that only it would have needed.
func (p *pruning) dropWith(s *Item, blobs []digest.Digest) error {
	for _, i := range slices.Clone(p.inv.items) {
		if i.Type != TypeFact || i.entry.IDMap != s.entry.IDMap ||
			!slices.ContainsFunc(i.entry.About, func(a snapshot.Subject) bool { return string(a.Snapshot) == s.ID }) {
			continue
		}
		ok, err := p.pruner.Remove(i.entry)
		if err != nil {
			return err
		}
		if ok {
			p.inv.drop(i)
			p.result.Freed += i.Size.Disk
			p.result.Left -= i.Size.Disk
		}
	}
	for _, d := range blobs {
		if err := p.removeBlob(p.inv.blobs[d]); err != nil {
			return err
		}
	}
	return nil
}

func (p *pruning) removeBlob(b *Item) error {
	if b == nil || b.InUse || len(p.Types) > 0 && !slices.Contains(p.Types, TypeBlob) && !slices.Contains(p.Types, TypeSnapshot) && !slices.Contains(p.Types, TypeImage) {
		return nil
	}
	ok, err := p.blobs.Remove(b.digest)
	if err == nil && ok {
		p.gone(b)
	}
	return err
}

// freeBlobs removes the blobs that neither an image nor a snapshot needs.
func (p *pruning) freeBlobs(ctx context.Context) error {
	for _, i := range slices.Clone(p.inv.items) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if i.Type != TypeBlob || p.inv.ties[i.digest] > 0 || p.Age > 0 && !i.LastUsed.Before(p.before) {
			continue
		}
		if err := p.removeBlob(i); err != nil {
			return err
		}
	}
	return nil
}

// forget removes the names of an image. Its blobs are free then, unless snapshots would need them.
func (p *pruning) forget(i *Item) error {
	forget := p.content.Forget
	if i.untagged {
		forget = p.content.ForgetUntagged
	}
	ok, err := forget(i.digest)
	if err = errors.Join(err, p.content.Release()); err != nil {
		return err
	}
	if !ok {
		p.result.InUse++
		return nil
	}
	p.inv.drop(i)
	p.result.Removed = append(p.result.Removed, *i)
	for _, b := range slices.Clone(p.inv.items) {
		if b.Type == TypeBlob && p.inv.ties[b.digest] == 0 && !(i.untagged && b.kept) {
			if err := p.removeBlob(b); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *pruning) gone(i *Item) {
	p.inv.drop(i)
	p.result.Removed = append(p.result.Removed, *i)
	p.result.Freed += i.Size.Disk
	p.result.Left -= i.Size.Disk
}

func (inv *inventory) drop(i *Item) {
	inv.items = slices.DeleteFunc(inv.items, func(o *Item) bool { return o == i })
	if i.Type == TypeBlob {
		delete(inv.blobs, i.digest)
	}
}
