package layer

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/owner"
)

// OwnerError says that a file belongs to an id which the user namespace does not have.
type OwnerError struct{ UID, GID int }

func (e *OwnerError) Error() string {
	return fmt.Sprintf("owner %d:%d is outside the ids of this user namespace", e.UID, e.GID)
}

// Hint tells what to do about it.
func (e *OwnerError) Hint() string {
	return "give the user more subordinate ids in /etc/subuid and /etc/subgid (usermod --add-subuids, --add-subgids)"
}

// SetOwner makes uid:gid the owner of f, which may be opened with O_PATH. With single, the user
// namespace has one id only and the owner is recorded, as package owner does it.
//
// A change of owner clears setuid bits and file capabilities: set those afterwards.
func SetOwner(f *os.File, uid, gid int, single bool) error {
	return setOwner(int(f.Fd()), uid, gid, single)
}

func setOwner(fd, uid, gid int, single bool) error {
	if uid < 0 || gid < 0 || uid > maxID || gid > maxID {
		return &OwnerError{UID: uid, GID: gid}
	}
	if single {
		return recordOwner(fd, uid, gid)
	}
	err := unix.Fchownat(fd, "", uid, gid, unix.AT_EMPTY_PATH)
	if err == unix.EINVAL {
		return &OwnerError{UID: uid, GID: gid}
	}
	if err != nil {
		return fmt.Errorf("change owner to %d:%d: %w", uid, gid, err)
	}
	return nil
}

// recordOwner writes down who owns what belongs to the one id.
func recordOwner(fd, uid, gid int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("record owner %d:%d: %w", uid, gid, err)
	}
	return owner.Record(procPath(fd), st.Mode, owner.IDs{UID: uint32(uid), GID: uint32(gid)})
}
