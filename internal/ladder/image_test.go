//go:build ladder

package ladder

import (
	"archive/tar"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// An image is a directory of testdata with a Dockerfile.
type image struct {
	name, base string
	// packages installs what takes longer than all others together. It is built by every account and once in a place of each rung:
	// what differs between places of one rung - filters, mounts, capabilities - shows in the others, which do the same in little.
	packages bool
}

var images = []image{
	{name: "simple", base: "busybox"},
	{name: "deb", base: "debian"},
	{name: "packages", base: "debian", packages: true}, // PostgreSQL, Redis, sshd, sudo
	{name: "users", base: "debian"},                    // useradd, chown -R, and every way to be somebody else
	{name: "modes", base: "busybox"},                   // setuid, setgid, sticky, and directories that hand their group on
	{name: "capabilities", base: "debian"},             // of files
	{name: "nodes", base: "debian"},                    // pipes, sockets, and no devices
	{name: "links", base: "busybox"},                   // owners of symbolic links; hard ones, also to lower layers
	{name: "copies", base: "busybox"},                  // COPY, its flags, and several stages
	{name: "syntax", base: "busybox"},                  // ONBUILD, WORKDIR, heredocs, ADD of an archive
	{name: "attributes", base: "debian"},               // extended ones, holes in files, odd names
	{name: "deletions", base: "busybox"},               // whiteouts, directories in the place of others, changes of a time alone
	{name: "changes", base: "debian"},                  // of what a lower layer has, one by one
	{name: "static", base: "busybox"},                  // programs between which and the kernel nothing can be put
	{name: "mounts", base: "busybox"},                  // owners of what RUN --mount shows
	{name: "kept", base: "busybox"},                    // what becomes of a mount, and devices without a /proc
}

// imagesFor are all, or all but those that take long.
func imagesFor(packages bool) []image {
	return slices.DeleteFunc(slices.Clone(images), func(i image) bool { return i.packages && !packages })
}

// An account builds on this machine, in no container.
type account struct {
	name string
	// enter is the command before the builder's.
	enter    []string
	packages bool
}

func as(account string, then ...string) []string {
	return append([]string{"setpriv", "--reuid=" + account, "--regid=" + account, "--init-groups", "--inh-caps=-all", "--ambient-caps=-all"}, then...)
}

var accounts = []account{
	{"an account with subordinate ids", as("cooper-many"), true},
	{"an account with one id", as("cooper-single"), true},
	{"root of a user namespace", as("cooper-many", "unshare", "--user", "--map-auto", "--map-root-user"), true},
	{"root of the machine", []string{"setpriv"}, false},
}

// buildAs builds the images, and tells of each its digest.
func (s *site) buildAs(t *testing.T, a account, then func(name, digest string)) {
	t.Helper()
	dir, err := os.MkdirTemp(s.dir, "account-")
	check(t, err)
	check(t, os.Chmod(dir, 0o777))
	environment := []string{"env", "-i", "PATH=" + os.Getenv("PATH"), "HOME=" + dir, "SOURCE_DATE_EPOCH=1700000000", "CANARY=secret-of-the-builder"}
	for _, image := range imagesFor(a.packages) {
		out := filepath.Join(dir, image.name)
		args := slices.Concat(a.enter, environment, []string{
			s.cooper, "build", "--root", filepath.Join(dir, "store"), "--policy", "none", "--progress", "plain", "--secret", "id=token,env=CANARY",
			"--build-context", "base=oci-layout://" + s.bases[image.base] + ":latest", "--build-context", "packages=" + s.packages,
			"-o", "type=oci,dest=" + out + ",tar=false", filepath.Join(s.contexts, image.name),
		})
		if log, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", strings.Join(args, " "), err, log)
			continue
		}
		then(image.name, digest(t, out))
	}
}

// writeArchive makes what ADD unpacks: a checkout keeps no owners.
func writeArchive(t *testing.T, file string) {
	t.Helper()
	f, err := os.Create(file)
	check(t, err)
	w := tar.NewWriter(f)
	for _, h := range []tar.Header{
		{Name: "dir/", Typeflag: tar.TypeDir, Mode: 0o2775, Uid: 31, Gid: 32},
		{Name: "dir/file", Typeflag: tar.TypeReg, Mode: 0o4751, Uid: 33, Gid: 34, Size: 5, PAXRecords: map[string]string{"SCHILY.xattr.user.a": "value"}},
		{Name: "dir/hard", Typeflag: tar.TypeLink, Linkname: "dir/file"},
		{Name: "dir/link", Typeflag: tar.TypeSymlink, Linkname: "/nowhere", Mode: 0o777, Uid: 35, Gid: 36},
		{Name: "dir/fifo", Typeflag: tar.TypeFifo, Mode: 0o640, Uid: 37, Gid: 38},
		{Name: "name-\xff", Typeflag: tar.TypeReg, Mode: 0o600, Uid: 60000, Gid: 60001, Size: 5, Format: tar.FormatGNU},
	} {
		h.ModTime = time.Unix(1_600_000_000, 0)
		check(t, w.WriteHeader(&h))
		if h.Size > 0 {
			_, err := w.Write([]byte("text\n"))
			check(t, err)
		}
	}
	check(t, errors.Join(w.Close(), f.Close()))
}
