package remote

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// What KeepGitDir leaves is what git leaves after a shallow fetch and a checkout of one commit: a detached HEAD, the ref that was asked
// for, origin without credentials, one pack and an index.

const packDir = "objects/pack"

// indexed is a file that the index lists.
type indexed struct {
	path string
	entry
}

// refOf is the ref to leave behind; a hash leaves none.
func refOf(c Commit) string {
	if !strings.HasPrefix(c.Ref, "refs/") {
		return ""
	}
	return c.Ref
}

// writeGit completes a git directory that has its pack already.
func (r *repository) writeGit(ref, id string) error {
	pack := packDir + "/pack-" + r.pack.sum.String()
	if err := r.file.Chmod(0o444); err != nil { // whatever the umask is
		return err
	}
	if err := r.git.Rename(packDir+"/incoming", pack+".pack"); err != nil {
		return err
	}
	idx, err := r.pack.index()
	if err != nil {
		return err
	}
	index, err := makeIndex(r.index, r.pack.size)
	if err != nil {
		return err
	}
	config, err := r.config()
	if err != nil {
		return err
	}
	files := map[string][]byte{
		pack + ".idx": idx,
		"HEAD":        []byte(r.commit.String() + "\n"),
		"config":      []byte(config),
		"index":       index,
	}
	if _, err := field(r.raw, "parent"); err == nil { // its history was not fetched, or is not shown
		files["shallow"] = []byte(r.commit.String() + "\n")
	}
	if ref != "" {
		if err := checkRef(ref); err != nil {
			return err
		}
		files[ref] = []byte(id + "\n")
	}
	for _, dir := range []string{"refs/heads", "refs/tags"} {
		if err := makeDirs(r.git, dir); err != nil {
			return err
		}
	}
	for name, b := range files {
		if err := writeFile(r.git, name, b); err != nil {
			return err
		}
	}
	return nil
}

// writeModuleGit does it for a submodule, whose git directory is within its parent's.
func (r *repository) writeModuleGit(work *os.Root) error {
	if err := r.writeGit("", ""); err != nil {
		return err
	}
	to, err := filepath.Rel("/"+r.work, "/"+r.place)
	if err != nil {
		return err
	}
	return writeFile(work, ".git", []byte("gitdir: "+to+"\n"))
}

func (r *repository) config() (string, error) {
	var b strings.Builder
	version, extension := 0, ""
	if r.pack.size == 32 {
		version, extension = 1, "[extensions]\n\tobjectformat = sha256\n"
	}
	fmt.Fprintf(&b, "[core]\n\trepositoryformatversion = %d\n\tfilemode = true\n\tbare = false\n\tlogallrefupdates = true\n", version)
	if r.work != "" {
		to, err := filepath.Rel("/"+r.place, "/"+r.work)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "\tworktree = %s\n", quoteConfig(to))
	}
	fmt.Fprintf(&b, "%s[remote \"origin\"]\n\turl = %s\n\tfetch = +refs/heads/*:refs/remotes/origin/*\n", extension, quoteConfig(r.at.String()))
	for _, m := range r.used {
		fmt.Fprintf(&b, "[submodule %s]\n\tactive = true\n\turl = %s\n", quoteConfig(m.name), quoteConfig(m.url))
	}
	return b.String(), nil
}

// quoteConfig writes a stranger's text so that git reads it as one value. Names and addresses have no line breaks, see their checks.
func quoteConfig(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s) + `"`
}

// moduleGit makes the directory in which a submodule's git directory is, within its parent's. One within another's would let a
// repository write the other's hooks.
func (r *repository) moduleGit(m module) (*os.Root, error) {
	for _, u := range r.used {
		a, b := strings.ToLower(u.name)+"/", strings.ToLower(m.name)+"/"
		if strings.HasPrefix(a, b) || strings.HasPrefix(b, a) {
			return nil, fmt.Errorf("the submodules %q and %q would share a git directory", u.name, m.name)
		}
	}
	at := path.Join("modules", m.name)
	if err := makeDirs(r.git, path.Dir(at)); err != nil {
		return nil, err
	}
	return makeDir(r.git, at)
}

func checkRef(ref string) error {
	bad := strings.ContainsAny(ref, " ~^:?*[\\\x7f") || strings.ContainsFunc(ref, func(r rune) bool { return r < ' ' }) || strings.Contains(ref, "@{")
	for part := range strings.SplitSeq(ref, "/") {
		bad = bad || part == "" || strings.HasPrefix(part, ".") || strings.HasSuffix(part, ".lock") || strings.Contains(part, "..") || strings.HasSuffix(part, ".")
	}
	if bad || !strings.HasPrefix(ref, "refs/") {
		return fmt.Errorf("%q is not a ref", ref)
	}
	return nil
}

// makeIndex writes the index of a clean work tree. It says nothing of inodes and times, which differ wherever the files are copied to; git
// compares contents where an entry has no size, so git status is right everywhere.
func makeIndex(entries []indexed, size int) ([]byte, error) {
	slices.SortFunc(entries, func(a, b indexed) int { return strings.Compare(a.path, b.path) })
	b := append([]byte("DIRC"), 0, 0, 0, 2)
	b = binary.BigEndian.AppendUint32(b, uint32(len(entries)))
	for _, e := range entries {
		start := len(b)
		b = append(b, make([]byte, 24)...) // times, device, inode
		b = binary.BigEndian.AppendUint32(b, [...]uint32{regular: 0o100644, executable: 0o100755, symlink: 0o120000, submodule: 0o160000}[e.kind])
		b = append(b, make([]byte, 12)...) // owner, size
		b = append(b, e.id...)
		b = binary.BigEndian.AppendUint16(b, uint16(min(len(e.path), 0xfff)))
		b = append(b, e.path...)
		b = append(b, make([]byte, 8-(len(b)-start)%8)...)
	}
	return appendChecksum(b, size)
}

// makeDirs is MkdirAll without a umask.
func makeDirs(root *os.Root, dir string) error {
	made := ""
	for part := range strings.SplitSeq(dir, "/") {
		made = path.Join(made, part)
		err := root.Mkdir(made, 0o755)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err == nil {
			err = root.Chmod(made, 0o755)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func writeFile(root *os.Root, name string, b []byte) (err error) {
	if dir := path.Dir(name); dir != "." {
		if err := makeDirs(root, dir); err != nil {
			return err
		}
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer closing(f, &err)
	if _, err := f.Write(b); err != nil {
		return err
	}
	return f.Chmod(0o644)
}
