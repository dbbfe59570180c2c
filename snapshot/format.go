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

	"golang.org/x/sys/unix"
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
	if to, linkErr := os.Readlink(dir); errors.Is(err, fs.ErrExist) && linkErr == nil {
		return "", &Error{dir, fmt.Errorf("it is a link to %s, where no directory is", to), "make that directory, or choose another with --root"}
	}
	root := dir
	if err == nil {
		root, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return "", &Error{dir, err, "choose a directory that you can write to with --root"}
	}
	return root, nil
}

// ErrNoStore says that there is no store in a directory yet.
var ErrNoStore = errors.New("there is no store")

// Check tells whether dir holds a store that this user may use, and changes nothing. Where nothing is, or a store could
// begin, that is ErrNoStore.
func Check(dir string) error {
	_, err := lookAt(dir)
	return err
}

// CheckWritable tells whether the store in dir can be changed, before somebody is halfway through that.
func CheckWritable(dir string) error {
	if err := unix.Access(dir, unix.W_OK); err == unix.EROFS {
		return &Error{dir, err, "mount its file system writable: builds can read it as it is, but not look after it; or choose another store with --root"}
	}
	return nil
}

// lookAt returns a store that was only looked at, with what keeps it from being opened.
func lookAt(dir string) (*Store, error) {
	root, err := filepath.Abs(dir)
	if err == nil {
		root, err = filepath.EvalSymlinks(root)
	}
	s := &Store{root: root}
	switch {
	case err == nil:
		err = s.check()
	case !errors.Is(err, fs.ErrNotExist):
		return s, &Error{dir, err, "choose a directory that you can read with --root"}
	default:
		err = ErrNoStore
	}
	if errors.Is(err, ErrNoStore) {
		err = &Error{dir, ErrNoStore, "name the directory of a store with --root; 'cooper build' makes one where there is none"}
	}
	return s, err
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

// ErrDamaged says that all of a store is there but a format file that can be read. Verify repairs it.
var ErrDamaged = errors.New("its format file is damaged")

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
				return s.wrongFormat(fmt.Errorf("%w: it is gone", ErrDamaged), fmt.Errorf("it is no store of ours, and not empty: it holds %q", other))
			}
		}
	}
	if err != nil {
		return &Error{s.root, err, "choose another directory with --root"}
	}
	version, ok := parseFormat(text)
	switch {
	case !ok:
		return s.wrongFormat(fmt.Errorf("%w: it says %.40q", ErrDamaged, text), fmt.Errorf("it is no store of ours: its format file says %.40q", text))
	case version > formatVersion:
		return &Error{s.root, fmt.Errorf("its format is %d, this program knows %d", version, formatVersion),
			"use the newer program that wrote it, or another directory with --root"}
	case version < formatVersion:
		return &Error{s.root, fmt.Errorf("its format is %d, this program knows only %d", version, formatVersion),
			fmt.Sprintf("choose another directory with --root; the program that wrote this one can push the images that it holds, before you remove all of it with 'unshare --map-auto --map-root-user rm -rf %s'", s.root)}
	}
	return nil
}

// wrongFormat tells a store whose format file was damaged from a directory of something else.
func (s *Store) wrongFormat(damaged, other error) error {
	for _, name := range parts() {
		if info, err := os.Lstat(s.path(name)); err != nil || !info.IsDir() {
			return &Error{s.root, other, "choose another directory with --root: a new one, or an empty one"}
		}
	}
	return &Error{s.root, damaged, "the rest is a store of ours: mend the file with 'cooper store verify --repair'"}
}

// parts are the directories that every store has.
func parts() []string {
	return []string{"snapshots", "keys", "facts", "leases", "tmp", "cache", "empty"}
}

// parseFormat reads the versions that ever were, bare numbers, and later ones, which are records: so no flipped bit makes a
// version of another.
func parseFormat(text []byte) (version int, ok bool) {
	switch strings.TrimSpace(string(text)) {
	case "1":
		return 1, true
	case "2":
		return 2, true
	}
	err := unsealed("format", text, &version)
	return version, err == nil && version > 2
}

// RepairFormat finds a format file that was damaged, without which the store in dir cannot be opened. With repair it is
// written again. A directory of anything else is an error, as for Open.
func RepairFormat(dir string, repair bool) ([]Damage, error) {
	s, err := lookAt(dir)
	if !errors.Is(err, ErrDamaged) {
		return nil, err
	}
	d := Damage{Where: "format", What: errors.Unwrap(err).Error()}
	if repair {
		if d.Repair, err = s.setAside(s.path("format")); err == nil {
			err = s.writeFormat()
		}
		if err != nil {
			return []Damage{d}, fmt.Errorf("repair format: %w", err)
		}
		d.Repair += "; written again"
	}
	return []Damage{d}, nil
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
