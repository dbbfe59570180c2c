package builder

import (
	"context"
	"io"
	"slices"

	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/policy"
	"github.com/cooper-build/cooper/snapshot"
	"github.com/cooper-build/cooper/snapshot/layer"
)

// A RUN's result is found again when the secret it was given has another value since: values are no part of keys.
// That build could not search the layer for a value that it does not know. So what a RUN with secrets left of them
// is looked for at once, and stays known for its snapshot.

func leaksKey(id snapshot.ID) snapshot.Key {
	return newKey("leaks").str(policy.ScannerVersion).str(string(id)).sum()
}

// A leaks record says what a search of a snapshot found, and for which values it was made.
type leaks struct {
	ScanKey string
	Hits    []policy.SecretHit
}

func readsSecrets(op plan.Op) bool {
	e, ok := op.(plan.Exec)
	return ok && slices.ContainsFunc(e.Mounts, func(m plan.Mount) bool { return m.Kind == plan.MountSecret })
}

// searched reports whether it is known what a step left of its secrets. It is not when the record was damaged, or when the
// process was killed between the two.
func (b *build) searched(s plan.Step, id snapshot.ID) (bool, error) {
	if !readsSecrets(s.Op) {
		return true, nil
	}
	var known leaks
	return b.store.Fact(leaksKey(id), &known)
}

// rememberLeaks searches what a RUN wrote for the secrets that it could read.
func (b *build) rememberLeaks(ctx context.Context, op plan.Exec, id snapshot.ID) error {
	if !readsSecrets(op) {
		return nil
	}
	facts, err := scanning(ctx, b.scan, func(tar io.Writer) error { return b.store.WriteLayer(ctx, id, tar, layer.DiffOptions{}) })
	if err != nil {
		return err
	}
	return b.store.SetFact(leaksKey(id), leaks{b.scanKey, facts.Secrets}, snapshot.OfSnapshot(id))
}

// addLeaks adds to a layer's facts what is known of its snapshots and what this build cannot search for, because it
// has other values. A squash may have removed it, which cannot be seen without the value; then the finding stays.
func (b *build) addLeaks(facts *policy.LayerFacts, ids []snapshot.ID) error {
	for _, id := range ids {
		var known leaks
		if _, err := b.store.Fact(leaksKey(id), &known); err != nil {
			return err
		}
		if known.ScanKey != b.scanKey {
			facts.Secrets = append(slices.Clip(facts.Secrets), known.Hits...) // others may share it
		}
	}
	return nil
}
