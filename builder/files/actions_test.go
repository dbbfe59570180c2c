package files

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/owner"
	"github.com/cooper-build/cooper/snapshot/layer"
)

func TestActionsWorkOnTheResultOfTheOneBefore(t *testing.T) {
	p := newPrison(t, []string{"d old", "f old/f", "l link old"}, []string{"f a"})
	when := planted.Add(time.Hour)
	must(t, p.apply(t,
		plan.Mkdir{Path: "/srv/dir", Mode: 0o750, MakeParents: true, Timestamp: &when},
		plan.Mkdir{Path: "/link/made", Mode: 0o700},
		plan.Mkdir{Path: "/old", Mode: 0o700, MakeParents: true},
		plan.Mkfile{Path: "/srv/dir/file", Mode: 0o640, Data: []byte("hello"), Timestamp: &when},
		dockerfile("/a", "/srv/dir/copy"),
		plan.Symlink{Old: "dir/file", New: "/srv/ln", Timestamp: &when},
		plan.Mkfile{Path: "/srv/ln", Mode: 0o600, Data: []byte("through the link, as in BuildKit")},
		plan.Remove{Path: "/old/f"}, plan.Remove{Path: "/gone", AllowNotFound: true}, plan.Remove{Path: "/srv/di?/co*", Wildcard: true},
	))
	want := picture{
		". drwxr-xr-x 0:0", "link Lrwxrwxrwx 0:0 -> old", "old drwxr-xr-x 0:0", "old/made drwx------ 0:0", "srv drwxr-x--- 0:0", "srv/dir drwxr-x--- 0:0",
		`srv/dir/file -rw------- 0:0 "through the link, as in BuildKit"`, "srv/ln Lrwxrwxrwx 0:0 -> dir/file",
	}
	if d := cmp.Diff(want, take(t, p.root, false)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestRemoveTakesLinksAndNotWhatTheyMean(t *testing.T) {
	p := newPrison(t, []string{"d keep", "f keep/f", "l link keep", "f d/sub/f", "l d/l ../keep", "l d/out OUTSIDE", "p d/p"}, nil)
	must(t, p.apply(t, plan.Remove{Path: "/link"}, plan.Remove{Path: "/d"}))
	p.check(t)
	want := picture{". drwxr-xr-x 0:0", "keep drwxr-xr-x 0:0", `keep/f -rw-r--r-- 0:0 "content of keep/f"`}
	if d := cmp.Diff(want, take(t, p.root, false)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestScratchIsAnEmptySource(t *testing.T) {
	p := newPrison(t, nil, nil)
	tree := func(plan.Ref) (Tree, error) { t.Error("asked for scratch"); return Tree{}, nil }
	everything := with(dockerfile("/", "/x"), func(c *plan.Copy) { c.From = plan.Scratch })
	must(t, Apply(t.Context(), p.root, []plan.Action{everything}, tree, Options{Single: singleID()}))
	if d := cmp.Diff(picture{". drwxr-xr-x 0:0", "x drwxr-xr-x 0:0"}, take(t, p.root, false)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	d1, err := Digest(t.Context(), Tree{}, everything, nil)
	must(t, err)
	d2, err := Digest(t.Context(), Tree{Dir: t.TempDir()}, everything, nil)
	must(t, err)
	if d1 != d2 {
		t.Error("no tree and an empty tree have different digests")
	}
	file := with(dockerfile("/f", "/x"), func(c *plan.Copy) { c.From = plan.Scratch })
	if err := Apply(t.Context(), p.root, []plan.Action{file}, tree, Options{}); err == nil || !strings.Contains(err.Error(), `"/f" not found`) {
		t.Errorf("got %v", err)
	}
}

func TestOwnersAreLookedUpInTheTreeThatIsNamed(t *testing.T) {
	const passwd, group = "f etc/passwd 644 app:x:1000:1001::/:", "f etc/group 644 web:x:33:"
	for _, tt := range []struct {
		owner plan.Owner
		want  ids
	}{
		{plan.Owner{UserName: "app", GID: plan.GroupOfUser}, ids{1000, 1001}},
		{plan.Owner{UserName: "app", GID: 5}, ids{1000, 5}},
		{plan.Owner{UserName: "app", GroupName: "web", GID: plan.GroupOfUser}, ids{1000, 33}},
		{plan.Owner{UID: 7, GID: 7, GroupName: "web"}, ids{7, 33}},
		{plan.Owner{UID: 7, GID: 8}, ids{7, 8}},
		{plan.Owner{UserName: "nobody-knows", GID: plan.GroupOfUser}, ids{0, 0}},
		{plan.Owner{UserName: "app", GroupName: "nobody-knows", GID: plan.GroupOfUser}, ids{1000, 1001}},
		{plan.Owner{UID: 7, GID: 7, GroupName: "nobody-knows"}, ids{7, 7}},
	} {
		p := newPrison(t, nil, []string{"f f 6755", "l l f", "d d", passwd, group})
		o := &tt.owner
		must(t, p.apply(t,
			with(dockerfile("/f", "/copied/f"), func(c *plan.Copy) { c.Owner = o }), with(dockerfile("/*", "/all/"), func(c *plan.Copy) { c.Owner = o }),
			plan.Mkdir{Path: "/dir/made", Mode: 0o755, MakeParents: true, Owner: o}, plan.Mkfile{Path: "/file", Mode: 0o644, Owner: o},
			plan.Symlink{Old: "f", New: "/all/link", Owner: o}))
		for _, name := range []string{"copied", "copied/f", "all", "all/f", "all/l", "dir", "dir/made", "file", "all/link"} {
			got := ownerOf(t, filepath.Join(p.root, name))
			if got != tt.want {
				t.Errorf("owner %+v: %s belongs to %v, want %v", tt.owner, name, got, tt.want)
			}
		}
		if st, err := os.Stat(filepath.Join(p.root, "copied/f")); err != nil || st.Mode()&os.ModeSetuid == 0 {
			t.Errorf("the change of owner took the setuid bit away: %v, %v", st.Mode(), err)
		}
	}
}

// ownerOf reads the owner, under a single id the recorded one.
func ownerOf(t *testing.T, p string) ids {
	t.Helper()
	fd, err := unix.Open(p, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	var st unix.Stat_t
	must(t, unix.Fstat(fd, &st))
	recorded, err := owner.Read(fdPath(fd), st.Mode)
	must(t, err)
	if recorded != (owner.IDs{}) {
		return ids{int(recorded.UID), int(recorded.GID)}
	}
	return ids{int(st.Uid), int(st.Gid)}
}

func TestRecordedOwnersGoWithTheFilesOfAStageOnly(t *testing.T) {
	if !singleID() {
		t.Log("every id can be a real owner here; the single-id run of this test is the one that counts")
		return
	}
	p := newPrison(t, []string{"f over"}, []string{"f f", "d d", "f d/plain", "l l f", "p p"})
	for _, name := range []string{"f", "d", "l", "p"} {
		f, err := os.OpenFile(filepath.Join(p.src, name), unix.O_PATH|unix.O_NOFOLLOW, 0)
		must(t, err)
		must(t, layer.SetOwner(f, 1000, 1001, true))
		must(t, f.Close())
	}
	must(t, p.apply(t, dockerfile("/", "/x"), dockerfile("/f", "/over")))
	for name, want := range map[string]ids{"x/f": {1000, 1001}, "x/d": {1000, 1001}, "x/l": {1000, 1001}, "x/p": {1000, 1001}, "x/d/plain": {}, "over": {1000, 1001}, "x": {}} {
		if got := ownerOf(t, filepath.Join(p.root, name)); got != want {
			t.Errorf("%s belongs to %v, want %v", name, got, want)
		}
	}
	local := func(plan.Ref) (Tree, error) { return Tree{Dir: p.src, Local: true}, nil }
	must(t, Apply(t.Context(), p.root, []plan.Action{dockerfile("/", "/y")}, local, Options{Single: true}))
	if got := ownerOf(t, filepath.Join(p.root, "y/f")); got != (ids{}) {
		t.Errorf("a context made its file belong to %v", got)
	}
	before, err := Digest(t.Context(), Tree{Dir: p.src}, dockerfile("/", "/x"), nil)
	must(t, err)
	must(t, unix.Removexattr(filepath.Join(p.src, "f"), owner.Xattr))
	after, err := Digest(t.Context(), Tree{Dir: p.src}, dockerfile("/", "/x"), nil)
	must(t, err)
	if before == after {
		t.Error("the recorded owner is not in the digest: a stage with other owners would be a hit")
	}
}

func TestNothingIsYoungerThanTheEpoch(t *testing.T) {
	epoch := planted.Add(10 * time.Hour)
	p := newPrison(t, []string{"d old"}, []string{"f a", "d d", "f d/b", "l l a", "p p"})
	must(t, lutime(filepath.Join(p.src, "a"), planted.AddDate(3, 0, 0)))
	must(t, lutime(filepath.Join(p.src, "l"), planted.AddDate(3, 0, 0)))
	must(t, lutime(filepath.Join(p.src, "d/b"), planted))
	must(t, lutime(filepath.Join(p.src, "d"), planted.AddDate(3, 0, 0)))
	must(t, os.WriteFile(filepath.Join(p.src, "t.tar"), pack(t, header(reg, "implied/x", at(planted.AddDate(3, 0, 0)))), 0o644))
	err := Apply(t.Context(), p.root, []plan.Action{
		dockerfile("/*", "/new/er/"), add("/t.tar", "/un/packed"), plan.Mkdir{Path: "/made/deep", Mode: 0o755, MakeParents: true},
		plan.Mkfile{Path: "/file", Mode: 0o644}, plan.Symlink{Old: "x", New: "/ln"},
	}, func(plan.Ref) (Tree, error) { return Tree{Dir: p.src}, nil }, Options{Single: singleID(), Epoch: &epoch})
	must(t, err)
	for _, path := range allPaths(t, p.root) {
		st, err := os.Lstat(path)
		must(t, err)
		rel, _ := filepath.Rel(p.root, path)
		if rel != "." && st.ModTime().After(epoch) {
			t.Errorf("%s is of %v, after the epoch %v: two builds differ", rel, st.ModTime(), epoch)
		}
		if rel == "new/er/b" && !st.ModTime().Equal(planted) {
			t.Errorf("%s is of %v: an older time was changed", rel, st.ModTime())
		}
	}
}

func TestADeepTreeIsCopiedOrRefusedButNeverCrashes(t *testing.T) {
	p := newPrison(t, nil, nil)
	fd, err := unix.Open(p.src, unix.O_DIRECTORY|unix.O_RDONLY, 0)
	must(t, err)
	for range 300 {
		must(t, unix.Mkdirat(fd, "deep", 0o755))
		next, err := openDirAt(fd, "deep")
		must(t, err)
		unix.Close(fd)
		fd = next
	}
	unix.Close(fd)
	must(t, p.apply(t, dockerfile("/", "/x")))
	if n := len(allPaths(t, p.root)); n != 302 {
		t.Errorf("copied %d of 302 directories", n)
	}
	var old unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &old))
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 100, Max: old.Max}))
	err = p.apply(t, dockerfile("/", "/y"))
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &old))
	if err == nil || !strings.Contains(err.Error(), "too many open files") {
		t.Errorf("with 100 descriptors: %v", err)
	}
}
