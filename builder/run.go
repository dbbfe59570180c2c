package builder

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder/account"
	"github.com/cooper-build/cooper/builder/files"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/sandbox"
	"github.com/cooper-build/cooper/sandbox/egress"
	"github.com/cooper-build/cooper/snapshot"
	"github.com/cooper-build/cooper/snapshot/layer"
)

// execCause is the cause of a RUN: the command and everything it can read.
func (b *build) execCause(ctx context.Context, e plan.Exec, in inputs, list bool) (*cause, error) {
	root, err := b.identity(ctx, in.of(e.Root))
	if err != nil {
		return nil, err
	}
	c := &cause{kind: "exec", op: plan.Encode(e)}
	c.input("base", in.of(e.Root), root)
	if b.Policy.NoNewPrivileges() || b.inChroot() {
		c.add("policy no_new_privs", "no new privileges") // what needed some may have gone another way
	}
	if e.Network == plan.NetworkDefault {
		for _, rule := range b.Egress { // what ran with more must not pass for what ran with less
			c.add("egress rules", rule.String())
		}
		if b.bound != nil {
			c.add("policy egress rules", "bound by policy") // no rule has a space
			for _, rule := range b.bound.Allow {
				c.add("policy egress rules", rule.String())
			}
		}
	}
	for _, m := range e.Mounts {
		if m.Kind == plan.MountSecret {
			// Not the value, but whether there is one: what ran with a secret must not be found by a build without,
			// which could not search it for the value.
			_, given := b.secret(m.ID)
			c.given("secret "+m.ID, given)
		}
		if m.Kind == plan.MountSSH {
			c.given("ssh agent "+m.ID, b.agent(m.ID) != nil)
		}
		if m.From == plan.Scratch || m.Kind != plan.MountBind && m.Kind != plan.MountCache {
			continue // nothing is read but what the operation says; a cache only begins as its source
		}
		if err := b.selects(ctx, c, "mount "+m.Target+": ", in.of(m.From), bound(m.Selector), list); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// exec runs a command over its root and freezes what it changed. caused is false when the result is not that of c.
func (b *build) exec(ctx context.Context, s plan.Step, op plan.Exec, in inputs, c *cause, id snapshot.ID, w *watch) (made snapshot.ID, caused bool, err error) {
	active, err := b.execOver(ctx, op, in, w, (*mounter).lockCaches)
	if err != nil {
		return "", false, err
	}
	defer active.Discard()
	// As in files: what was bound from the context may have changed since the key was made.
	again, err := b.execCause(ctx, op, in, true)
	if err != nil {
		return "", false, err
	}
	named := c.confirm(again, id)
	if made, err = active.CommitOrFind(ctx, named, b.earlierResults(s, c, active), b.epoch()); err != nil {
		return "", false, err
	}
	return made, named == id, b.rememberLeaks(ctx, op, made)
}

// execOver runs a command over its root, which the caller ends. caches finds the directories of cache mounts.
func (b *build) execOver(ctx context.Context, op plan.Exec, in inputs, w *watch, caches func(*mounter, context.Context, []plan.Mount) error) (*snapshot.Active, error) {
	root, err := b.snapshotOf(ctx, in.of(op.Root))
	if err != nil {
		return nil, err
	}
	active, err := b.store.Prepare(ctx, root)
	if err != nil {
		return nil, err
	}
	if err := b.execIn(ctx, active.Dir(), op, in, w, caches); err != nil {
		active.Discard()
		return nil, err
	}
	return active, nil
}

func (b *build) execIn(ctx context.Context, dir string, op plan.Exec, in inputs, w *watch, caches func(*mounter, context.Context, []plan.Mount) error) error {
	who, err := account.Resolve(dir, op.User)
	if err != nil {
		return err
	}
	scratch, cleanup, err := b.store.Temp()
	if err != nil {
		return err
	}
	defer cleanup()

	state := filepath.Join(scratch, "state")
	if err := os.Mkdir(state, 0o700); err != nil {
		return err
	}
	mounts := &mounter{b: b, dir: scratch, in: in}
	defer mounts.close()
	if err := caches(mounts, ctx, op.Mounts); err != nil {
		return err
	}
	spec := sandbox.Spec{
		Root: dir, Args: op.Args, Env: withProxy(op.Env, op.Proxy), Dir: op.Dir,
		UID: who.UID, GID: who.GID, Groups: who.Groups,
		Hostname: op.Hostname, ShmSize: op.ShmSize,
		CgroupParent: op.CgroupParent, Insecure: op.Insecure, Limits: b.Limits, NoNewPrivs: b.Policy.NoNewPrivileges(),
		StateDir: state, Note: b.note, Chroot: b.inChroot(),
	}
	for _, h := range op.Hosts {
		spec.Hosts = append(spec.Hosts, sandbox.HostEntry{Name: h.Name, IP: h.IP})
	}
	for _, u := range op.Ulimits {
		spec.Ulimits = append(spec.Ulimits, sandbox.Ulimit{Name: u.Name, Soft: u.Soft, Hard: u.Hard})
	}
	var traffic traffic
	switch {
	case op.Network == plan.NetworkNone:
		spec.Network = sandbox.None
	case op.Network == plan.NetworkHost, b.inChroot():
		spec.Network = sandbox.Host
	default:
		spec.Network = sandbox.Private
		spec.Egress = egress.Options{Policy: egress.Policy{Allow: b.Egress, Bound: b.bound}, Log: traffic.add}
	}
	for _, m := range op.Mounts {
		if err := mounts.add(ctx, m, &spec); err != nil {
			return err
		}
	}
	out, errOut := b.logs(w)
	spec.Stdout, spec.Stderr = out, errOut
	err = sandbox.Run(ctx, spec)
	out.flush()
	errOut.flush()
	traffic.report(w)
	if err != nil {
		return traffic.explain(aboutRoom(dir, err))
	}
	return mounts.close()
}

// note tells the user once what this machine forces every RUN to.
func (b *build) note(message string) {
	if _, told := b.notes.LoadOrStore(message, true); !told {
		b.events.send(Event{Kind: Warned, Warning: &Warning{Rule: "Sandbox", Message: message}})
	}
}

// withProxy adds the proxy variables that the environment does not set itself.
func withProxy(env []string, p plan.Proxy) []string {
	set := map[string]bool{}
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		set[name] = true
	}
	out := slices.Clone(env)
	for _, v := range []struct{ name, value string }{
		{"HTTP_PROXY", p.HTTP}, {"HTTPS_PROXY", p.HTTPS}, {"FTP_PROXY", p.FTP}, {"NO_PROXY", p.No}, {"ALL_PROXY", p.All},
	} {
		for _, name := range []string{v.name, strings.ToLower(v.name)} {
			if v.value != "" && !set[name] {
				out = append(out, name+"="+v.value)
			}
		}
	}
	return out
}

// A mounter turns the mounts of one RUN into sources that the sandbox can bind, and takes them down again.
type mounter struct {
	b    *build
	dir  string // private to this RUN
	in   inputs
	undo []func() error

	caches map[string]string // the directory of each cache id, locked
	memory string            // a tmpfs for the files of secrets, once one is asked for
	n      int
}

func (m *mounter) close() error {
	var errs []error
	for i := len(m.undo) - 1; i >= 0; i-- {
		errs = append(errs, m.undo[i]())
	}
	m.undo = nil
	return errors.Join(errs...)
}

func (m *mounter) add(ctx context.Context, p plan.Mount, spec *sandbox.Spec) error {
	switch p.Kind {
	case plan.MountBind:
		return m.bind(ctx, p, spec)
	case plan.MountCache:
		return m.cache(ctx, p, spec)
	case plan.MountSecret:
		return m.secret(p, spec)
	case plan.MountSSH:
		return m.ssh(ctx, p, spec)
	case plan.MountTmpfs:
		spec.Mounts = append(spec.Mounts, sandbox.Mount{Kind: sandbox.Tmpfs, Target: p.Target, Size: p.Size, Mode: modeThere(spec.Root, p.Target)})
		return nil
	}
	return fmt.Errorf("mount %s: no way to make a mount of kind %v", p.Target, p.Kind)
}

// bind shows a path of a stage, an image or the context. A writable bind works on a throw-away copy-on-write
// view: what RUN writes there is gone with the RUN.
func (m *mounter) bind(ctx context.Context, p plan.Mount, spec *sandbox.Spec) error {
	id, err := m.b.snapshotOf(ctx, m.in.of(p.From))
	if err != nil {
		return err
	}
	var root string
	if p.ReadOnly {
		view, err := m.b.store.View(ctx, id)
		if err != nil {
			return err
		}
		m.undo = append(m.undo, view.Close)
		root = view.Dir()
	} else {
		active, err := m.b.store.Prepare(ctx, id)
		if err != nil {
			return err
		}
		m.undo = append(m.undo, active.Discard)
		root = active.Dir()
	}
	spec.Mounts = append(spec.Mounts, sandbox.Mount{Kind: sandbox.Bind, Source: root, Select: p.Selector, Target: p.Target, ReadOnly: p.ReadOnly})
	return nil
}

// lockCaches locks every cache of a RUN once, in one order for all of them, so that no RUN waits for itself or for
// one that waits for it. Mounts of one id within a RUN show one directory, as in BuildKit, and keep the strictest
// promise that one of them makes.
func (m *mounter) lockCaches(ctx context.Context, mounts []plan.Mount) error {
	strictest := map[string]snapshot.Sharing{}
	for _, p := range mounts {
		if p.Kind == plan.MountCache {
			strictest[p.ID] = max(strictest[p.ID], m.b.cacheSharing(p.Sharing))
		}
	}
	m.caches = map[string]string{}
	for _, id := range slices.Sorted(maps.Keys(strictest)) {
		dir, unlock, err := m.b.store.CacheDir(ctx, id, strictest[id])
		if err != nil {
			return err
		}
		m.undo = append(m.undo, func() error { unlock(); return nil })
		m.caches[id] = dir
	}
	return nil
}

func (b *build) cacheSharing(s plan.Sharing) snapshot.Sharing {
	if s == plan.SharingShared && b.inChroot() {
		return snapshot.Locked // it is moved into the root, and can be in one only
	}
	switch s {
	case plan.SharingPrivate:
		return snapshot.Private
	case plan.SharingLocked:
		return snapshot.Locked
	}
	return snapshot.Shared
}

// cache shows a directory that outlives the build. A new one begins as a copy of what from= names; uid=, gid= and
// mode= arrive in that way, too.
func (m *mounter) cache(ctx context.Context, p plan.Mount, spec *sandbox.Spec) error {
	dir := m.caches[p.ID]
	if p.From != plan.Scratch {
		if err := m.fill(ctx, dir, p); err != nil {
			return fmt.Errorf("fill cache %q: %w", p.ID, err)
		}
	}
	spec.Mounts = append(spec.Mounts, sandbox.Mount{Kind: sandbox.Bind, Source: dir, Target: p.Target, ReadOnly: p.ReadOnly})
	return nil
}

// fill makes an empty cache directory a copy of a mount's source.
func (m *mounter) fill(ctx context.Context, dir string, p plan.Mount) error {
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		return err
	}
	if err := m.b.apply(ctx, dir, []plan.Action{copyOf(p.From, p.Selector)}, m.in, files.Options{}); err != nil {
		return err
	}
	id, err := m.b.snapshotOf(ctx, m.in.of(p.From))
	if err != nil {
		return err
	}
	view, err := m.b.store.View(ctx, id)
	if err != nil {
		return err
	}
	defer view.Close()
	from, err := openIn(view.Dir(), p.Selector, unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer from.Close()
	return layer.CopyAttributes(dir, fmt.Sprintf("/proc/self/fd/%d/.", from.Fd()))
}

// modeThere is the mode of a directory that something will be mounted over, or that of the one that is made for it.
func modeThere(root, path string) os.FileMode {
	dir, err := openIn(root, path, unix.O_DIRECTORY)
	if err != nil {
		return 0o755
	}
	defer dir.Close()
	st, err := dir.Stat()
	if err != nil {
		return 0o755
	}
	return st.Mode()
}

// openIn opens a path of a hostile tree: links are followed inside the tree only.
func openIn(root, path string, flags uint64) (*os.File, error) {
	dir, err := os.OpenFile(root, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	how := &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | flags,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	fd, err := unix.Openat2(int(dir.Fd()), "./"+path, how)
	for errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) { // a path with "..", and a rename anywhere meanwhile
		fd, err = unix.Openat2(int(dir.Fd()), "./"+path, how)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// secret shows a secret as a file on a tmpfs of this RUN alone, or as a variable: it never reaches a disk.
func (m *mounter) secret(p plan.Mount, spec *sandbox.Spec) error {
	v, ok := m.b.secret(p.ID)
	if !ok {
		if p.Optional {
			return nil
		}
		return hinted{fmt.Errorf("secret %q was not given", p.ID), fmt.Sprintf("pass --secret id=%s,src=FILE or --secret id=%[1]s,env=NAME", p.ID)}
	}
	if p.Env != "" {
		spec.Env = append(spec.Env, p.Env+"="+string(v))
	}
	if p.Target == "" {
		return nil
	}
	if err := m.mountMemory(); err != nil {
		return err
	}
	m.n++
	file := filepath.Join(m.memory, strconv.Itoa(m.n))
	if err := os.WriteFile(file, v, 0o600); err != nil {
		return err
	}
	if err := m.give(file, p.UID, p.GID); err != nil {
		return fmt.Errorf("secret %q for uid %d: %w", p.ID, p.UID, err)
	}
	if err := os.Chmod(file, os.FileMode(p.Mode).Perm()); err != nil {
		return err
	}
	spec.Mounts = append(spec.Mounts, sandbox.Mount{Kind: sandbox.Bind, Source: file, Target: p.Target, ReadOnly: true})
	return nil
}

// ssh shows the socket of an ssh agent, for as long as the RUN lasts.
func (m *mounter) ssh(ctx context.Context, p plan.Mount, spec *sandbox.Spec) error {
	agent := m.b.agent(p.ID)
	if agent == nil {
		if p.Optional {
			return nil
		}
		return noAgent(p.ID)
	}
	m.n++
	name := "agent" + strconv.Itoa(m.n)
	listener, err := sandbox.Listen(m.dir, name, uint32(p.UID), uint32(p.GID), os.FileMode(p.Mode).Perm())
	if err != nil {
		return fmt.Errorf("ssh agent %q: %w", p.ID, err)
	}
	ctx, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- agent.Source.Serve(ctx, listener) }()
	m.undo = append(m.undo, func() error {
		stop()
		return <-ended
	})
	spec.Mounts = append(spec.Mounts, sandbox.Mount{Kind: sandbox.Bind, Source: filepath.Join(m.dir, name), Target: p.Target})
	return nil
}

// give makes somebody the owner of a file in memory. Before Linux 6.6 that cannot be recorded there, and then root is
// shown as the owner; with a single id everybody can read it all the same.
func (m *mounter) give(file string, uid, gid int) error {
	f, err := os.OpenFile(file, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	err = layer.SetOwner(f, uid, gid, m.b.single)
	if m.b.single && errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return err
}

// mountMemory mounts a small private tmpfs for the secrets of this RUN.
func (m *mounter) mountMemory() error {
	if m.memory != "" {
		return nil
	}
	at := filepath.Join(m.dir, "secrets")
	if err := os.Mkdir(at, 0o700); err != nil {
		return err
	}
	if m.b.inChroot() { // nothing can be mounted, and what is here goes with the RUN
		m.memory = at
		return nil
	}
	if err := unix.Mount("tmpfs", at, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=700"); err != nil {
		return fmt.Errorf("tmpfs for secrets: %w", err)
	}
	m.memory = at
	m.undo = append(m.undo, func() error { return unix.Unmount(at, unix.MNT_DETACH) })
	return nil
}

// hinted is an error with the next step for the person who reads it.
type hinted struct {
	error
	hint string
}

func (h hinted) Hint() string  { return h.hint }
func (h hinted) Unwrap() error { return h.error }
