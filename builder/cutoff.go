package builder

import (
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/snapshot"
)

// A step that had to run may come out as it was: a comment changed in a source that it compiles, an argument that it does not
// read. Then its result is the one of before, and everything that stands on that hits.
//
// Nothing is hashed to find out. Most steps that run have no earlier result on what they stand on now; where one has, the two
// change sets lie side by side, and nearly always the first names and sizes tell them apart.

// earlierResults are what a step may have come out as before, newest first. The journals only propose them: whether one is equal
// is seen by its files.
func (b *build) earlierResults(s plan.Step, c *cause, active *snapshot.Active) []snapshot.ID {
	if s.NoCache && len(b.Plan.NoCacheStages) == 0 {
		return nil // all is wanted anew
	}
	if e, ok := s.Op.(plan.Exec); ok && slices.ContainsFunc(e.Mounts, leavesMore) {
		return nil
	}
	own, store := b.notebook.load()
	at := placeOf(s)
	var found []snapshot.ID
	for _, e := range append(slices.Clip(own.Entries), store.Entries...) {
		if e.Kind != c.kind || !e.sameStep(at) {
			continue
		}
		if id, ok := active.Earlier(e.Key); ok && !slices.Contains(found, id) && b.mayEqual(e.Key, c) {
			if found = append(found, id); len(found) == tryAtMost {
				break
			}
		}
	}
	return found
}

// leavesMore reports a mount by which a RUN leaves more than its change set: what it writes to a cache, which the next RUN may read, and
// what was found of its secrets, which is a fact of each result.
func leavesMore(m plan.Mount) bool {
	return m.Kind == plan.MountSecret || m.Kind == plan.MountCache && !m.ReadOnly
}

// mayEqual rules out what the same COPY made of other files, as these can be many.
func (b *build) mayEqual(earlier snapshot.Key, c *cause) bool {
	if c.kind != "files" {
		return true
	}
	var r causeRecord
	ok, err := b.store.Fact(recordKey(earlier), &r)
	return err == nil && ok && r.Op != digest.FromBytes(c.op).String()
}
