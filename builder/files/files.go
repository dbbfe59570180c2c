// Package files does what COPY, ADD and WORKDIR do: it changes the files below a root directory, and it says what a
// copy would read, as a digest.
//
// The meaning is BuildKit's, down to the treatment of existing directories and of trailing slashes. Both trees are
// taken to be hostile: a path is resolved by descriptor beneath its own root, a final link is followed only where the
// meaning of the step asks for it and then inside that root, nothing but a regular file is ever opened for reading,
// and what lies at a destination is replaced and never written through.
//
// One walk over the source serves Digest and Apply, so that a cache key and the result it stands for are made of the
// same selection. The package knows no snapshots, no layers and no cache; it gets directories.
package files

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/cooper-build/cooper/builder/plan"
)

// Tree is a directory that a copy reads.
type Tree struct {
	// Dir is where it lies. Empty is a tree without any file.
	Dir string
	// Layers are what an overlay at Dir shows, topmost first; empty if there is none. The content of large files is copied from
	// there, because an overlay is a file system of its own, out of which the kernel copies no blocks. Nobody changes them.
	Layers []string
	// Exclude and Include are patterns as in .dockerignore on paths relative to Dir: a file is there for the build if
	// an Include matches it (or there is none) and Exclude does not, a directory also if something in it is.
	Exclude, Include []string
	// Follow names what the build is going to read. It lets a remote builder send less and changes no result, so it
	// is not used: what is not asked for is not read anyway.
	Follow []string
	// Local says that the directory belongs to the person who builds: everything in it is owned by 0:0.
	Local bool
}

// Options say where the files go.
type Options struct {
	// Single says that there is one id only: other owners are recorded as layer.SetOwner does.
	Single bool
	// Epoch is the youngest modification time that anything gets; nil sets no limit.
	Epoch *time.Time
	// Upper is the directory in which an overlay at root keeps what is made in it; empty if root is none. Directories that a
	// copy makes are filled there: an overlay is a file system of its own, into which the kernel copies no blocks.
	Upper string
	// Made, if not nil, gets what the files contain that Upper got from a context and whose content Hashes knows. Where that,
	// owner, mode and time are those of Earlier, they are hard links to that.
	Made    Sums
	Hashes  *HashCache
	Pending Pending // if not nil, gets the files whose content Hashes does not know yet
	Earlier Earlier
}

// Apply does the actions in order to the files below root, a directory that nobody else changes meanwhile. tree gives
// the trees that copies read and that name owners; it is not asked for plan.Scratch.
//
// A nil error means that every action is done completely. On an error root holds a part of the result and should be
// thrown away. Errors name paths as the build sees them and never those of this machine; one may have a Hint.
func Apply(ctx context.Context, root string, actions []plan.Action, tree func(plan.Ref) (Tree, error), o Options) error {
	to, err := openTarget(root, o)
	if err != nil {
		return err
	}
	defer to.close()
	again, err := openAgain(o)
	if err != nil {
		return fmt.Errorf("open the earlier result: %w", err)
	}
	defer again.close()
	a := applier{to: to, tree: tree, again: again}
	for _, action := range actions {
		if err := a.apply(ctx, action); err != nil {
			return err
		}
	}
	return nil
}

type applier struct {
	to    *target
	tree  func(plan.Ref) (Tree, error)
	again *again
}

func (a *applier) apply(ctx context.Context, action plan.Action) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	switch action := action.(type) {
	case plan.Copy:
		return a.copy(ctx, action)
	case plan.Mkdir:
		return a.mkdir(action)
	case plan.Mkfile:
		return a.mkfile(action)
	case plan.Remove:
		return a.remove(action)
	case plan.Symlink:
		return a.symlink(action)
	}
	return fmt.Errorf("no way to do %T", action)
}

// pathError is a failure at a path of the build. It replaces errors that show where a tree lies on this machine.
type pathError struct {
	doing, path string
	err         error
}

func (e *pathError) Error() string { return e.doing + " " + e.path + ": " + e.err.Error() }
func (e *pathError) Unwrap() error { return e.err }

func failed(doing, path string, err error) error {
	if err == nil {
		return nil
	}
	return &pathError{doing: doing, path: shown(path), err: bare(err)}
}

// shown is a path inside a tree as people write it.
func shown(path string) string {
	if path == "" || path[0] != '/' {
		return "/" + path
	}
	return path
}

// bare drops the path of this machine from an error.
func bare(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}
