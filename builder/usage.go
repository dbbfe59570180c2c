package builder

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/sandbox/userns"
	"github.com/cooper-build/cooper/snapshot"
)

// Item types.
const (
	TypeSnapshot   = "snapshot"
	TypeCache      = "cache mount"
	TypeImage      = "image"
	TypeBlob       = "blob"
	TypeFact       = "fact"
	TypeTree       = "tree" // a copy of a snapshot, to go on from
	TypeQuarantine = "quarantine"
)

// An Item is one thing in the store that takes space.
type Item struct {
	Type        string
	ID          string
	Description string
	Parents     []string
	Size        snapshot.Size
	LastUsed    time.Time
	InUse       bool     // by a running process
	Images      []string // the tagged images that need it or were made from it
	Shared      bool     // by several of those, or by several snapshots
	Reclaimable bool     // prune without --all would remove it
	Unusable    bool     // damaged, or something that it needs is gone: nothing will ever find it

	entry     snapshot.Entry
	digest    digest.Digest
	untagged  bool // an image that has no tag and was not just made
	kept      bool // a blob of an image that is tagged or in use
	fromImage bool // a snapshot that a tagged image was made from
	parents   []*Item
	above     int             // snapshots standing on it that are still there
	blobs     []digest.Digest // that a snapshot would need again
}

// A housekeeper looks at a store as a whole: what there is, what belongs together, what may go.
type housekeeper struct {
	store   *snapshot.Store
	content *image.Layout
}

// keepHouse opens a store for that. It must run inside [userns.Enter], as files have owners of their own.
func keepHouse(root string) (*housekeeper, error) {
	m, inside := userns.Inside()
	if !inside {
		return nil, errors.New("the store's files are looked after inside a user namespace: call userns.Enter first")
	}
	store, err := snapshot.Open(root, snapshot.Options{IDMap: m.String(), Single: m.Kind == userns.Single, Copying: m.Kind == userns.Chroot})
	if err != nil {
		return nil, err
	}
	content, err := image.CreateLayout(filepath.Join(root, "content"))
	if err != nil {
		return nil, errors.Join(err, store.Close())
	}
	return &housekeeper{store, content}, nil
}

func (h *housekeeper) close() error { return errors.Join(h.content.Close(), h.store.Close()) }

// Usage lists what takes space in the store at root, snapshots and the rest by last use. It must run inside
// [userns.Enter].
func Usage(ctx context.Context, root string) (items []Item, err error) {
	h, err := keepHouse(root)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	inv, err := h.inventory(ctx)
	if err != nil {
		return nil, err
	}
	_ = h.store.Measured(inv.total()) // an estimate; what cannot be written to can still be listed
	for _, i := range inv.items {
		items = append(items, *i)
	}
	slices.SortStableFunc(items, func(a, b Item) int {
		return cmp.Or(cmp.Compare(typeOrder(a.Type), typeOrder(b.Type)), b.LastUsed.Compare(a.LastUsed), cmp.Compare(a.ID, b.ID))
	})
	return items, nil
}

func typeOrder(t string) int {
	return slices.Index([]string{TypeImage, TypeSnapshot, TypeCache, TypeBlob, TypeFact, TypeTree, TypeQuarantine}, t)
}

// An inventory is everything in a store and how it hangs together.
type inventory struct {
	items     []*Item
	snapshots map[string]*Item // by id map and id
	blobs     map[digest.Digest]*Item
	images    map[digest.Digest][]*Item // by the manifests that they consist of
	ties      map[digest.Digest]int     // snapshots that would need a blob again
}

func (inv *inventory) total() int64 {
	var sum int64
	for _, i := range inv.items {
		if i.Type != TypeImage { // its blobs count
			sum += i.Size.Disk
		}
	}
	return sum
}

// inventory looks at everything. Images that were just made count as tagged.
func (h *housekeeper) inventory(ctx context.Context, made ...digest.Digest) (*inventory, error) {
	inv := &inventory{
		snapshots: map[string]*Item{}, blobs: map[digest.Digest]*Item{},
		images: map[digest.Digest][]*Item{}, ties: map[digest.Digest]int{},
	}
	// Facts tie blobs to snapshots, so blobs are listed first: one that is written meanwhile is nobody's candidate.
	if err := h.addContent(inv, made); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	entries, err := h.store.List()
	if err != nil {
		return nil, err
	}
	var facts []snapshot.Entry
	for _, e := range entries {
		switch e.Kind {
		case snapshot.KindSnapshot:
			inv.addSnapshot(e)
		case snapshot.KindFact:
			facts = append(facts, e)
		case snapshot.KindCache:
			id := strings.TrimPrefix(e.Name, "/") // BuildKit sets it before the id, after a name space that we have not
			inv.add(&Item{Type: TypeCache, ID: id, Description: "RUN --mount=type=cache,id=" + id, Reclaimable: !e.InUse}, e)
		case snapshot.KindTree:
			inv.add(&Item{Type: TypeTree, ID: e.Name, Description: "a copy to go on from", Parents: []string{e.Name}, Reclaimable: true}, e)
		case snapshot.KindQuarantine:
			inv.add(&Item{Type: TypeQuarantine, ID: e.Name, Description: "moved away by verify"}, e)
		}
	}
	inv.connect()
	for _, e := range facts {
		inv.addFact(e)
	}
	inv.judge()
	return inv, nil
}

func (inv *inventory) add(i *Item, e snapshot.Entry) {
	i.entry, i.Size, i.LastUsed, i.InUse, i.Unusable = e, e.Size, e.Used, e.InUse, !e.Usable && e.Kind != snapshot.KindQuarantine
	inv.items = append(inv.items, i)
}

func (h *housekeeper) addContent(inv *inventory, made []digest.Digest) error {
	blobs, err := h.content.Blobs()
	if err != nil {
		return err
	}
	for _, b := range blobs {
		i := &Item{
			Type: TypeBlob, ID: b.Digest.String(), digest: b.Digest, Size: snapshot.Size{Disk: b.Disk, Bytes: b.Bytes},
			LastUsed: b.Written, InUse: b.InUse,
		}
		if b.Reachable {
			i.Description = "of an image"
		}
		inv.blobs[b.Digest] = i
		inv.items = append(inv.items, i)
	}
	if err = h.addImages(inv, made); err != nil {
		return err
	}
	broken, err := h.content.Quarantine()
	if err != nil {
		return err
	}
	for _, b := range broken {
		inv.items = append(inv.items, &Item{
			Type: TypeQuarantine, ID: b.Digest.String(), Description: "a blob with wrong bytes", digest: b.Digest,
			Size: snapshot.Size{Disk: b.Disk, Bytes: b.Bytes}, LastUsed: b.Written,
		})
	}
	return nil
}

// addImages adds the images, and says of the blobs which must stay for them. An untagged one keeps nothing, unless
// somebody uses it or it was just made.
func (h *housekeeper) addImages(inv *inventory, made []digest.Digest) (err error) {
	defer func() { err = errors.Join(err, h.content.Release()) }()
	images, err := h.content.List()
	if err != nil {
		return err
	}
	leaving, seen := map[digest.Digest]bool{}, map[digest.Digest]*Item{}
	for _, e := range images {
		i := seen[e.Digest]
		if i == nil {
			i = &Item{Type: TypeImage, ID: e.Digest.String(), digest: e.Digest, Size: snapshot.Size{Disk: e.Size, Bytes: e.Size}}
			if b := inv.blobs[e.Digest]; b != nil {
				i.LastUsed, i.InUse = b.LastUsed, b.InUse
			}
			for _, part := range e.Parts { // what an image of an index was made from, the index was made from
				inv.images[part] = append(inv.images[part], i)
			}
			seen[e.Digest] = i
			inv.items = append(inv.items, i)
		}
		if e.Name == "" {
			i.untagged, i.Description = !slices.Contains(made, e.Digest), "<none>"
			i.Reclaimable = i.untagged && !i.InUse
			leaving[e.Digest] = i.Reclaimable
			continue
		}
		i.Images = append(i.Images, e.Name)
		i.Description = strings.Join(i.Images, " ")
	}
	kept, err := h.content.Without(leaving)
	if err != nil {
		return err
	}
	for _, b := range inv.blobs {
		b.kept = kept[b.digest]
	}
	return nil
}

func snapshotKey(idMap string, id snapshot.ID) string { return idMap + "/" + string(id) }

func (inv *inventory) addSnapshot(e snapshot.Entry) {
	i := &Item{Type: TypeSnapshot, ID: e.Name, Description: "a step"}
	if strings.HasPrefix(e.Name, "sha256:") {
		i.Description = "a layer of a base image"
	}
	for _, n := range e.Needs {
		i.Parents = append(i.Parents, string(n))
	}
	inv.snapshots[snapshotKey(e.IDMap, snapshot.ID(e.Name))] = i
	inv.add(i, e)
}

// connect finds what stands on what, and lets every snapshot have been used when something above it was.
func (inv *inventory) connect() {
	for _, i := range inv.snapshots {
		for _, n := range i.entry.Needs {
			if p := inv.snapshots[snapshotKey(i.entry.IDMap, n)]; p != nil {
				i.parents = append(i.parents, p)
				p.above++
				p.Shared = p.above > 1
			}
		}
	}
	for _, i := range inv.snapshots {
		used := i.LastUsed
		i.below(func(p *Item) {
			if p.LastUsed.Before(used) {
				p.LastUsed = used
			}
		})
	}
}

// below calls do for everything that i stands on, each once.
func (i *Item) below(do func(*Item)) {
	seen := map[*Item]bool{i: true}
	for todo := slices.Clone(i.parents); len(todo) > 0; todo = todo[1:] {
		p := todo[0]
		if !seen[p] {
			seen[p] = true
			do(p)
			todo = append(todo, p.parents...)
		}
	}
}

// addFact ties what a fact is about together. A fact about something that is gone ties nothing.
func (inv *inventory) addFact(e snapshot.Entry) {
	i := &Item{Type: TypeFact, ID: e.Name}
	var about []*Item
	var blobs []digest.Digest
	for _, a := range e.About {
		if a.Snapshot != "" {
			if s := inv.snapshots[snapshotKey(e.IDMap, a.Snapshot)]; s != nil {
				about = append(about, s)
				i.Parents = append(i.Parents, string(a.Snapshot))
			}
		}
		if a.Blob != "" {
			blobs = append(blobs, a.Blob)
			if inv.blobs[a.Blob] == nil {
				e.Usable = false
			}
		}
	}
	inv.add(i, e)
	if !e.Usable {
		return
	}
	// The fact of an image names its manifest and its config, at least. Layers alone may be those of another image.
	ofImage := len(blobs) > 1 && !slices.ContainsFunc(blobs, func(d digest.Digest) bool { return !inv.blobs[d].kept })
	for _, s := range about {
		s.blobs = append(s.blobs, blobs...)
		s.fromImage = s.fromImage || ofImage
		for _, b := range blobs {
			inv.ties[b]++
			for _, img := range inv.images[b] {
				s.Images = append(s.Images, img.Images...)
				if img.LastUsed.Before(s.LastUsed) {
					img.LastUsed = s.LastUsed
				}
			}
		}
	}
}

// spreadImages gives what a snapshot stands on the images that it is in itself, so that none is passed on twice: a chain of
// many steps would double their number at every one.
func (inv *inventory) spreadImages() {
	own := map[*Item][]string{}
	var fromImage []*Item
	for _, i := range inv.snapshots {
		own[i] = slices.Compact(slices.Sorted(slices.Values(i.Images)))
		if i.fromImage {
			fromImage = append(fromImage, i)
		}
	}
	for _, i := range fromImage {
		i.below(func(p *Item) { p.fromImage = true })
	}
	for i, images := range own {
		if len(images) == 0 {
			continue
		}
		i.below(func(p *Item) {
			for _, name := range images {
				if !slices.Contains(p.Images, name) {
					p.Images = append(p.Images, name)
				}
			}
		})
	}
}

// judge decides what prune would remove, now that everything is known.
func (inv *inventory) judge() {
	inv.spreadImages()
	needed := map[*Item]bool{} // by something that stays
	for _, i := range inv.snapshots {
		i.Images = slices.Compact(slices.Sorted(slices.Values(i.Images)))
		i.Shared = i.Shared || len(i.Images) > 1
		if i.InUse || i.fromImage {
			needed[i] = true
			i.below(func(p *Item) { needed[p] = true })
		}
	}
	for _, i := range inv.snapshots {
		i.Reclaimable = !needed[i]
		if len(i.Images) > 0 {
			i.Description += " of " + strings.Join(i.Images, " ")
		}
	}
	for _, b := range inv.blobs {
		b.Reclaimable = !b.InUse && !b.kept
	}
	for _, i := range inv.snapshots {
		for _, d := range i.blobs {
			if b := inv.blobs[d]; b != nil && !b.kept {
				b.Parents = append(b.Parents, i.ID)
				b.Reclaimable = b.Reclaimable && i.Reclaimable
				if b.LastUsed.Before(i.LastUsed) {
					b.LastUsed = i.LastUsed
				}
			}
		}
	}
	for _, i := range inv.items {
		if i.Type == TypeBlob && i.Description == "" {
			i.Description = "of snapshots"
			if inv.ties[i.digest] == 0 {
				i.Description = "nobody's"
			}
		}
		if i.Type == TypeFact {
			i.Description, i.Reclaimable = "about something else", true
			for _, p := range i.Parents {
				i.Description = "about a snapshot"
				if s := inv.snapshots[snapshotKey(i.entry.IDMap, snapshot.ID(p))]; s != nil {
					i.Reclaimable = i.Reclaimable && s.Reclaimable
				}
			}
			i.Parents = nil
		}
	}
}

// A Total sums up a list of items.
type Total struct{ All, Reclaimable, Shared int64 }

// Sum sums up a list of items. Images count as their blobs.
func Sum(items []Item) Total {
	var t Total
	for _, i := range items {
		if i.Type == TypeImage {
			continue
		}
		t.All += i.Size.Disk
		if i.Reclaimable {
			t.Reclaimable += i.Size.Disk
		}
		if i.Shared {
			t.Shared += i.Size.Disk
		}
	}
	return t
}

// types are the item types by the names that people may give, which include those of docker buildx.
func types() map[string]string {
	return map[string]string{
		"snapshot": TypeSnapshot, "regular": TypeSnapshot,
		"cache": TypeCache, "cachemount": TypeCache, "exec.cachemount": TypeCache,
		"image": TypeImage, "blob": TypeBlob, "fact": TypeFact, "tree": TypeTree, "quarantine": TypeQuarantine,
	}
}

// ParseType returns the item type that people call name.
func ParseType(name string) (string, error) {
	t, ok := types()[name]
	if !ok {
		return "", fmt.Errorf("type %q is none of %s", name, strings.Join(slices.Sorted(maps.Keys(types())), ", "))
	}
	return t, nil
}
