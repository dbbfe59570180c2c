package layer

import (
	"errors"
	"fmt"
	"os"

	rootlesscontainers "github.com/rootless-containers/proto/go-proto"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
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
// namespace has one id only and the owner is recorded in user.rootlesscontainers instead; the kernel
// allows that on files and directories only, so on links, pipes and sockets nothing is recorded.
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

// recordOwner writes the owner in the format that umoci and other rootless tools share. An id of 0 is
// what the file has anyway and is written as "no change".
func recordOwner(fd, uid, gid int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("record owner %d:%d: %w", uid, gid, err)
	}
	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFREG && kind != unix.S_IFDIR {
		return nil
	}
	if uid == 0 && gid == 0 {
		err := unix.Removexattr(procPath(fd), rootlesscontainers.Keyname)
		if err != nil && !errors.Is(err, unix.ENODATA) {
			return fmt.Errorf("forget the recorded owner: %w", err)
		}
		return nil
	}
	owner := &rootlesscontainers.Resource{Uid: rootlesscontainers.NoopID, Gid: rootlesscontainers.NoopID}
	if uid != 0 {
		owner.Uid = uint32(uid)
	}
	if gid != 0 {
		owner.Gid = uint32(gid)
	}
	value, err := proto.Marshal(owner)
	if err != nil {
		return fmt.Errorf("record owner %d:%d: %w", uid, gid, err)
	}
	if err := unix.Setxattr(procPath(fd), rootlesscontainers.Keyname, value, 0); err != nil {
		return fmt.Errorf("record owner %d:%d: %w", uid, gid, err)
	}
	return nil
}
