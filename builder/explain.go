package builder

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/cooper-build/cooper/builder/files"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/snapshot"
)

// An Explanation says whether a step was answered from the store and, if not, why.
type Explanation struct {
	Hit     bool
	Reasons []string // of a miss: what is not as it was the last time
	Line    int      // of the instruction in the Dockerfile, 0 if there is none
}

// fewFiles is how many files a reason names.
const fewFiles = 3

func (b *build) explainHit(s plan.Step) { b.tellWhy(s, Explanation{Hit: true}) }

// explainMiss tells the watcher why a step runs, before it does.
func (b *build) explainMiss(ctx context.Context, s plan.Step, c *cause) error {
	if !b.Explain {
		return nil
	}
	reasons := b.refusedCache(s)
	if reasons == nil {
		reasons = b.missReasons(s, c)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	b.tellWhy(s, Explanation{Reasons: reasons})
	return nil
}

// tellWhy sends one explanation for each step of a build: what a source was when it was first needed.
func (b *build) tellWhy(s plan.Step, e Explanation) {
	if !b.Explain {
		return
	}
	if _, told := b.explained.LoadOrStore(s.ID, true); told {
		return
	}
	mask, _ := b.masker()
	for i, r := range e.Reasons {
		e.Reasons[i] = string(mask([]byte(r)))
	}
	e.Line = s.Where.Line()
	b.events.send(Event{Kind: Explained, Step: s.ID, Name: s.Name, Explanation: &e})
}

// refusedCache is the reason of a step that was not looked up, nil if it was.
func (b *build) refusedCache(s plan.Step) []string {
	switch {
	case !s.NoCache:
		return nil
	case len(b.Plan.NoCacheStages) > 0:
		return []string{"--no-cache-filter names its stage"}
	}
	return []string{"--no-cache was given"}
}

func (b *build) missReasons(s plan.Step, c *cause) []string {
	best, known, again := b.nearest(s, c)
	switch {
	case again && readsSecrets(s.Op) && b.store.Has(snapshot.ID(c.key())):
		return []string{"what it left of its secrets is not known any more"}
	case again:
		return []string{"nothing changed, but its result is no longer in the store: it was pruned or damaged, or the machine lost power"}
	case best == nil && known:
		return []string{"it was built from something else before, of which nothing is recorded any more: the snapshot was pruned"}
	case best == nil:
		return []string{"never built before in this store"}
	}
	reasons := b.differences(best, c)
	if len(reasons) == 0 {
		return []string{"its cause changed in a way that is not recorded"}
	}
	return reasons
}

// differences tells what is in a cause that was not in an earlier one, and the other way round.
func (b *build) differences(before *causeRecord, c *cause) []string {
	now := b.describe(c)
	reasons := b.fieldReasons(before, now)
	selects := len(reasons) == 0 || c.kind != "files" // else what is selected changed because of that
	old, parts := grouped(before.Parts), grouped(c.parts)
	for _, name := range union(old, parts) {
		was, is := old[name], parts[name]
		if sameValues(was, is) {
			continue
		}
		switch which(was, is).Role {
		case filesPart:
			if selects {
				reasons = append(reasons, b.fileReasons(was, is, c)...)
			}
		case inputPart:
			reasons = append(reasons, inputReason(was, is))
		default:
			reasons = append(reasons, partReason(was, is))
		}
	}
	return reasons
}

func which(a, b []part) part { return append(slices.Clone(a), b...)[0] }

func (b *build) fieldReasons(before, now *causeRecord) []string {
	if before.Op == now.Op {
		return nil // whatever is hidden of it, or was written down in another way
	}
	var reasons, hidden []string
	for _, name := range union(before.Fields, now.Fields) {
		was, had := before.Fields[name]
		is, has := now.Fields[name]
		label := b.fieldLabel(name)
		switch {
		case was.Hidden && is.Hidden:
			hidden = append(hidden, label)
		case was == is && had == has:
		case !had:
			reasons = append(reasons, label+" is new"+shown(": ", is))
		case !has:
			reasons = append(reasons, label+" is gone"+shown(", which was ", was))
		case strings.HasPrefix(name, mountField):
			reasons = append(reasons, "the options of "+label+" changed")
		case was.Digest != "" || is.Digest != "" || was.Hidden || is.Hidden:
			reasons = append(reasons, label+" changed")
		default:
			reasons = append(reasons, fmt.Sprintf("%s changed: %q -> %q", label, was.Value, is.Value))
		}
	}
	if len(reasons) > 0 {
		return reasons
	}
	switch len(hidden) {
	case 0:
		return nil
	case 1:
		return []string{hidden[0] + " changed (its value is not recorded)"}
	}
	return []string{"one of " + strings.Join(hidden, ", ") + " changed (their values are not recorded)"}
}

func shown(lead string, f field) string {
	if f.Value == "" {
		return ""
	}
	return fmt.Sprintf("%s%q", lead, f.Value)
}

// fieldLabel calls a variable what the Dockerfile makes it; a step does not know which of its variables are arguments.
func (b *build) fieldLabel(name string) string {
	variable, ok := strings.CutPrefix(name, "ENV ")
	if ok && slices.Contains(b.dockerfile.args, variable) {
		return "ARG " + variable
	}
	return name
}

func partReason(was, is []part) string {
	p := which(was, is)
	switch {
	case p.Role == givenPart && len(was) == 1 && len(is) == 1:
		if is[0].Value == "true" {
			return p.Name + " is given, and was not before"
		}
		return p.Name + " is not given, and was before"
	case p.Name == epochPart && len(was) == 1 && len(is) == 1:
		return fmt.Sprintf("%s changed: %s -> %s", p.Name, epochText(was[0].Value), epochText(is[0].Value))
	case len(was) == 1 && len(is) == 1:
		return fmt.Sprintf("%s changed: %s -> %s", p.Name, briefly(was[0].Value), briefly(is[0].Value))
	case strings.HasSuffix(p.Name, "s") && p.Name != "policy no_new_privs":
		return p.Name + " changed"
	case len(was) == 0:
		return p.Name + " is new"
	}
	return p.Name + " is gone"
}

func inputReason(was, is []part) string {
	if len(is) == 0 || len(was) == 0 {
		return "what it stands on changed"
	}
	old, now := was[0], is[0]
	switch {
	case now.Value == "":
		return "it stands on nothing, and did not before"
	case old.Image != "" && now.Image != "" && old.Image != now.Image:
		return fmt.Sprintf("base digest changed: %s -> %s", brief(old.Image), brief(now.Image))
	case old.From == (place{}) || old.From.sameStep(now.From):
		return "the result of " + short(now.source) + " changed"
	}
	return "it stands on another step than before: " + short(now.source)
}

func briefly(value string) string {
	if d := digest.Digest(value); d.Validate() == nil {
		return brief(d)
	}
	return value
}

// brief is as much of a digest as people compare.
func brief(d digest.Digest) string {
	const most = len("sha256:") + 12
	return string(d[:min(len(d), most)])
}

// fileReasons names the files of selections that changed.
func (b *build) fileReasons(was, is []part, c *cause) []string {
	if len(was) != len(is) {
		return nil // the operation has more of them, or fewer, and is told to have changed
	}
	var reasons []string
	for i := range is {
		if was[i].Value == is[i].Value {
			continue
		}
		of := ""
		if is[i].source != "context" {
			of = " in " + short(is[i].source)
		}
		changes := b.fileChanges(was[i], is[i], c)
		if len(changes) == 0 {
			reasons = append(reasons, is[i].Name+"files that it reads changed"+of)
			continue
		}
		reasons = append(reasons, is[i].Name+nameFiles(changes)+of)
	}
	return reasons
}

// fileChanges are those of one selection, none if they are not known.
func (b *build) fileChanges(was, is part, c *cause) []files.Change {
	before, now := b.listing(digest.Digest(was.Value)), b.listingNow(digest.Digest(is.Value), c)
	if before == nil || now == nil {
		return nil
	}
	return now.Changes(before)
}

func (b *build) listingNow(d digest.Digest, c *cause) files.Listing {
	if l, ok := c.lists[d]; ok {
		return l
	}
	return b.listing(d)
}

// short is the name of another step as far as it takes to know which.
func short(name string) string {
	const most = 60
	if r := []rune(name); len(r) > most {
		return string(r[:most]) + "..."
	}
	return name
}

// nameFiles is "file a changed, b added and 7 more".
func nameFiles(changes []files.Change) string {
	var named []string
	for _, c := range changes[:min(len(changes), fewFiles)] {
		path := c.Path
		if c.Folded {
			path += "/..."
		}
		named = append(named, path+" "+string(c.What))
	}
	text := "file " + strings.Join(named, ", file ")
	if more := len(changes) - len(named); more > 0 {
		text += fmt.Sprintf(", and %d more", more)
	}
	return text
}

// explainJoin explains a step that only puts results of others together.
func (b *build) explainJoin(s plan.Step, in inputs, ran bool, err error) error {
	if err != nil || !b.Explain {
		return err
	}
	if !ran {
		b.explainHit(s)
		return nil
	}
	var names []string
	for _, r := range plan.Inputs(s.Op) {
		if from := in.of(r); from.name != "" {
			names = append(names, short(from.name))
		}
	}
	b.tellWhy(s, Explanation{Reasons: []string{"the result of " + strings.Join(names, " or ") + " changed"}})
	return nil
}

// explainFetch explains a source that is not looked up by a cause.
func (b *build) explainFetch(s plan.Step, ran bool, reason string, err error) error {
	switch {
	case errors.Is(err, ErrNotCached) || err != nil:
		return err
	case ran:
		b.tellWhy(s, Explanation{Reasons: []string{reason}})
	default:
		b.explainHit(s)
	}
	return nil
}
