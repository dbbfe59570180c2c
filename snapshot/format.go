package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// formatVersion is what this program reads and writes.
const formatVersion = 2

// placeOf makes a store's directory when there is none, and returns where it really is: a store may be reached
// through a link, which is not ours to judge or to move.
func placeOf(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	err = os.MkdirAll(dir, 0o700)
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return "", &Error{dir, err, "choose a directory that you can write to with --root"}
	}
	return dir, nil
}

// ErrNoStore says that there is no store in a directory yet.
var ErrNoStore = errors.New("there is no store")

// Check tells whether dir holds a store that this user may use, and changes nothing. Where nothing is, or a store could
// begin, that is ErrNoStore.
func Check(dir string) error {
	at, err := filepath.Abs(dir)
	if err == nil {
		at, err = filepath.EvalSymlinks(at)
	}
	none := &Error{dir, ErrNoStore, "name the directory of a store with --root; 'cooper build' makes one where there is none"}
	if errors.Is(err, fs.ErrNotExist) {
		return none
	}
	if err != nil {
		return &Error{dir, err, "choose a directory that you can read with --root"}
	}
	err = (&Store{root: at}).check()
	if errors.Is(err, ErrNoStore) {
		return none
	}
	return err
}

// check changes nothing. ErrNoStore says that a store may begin here.
func (s *Store) check() error {
	if err := s.checkOwner(); err != nil {
		return err
	}
	if err := s.checkPlace(); err != nil {
		return err
	}
	return s.checkFormat()
}

// settleIn makes sure that the directory is a store, or becomes one. Nothing in it is touched before that is known: everything that
// follows removes what it takes for leftovers.
func (s *Store) settleIn() error {
	err := s.check()
	fresh := errors.Is(err, ErrNoStore)
	if err != nil && !fresh {
		return err
	}
	if err := s.makePrivate(); err != nil {
		return err
	}
	if !fresh {
		return nil
	}
	if err := s.checkFileSystem(); err != nil {
		return err
	}
	return s.writeFormat()
}

// overflowID is whom everybody looks like in a user namespace that has no id for them.
const overflowID = 65534

// checkOwner refuses a store of someone else: what lies in it would be executed by us.
func (s *Store) checkOwner() error {
	info, err := os.Stat(s.root)
	if err != nil {
		return &Error{s.root, err, "choose a directory that you can read with --root"}
	}
	if !info.IsDir() {
		return &Error{s.root, errors.New("it is no directory"), "name a store's directory with --root, or a new one"}
	}
	if owner := info.Sys().(*syscall.Stat_t).Uid; int(owner) != os.Geteuid() {
		whose := fmt.Sprintf("user %d", owner)
		if owner == overflowID {
			whose = "another user"
		}
		return &Error{s.root, fmt.Errorf("it belongs to %s, not to you", whose), "choose a directory of your own with --root"}
	}
	return nil
}

func (s *Store) makePrivate() error {
	info, err := os.Stat(s.root)
	if err == nil && info.Mode().Perm() != 0o700 {
		err = os.Chmod(s.root, 0o700)
	}
	if err != nil {
		return &Error{s.root, err, "choose a directory of your own with --root"}
	}
	return nil
}

// checkFormat reads the format version. ErrNoStore says that there is none, and that a store may begin here.
func (s *Store) checkFormat() error {
	text, err := os.ReadFile(s.path("format"))
	if errors.Is(err, fs.ErrNotExist) {
		var other string
		if other, err = s.foreign(); err == nil && other == "" {
			return ErrNoStore
		}
		if err == nil {
			// Another process may have begun the store meanwhile: then the format was there before anything else.
			if text, err = os.ReadFile(s.path("format")); errors.Is(err, fs.ErrNotExist) {
				return &Error{s.root, fmt.Errorf("it is no store of ours, and not empty: it holds %q", other),
					"choose another directory with --root: a new one, or an empty one"}
			}
		}
	}
	if err != nil {
		return &Error{s.root, err, "choose another directory with --root"}
	}
	version, err := strconv.Atoi(strings.TrimSpace(string(text)))
	switch {
	case err != nil:
		return &Error{s.root, fmt.Errorf("its format file says %.40q", text), "this is no store of ours: choose another directory with --root"}
	case version > formatVersion:
		return &Error{s.root, fmt.Errorf("its format is %d, this program knows %d", version, formatVersion),
			"use the newer program that wrote it, or another directory with --root"}
	case version < formatVersion:
		return &Error{s.root, fmt.Errorf("its format is %d, this program knows only %d", version, formatVersion),
			fmt.Sprintf("it is a cache: remove it with 'unshare --map-auto --map-root-user rm -rf %s', or choose another with --root", s.root)}
	}
	return nil
}

// foreign returns a name in the directory that neither a first start of ours that was killed before it wrote the format
// can have left, nor the file system. "" means that a store may begin here.
func (s *Store) foreign() (string, error) {
	entries, err := os.ReadDir(s.root)
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		switch name := e.Name(); {
		case strings.HasPrefix(name, formatTemp), strings.HasPrefix(name, probeTemp), name == lostAndFound:
		case name == "content" && s.holdsOurImages():
		default:
			return name, nil
		}
	}
	return "", nil
}

const (
	formatTemp = ".format-"
	probeTemp  = ".probe-"
	// lostAndFound is in the top directory of an ext4 file system, where a volume's store lies.
	lostAndFound = "lost+found"
)

// holdsOurImages reports whether content is a layout such as only a store has: earlier versions began with it.
func (s *Store) holdsOurImages() bool {
	info, err := os.Lstat(s.path("content", ".leases"))
	return err == nil && info.IsDir()
}

// writeFormat makes the file appear whole. Two processes that do so write the same.
func (s *Store) writeFormat() error {
	f, err := os.CreateTemp(s.root, formatTemp)
	if err != nil {
		return fmt.Errorf("open store: %w", err)
	}
	defer os.Remove(f.Name()) // fails after the rename, which is what we want
	if err := writeSynced(f, []byte(strconv.Itoa(formatVersion)+"\n")); err != nil {
		return fmt.Errorf("open store: %w", err)
	}
	if err := os.Rename(f.Name(), s.path("format")); err != nil {
		return fmt.Errorf("open store: %w", err)
	}
	return syncDirectory(s.root)
}
