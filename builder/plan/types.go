package plan

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Request says which Dockerfile to plan and with what. The zero value of every
// field but Context means what docker build means when the flag is not given.
type Request struct {
	// Dockerfile is the path of the file; empty is Dockerfile in Context. In a
	// remote context a relative path is a path in it.
	Dockerfile string
	// Text is the Dockerfile itself, where it comes from no file.
	Text []byte
	// Context is the directory that COPY and ADD read, a git or http(s) URL, or
	// Uploaded. Empty is a context without files.
	Context string
	// Target is the stage to build; empty is the last one.
	Target string
	// Args are the --build-arg values.
	Args map[string]string
	// Contexts are the --build-context values, by name.
	Contexts map[string]string
	// Labels are added to the image config.
	Labels map[string]string
	// NoCache marks every step that BuildKit would not take from its cache, or
	// only those of NoCacheStages, if there are some.
	NoCache       bool
	NoCacheStages []string
	// Pull asks the registry for base images also where they are known.
	Pull bool
	// Platforms are the targets; none is this machine's. Several make an index.
	Platforms []ocispec.Platform
	// Network is what a RUN without --network gets.
	Network Network
	// Hosts are lines for /etc/hosts, as "name=ip".
	Hosts []Host
	// ShmSize is the size of /dev/shm in bytes; 0 leaves it to the sandbox.
	ShmSize int64
	// Ulimits are the limits of every RUN.
	Ulimits []Ulimit
	// CgroupParent is the control group that RUN's processes belong below.
	CgroupParent string
	// Epoch becomes the build argument SOURCE_DATE_EPOCH, unless Args has it.
	Epoch *time.Time
}

// Uploaded as a context stands for the archive that the caller sends.
const Uploaded = "-"

// Resolver answers what planning must know of the world. Its methods may be
// called from several goroutines at once.
type Resolver interface {
	// ResolveImage gives the digest and the config of the image that ref means
	// on p. ref is "oci-layout://NAME[:TAG][@DIGEST]" for the layout that was
	// given as build context NAME, else a normalised docker reference. An empty
	// digest says that it is not known; the config must always be there.
	ResolveImage(ctx context.Context, ref string, p ocispec.Platform) (digest.Digest, []byte, error)
	// ReadFile gives a file of the tree that a step makes, or its first limit
	// bytes: a Dockerfile in a git repository. steps holds what the step needs.
	// The error is fs.ErrNotExist if the tree has no such file.
	ReadFile(ctx context.Context, steps []Step, of Ref, path string, limit int64) ([]byte, error)
	// ResolveRevision says which state of a Git or HTTP source the build sees.
	ResolveRevision(ctx context.Context, op Op) (Revision, error)
}

// Revision is the state of a remote source.
type Revision struct {
	// Commit is the raw commit object of a Git source.
	Commit []byte
	// Modified is when the server says that a file was changed; nil if it does not.
	Modified *time.Time
}

// Ref is the index of a step in Graph.Steps.
type Ref int

// Scratch is the empty tree; it is a base, never a step.
const Scratch Ref = -1

// Graph is a planned build. It is a value: nothing changes it after Make.
type Graph struct {
	// Steps holds what the targets need and no more, inputs before their users.
	// What several targets need is there once.
	Steps []Step
	// Targets are the images to make, one for each platform that was asked for.
	Targets []Target
	// Index says that the result is an image index, also of a single target.
	Index bool
	// Warnings are what the frontend's build checks found, in Dockerfile order.
	Warnings []Warning
	// Dockerfile is the text that was planned.
	Dockerfile []byte
	// Epoch is the effective SOURCE_DATE_EPOCH, from wherever it came.
	Epoch *time.Time
}

// Target is an image for one platform.
type Target struct {
	// Platform is what the image is for.
	Platform ocispec.Platform
	// Result is the step whose tree becomes the image; Scratch for an empty one.
	Result Ref
	// Config is the image config as the frontend leaves it: the history of the
	// base and one entry per instruction, but DiffIDs of the base only.
	Config []byte
	// BaseConfig is the config of the image that Result stands on; nil if none.
	BaseConfig []byte
	// Base is the Image step that Result stands on, Scratch if there is none.
	Base Ref
	// Layers are the steps on the way from Base to Result that make a layer,
	// base first: one for each non-empty history entry which Config has more
	// than BaseConfig, in the same order. COPY --link counts as its Merge. When
	// Result stands on a tree that is no image (FROM a directory or a repository
	// given as build context) that step comes first and, as in BuildKit, no
	// history entry belongs to it.
	Layers []Ref
	// HistoryLines are the Dockerfile lines of the entries of Config's history,
	// 0 for those of the base and wherever the line is unknown.
	HistoryLines []int
}

// Step is one vertex of the graph.
type Step struct {
	// ID is the same for the same step of every graph of one build.
	ID string
	// Name is what BuildKit displays, such as "[build 2/4] RUN make".
	Name string
	// Where is the instruction. A step that serves several, like the load of the
	// build context, has the first that needs it.
	Where Location
	// Op is one of the closed set of operations, held by value.
	Op Op
	// NoCache says that the step must run even if its result is known.
	NoCache bool
}

// Op is what a step does: Image, Local, Git, HTTP, Upload, Exec, Files, Merge
// or Diff.
type Op interface{ op() }

func (Image) op()  {}
func (Local) op()  {}
func (Git) op()    {}
func (HTTP) op()   {}
func (Upload) op() {}
func (Exec) op()   {}
func (Files) op()  {}
func (Merge) op()  {}
func (Diff) op()   {}

// Image is the tree of an image from a registry or an OCI layout.
type Image struct {
	// Ref is a name that Resolver understands, with the digest when known.
	Ref string
	// Digest is what the Resolver answered; it is empty if it did not know.
	Digest digest.Digest
	// Layout says that the image comes from an oci-layout build context.
	Layout bool
	// Platform chooses the manifest when Ref names an index.
	Platform ocispec.Platform
}

// Local is a directory of the person who builds: the context or a named one.
type Local struct {
	// Name is "context", or the name of the build context.
	Name string
	// Dir is where it lies. It is no part of what the step means.
	Dir string `encode:"-"`
	// Include, Exclude are patterns as in .dockerignore; Follow are the paths
	// that the build reads, where symlinks bring in what they point to.
	// Empty Include and Follow mean everything.
	Include, Exclude, Follow []string
}

// Git is the tree of a commit.
type Git struct {
	// Remote is the URL, also in the form user@host:path.
	Remote string
	// Ref is a branch, a tag, a full reference or a commit; empty is the
	// remote's HEAD. Checksum is what the commit, or the tag, must begin with.
	Ref, Checksum string
	// Subdir is the directory of the tree that becomes the root.
	Subdir string
	// KeepGitDir keeps .git. SkipSubmodules leaves their directories empty.
	// CommitTime gives files the time of the commit, not of the checkout.
	// FetchByCommit trusts Checksum to be what Ref names.
	KeepGitDir, SkipSubmodules, CommitTime, FetchByCommit bool
	// TokenSecret and HeaderSecret name secrets for an http server, and SSH an
	// agent for an ssh server, if they were given.
	TokenSecret, HeaderSecret, SSH string `encode:"-"`
}

// HTTP is a tree of one file that a server has.
type HTTP struct {
	URL string
	// Checksum is what the file must have; empty is anything.
	Checksum digest.Digest
	// Filename is its name; empty is what the server or the URL says.
	Filename string
	// Mode is its permissions; nil leaves them to the fetcher.
	Mode *os.FileMode
	// UID and GID own it.
	UID, GID int
	// HeaderSecret names a secret for the Authorization header, if it was given.
	HeaderSecret string `encode:"-"`
	// Header has further fields of the request, as "name: value".
	Header []string
}

// Upload is a tree of one file, the archive that the caller sends as context.
type Upload struct{ Filename string }

// Exec runs a process in Root; its result is Root as the process leaves it.
type Exec struct {
	Root     Ref
	Args     []string
	Env      []string
	Dir      string
	User     string
	Hostname string
	Network  Network
	Hosts    []Host
	// ShmSize is the size of /dev/shm in bytes; 0 leaves it to the sandbox.
	ShmSize int64
	Ulimits []Ulimit
	// CgroupParent is the control group that the process belongs below.
	CgroupParent string
	// Insecure takes the sandbox's limits away (RUN --security=insecure).
	Insecure bool
	// Mounts are sorted by target as BuildKit sorts them; secrets come last.
	Mounts []Mount
	// Proxy is added to Env in lower and upper case where Env lacks it. It is
	// how the network is reached and not what is fetched: no part of a key.
	Proxy Proxy `encode:"-"`
	// Platform is what the process was built for.
	Platform ocispec.Platform
}

// Network is what a process can reach.
type Network int

// The networks of RUN --network.
const (
	NetworkDefault Network = iota
	NetworkNone
	NetworkHost
)

func (n Network) String() string { return names(int(n), "default", "none", "host") }

// Host is a line of /etc/hosts.
type Host struct{ Name, IP string }

// Ulimit is a resource limit, named as in setrlimit(2) without RLIMIT_ and in
// lower case. -1 is no limit.
type Ulimit struct {
	Name       string
	Soft, Hard int64
}

// Proxy holds the values of the predefined proxy build arguments.
type Proxy struct{ HTTP, HTTPS, FTP, No, All string }

// MountKind says what RUN --mount mounts.
type MountKind int

// The kinds of mounts that an Exec can have.
const (
	// MountBind shows From at Selector. What a writable one changes is lost.
	MountBind MountKind = iota
	// MountCache is a directory that outlives the build, named by ID; it starts
	// as a copy of From at Selector.
	MountCache
	// MountSecret is a file with the value of the secret ID, or, when Env is
	// set, an environment variable and no file.
	MountSecret
	// MountTmpfs is an empty file system of at most Size bytes (0: no limit).
	MountTmpfs
	// MountSSH is the socket of the ssh agent ID.
	MountSSH
)

func (k MountKind) String() string { return names(int(k), "bind", "cache", "secret", "tmpfs", "ssh") }

// Sharing says what a second user of a cache mount gets.
type Sharing int

// The values of RUN --mount=type=cache,sharing.
const (
	SharingShared Sharing = iota
	SharingPrivate
	SharingLocked
)

func (s Sharing) String() string { return names(int(s), "shared", "private", "locked") }

// Mount is one mount of an Exec besides its root.
type Mount struct {
	Kind MountKind
	// From is the tree of a bind or the initial content of a cache.
	From Ref
	// Selector is an absolute path in From; empty is all of it.
	Selector string
	// Target is an absolute path; it is empty for a secret in the environment.
	Target   string
	ReadOnly bool
	// ID names the cache, the secret or the agent.
	ID      string
	Sharing Sharing
	// UID, GID and Mode belong to the file of a secret or the socket of an agent.
	UID, GID int
	Mode     uint32
	// Optional says that a missing secret or agent is no error.
	Optional bool
	// Env is the variable that takes the value of a secret.
	Env string
	// Size limits a tmpfs, in bytes.
	Size int64
}

// Files changes files: each action works on the result of the one before, the
// first on Base, and the result of the last is the result of the step.
type Files struct {
	Base    Ref
	Actions []Action
}

// Action is one change of a Files step: Copy, Mkdir, Mkfile, Remove, Symlink.
type Action interface{ action() }

func (Copy) action()    {}
func (Mkdir) action()   {}
func (Mkfile) action()  {}
func (Remove) action()  {}
func (Symlink) action() {}

// Copy copies Src of From to Dst.
type Copy struct {
	From     Ref
	Src, Dst string
	// Owner is who gets the files; nil keeps their owners (0:0 from a Local).
	Owner *Owner
	// Mode replaces the permissions; nil keeps them.
	Mode *Mode
	// FollowSymlink resolves links in Src. ContentsOnly copies what is in Src
	// if that is a directory. Unpack extracts Src if it is an archive.
	FollowSymlink, ContentsOnly, Unpack bool
	// CreateDestPath makes the directories above Dst. Wildcard expands Src as
	// filepath.Match does; AllowEmptyWildcard lets that match nothing.
	// ReplaceExisting removes what is at Dst if it is of another type.
	CreateDestPath, Wildcard, AllowEmptyWildcard, ReplaceExisting bool
	// Include and Exclude are patterns on the paths below Src. Required are
	// paths that must be there when Include is used.
	Include, Exclude, Required []string
	// Timestamp replaces the modification times; nil keeps them.
	Timestamp *time.Time
}

// Mode is the value of --chmod.
type Mode struct {
	// Bits are the twelve Unix permission bits, when Symbolic is empty.
	Bits uint32
	// Symbolic is a mode as chmod(1) takes it, such as "u=rwX,go=rX".
	Symbolic string
}

func (m Mode) String() string {
	if m.Symbolic != "" {
		return m.Symbolic
	}
	return fmt.Sprintf("%04o", m.Bits)
}

// Mkdir makes a directory; one that exists stays as it is.
type Mkdir struct {
	Path        string
	Mode        os.FileMode
	MakeParents bool
	Owner       *Owner
	Timestamp   *time.Time
}

// Mkfile writes a file, in the place of whatever is at Path.
type Mkfile struct {
	Path      string
	Mode      os.FileMode
	Data      []byte
	Owner     *Owner
	Timestamp *time.Time
}

// Remove removes Path and what is below it.
type Remove struct {
	Path                    string
	AllowNotFound, Wildcard bool
}

// Symlink makes New a link that says Old.
type Symlink struct {
	Old, New  string
	Owner     *Owner
	Timestamp *time.Time
}

// GroupOfUser as an Owner's GID takes the group that /etc/passwd gives UserName.
const GroupOfUser = -1

// Owner is a user and a group. As in BuildKit a user that /etc/passwd does not
// have is 0, a numeric user without a group has the group of the same number,
// and a group that /etc/group does not have is that of the user.
type Owner struct {
	// UserName is looked up in /etc/passwd of NamesFrom; UID counts if empty.
	UserName string
	UID      int
	// GroupName is looked up in /etc/group of NamesFrom; GID counts if it is
	// empty or not found.
	GroupName string
	GID       int
	// NamesFrom is the tree with those files. It is never Scratch if a name is set.
	NamesFrom Ref
}

// Merge is the first input with the files of the others laid over it in order.
// COPY --link makes one of two inputs, where the second stands on Scratch.
type Merge struct{ Inputs []Ref }

// Diff is the change from Lower to Upper.
type Diff struct{ Lower, Upper Ref }

// Inputs lists the steps that op reads, each once, in a fixed order.
func Inputs(op Op) []Ref {
	var all []Ref
	switch op := op.(type) {
	case Exec:
		all = append(all, op.Root)
		for _, m := range op.Mounts {
			all = append(all, m.From)
		}
	case Files:
		all = append(all, op.Base)
		for _, a := range op.Actions {
			all = append(all, actionInputs(a)...)
		}
	case Merge:
		all = append(all, op.Inputs...)
	case Diff:
		all = append(all, op.Lower, op.Upper)
	}
	return distinct(all)
}

func distinct(all []Ref) []Ref {
	var refs []Ref
	for _, r := range all {
		if r != Scratch && !slices.Contains(refs, r) {
			refs = append(refs, r)
		}
	}
	return refs
}

func actionInputs(a Action) []Ref {
	var from []Ref
	var owner *Owner
	switch a := a.(type) {
	case Copy:
		from, owner = []Ref{a.From}, a.Owner
	case Mkdir:
		owner = a.Owner
	case Mkfile:
		owner = a.Owner
	case Symlink:
		owner = a.Owner
	}
	if owner != nil {
		from = append(from, owner.NamesFrom)
	}
	return from
}

// Warning is a finding of the frontend that does not stop the build.
type Warning struct {
	// Rule is the name of a build check, such as "StageNameCasing".
	Rule    string
	Message string
	// URL explains the rule; it may be empty.
	URL   string
	Where Location
}

func (w Warning) String() string {
	s := w.Message
	if w.Rule != "" {
		s = w.Rule + ": " + s
	}
	if at := w.Where.String(); at != "" {
		s = at + ": " + s
	}
	return s
}

func names(i int, all ...string) string {
	if i < 0 || i >= len(all) {
		return fmt.Sprintf("unknown(%d)", i)
	}
	return all[i]
}
