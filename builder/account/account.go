// Package account turns the user that a Dockerfile names into the numbers that a process and a file get.
//
// The names are looked up in /etc/passwd and /etc/group of a root directory that strangers made. Both files are
// therefore opened by descriptor with every link resolved inside that root, must be regular, and are read up to a
// limit. The package knows nothing of users of the machine that builds, and never asks its name services.
package account

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Identity is who a process runs as.
type Identity struct {
	UID, GID uint32
	// Groups are the supplementary groups, as /etc/group lists them; empty when the spec names a group itself.
	Groups []uint32
	// Home is the home directory in /etc/passwd, empty if the user has no entry there.
	Home string
}

const (
	// maxID is the largest id: the kernel, runtimes and libraries disagree about larger ones, and some have read
	// 4294967296 as root (CVE-2024-40635).
	maxID = 1<<31 - 1
	// maxGroups is the kernel's NGROUPS_MAX.
	maxGroups = 65536
)

// Resolve finds who spec means in the root directory root. spec is what USER takes: "user", "user:group", "uid",
// "uid:gid" or a mixture; empty is root. The rules are BuildKit's:
//
//   - a number is an id and never a name, whatever /etc/passwd says, and needs no entry;
//   - a user without a group has the group and the supplementary groups of its entry, group 0 if it has none;
//   - a name that has no entry is an error, except root in "root:GROUP" where both halves need no lookup.
//
// A nil error means that both numbers are valid ids (0 to 2147483647).
func Resolve(root, spec string) (Identity, error) {
	user, group, _ := strings.Cut(spec, ":")
	if spec == "" {
		return defaultUser(root), nil
	}
	if id, ok := literal(user, group); ok {
		return id, nil
	}
	who, err := findUser(root, user)
	if err != nil {
		return Identity{}, err
	}
	if group != "" {
		gid, err := findGroup(root, group)
		if err != nil {
			return Identity{}, err
		}
		return Identity{UID: who.uid, GID: gid, Home: who.home}, nil
	}
	id := Identity{UID: who.uid, GID: who.gid, Home: who.home}
	if who.name == "" {
		return id, nil
	}
	id.Groups, err = groupsOf(root, who.name)
	return id, err
}

// LookupUser finds name, which is never taken for a number, in /etc/passwd of root. found is false when there is no
// such user or no such file.
func LookupUser(root, name string) (uid, gid uint32, found bool, err error) {
	e, found, err := passwdEntry(root, func(f []string) bool { return f[0] == name })
	if err != nil || !found {
		return 0, 0, false, err
	}
	return e.uid, e.gid, true, nil
}

// LookupGroup finds name, which is never taken for a number, in /etc/group of root. found is false when there is no
// such group or no such file.
func LookupGroup(root, name string) (gid uint32, found bool, err error) {
	return groupEntry(root, func(f []string) bool { return f[0] == name })
}

// defaultUser is root as the files describe it. Files that cannot be used change nothing: an image without USER
// must run, whatever lies at /etc/passwd.
func defaultUser(root string) Identity {
	id, err := Resolve(root, "0")
	if err != nil {
		return Identity{}
	}
	return id
}

// literal answers a spec of which both halves are a number or root, without looking at any file.
func literal(user, group string) (Identity, bool) {
	uid, ok := literalID(user)
	if !ok {
		return Identity{}, false
	}
	gid, ok := literalID(group)
	return Identity{UID: uid, GID: gid}, ok
}

func literalID(s string) (uint32, bool) {
	if s == "root" {
		return 0, true
	}
	id, isNumber, err := number(s)
	return id, isNumber && err == nil
}

// number reads an id of ASCII digits. A sign before digits makes neither a number nor a name: runtimes disagree
// about it, and some have run "-1" as root (CVE-2026-30892).
func number(s string) (id uint32, isNumber bool, err error) {
	digits := strings.TrimLeft(s, "+-")
	if digits == "" || strings.Trim(digits, "0123456789") != "" {
		return 0, false, nil
	}
	if len(digits) != len(s) {
		return 0, true, fmt.Errorf("%q is neither a name nor an id: an id has no sign", s)
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	if err != nil || n > maxID {
		return 0, true, fmt.Errorf("id %s is out of range: ids go from 0 to %d", s, maxID)
	}
	return uint32(n), true, nil
}

type entry struct {
	name     string
	uid, gid uint32
	home     string
}

func findUser(root, user string) (entry, error) {
	if user == "" {
		user = "0"
	}
	uid, isNumber, err := number(user)
	if err != nil {
		return entry{}, fmt.Errorf("user %w", err)
	}
	e, found, err := passwdEntry(root, func(f []string) bool {
		if !isNumber {
			return f[0] == user
		}
		id, err := field(f, 2)
		return err == nil && id == uid
	})
	switch {
	case err != nil:
		return entry{}, fmt.Errorf("look up user %q: %w", user, err)
	case found:
		return e, nil
	case isNumber:
		return entry{uid: uid}, nil
	}
	return entry{}, missing(root, "user", passwdFile, user)
}

func findGroup(root, group string) (uint32, error) {
	gid, isNumber, err := number(group)
	if err != nil {
		return 0, fmt.Errorf("group %w", err)
	}
	if isNumber {
		return gid, nil
	}
	gid, found, err := LookupGroup(root, group)
	if err != nil {
		return 0, fmt.Errorf("look up group %q: %w", group, err)
	}
	if !found {
		return 0, missing(root, "group", groupFile, group)
	}
	return gid, nil
}

// groupsOf lists the groups that have user as a member, in the order of the file.
func groupsOf(root, user string) ([]uint32, error) {
	var groups []uint32
	err := eachLine(root, groupFile, func(f []string) (bool, error) {
		if len(f) < 4 || !isMember(f[3], user) {
			return false, nil
		}
		gid, err := field(f, 2)
		if err != nil {
			return false, err
		}
		if len(groups) == maxGroups {
			return false, fmt.Errorf("user %q is in more than %d groups", user, maxGroups)
		}
		groups = append(groups, gid)
		return false, nil
	})
	if err != nil && !errors.Is(err, errNoFile) {
		return nil, fmt.Errorf("find the groups of user %q: %w", user, err)
	}
	return groups, nil
}

func isMember(list, user string) bool {
	for member := range strings.SplitSeq(list, ",") {
		if member == user {
			return true
		}
	}
	return false
}

// passwdEntry gives the first entry that match accepts.
func passwdEntry(root string, match func(fields []string) bool) (e entry, found bool, err error) {
	err = eachLine(root, passwdFile, func(f []string) (bool, error) {
		if !match(f) {
			return false, nil
		}
		found, e.name = true, f[0]
		if e.uid, err = field(f, 2); err != nil {
			return false, err
		}
		if e.gid, err = field(f, 3); err != nil {
			return false, err
		}
		if len(f) > 5 {
			e.home = f[5]
		}
		return true, nil
	})
	if errors.Is(err, errNoFile) {
		return entry{}, false, nil
	}
	return e, found, err
}

// groupEntry gives the id of the first entry that match accepts.
func groupEntry(root string, match func(fields []string) bool) (gid uint32, found bool, err error) {
	err = eachLine(root, groupFile, func(f []string) (bool, error) {
		if !match(f) {
			return false, nil
		}
		found = true
		gid, err = field(f, 2)
		return true, err
	})
	if errors.Is(err, errNoFile) {
		return 0, false, nil
	}
	return gid, found, err
}

// field reads the id in column i of an entry. A broken id is an error and not 0, which would be root.
func field(f []string, i int) (uint32, error) {
	if i >= len(f) {
		return 0, fmt.Errorf("the entry of %q has no column %d", f[0], i+1)
	}
	id, isNumber, err := number(f[i])
	if err != nil {
		return 0, fmt.Errorf("the entry of %q: %w", f[0], err)
	}
	if !isNumber {
		return 0, fmt.Errorf("the entry of %q has %q where an id must be", f[0], f[i])
	}
	return id, nil
}

// notFound is a name without an entry.
type notFound struct {
	what, file, name string
	noFile           bool
}

func missing(root, what, file, name string) error {
	f, err := open(root, file)
	if err == nil {
		f.Close()
	}
	return &notFound{what: what, file: file, name: name, noFile: errors.Is(err, errNoFile)}
}

func (e *notFound) Error() string {
	if e.noFile {
		return fmt.Sprintf("no %s %q: the image has no /%s", e.what, e.name, e.file)
	}
	return fmt.Sprintf("no %s %q in /%s of the image", e.what, e.name, e.file)
}

// Hint gives the two ways out.
func (e *notFound) Hint() string {
	return fmt.Sprintf("use a number, or add the %s in an earlier RUN", e.what)
}
