package remote

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"strconv"
	"strings"
	"time"

	"github.com/pjbgf/sha1cd"
)

// oid is the name of a git object: the bytes of its SHA-1 or, in a SHA-256 repository, of that.
type oid string

func (o oid) String() string { return hex.EncodeToString([]byte(o)) }

func parseOID(s string) (oid, error) {
	b, err := hex.DecodeString(s)
	if err != nil || (len(b) != sha1cd.Size && len(b) != sha256.Size) {
		return "", fmt.Errorf("%q is not the name of an object", s)
	}
	return oid(b), nil
}

// isCommit says whether a ref is a whole commit hash, in the form BuildKit takes.
func isCommit(s string) bool {
	_, err := parseOID(s)
	return err == nil && s == strings.ToLower(s)
}

// checksum is the hash of objects and files of a repository. SHA-1 comes with the detection of collisions that git itself has.
type checksum struct{ hash.Hash }

func newChecksum(size int) checksum {
	if size == sha256.Size {
		return checksum{sha256.New()}
	}
	return checksum{sha1cd.New()}
}

func (c checksum) oid() (oid, error) {
	if s, ok := c.Hash.(sha1cd.CollisionResistantHash); ok {
		sum, collision := s.CollisionResistantSum(nil)
		if collision {
			return "", fmt.Errorf("%x is made to collide with another SHA-1", sum)
		}
		return oid(sum), nil
	}
	return oid(c.Sum(nil)), nil
}

type objectType byte

const (
	commitObject objectType = 1
	treeObject   objectType = 2
	blobObject   objectType = 3
	tagObject    objectType = 4
	ofsDelta     objectType = 6
	refDelta     objectType = 7
)

func (t objectType) String() string {
	switch t {
	case commitObject:
		return "commit"
	case treeObject:
		return "tree"
	case blobObject:
		return "blob"
	case tagObject:
		return "tag"
	}
	return "delta"
}

// field is the value of a header line of a commit or tag.
func field(object []byte, name string) (string, error) {
	for line := range bytes.Lines(object) {
		if len(line) == 1 {
			break
		}
		if v, ok := bytes.CutPrefix(line, []byte(name+" ")); ok {
			return strings.TrimSuffix(string(v), "\n"), nil
		}
	}
	return "", fmt.Errorf("the object has no %s", name)
}

func committed(commit []byte) (time.Time, error) {
	v, err := field(commit, "committer")
	if err != nil {
		return time.Time{}, err
	}
	words := strings.Fields(v[strings.LastIndexByte(v, '>')+1:])
	if len(words) == 0 {
		return time.Time{}, errors.New("the commit has no time")
	}
	s, err := strconv.ParseInt(words[0], 10, 64)
	if err != nil || s < 0 || s > 1<<40 {
		return time.Time{}, fmt.Errorf("%q is not the time of a commit", words[0])
	}
	return time.Unix(s, 0), nil
}

// entry is one line of a tree.
type entry struct {
	name string
	kind entryKind
	id   oid
}

type entryKind int

const (
	regular entryKind = iota
	executable
	symlink
	directory
	submodule
)

// parseTree reads a tree whose names can be files of a directory and nothing else: no path, no second one of the same name, and no
// other spelling of .git, in which git would look for programs to run.
func parseTree(raw []byte, size int) ([]entry, error) {
	var entries []entry
	seen := map[string]bool{}
	for len(raw) > 0 {
		head, rest, ok := bytes.Cut(raw, []byte{0})
		mode, name, ok2 := strings.Cut(string(head), " ")
		if !ok || !ok2 || len(rest) < size {
			return nil, errors.New("a tree that is cut short")
		}
		e := entry{name: name, id: oid(rest[:size])}
		raw = rest[size:]
		n, err := strconv.ParseUint(mode, 8, 32)
		if err != nil {
			return nil, fmt.Errorf("%q has the mode %q", name, mode)
		}
		switch n &^ 0o7777 {
		case 0o100000:
			if n&0o100 != 0 {
				e.kind = executable
			}
		case 0o120000:
			e.kind = symlink
		case 0o040000:
			e.kind = directory
		case 0o160000:
			e.kind = submodule
		default:
			return nil, fmt.Errorf("%q has the mode %q", name, mode)
		}
		if err := checkName(name); err != nil {
			return nil, err
		}
		if e.kind == symlink && disguised(name, "gitmodules", "gi7eba") {
			return nil, fmt.Errorf("%q is a symbolic link", name)
		}
		if seen[name] {
			return nil, fmt.Errorf("two entries are called %q", name)
		}
		seen[name] = true
		entries = append(entries, e)
	}
	return entries, nil
}

// checkName refuses what git refuses to check out.
func checkName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || disguised(name, "git", "") {
		return fmt.Errorf("an entry is called %q", name)
	}
	if len(name) > 255 {
		return fmt.Errorf("the name %.20q... is longer than a file's can be", name)
	}
	return nil
}

// disguised says whether some file system would take name for .plain: in any case, with code points that HFS+ leaves out, with the dots,
// spaces and streams that NTFS leaves out, or as a short name that NTFS makes of it, which begins like plain or, in a crowded directory,
// with a hash.
func disguised(name, plain, hash string) bool {
	name = strings.ToLower(strings.Map(func(r rune) rune {
		switch {
		case r >= 0x200c && r <= 0x200f, r >= 0x202a && r <= 0x202e, r >= 0x206a && r <= 0x206f, r == 0xfeff:
			return -1
		}
		return r
	}, name))
	name, _, _ = strings.Cut(name, ":")
	name, _, _ = strings.Cut(name, `\`) // a separator on Windows
	name = strings.TrimRight(name, " .")
	if name == "."+plain {
		return true
	}
	stem, digits, ok := strings.Cut(name, "~")
	if !ok || stem == "" || digits == "" || strings.Trim(digits, "0123456789") != "" {
		return false
	}
	return stem == plain[:min(6, len(plain))] || strings.HasPrefix(hash, stem)
}
