package files

import (
	"fmt"
	"math"

	"github.com/cooper-build/cooper/builder/account"
	"github.com/cooper-build/cooper/builder/plan"
)

// owner finds out who an action's files are to belong to; nil if it says nothing about it. As in BuildKit a user without
// an entry is 0, and a group without an entry is that of the user.
func (a *applier) owner(o *plan.Owner) (*ids, error) {
	if o == nil {
		return nil, nil
	}
	own := &ids{uid: o.UID, gid: o.GID}
	var names Tree
	if o.UserName != "" || o.GroupName != "" {
		if o.NamesFrom == plan.Scratch {
			return nil, fmt.Errorf("no /etc/passwd to look up %q in: there is no file yet", o.UserName+":"+o.GroupName)
		}
		var err error
		if names, err = a.tree(o.NamesFrom); err != nil {
			return nil, err
		}
	}
	if o.UserName != "" {
		uid, gid, _, err := account.LookupUser(names.Dir, o.UserName)
		if err != nil {
			return nil, fmt.Errorf("look up user %q: %w", o.UserName, err)
		}
		own.uid = int(uid)
		if o.GID == plan.GroupOfUser {
			own.gid = int(gid)
		}
	}
	if o.GroupName != "" {
		gid, found, err := account.LookupGroup(names.Dir, o.GroupName)
		if err != nil {
			return nil, fmt.Errorf("look up group %q: %w", o.GroupName, err)
		}
		if found {
			own.gid = int(gid)
		}
	}
	return own, own.check()
}

// check refuses ids that mean "leave as it is" to chown or that others read as another number.
func (i *ids) check() error {
	for _, id := range []int{i.uid, i.gid} {
		if id < 0 || id > math.MaxInt32 {
			return fmt.Errorf("owner %d:%d: ids go from 0 to %d", i.uid, i.gid, math.MaxInt32)
		}
	}
	return nil
}
