package files

import (
	"errors"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/plan"
)

func (a *applier) mkdir(m plan.Mkdir) error {
	own, err := a.owner(m.Owner)
	if err != nil {
		return err
	}
	p, err := a.to.resolve(m.Path, true)
	if err != nil {
		return err
	}
	if !m.MakeParents {
		if st, err := lstatBeneath(a.to.dir, parent(p)); err != nil {
			return failed("make directory", p, err)
		} else if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return failed("make directory", p, unix.ENOTDIR)
		}
	}
	l := look{mode: m.Mode & os.ModePerm, own: own, mtime: a.to.stamp(m.Timestamp, nil)}
	made, err := a.to.mkdirAll(p, l)
	if err != nil {
		return err
	}
	return a.to.restamp(made, l.mtime)
}

func (a *applier) mkfile(m plan.Mkfile) error {
	own, err := a.owner(m.Owner)
	if err != nil {
		return err
	}
	p, err := a.to.resolve(m.Path, true)
	if err != nil {
		return err
	}
	if p == "" {
		return failed("write", p, unix.EISDIR)
	}
	dir, err := a.to.openDir(parent(p))
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	err = makeRoom(dir, path.Base(p), false)
	if err == nil {
		err = a.to.writeAt(dir, path.Base(p), m.Data, look{
			mode: m.Mode & os.ModePerm, own: own, mtime: a.to.stamp(m.Timestamp, nil),
		})
	}
	return failed("write", p, err)
}

func (t *target) writeAt(dir int, name string, data []byte, l look) error {
	f, err := createAt(dir, name)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = t.dress(f, l)
	}
	return errors.Join(err, f.Close())
}

func (a *applier) symlink(s plan.Symlink) error {
	own, err := a.owner(s.Owner)
	if err != nil {
		return err
	}
	p, err := a.to.resolve(s.New, true)
	if err != nil {
		return err
	}
	if p == "" {
		return failed("make link", p, unix.EEXIST)
	}
	dir, err := a.to.openDir(parent(p))
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	err = a.to.symlinkAt(s.Old, dir, path.Base(p), look{own: own, mtime: a.to.stamp(s.Timestamp, nil)})
	return failed("make link", p, err)
}

func (a *applier) remove(r plan.Remove) error {
	paths := []string{cleanPath(r.Path)}
	if r.Wildcard {
		all := &source{dir: a.to.dir}
		var err error
		if paths, err = all.glob(paths[0], false); err != nil {
			return err
		}
	}
	for _, p := range paths {
		if err := a.removePath(p, r.AllowNotFound); err != nil {
			return err
		}
	}
	return nil
}

func (a *applier) removePath(p string, allowNotFound bool) error {
	p, err := a.to.resolve(strings.TrimSuffix(p, "/."), false)
	if err != nil {
		return err
	}
	if p == "" {
		return failed("remove", p, errors.New("it is the root directory"))
	}
	dir, err := openBeneath(a.to.dir, parent(p), unix.O_RDONLY|unix.O_DIRECTORY)
	if err == nil {
		defer unix.Close(dir)
		_, err = lstatAt(dir, path.Base(p))
	}
	if isNotExist(err) && allowNotFound {
		return nil
	}
	if err == nil {
		err = removeAll(dir, path.Base(p))
	}
	return failed("remove", p, err)
}
