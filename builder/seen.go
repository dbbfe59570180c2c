package builder

import (
	"os"
	"path/filepath"
	"slices"

	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/snapshot"
)

// maxSeen is more than a Dockerfile has.
const maxSeen = 1 << 20

// seenKey stands for the text of the Dockerfile, the stage that is built and the arguments. It is empty where the text is not at hand.
func (b *build) seenKey() snapshot.Key {
	text, file := b.Plan.Text, b.Plan.Dockerfile
	if text == nil {
		if file == "" {
			file = filepath.Join(b.Plan.Context, "Dockerfile")
		}
		if plan.IsRemote(file) || plan.IsRemote(b.Plan.Context) {
			return ""
		}
		fi, err := os.Stat(file)
		if err != nil || !fi.Mode().IsRegular() || fi.Size() > maxSeen {
			return "" // a pipe can be read once
		}
		if text, err = os.ReadFile(file); err != nil {
			return ""
		}
	}
	return newKey("made of").str(string(text)).str(b.Plan.Target).value(b.Plan.Args).sum()
}

// look finds out whether a build of this Dockerfile, as it is and with these arguments, has come to its end. If none has, there is a step
// that must run; if none made layers of this compression, there is a layer that must be written. Then asking the store for everything first
// would only take time.
func (b *build) look() {
	b.seen = b.seenKey()
	if b.seen == "" {
		return
	}
	ok, err := b.store.Fact(b.seen, &b.ends)
	b.fresh = err == nil && !ok
	b.unmade = err == nil && !slices.Contains(b.ends, b.makes())
}

// makes names what is made of the layers.
func (b *build) makes() string {
	if b.NoImage {
		return "no image"
	}
	return b.Compression.String()
}

// see remembers that the build of what look has seen came to its end. Losing that only costs time.
func (b *build) see() {
	if b.unmade {
		_ = b.store.SetFact(b.seen, append(b.ends, b.makes()))
	}
}
