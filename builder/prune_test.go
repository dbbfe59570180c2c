package builder

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/internal/nstest"
	"github.com/cooper-build/cooper/sandbox/userns"
	"github.com/cooper-build/cooper/snapshot"
	"github.com/cooper-build/cooper/snapshot/layer"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// A shelf is a store with things of known age and size in it.
type shelf struct {
	t    *testing.T
	root string
	*housekeeper
}

const piece = 100 << 10 // what each thing takes, about

func newShelf(t *testing.T) *shelf {
	t.Helper()
	root := filepath.Join(t.TempDir(), "store")
	t.Cleanup(func() { layer.RemoveAll(root) })
	h, err := keepHouse(root)
	if err != nil {
		t.Fatal(err)
	}
	return &shelf{t, root, h}
}

func (s *shelf) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// aged lets a file have been used some hours ago.
func (s *shelf) aged(hours int, path ...string) {
	s.t.Helper()
	m, _ := userns.Inside()
	at := time.Now().Add(-time.Duration(hours) * time.Hour)
	s.must(os.Chtimes(filepath.Join(append([]string{s.root, path[0], m.String()}, path[1:]...)...), at, at))
}

// step makes a snapshot with a layer blob, as a build does.
func (s *shelf) step(id, on snapshot.ID) ocispec.Descriptor {
	s.t.Helper()
	a, err := s.store.Prepare(s.t.Context(), on)
	s.must(err)
	defer a.Discard()
	s.must(os.WriteFile(filepath.Join(a.Dir(), string(id)), make([]byte, piece), 0o644))
	_, err = a.Commit(s.t.Context(), id)
	s.must(err)
	blob, err := s.content.WriteBlob(ocispec.MediaTypeImageLayer, []byte("layer of "+string(id)))
	s.must(err)
	s.must(s.store.SetFact(newKey("layer").str(string(id)).sum(), id, snapshot.OfSnapshot(id), snapshot.OfBlob(blob.Digest)))
	s.must(s.store.Remember(newKey("step").str(string(id)).sum(), id))
	return blob
}

// image assembles one of steps, the last of which is its root, and gives it a name; "" is none.
func (s *shelf) image(name string, root snapshot.ID, layers ...ocispec.Descriptor) ocispec.Descriptor {
	s.t.Helper()
	config, err := s.content.WriteBlob(ocispec.MediaTypeImageConfig, fmt.Appendf(nil, `{"os":"linux","author":%q}`, name+string(root)))
	s.must(err)
	var list []string
	about := []snapshot.Subject{snapshot.OfSnapshot(root), snapshot.OfBlob(config.Digest)}
	for _, l := range layers {
		list = append(list, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, l.MediaType, l.Digest, l.Size))
		about = append(about, snapshot.OfBlob(l.Digest))
	}
	manifest, err := s.content.WriteBlob(ocispec.MediaTypeImageManifest, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[%s]}`,
		ocispec.MediaTypeImageManifest, config.MediaType, config.Digest, config.Size, strings.Join(list, ",")))
	s.must(err)
	var names []string
	if name != "" {
		names = []string{name}
	}
	s.must(image.NewStoreSink(s.content).Publish(s.t.Context(), s.content, image.Publication{Image: manifest, Names: names}))
	s.must(s.store.SetFact(newKey("image").str(name).str(string(root)).sum(), name, append(about, snapshot.OfBlob(manifest.Digest))...))
	return manifest
}

func (s *shelf) cache(id string, hours int) {
	s.t.Helper()
	dir, unlock, err := s.store.CacheDir(s.t.Context(), id, snapshot.Shared)
	s.must(err)
	s.must(os.WriteFile(filepath.Join(dir, "cached"), make([]byte, piece), 0o644))
	unlock()
	entries, err := s.store.List()
	s.must(err)
	m, _ := userns.Inside()
	dirs, err := filepath.Glob(filepath.Join(s.root, "cache", m.String(), "*", "id"))
	s.must(err)
	if len(entries) == 0 || len(dirs) != 1 {
		s.t.Fatalf("cache mounts: %v", dirs)
	}
	s.aged(hours, "cache", filepath.Base(filepath.Dir(dirs[0])), "id")
}

// fill is a store with two images of which the first lost its name, a stage of no image, and a cache mount:
//
//	base(9h) <- old(8h), was app:1     base <- new(1h), is app:1      stage(5h)      cache(3h)
func (s *shelf) fill() {
	base := s.step("base", "")
	s.image("docker.io/library/app:1", "old", base, s.step("old", "base"))
	s.image("docker.io/library/app:1", "new", base, s.step("new", "base"))
	s.step("stage", "")
	s.cache("npm", 3)
	_, err := s.content.WriteBlob("", []byte("of a build that was killed"))
	s.must(err)
	s.must(s.close())
	for id, hours := range map[string]int{"base": 9, "old": 8, "new": 1, "stage": 5} {
		s.aged(hours, "snapshots", id, "meta")
	}
}

// left names what is there.
func (s *shelf) left() string {
	s.t.Helper()
	items, err := Usage(s.t.Context(), s.root)
	s.must(err)
	var names []string
	for _, i := range items {
		switch i.Type {
		case TypeSnapshot, TypeCache:
			names = append(names, i.ID)
		case TypeImage:
			names = append(names, i.Description)
		}
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

func TestPruneRemovesTheLeastRecentlyUsed(t *testing.T) {
	const image = "docker.io/library/app:1 "
	for _, tt := range []struct {
		name   string
		limits Limits
		want   string
	}{
		{"what no image was made from", Limits{}, "base " + image + "new"},
		{"everything", Limits{All: true}, ""},
		{"nothing, as there is room", Limits{Keep: 100 << 20}, "base " + image + "new npm old stage"},
		{"the oldest", Limits{Keep: 5 * piece}, "base " + image + "new npm stage"},
		{"the two oldest", Limits{Keep: 4 * piece}, "base " + image + "new npm"},
		{"all but what an image was made from", Limits{Keep: 3 * piece}, "base " + image + "new"},
		{"and at last that, but not the image", Limits{Keep: 1}, strings.TrimSpace(image)},
		{"the image, too", Limits{Keep: 1, All: true}, ""},
		{"what was not used for a time", Limits{Age: 4 * time.Hour}, "base " + image + "new npm"},
		{"cache mounts", Limits{Types: []string{TypeCache}}, "base " + image + "new old stage"},
		{"snapshots", Limits{Types: []string{TypeSnapshot}}, "base " + image + "new npm"},
		{"old snapshots", Limits{Types: []string{TypeSnapshot}, Age: 7 * time.Hour}, "base " + image + "new npm stage"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newShelf(t)
			s.fill()
			before, err := Usage(t.Context(), s.root)
			s.must(err)
			p, err := Prune(t.Context(), s.root, tt.limits)
			s.must(err)
			if got := s.left(); got != tt.want {
				t.Errorf("left %q, want %q", got, tt.want)
			}
			after, err := Usage(t.Context(), s.root)
			s.must(err)
			if got, want := p.Left, Sum(after).All; got != want {
				t.Errorf("it says that %d bytes are left, there are %d", got, want)
			}
			if got, want := p.Freed, Sum(before).All-Sum(after).All; got != want {
				t.Errorf("it says that it freed %d bytes, it were %d", got, want)
			}
			if found, err := VerifyStore(t.Context(), s.root, false); err != nil || len(found) != 0 {
				t.Errorf("verify: %v %v", found, err)
			}
			wantNothingDangling(t, s)
		})
	}
}

// wantNothingDangling checks that keys, facts and blobs went with what they belonged to, and that images are whole.
func wantNothingDangling(t *testing.T, s *shelf) {
	t.Helper()
	h, err := keepHouse(s.root)
	s.must(err)
	defer h.close()
	for _, id := range []snapshot.ID{"base", "old", "new", "stage"} {
		there := h.store.Has(id)
		if _, ok, err := h.store.Lookup(newKey("step").str(string(id)).sum()); err != nil || ok != there {
			t.Errorf("key of %s: %v %v", id, ok, err)
		}
		var v string
		if ok, err := h.store.Fact(newKey("layer").str(string(id)).sum(), &v); err != nil || ok != there {
			t.Errorf("fact about %s: %v %v", id, ok, err)
		}
	}
	inv, err := h.inventory(t.Context())
	s.must(err)
	for _, i := range inv.items {
		if i.Unusable {
			t.Errorf("%s %s can never be found and takes space", i.Type, i.ID)
		}
	}
}

func TestReclaimableIsWhatPruneRemoves(t *testing.T) {
	s := newShelf(t)
	s.fill()
	items, err := Usage(t.Context(), s.root)
	s.must(err)
	p, err := Prune(t.Context(), s.root, Limits{})
	s.must(err)
	if got, want := Sum(items).Reclaimable, p.Freed; got != want {
		var list []string
		for _, i := range items {
			list = append(list, fmt.Sprint(i.Type, " ", i.ID, " ", i.Reclaimable, " ", i.Size.Disk))
		}
		t.Errorf("du promised %d bytes, prune freed %d:\n%s\nremoved %v", got, want, strings.Join(list, "\n"), p.Removed)
	}
	shared := map[string]bool{}
	for _, i := range items {
		if i.Shared {
			shared[i.ID] = true
		}
	}
	if diff := cmp.Diff(map[string]bool{"base": true}, shared); diff != "" {
		t.Errorf("shared: %s", diff)
	}
}

func TestAReadOnlyStoreIsShownAndNotChanged(t *testing.T) {
	s := newShelf(t)
	s.fill()
	s.must(s.close())
	s.must(unix.Mount(s.root, s.root, "", unix.MS_BIND, ""))
	defer unix.Unmount(s.root, unix.MNT_DETACH)
	s.must(unix.Mount("", s.root, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
	_, verifyErr := VerifyStore(t.Context(), s.root, false)
	_, repairErr := VerifyStore(t.Context(), s.root, true)
	result, pruneErr := Prune(t.Context(), s.root, Limits{})
	for what, err := range map[string]error{"verify": verifyErr, "repair": repairErr, "prune": pruneErr} {
		var hint interface{ Hint() string }
		if !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), s.root) || !errors.As(err, &hint) || !strings.Contains(hint.Hint(), "writable") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if result != nil {
		t.Errorf("prune tells of %v", result)
	}
	if items, err := Usage(t.Context(), s.root); err != nil || len(items) == 0 {
		t.Errorf("du shows %v: %v", items, err)
	}
}

func TestPruneLeavesWhatARunningBuildUses(t *testing.T) {
	s := newShelf(t)
	s.fill()
	build, err := keepHouse(s.root)
	s.must(err)
	if !build.store.Has("old") {
		t.Fatal("it is not there")
	}
	written, err := build.content.WriteBlob("", []byte("not in any index yet"))
	s.must(err)
	p, err := Prune(t.Context(), s.root, Limits{All: true})
	s.must(err)
	if got := s.left(); got != "base old" {
		t.Errorf("left %q, want base and old: the running build would miss the rest, or prune spared too much", got)
	}
	if p.InUse == 0 {
		t.Error("it does not say that something is in use")
	}
	if !build.content.Has(written) {
		t.Error("prune removed a blob that a build has just written")
	}
	s.must(build.close())
	_, err = Prune(t.Context(), s.root, Limits{All: true})
	s.must(err)
	if got := s.left(); got != "" {
		t.Errorf("left %q", got)
	}
}

func TestTheDefaultLimitLeavesRoomForABuild(t *testing.T) {
	const gb = 1_000_000_000
	for size, want := range map[int64]int64{1 * gb: gb / 2, 10 * gb: 2 * gb, 20 * gb: 2 * gb, 500 * gb: 50 * gb} {
		if got := defaultLimit(size); got != want {
			t.Errorf("of %d bytes: %d, want %d", size, got, want)
		}
	}
}

func TestABuildKeepsTheStoreWithinItsLimit(t *testing.T) {
	s := newShelf(t)
	s.fill()
	end := func(limit int64) string {
		t.Helper()
		m, _ := userns.Inside()
		store, err := snapshot.Open(s.root, snapshot.Options{IDMap: m.String(), Single: m.Kind == userns.Single})
		s.must(err)
		defer store.Close()
		b := &build{Request: Request{Root: s.root, KeepStorage: limit}, store: store}
		s.must(b.trim(t.Context()))
		return s.left()
	}
	const all = "base docker.io/library/app:1 new npm old stage"
	for _, limit := range []int64{-1, 0, 100 << 20} {
		if got := end(limit); got != all {
			t.Errorf("limit %d: left %q", limit, got)
		}
	}
	if disk, ok := s.store.Estimate(); !ok || disk < 5*piece || disk > 10*piece {
		t.Errorf("estimate %d %v", disk, ok)
	}
	if got, want := end(5*piece), "base docker.io/library/app:1 new npm"; got != want {
		t.Errorf("left %q, want %q", got, want)
	}
	// An estimate below the limit is believed: nothing is walked.
	s.must(s.store.Measured(1))
	if got := end(2); got != "base docker.io/library/app:1 new npm" {
		t.Errorf("left %q", got)
	}
}

// fillUntagged is a store with one tagged image and some that are not, each with a layer that takes as much as its snapshot. It
// returns the untagged images by their steps.
//
//	base <- app(1h), is app:1      base <- each of untagged, used so many hours ago
func (s *shelf) fillUntagged(untagged map[snapshot.ID]float64) map[snapshot.ID]digest.Digest {
	s.t.Helper()
	base := s.step("base", "")
	s.image("docker.io/library/app:1", "app", base, s.step("app", "base"))
	images := map[snapshot.ID]digest.Digest{}
	for id := range untagged {
		s.step(id, "base")
		big, err := s.content.WriteBlob(ocispec.MediaTypeImageLayer, bytes.Repeat([]byte(id), piece/len(id)))
		s.must(err)
		images[id] = s.image("", id, base, big).Digest
	}
	s.must(s.close())
	s.aged(9, "snapshots", "base", "meta")
	s.aged(1, "snapshots", "app", "meta")
	for id, hours := range untagged {
		at := time.Now().Add(-time.Duration(hours * float64(time.Hour)))
		m, _ := userns.Inside()
		s.must(os.Chtimes(filepath.Join(s.root, "snapshots", m.String(), string(id), "meta"), at, at))
		s.must(os.Chtimes(filepath.Join(s.root, "content/blobs/sha256", images[id].Encoded()), at, at))
	}
	return images
}

func (s *shelf) total() Total {
	s.t.Helper()
	items, err := Usage(s.t.Context(), s.root)
	s.must(err)
	return Sum(items)
}

func TestAnUntaggedImageIsPrunedLikeWhatNoImageWasMadeFrom(t *testing.T) {
	const tagged = "app base docker.io/library/app:1"
	for _, tt := range []struct {
		name   string
		limits Limits
		less   int64 // than all may be kept, in halves of a piece
		want   string
	}{
		{"when asked", Limits{}, 0, tagged},
		{"the oldest with its snapshot", Limits{}, 3, "<none> " + tagged + " x2"},
		{"all of them before what a tagged image was made from", Limits{}, 7, tagged},
		{"what was not used for a time", Limits{Age: 7 * time.Hour}, 0, "<none> " + tagged + " x2"},
		{"images alone", Limits{Types: []string{TypeImage}}, 0, tagged + " x1 x2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newShelf(t)
			s.fillUntagged(map[snapshot.ID]float64{"x1": 8, "x2": 6})
			before := s.total()
			if tt.less > 0 {
				tt.limits.Keep = before.All - tt.less*piece/2
			}
			p, err := Prune(t.Context(), s.root, tt.limits)
			s.must(err)
			if got := s.left(); got != tt.want {
				t.Errorf("left %q, want %q", got, tt.want)
			}
			if tt.name == "when asked" && p.Freed != before.Reclaimable {
				t.Errorf("du promised %d bytes, prune freed %d", before.Reclaimable, p.Freed)
			}
			if got, want := p.Left, s.total().All; got != want {
				t.Errorf("it says that %d bytes are left, there are %d", got, want)
			}
			wantNothingDangling(t, s)
		})
	}
}

func TestPruneLeavesAnUntaggedImageThatSomebodyUses(t *testing.T) {
	s := newShelf(t)
	images := s.fillUntagged(map[snapshot.ID]float64{"x1": 8, "x2": 6})
	sender, err := keepHouse(s.root)
	s.must(err)
	d, err := sender.content.Resolve(images["x1"].String())
	s.must(err)
	raw, err := sender.content.ReadAll(d, 1<<20)
	s.must(err)
	for _, limits := range []Limits{{}, {Keep: 1}, {All: true}} {
		p, err := Prune(t.Context(), s.root, limits)
		s.must(err)
		if p.InUse == 0 {
			t.Errorf("%+v: it does not say that something is in use", limits)
		}
		var m ocispec.Manifest
		s.must(json.Unmarshal(raw, &m))
		for _, b := range append(m.Layers, m.Config) {
			if !sender.content.Has(b) {
				t.Errorf("%+v: %s is gone while somebody sends the image", limits, b.Digest)
			}
		}
	}
	s.must(sender.close())
	_, err = Prune(t.Context(), s.root, Limits{})
	s.must(err)
	if got := s.left(); strings.Contains(got, "<none>") {
		t.Errorf("left %q", got)
	}
}

// Whoever builds an image without a tag wants to use it by its digest: the limit, at the end of that build or of another one
// at the same time, must not take it first.
func TestTheLimitSparesAnImageThatWasJustMade(t *testing.T) {
	const tagged, young = "app base docker.io/library/app:1", 0.01
	for _, tt := range []struct {
		name     string
		untagged map[snapshot.ID]float64
		made     snapshot.ID
		limit    func(all int64) int64
		want     string
		warning  string
	}{
		{
			"by itself", map[snapshot.ID]float64{"x1": 8, "x2": 6}, "x1",
			func(all int64) int64 { return all - piece }, "<none> " + tagged + " x1", "",
		},
		{
			"by another, as long as something else can go", map[snapshot.ID]float64{"x1": young, "x2": 0}, "x2",
			func(all int64) int64 { return all - piece/2 }, "<none> <none> " + tagged + " x2", "",
		},
		{
			"by another, as long as that meets no limit", map[snapshot.ID]float64{"x1": young, "x2": 0}, "x2",
			func(int64) int64 { return piece }, "<none> <none> docker.io/library/app:1", "than its limit of 102.4kB; tagged images and the one just made hold",
		},
		{
			"but not for ever", map[snapshot.ID]float64{"x1": 1, "x2": 0}, "x2",
			func(int64) int64 { return piece }, "<none> docker.io/library/app:1", "'cooper prune --all'",
		},
		{
			"the oldest first", map[snapshot.ID]float64{"x1": 2 * young, "x2": young, "x3": 0}, "x3",
			func(int64) int64 { return 3*piece + piece/2 }, "<none> <none> docker.io/library/app:1", "",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newShelf(t)
			images := s.fillUntagged(tt.untagged)
			m, _ := userns.Inside()
			store, err := snapshot.Open(s.root, snapshot.Options{IDMap: m.String(), Single: m.Kind == userns.Single})
			s.must(err)
			defer store.Close()
			var warnings []string
			b := &build{Request: Request{Root: s.root, KeepStorage: tt.limit(s.total().All)}, store: store}
			b.events.watch = func(e Event) { warnings = append(warnings, e.Warning.Message) }
			s.must(b.trim(t.Context(), images[tt.made]))
			if got := s.left(); got != tt.want {
				t.Errorf("left %q, want %q", got, tt.want)
			}
			content, err := image.OpenLayout(filepath.Join(s.root, "content"))
			s.must(err)
			defer content.Close()
			if _, err := content.Resolve(images[tt.made].String()); err != nil {
				t.Errorf("the image that was just made: %v", err)
			}
			if got := strings.Join(warnings, "\n"); !strings.Contains(got, tt.warning) || tt.warning == "" && got != "" || len(warnings) > 1 {
				t.Errorf("warnings %q, want %q", got, tt.warning)
			}
		})
	}
}
