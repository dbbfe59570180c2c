package remote

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Checkout writes the tree of a commit into dir, which must be empty. A nil error means that the tree is complete: files are 0644 or 0755,
// directories 0755, owned by whoever runs this. Their time is the commit's with CommitTime, else now, where that is not zero. After an
// error dir is empty again.
//
// Submodules are checked out with it. Their own .git, a file that leads to what BuildKit throws away, is there only with KeepGitDir.
func (c *Client) Checkout(ctx context.Context, g Git, commit Commit, dir string, now time.Time) (err error) {
	defer func() { err = c.explain(ctx, g.Remote, err) }()
	at, err := parseLocation(g.Remote)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if names, err := list(root); err != nil || len(names) > 0 {
		return errors.Join(fmt.Errorf("%s is not empty", dir), err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, empty(root))
		}
	}()
	return (&checkout{ctx: ctx, client: c, g: g, limit: c.Limits}).run(at, commit, root, now)
}

// checkout is the work of one Checkout, with what it has used of its limits.
type checkout struct {
	ctx    context.Context
	client *Client
	g      Git
	limit  Limits

	entries, modules int
	bytes            int64
}

// repository is a commit that was fetched: the one that was asked for, or a submodule's.
type repository struct {
	at      location
	file    *os.File // of pack
	pack    *pack
	commit  oid
	raw     []byte
	tree    oid
	modules []module // of .gitmodules
	nesting int

	git   *os.Root // its git directory, or nil
	place string   // of that, from the top of the checkout
	work  string   // of its files, from there
	index []indexed
	used  []module
}

func (r *repository) close() {
	if r.file != nil {
		r.file.Close()
	}
	if r.git != nil {
		r.git.Close()
	}
}

func (k *checkout) run(at location, commit Commit, root *os.Root, now time.Time) error {
	subdir := strings.TrimPrefix(path.Join("/", k.g.Subdir), "/")
	hash := commit.Hash
	var git *os.Root
	if k.g.KeepGitDir && subdir == "" {
		var err error
		if git, err = makeDir(root, ".git"); err != nil {
			return err
		}
		if commit.Tag != "" {
			hash = commit.Tag
		}
	}
	repo := &repository{git: git, place: ".git"}
	defer repo.close()
	id, err := parseOID(hash)
	if err != nil {
		return err
	}
	if err := k.open(at, id, repo); err != nil {
		return err
	}
	if err := k.g.verify(id.String(), repo.commit.String(), commit.Tag); err != nil {
		return err
	}
	if err := k.subdir(repo, root, subdir); err != nil {
		return err
	}
	if git != nil {
		if err := repo.writeGit(refOf(commit), hash); err != nil {
			return err
		}
	}
	if k.g.CommitTime {
		if now, err = committed(repo.raw); err != nil {
			return err
		}
	}
	if now.IsZero() {
		return nil
	}
	return stamp(root, now)
}

// open fetches a commit into r.
func (k *checkout) open(at location, id oid, r *repository) (err error) {
	r.at = at
	if r.git == nil {
		r.file, err = k.client.tempFile()
	} else if err = makeDirs(r.git, packDir); err == nil {
		r.file, err = r.git.OpenFile(packDir+"/incoming", os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o444)
	}
	if err != nil {
		return err
	}
	if r.pack, err = k.client.fetch(k.ctx, k.g, at, id, false, r.file); err != nil {
		return err
	}
	if r.commit, r.raw, err = r.pack.commit(id); err != nil {
		return err
	}
	v, err := field(r.raw, "tree")
	if err != nil {
		return err
	}
	if r.tree, err = parseOID(v); err != nil {
		return err
	}
	if !k.g.SkipSubmodules {
		r.modules, err = r.readModules()
	}
	return err
}

func (r *repository) entries(tree oid) ([]entry, error) {
	raw, err := r.pack.read(tree, treeObject)
	if err != nil {
		return nil, err
	}
	return parseTree(raw, r.pack.size)
}

// subdir checks out what is below a directory of the repository, which may be in a submodule. Nothing else may lead there, links least.
func (k *checkout) subdir(r *repository, root *os.Root, subdir string) error {
	tree, at := r.tree, ""
	for subdir != "" {
		var name string
		name, subdir, _ = strings.Cut(subdir, "/")
		entries, err := r.entries(tree)
		if err != nil {
			return fmt.Errorf("%s: %w", at, err)
		}
		at = path.Join(at, name)
		i := find(entries, name)
		if i < 0 {
			return withHint(fmt.Errorf("the repository has no directory %s at that commit", at), "check what follows the colon, or subdir=")
		}
		switch e := entries[i]; e.kind {
		case directory:
			tree = e.id
		case submodule:
			if k.g.SkipSubmodules {
				return fmt.Errorf("%s is a submodule, and submodules are not fetched", at)
			}
			inner, err := k.openModule(r, at, e.id)
			if err == nil && inner == nil {
				err = errors.New("the repository does not want it checked out")
			}
			if err != nil {
				return fmt.Errorf("submodule %s: %w", at, err)
			}
			defer inner.close()
			r, tree, at = inner, inner.tree, ""
		default:
			return fmt.Errorf("%s is not a directory", at)
		}
	}
	return k.write(r, root, tree, at, 0)
}

func find(entries []entry, name string) int {
	for i, e := range entries {
		if e.name == name {
			return i
		}
	}
	return -1
}

// write makes the entries of a tree in root, and of the trees below.
func (k *checkout) write(r *repository, root *os.Root, tree oid, at string, depth int) error {
	if depth > k.limit.Depth {
		return fmt.Errorf("directories %d deep, more than %d", depth, k.limit.Depth)
	}
	entries, err := r.entries(tree)
	if err != nil {
		return fmt.Errorf("/%s: %w", at, err)
	}
	for _, e := range entries {
		if k.ctx.Err() != nil {
			return context.Cause(k.ctx)
		}
		if k.entries++; k.entries > k.limit.Entries {
			return fmt.Errorf("more than %d files", k.limit.Entries)
		}
		p := path.Join(at, e.name)
		if len(p) >= unix.PathMax {
			return fmt.Errorf("the path %.40s... is longer than a path can be", p)
		}
		if err := k.entry(r, root, e, p, depth); err != nil {
			return err
		}
		if r.git != nil && e.kind != directory {
			r.index = append(r.index, indexed{p, e})
		}
	}
	return nil
}

func (k *checkout) entry(r *repository, root *os.Root, e entry, p string, depth int) error {
	switch e.kind {
	case symlink:
		return k.link(r, root, e, p)
	case regular, executable:
		if err := k.file(r, root, e); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		return nil
	}
	sub, err := makeDir(root, e.name)
	if err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	defer sub.Close()
	if e.kind == directory {
		return k.write(r, sub, e.id, p, depth+1)
	}
	if k.g.SkipSubmodules {
		return nil
	}
	inner, err := k.openModule(r, p, e.id)
	if err == nil && inner != nil {
		defer inner.close()
		if err = k.write(inner, sub, inner.tree, "", depth+1); err == nil && inner.git != nil {
			err = inner.writeModuleGit(sub)
		}
	}
	if err != nil {
		return fmt.Errorf("submodule %s: %w", p, err)
	}
	return nil
}

func (k *checkout) file(r *repository, root *os.Root, e entry) (err error) {
	mode := fs.FileMode(0o644)
	if e.kind == executable {
		mode = 0o755
	}
	if i, ok := r.pack.byID[e.id]; ok && !r.pack.packed[i].delta && k.bytes+r.pack.packed[i].length > k.limit.Bytes {
		return fmt.Errorf("more than %d bytes in the files", k.limit.Bytes)
	}
	f, err := root.OpenFile(e.name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer closing(f, &err)
	n, err := r.pack.write(f, e.id)
	if err != nil {
		return err
	}
	if k.bytes += n; k.bytes > k.limit.Bytes {
		return fmt.Errorf("more than %d bytes in the files", k.limit.Bytes)
	}
	return f.Chmod(mode) // whatever the umask is
}

func (k *checkout) link(r *repository, root *os.Root, e entry, p string) error {
	if i, ok := r.pack.byID[e.id]; ok && !r.pack.packed[i].delta && r.pack.packed[i].length >= unix.PathMax {
		return fmt.Errorf("%s: the target of the link is longer than a path can be", p)
	}
	target, err := r.pack.read(e.id, blobObject)
	if err == nil {
		err = root.Symlink(string(target), e.name) // it may lead anywhere; nothing here follows it
	}
	if err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	return nil
}

// makeDir makes a directory that was not there and opens it.
func makeDir(root *os.Root, name string) (*os.Root, error) {
	if err := root.Mkdir(name, 0o755); err != nil {
		return nil, err
	}
	if err := root.Chmod(name, 0o755); err != nil {
		return nil, err
	}
	return root.OpenRoot(name)
}

func list(root *os.Root) ([]fs.DirEntry, error) {
	d, err := root.Open(".")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.ReadDir(-1)
}

func empty(root *os.Root) error {
	entries, err := list(root)
	for _, e := range entries {
		err = errors.Join(err, root.RemoveAll(e.Name()))
	}
	return err
}

// stamp gives everything in root, and root itself, a time.
func stamp(root *os.Root, t time.Time) error {
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	entries, err := d.ReadDir(-1)
	if err != nil {
		return err
	}
	ts, err := unix.TimeToTimespec(t)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			sub, err := root.OpenRoot(e.Name())
			if err != nil {
				return err
			}
			err = stamp(sub, t)
			sub.Close()
			if err != nil {
				return err
			}
			continue
		}
		if err := unix.UtimesNanoAt(int(d.Fd()), e.Name(), []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("time of %s: %w", e.Name(), err)
		}
	}
	return unix.UtimesNanoAt(int(d.Fd()), ".", []unix.Timespec{ts, ts}, 0)
}
