package plan

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
)

// maxFile bounds a Dockerfile and the ignore files.
const maxFile = 8 << 20

// tree is a directory that the frontend reads from, at or below dir. Nothing
// outside dir is ever read, whatever links lie in it. With only, it is no
// directory but those files.
type tree struct {
	dir, below string
	only       map[string][]byte
}

// dockerfileTree roots a Dockerfile at the context when it lies in it, so that
// it may be a link to any other file of the context, else at its own directory.
func dockerfileTree(context, file string) (t tree, name string, err error) {
	if file == "" {
		file = filepath.Join(context, "Dockerfile")
	}
	dir, err := filepath.Abs(context)
	if err != nil {
		return tree{}, "", fmt.Errorf("find the build context: %w", err)
	}
	abs, err := filepath.Abs(file)
	if err != nil {
		return tree{}, "", fmt.Errorf("find the Dockerfile: %w", err)
	}
	if rel, err := filepath.Rel(dir, abs); err == nil && filepath.IsLocal(rel) {
		return tree{dir: dir, below: filepath.Dir(rel)}, filepath.Base(rel), nil
	}
	return tree{dir: filepath.Dir(abs)}, filepath.Base(abs), nil
}

// open opens a regular file of at most maxFile bytes. Not to wait for a writer
// when the name is a pipe, it opens without blocking and looks afterwards.
func (t tree) open(name string) (*os.File, int64, error) {
	root, err := os.OpenRoot(t.dir)
	if err != nil {
		return nil, 0, err
	}
	defer root.Close()
	rel := strings.TrimPrefix(path.Join(filepath.ToSlash(t.below), path.Join("/", name)), "/")
	f, err := root.OpenFile(rel, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil {
		err = acceptable(info)
	}
	if err != nil {
		f.Close()
		return nil, 0, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return f, info.Size(), nil
}

func acceptable(info fs.FileInfo) error {
	if !info.Mode().IsRegular() {
		return fmt.Errorf("not a regular file but %s", fileKind(info.Mode()))
	}
	if info.Size() > maxFile {
		return fmt.Errorf("%d bytes are more than the %d allowed", info.Size(), maxFile)
	}
	return nil
}

func fileKind(m fs.FileMode) string {
	switch m.Type() {
	case fs.ModeDir:
		return "a directory"
	case fs.ModeNamedPipe:
		return "a named pipe"
	case fs.ModeSocket:
		return "a socket"
	default:
		return "a device"
	}
}

func (t tree) held(name string) ([]byte, error) {
	b, ok := t.only[path.Clean(name)]
	if !ok {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return b, nil
}

// read gives the whole file. It fails rather than give a part.
func (t tree) read(name string) ([]byte, error) {
	if t.only != nil {
		return t.held(name)
	}
	f, _, err := t.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(b) > maxFile {
		return nil, &fs.PathError{Op: "read", Path: name, Err: errors.New("grew beyond the allowed size while it was read")}
	}
	return b, nil
}

func (t tree) size(name string) (int64, error) {
	if t.only != nil {
		b, err := t.held(name)
		return int64(len(b)), err
	}
	f, n, err := t.open(name)
	if err != nil {
		return 0, err
	}
	return n, f.Close()
}
