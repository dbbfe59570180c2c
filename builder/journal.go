package builder

import (
	"path/filepath"
	"slices"
	"sync"

	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/snapshot"
)

// A journal lists the steps that had to run, newest first, so that a step which misses the cache can be compared with what
// it was before, and its result with what it gave. There is one for each Dockerfile, and one for the whole store, in which a step is found again after
// its Dockerfile was moved, such as by a runner that makes a new directory for each checkout.
type journal struct {
	Entries []journalEntry
}

type journalEntry struct {
	place
	Kind string       `json:"kind"` // of the cause
	Key  snapshot.Key `json:"key"`  // of the cause, and of its record
}

const (
	perStep   = 4    // how many causes of one step a journal remembers
	perFile   = 4096 // entries of the journal of a Dockerfile
	perStore  = 512  // entries of that of the store
	tryAtMost = 16   // records that one explanation reads
)

// A notebook is the journals as one build sees them, and what it will add.
type notebook struct {
	mu    sync.Mutex
	added []journalEntry
	load  func() (own, store journal)
}

func (n *notebook) add(e journalEntry) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.added = append(n.added, e)
}

func (b *build) journalKeys() (own, store snapshot.Key) {
	dir, file := b.Plan.Context, b.Plan.Dockerfile
	if abs, err := filepath.Abs(dir); err == nil && !plan.IsRemote(dir) {
		dir = abs
	}
	return newKey("journal of a Dockerfile").str(dir).str(file).sum(), newKey("journal of the store").sum()
}

// newNotebook reads the journals when they are first asked for. They only help to explain: what cannot be read is empty.
func (b *build) newNotebook() *notebook {
	return &notebook{load: sync.OnceValues(func() (own, store journal) {
		ownKey, storeKey := b.journalKeys()
		_, _ = b.store.Fact(ownKey, &own)
		_, _ = b.store.Fact(storeKey, &store)
		return own, store
	})}
}

// saveJournals adds the steps that ran. Of two builds that end at the same time one may be forgotten: that costs a worse
// explanation.
func (b *build) saveJournals() {
	b.notebook.mu.Lock()
	defer b.notebook.mu.Unlock()
	if len(b.notebook.added) == 0 {
		return
	}
	own, store := b.notebook.load()
	ownKey, storeKey := b.journalKeys()
	_ = b.store.SetFact(ownKey, own.with(b.notebook.added, perFile))
	_ = b.store.SetFact(storeKey, store.with(b.notebook.added, perStore))
}

// with puts new entries in front, and forgets the oldest of each step and of all.
func (j journal) with(added []journalEntry, limit int) journal {
	var out []journalEntry
	seen := map[snapshot.Key]bool{}
	count := map[place]int{}
	fresh := slices.Clone(added)
	slices.Reverse(fresh)
	for _, e := range append(fresh, j.Entries...) {
		step := place{Stage: e.Stage, At: e.At}
		if seen[e.Key] || count[step] == perStep || len(out) == limit {
			continue
		}
		seen[e.Key] = true
		count[step]++
		out = append(out, e)
	}
	return journal{out}
}

// likeness says how sure it is that an entry was the same step, 0 the most.
type likeness int

const (
	sameText  likeness = iota // in the same stage of this Dockerfile
	edited                    // the place is the same, and what stood there is gone
	movedText                 // in another stage
	elsewhere                 // in another Dockerfile
	alike                     // the same place of what may be this Dockerfile, elsewhere: only if most of it is the same
	unlike
)

// compare tells what an entry is to the step at p. there says whether a text is in the Dockerfile now.
func (e journalEntry) compare(p place, ofStore bool, there func(place) bool) likeness {
	same := e.Stage == p.Stage && e.At == p.At
	switch {
	case !ofStore && e.Text == p.Text && e.Stage == p.Stage:
		return sameText
	case !ofStore && same && !there(e.place):
		return edited
	case !ofStore && e.Text == p.Text:
		return movedText
	case ofStore && e.Text == p.Text:
		return elsewhere
	case ofStore && same && !there(e.place):
		return alike
	}
	return unlike
}

// nearest returns the record of the earlier cause that is most like c, or nil. known says whether there was any, and again
// whether it was c itself.
func (b *build) nearest(s plan.Step, c *cause) (best *causeRecord, known, again bool) {
	own, store := b.notebook.load()
	at, key := placeOf(s), c.key()
	ranked := map[likeness][]snapshot.Key{}
	for i, j := range []journal{own, store} {
		for _, e := range j.Entries {
			if e.Key == key {
				return nil, true, true
			}
			if e.Kind != c.kind {
				continue
			}
			if l := e.compare(at, i == 1, b.dockerfile.has); l != unlike {
				ranked[l] = append(ranked[l], e.Key)
			}
		}
	}
	now := b.describe(c)
	left := tryAtMost
	elsewhereToo := b.dockerfile.isKnown(store, at)
	for l := sameText; l < unlike; l++ {
		if l == alike && !elsewhereToo {
			break
		}
		var least difference
		for _, key := range ranked[l] {
			if left--; left < 0 {
				return best, known, false
			}
			known = known || l != alike
			var r causeRecord
			if ok, err := b.store.Fact(recordKey(key), &r); err != nil || !ok {
				continue
			}
			if l == alike && !r.resembles(now, c.kind) {
				continue
			}
			if d := b.difference(&r, now, c); best == nil || d.less(least) {
				best, least = &r, d
			}
		}
		if best != nil {
			return best, true, false
		}
	}
	return nil, known, false
}

// A difference is how far an earlier cause is from one: in parts, then in files of selections.
type difference struct{ parts, files int }

func (d difference) less(o difference) bool {
	return d.parts < o.parts || d.parts == o.parts && d.files < o.files
}

// notKnown stands for changes of a selection that cannot be counted: more than a listing has entries.
const notKnown = 1 << 20

func (b *build) difference(before, now *causeRecord, c *cause) difference {
	var d difference
	d.parts, _ = before.distance(now)
	old, parts := grouped(before.Parts), grouped(now.Parts)
	for name, is := range parts {
		was := old[name]
		if which(was, is).Role != filesPart || len(was) != len(is) {
			continue
		}
		for i := range is {
			if was[i].Value == is[i].Value {
				continue
			}
			n := len(b.fileChanges(was[i], is[i], c))
			if n == 0 {
				n = notKnown
			}
			d.files += n
		}
	}
	return d
}

// A dockerfile is what explanations ask about the one that is built.
type dockerfile struct {
	written map[place]bool // its instructions, wherever they stand in their stage
	steps   []place        // those that have a result of their own
	args    []string
}

func aboutDockerfile(g *plan.Graph) dockerfile {
	d := dockerfile{written: map[place]bool{}, args: plan.ArgNames(g.Dockerfile)}
	for _, s := range g.Steps {
		p := placeOf(s).anywhere()
		d.written[p] = true
		switch s.Op.(type) {
		case plan.Exec, plan.Files:
			d.steps = append(d.steps, p)
		}
	}
	return d
}

func (p place) anywhere() place {
	p.At = 0
	return p
}

// has reports whether the Dockerfile still has an instruction in a stage.
func (d dockerfile) has(p place) bool { return d.written[p.anywhere()] }

// isKnown reports whether a journal has at least half of the instructions besides the one at p: then the Dockerfile was most likely
// built in another directory. Nothing else tells an instruction that was edited from one that has the same number.
func (d dockerfile) isKnown(j journal, p place) bool {
	in := map[place]bool{}
	for _, e := range j.Entries {
		in[e.anywhere()] = true
	}
	known, others := 0, 0
	for _, s := range d.steps {
		if s == p.anywhere() {
			continue
		}
		others++
		if in[s] {
			known++
		}
	}
	return known > 0 && 2*known >= others
}
