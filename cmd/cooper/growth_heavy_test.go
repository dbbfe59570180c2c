//go:build growth

package main

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// What make test-growth runs: builds that are large in one respect each. Memory must stay below a bound; how long they take
// is told and not judged.

const (
	mostMemory     = 120 << 20 // of any build
	mostMemory8GB  = 200 << 20
	cachedBuilds   = 1000
	manySteps      = 500
	manyFiles      = 100_000
	gigabytes      = 8
	filesInASample = 10 // builds between two looks at the store
)

func measured(t *testing.T, what string, most int64, store, context string, more ...string) grown {
	t.Helper()
	began := time.Now()
	g := buildOn(t, store, context, more...)
	t.Logf("%s: %.1f s, %d MB", what, time.Since(began).Seconds(), g.peak>>20)
	if g.peak > most {
		t.Errorf("%s took %d MB of memory, want at most %d MB", what, g.peak>>20, most>>20)
	}
	return g
}

func steps(n int) string {
	var d strings.Builder
	d.WriteString("FROM base\n")
	for i := range n {
		fmt.Fprintf(&d, "RUN echo %d > /f%d\n", i, i)
	}
	return d.String()
}

func TestGrowthOfSteps(t *testing.T) {
	for _, n := range []int{manySteps / 4, manySteps / 2, manySteps} {
		store := newStore(t)
		context := contextOf(t, steps(n))
		measured(t, fmt.Sprintf("%d steps", n), mostMemory, store, context)
		measured(t, fmt.Sprintf("%d steps, no change", n), mostMemory, store, context)
	}
}

func TestGrowthOfBuilds(t *testing.T) {
	store := newStore(t)
	context := contextOf(t, steps(5)+"COPY used /used\n", "used")
	time.Sleep(3 * time.Second) // a file that changed in the last two is not remembered yet
	buildOn(t, store, context)
	buildOn(t, store, context)
	before := len(inStore(t, store))
	for i := 1; i <= cachedBuilds; i++ {
		g := buildOn(t, store, context)
		if g.peak > mostMemory {
			t.Fatalf("build %d took %d MB", i, g.peak>>20)
		}
		if i%(cachedBuilds/filesInASample) == 0 {
			now := len(inStore(t, store))
			t.Logf("%d builds: %d files, %d MB", i, now, g.peak>>20)
			if now != before {
				t.Fatalf("after %d builds without changes the store has %d files, it had %d", i, now, before)
			}
		}
	}
}

func TestGrowthOfFiles(t *testing.T) {
	for _, n := range []int{manyFiles / 4, manyFiles / 2, manyFiles} {
		run := fmt.Sprintf("RUN mkdir /many && cd /many && i=0; while [ $i -lt %d ]; do : > $i; i=$((i+1)); done\n", n)
		store := newStore(t)
		context := contextOf(t, "FROM base\n"+run)
		measured(t, fmt.Sprintf("%d files", n), mostMemory, store, context)
		measured(t, fmt.Sprintf("%d files, no change", n), mostMemory, store, context)
	}
}

func TestGrowthOfAFile(t *testing.T) {
	for _, n := range []int{gigabytes / 4, gigabytes} {
		run := fmt.Sprintf("RUN dd if=/dev/zero of=/large bs=1M count=%d\n", n<<10)
		store := newStore(t)
		measured(t, fmt.Sprintf("%d GB", n), mostMemory8GB, store, contextOf(t, "FROM base\n"+run), "--keep-storage", "none")
	}
}
