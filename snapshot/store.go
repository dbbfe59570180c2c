// Package snapshot remembers directories by id and by cause.
//
// A snapshot is a change set on a parent: one overlay layer. It begins as an Active, a writable
// directory that shows the parent; Commit freezes it under an ID, Discard forgets it. A frozen
// snapshot never changes. A View shows one read-only, Unpack makes one from a layer stream.
// Keys map causes to IDs, and facts are small values kept by cause.
//
// Many processes share a store without a server. Whatever is being made lies in a temporary
// directory whose maker holds a lock; a finished thing is renamed into place. A killed process
// leaves temporary directories, which the next Open inside a user namespace removes.
//
// The package knows nothing of builds, images or containers: a directory path is all that leaves it.
// The format on disk is described in docs/store.md.
package snapshot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/snapshot/lease"
)

// ID names a result in the store: the verified OCI chain id of what was pulled, the key that first
// produced it for what was built.
type ID string

// Key names a cause: the hex SHA-256 of all that a result depends on.
type Key string

// Options say for which id map the store is opened. Snapshots of different maps never mix: their
// files have other owners.
type Options struct {
	IDMap  string // a stable name of the map
	Single bool   // one id only: owners are recorded in extended attributes
	// Copying says that this process can mount nothing. Snapshots are then shown as trees, which are copied.
	Copying bool
}

// Store is an open store. Its methods may be used by many goroutines. Outside a user namespace only
// Lookup, Remember, Fact, SetFact and Has work.
type Store struct {
	root      string
	idMap     string
	snapshots string // of this id map
	keys      string // of this id map
	facts     string // of this id map
	single    bool
	copying   bool
	boot      string
	peek      bool // look without using
	lease     *lease.Lease

	mu     sync.Mutex
	unsafe []ID        // committed by us, not yet known to survive a loss of power
	good   map[ID]meta // found whole while leased, and so whole until Close
}

// Error is what keeps a store from being opened, with a next step.
type Error struct {
	Dir    string
	Err    error
	Advice string
}

func (e *Error) Error() string { return fmt.Sprintf("open store %s: %v", e.Dir, e.Err) }
func (e *Error) Unwrap() error { return e.Err }

// Hint is the next step.
func (e *Error) Hint() string { return e.Advice }

// ErrNotFound says that a snapshot is not in the store.
var ErrNotFound = errors.New("no such snapshot in the store")

// Open opens the store in dir and makes it when dir is missing or empty. A nil error means that this user may
// use it, that this program knows its format and that its file system can hold overlay layers. A directory of
// anything else is left exactly as it is. Inside a user namespace Open also removes what killed processes left.
func Open(dir string, o Options) (*Store, error) {
	if err := checkName(o.IDMap); err != nil {
		return nil, fmt.Errorf("open store: id map: %w", err)
	}
	dir, err := placeOf(dir)
	if err != nil {
		return nil, err
	}
	s := &Store{
		root:      dir,
		idMap:     o.IDMap,
		snapshots: filepath.Join(dir, "snapshots", o.IDMap),
		keys:      filepath.Join(dir, "keys", o.IDMap),
		facts:     filepath.Join(dir, "facts", o.IDMap),
		single:    o.Single,
		copying:   o.Copying,
		lease:     lease.New(filepath.Join(dir, "leases")),
		good:      map[ID]meta{},
	}
	if err := s.settleIn(); err != nil {
		return nil, err
	}
	for _, sub := range []string{s.snapshots, s.keys, s.facts, s.path("leases"), s.path("tmp"), s.path("cache"), s.path("empty")} {
		if err := os.MkdirAll(sub, 0o700); err != nil {
			return nil, fmt.Errorf("open store: %w", err)
		}
	}
	if s.boot, err = bootID(); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if os.Geteuid() == 0 {
		s.sweep()
		lease.Sweep(s.path("leases"))
	}
	return s, nil
}

// Close makes the snapshots committed through s survive a loss of power, and ends every use. Without it
// they still survive any end of the process, but not the next boot.
func (s *Store) Close() error {
	err := s.settle()
	s.mu.Lock()
	clear(s.good) // no longer leased
	s.mu.Unlock()
	return errors.Join(err, s.lease.Close())
}

func (s *Store) settle() error {
	s.mu.Lock()
	ids := s.unsafe
	s.unsafe = nil
	s.mu.Unlock()
	if len(ids) == 0 {
		return nil
	}
	if err := syncFileSystem(s.root); err != nil {
		return fmt.Errorf("sync store: %w", err)
	}
	var grown int64
	for _, id := range ids {
		size, err := s.markSafe(id)
		if err != nil {
			return fmt.Errorf("sync store: %w", err)
		}
		grown += size.Disk
	}
	return s.Grow(grown)
}

func (s *Store) path(elements ...string) string {
	return filepath.Join(append([]string{s.root}, elements...)...)
}

const localAdvice = "choose a directory on a local file system such as ext4, xfs, btrfs or tmpfs with --root"

// checkPlace refuses file systems that cannot work, also for a store that was moved there.
func (s *Store) checkPlace() error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.root, &st); err != nil {
		return &Error{s.root, err, "choose another directory with --root"}
	}
	if s.copying && st.Type == unix.TMPFS_MAGIC {
		return &Error{s.root, errors.New("it lies on tmpfs, which does not note what is written through mmap, so changes cannot be found without overlay mounts"),
			"choose a directory on a disk, such as ext4, xfs or btrfs, with --root; in a pod that is an emptyDir without medium: Memory"}
	}
	if why, advice := unsuitable(st.Type); why != "" {
		return &Error{s.root, errors.New(why), advice}
	}
	return nil
}

// unsuitable says why a store cannot lie on a kind of file system, and what to do.
func unsuitable(kind int64) (why, advice string) {
	switch kind {
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "it lies on an overlay, which cannot hold the layers of another", localAdvice + "; in a container that is a volume"
	case unix.NFS_SUPER_MAGIC:
		return "it lies on NFS, where locks and extended attributes do not work as needed", localAdvice
	case unix.SMB_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC:
		return "it lies on a Windows share, where owners and extended attributes are not kept", localAdvice
	case unix.V9FS_MAGIC, unix.AFS_SUPER_MAGIC, unix.CEPH_SUPER_MAGIC, unix.CODA_SUPER_MAGIC:
		return "it lies on a network file system, where locks and extended attributes do not work as needed", localAdvice
	case unix.ECRYPTFS_SUPER_MAGIC, unix.MSDOS_SUPER_MAGIC, unix.EXFAT_SUPER_MAGIC:
		return "its file system cannot hold overlay layers", localAdvice
	}
	return "", ""
}

func (s *Store) checkFileSystem() error {
	probe, err := os.CreateTemp(s.root, probeTemp)
	if err != nil {
		return &Error{s.root, err, "choose a directory that you can write to with --root"}
	}
	defer os.Remove(probe.Name())
	defer probe.Close()
	if err := unix.Fsetxattr(int(probe.Fd()), "user.overlay.probe", []byte("y"), 0); err != nil {
		return &Error{s.root, fmt.Errorf("its file system keeps no user extended attributes: %w", err), localAdvice}
	}
	return nil
}

// checkName keeps ids, keys and maps to what is one harmless file name: letters, digits and a few signs, the first not one of them.
func checkName(name string) error {
	ok := 0 < len(name) && len(name) <= 200
	for i := 0; ok && i < len(name); i++ {
		c := name[i]
		alphanumeric := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		ok = alphanumeric || i > 0 && strings.IndexByte(":+,._@=-", c) >= 0
	}
	if !ok {
		return fmt.Errorf("%.60q is no valid name", name)
	}
	return nil
}

func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
}
