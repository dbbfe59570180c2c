package files

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/cooper-build/cooper/builder/plan"
)

// TestListingsDifferExactlyWhenDigestsDo changes one attribute of a tree at a time. A digest that changes without a change in
// the listing is a step that runs again for no reason that anybody is told.
func TestListingsDifferExactlyWhenDigestsDo(t *testing.T) {
	copies := map[string]plan.Copy{
		"everything": dockerfile("/", "/new"),
		"directory":  dockerfile("/src", "/new/"),
		"whole":      with(dockerfile("/src", "/new"), func(c *plan.Copy) { c.ContentsOnly = false }),
		"file":       dockerfile("/main.go", "/new"),
		"glob":       dockerfile("/*o*", "/new/"),
		"exclude":    with(dockerfile("/", "/new"), func(c *plan.Copy) { c.Exclude = []string{"**/*.md", "src/b"} }),
	}
	fresh := newForest(t)
	before := plant(t, fresh.dir(), someContext...)
	for _, m := range mutations() {
		after := plant(t, fresh.dir(), someContext...)
		m.do(t, after)
		for name, c := range copies {
			d1, l1 := listed(t, before, c)
			d2, l2 := listed(t, after, c)
			if changes := l2.Changes(l1); (d1 == d2) != (len(changes) == 0) {
				t.Errorf("%s, %s: digests equal: %t, changes: %v", m.name, name, d1 == d2, changes)
			}
		}
		must(t, os.RemoveAll(after))
	}
}

// listed also sees that listing changes no digest, and that a listing is what it was when it was saved.
func listed(t *testing.T, dir string, c plan.Copy) (digest.Digest, Listing) {
	t.Helper()
	d, l, err := DigestAndList(t.Context(), Tree{Dir: dir, Local: true}, c, nil)
	plain, plainErr := Digest(t.Context(), Tree{Dir: dir, Local: true}, c, nil)
	if d != plain || (err == nil) != (plainErr == nil) {
		t.Errorf("digest is %s (%v), with a listing %s (%v)", plain, plainErr, d, err)
	}
	if err != nil {
		return digest.FromString(err.Error()), Listing{{Path: err.Error()}}
	}
	saved, err := l.Save()
	must(t, err)
	loaded, err := LoadListing(saved)
	must(t, err)
	if !slices.Equal(l, loaded) {
		t.Errorf("saved %v, loaded %v", l, loaded)
	}
	return d, l
}

func TestChangesNameTheFiles(t *testing.T) {
	before := Listing{{Path: "a"}, {Path: "b", Content: 1}, {Path: "c", Look: 1}, {Path: "d/x"}}
	now := Listing{{Path: "b", Content: 2, Look: 3}, {Path: "c", Look: 2}, {Path: "d/w"}, {Path: "d/x"}}
	want := []Change{{Path: "a", What: FileRemoved}, {Path: "b", What: FileChanged}, {Path: "c", What: LookChanged}, {Path: "d/w", What: FileAdded}}
	if got := now.Changes(before); !slices.Equal(got, want) {
		t.Errorf("changes are %v, want %v", got, want)
	}
}

// A listing stays small whatever it lists, and a change in what was folded is still seen.
func TestALongListingIsFolded(t *testing.T) {
	list := func(change string) Listing {
		l := Listing{{Path: "top"}}
		for d := range 50 {
			dir := fmt.Sprintf("dir%02d", d)
			l = append(l, Listed{Path: dir})
			for f := range 20 {
				e := Listed{Path: fmt.Sprintf("%s/%02d", dir, f), Content: 1}
				if e.Path == change {
					e.Content = 2
				}
				l = append(l, e)
			}
		}
		slices.SortFunc(l, func(a, b Listed) int { return strings.Compare(a.Path, b.Path) })
		return l.fold(100)
	}
	before := list("")
	if len(before) != 51 {
		t.Fatalf("%d entries are left, want 50 directories and a file", len(before))
	}
	want := []Change{{Path: "dir07", What: FileChanged, Folded: true}}
	if got := list("dir07/03").Changes(before); !slices.Equal(got, want) {
		t.Errorf("changes are %v, want %v", got, want)
	}
	flat := make(Listing, 0, 200)
	for i := range 200 {
		flat = append(flat, Listed{Path: fmt.Sprintf("%03d", i)})
	}
	if got := flat.fold(100); len(got) != 1 {
		t.Errorf("a flat directory is folded into %d entries, want one", len(got))
	}
}

func TestADamagedListingIsNone(t *testing.T) {
	saved, err := Listing{{Path: "a/b"}, {Path: "a/c", Content: 7}}.Save()
	must(t, err)
	for n := range len(saved) {
		if _, err := LoadListing(saved[:n]); err == nil {
			t.Errorf("the first %d of %d bytes pass for a listing", n, len(saved))
		}
	}
}
