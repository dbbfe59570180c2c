package plan

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// decoder turns a definition of BuildKit into steps.
type decoder struct {
	client *client
	ops    map[string]*pb.Op // by digest
	meta   map[string]*pb.OpMetadata
	where  map[string]Location
	refs   map[string]Ref
	steps  []Step
}

func newDecoder(c *client) *decoder {
	return &decoder{
		client: c,
		ops:    map[string]*pb.Op{},
		meta:   map[string]*pb.OpMetadata{},
		where:  map[string]Location{},
		refs:   map[string]Ref{},
	}
}

// add decodes a definition. A vertex that an earlier one had becomes no second step.
func (d *decoder) add(def *pb.Definition) (Ref, error) {
	for _, b := range def.GetDef() {
		op := &pb.Op{}
		if err := op.UnmarshalVT(b); err != nil {
			return Scratch, fmt.Errorf("decode step: %w", err)
		}
		d.ops[digest.FromBytes(b).String()] = op
	}
	for dgst, meta := range def.GetMetadata() {
		if _, ok := d.meta[dgst]; !ok {
			d.meta[dgst] = meta
		}
	}
	for dgst, where := range locations(def.GetSource()) {
		if _, ok := d.where[dgst]; !ok {
			d.where[dgst] = where
		}
	}
	return d.result(def)
}

// result decodes everything that the last vertex of def needs.
func (d *decoder) result(def *pb.Definition) (Ref, error) {
	if len(def.GetDef()) == 0 {
		return Scratch, nil
	}
	last := d.ops[digest.FromBytes(def.Def[len(def.Def)-1]).String()]
	if last.Op != nil || len(last.Inputs) != 1 {
		return Scratch, errors.New("decode result: the last vertex is none")
	}
	return d.visit(last.Inputs[0], Location{})
}

// visit decodes a vertex after its inputs. user is the instruction that needs
// it: vertices without a line of their own, such as the text of a heredoc, are
// found at the instruction that they were made for.
func (d *decoder) visit(in *pb.Input, user Location) (Ref, error) {
	op, ok := d.ops[in.GetDigest()]
	if !ok {
		return Scratch, fmt.Errorf("decode step: no vertex %s", in.GetDigest())
	}
	where, ok := d.where[in.Digest]
	if !ok {
		where = user
	}
	if err := d.checkOutput(op, in.Index); err != nil {
		return Scratch, at(where, err)
	}
	if ref, ok := d.refs[in.Digest]; ok {
		return ref, nil
	}
	inputs := make([]Ref, len(op.Inputs))
	for i, in := range op.Inputs {
		ref, err := d.visit(in, where)
		if err != nil {
			return Scratch, err
		}
		inputs[i] = ref
	}
	// after the inputs, so that the first line at fault is the one reported
	if err := refuse(op, d.meta[in.Digest]); err != nil {
		return Scratch, at(where, err)
	}
	decoded, err := d.op(op, inputs)
	if err != nil {
		return Scratch, at(where, err)
	}
	ref := Ref(len(d.steps))
	d.steps = append(d.steps, Step{
		ID:      in.Digest,
		Name:    stepName(d.meta[in.Digest], op),
		Where:   where,
		Op:      decoded,
		NoCache: d.meta[in.Digest].GetIgnoreCache(),
	})
	d.refs[in.Digest] = ref
	return ref, nil
}

func at(where Location, err error) error {
	e := &Error{Where: where, Err: err}
	var u *unsupported
	if errors.As(err, &u) {
		e.Advice = u.hint
	}
	return e
}

func stepName(meta *pb.OpMetadata, op *pb.Op) string {
	if name := meta.GetDescription()["llb.customname"]; name != "" {
		return name
	}
	switch op := op.Op.(type) {
	case *pb.Op_Source:
		return op.Source.GetIdentifier()
	case *pb.Op_Exec:
		return strings.Join(op.Exec.GetMeta().GetArgs(), " ")
	case *pb.Op_Merge:
		return "merge"
	case *pb.Op_Diff:
		return "diff"
	default:
		return "change files"
	}
}

// checkOutput refuses every output of a vertex but the tree it works on.
func (d *decoder) checkOutput(op *pb.Op, index int64) error {
	var want int64
	if exec := op.GetExec(); exec != nil {
		for _, m := range exec.Mounts {
			if m.GetDest() == pb.RootMount {
				want = m.Output
			}
		}
	}
	if index == want {
		return nil
	}
	return &unsupported{
		what: "what a step changes outside its root cannot be used by another step",
		hint: "write it to the root file system and COPY it from there",
	}
}

func (d *decoder) op(op *pb.Op, inputs []Ref) (Op, error) {
	ins := refs(inputs)
	switch v := op.Op.(type) {
	case *pb.Op_Source:
		return d.source(v.Source, platform(op.Platform))
	case *pb.Op_Exec:
		return decodeExec(v.Exec, platform(op.Platform), ins)
	case *pb.Op_File:
		return decodeFiles(v.File, ins)
	case *pb.Op_Merge:
		return decodeMerge(v.Merge, ins)
	case *pb.Op_Diff:
		return decodeDiff(v.Diff, ins)
	default:
		return nil, fmt.Errorf("unknown kind of step %T", v)
	}
}

// refs are the inputs of a vertex by the numbers that it uses for them.
type refs []Ref

func (r refs) at(i int64) (Ref, error) {
	if i == int64(pb.Empty) {
		return Scratch, nil
	}
	if i < 0 || i >= int64(len(r)) {
		return Scratch, fmt.Errorf("decode step: it has no input %d", i)
	}
	return r[i], nil
}

func platform(p *pb.Platform) ocispec.Platform {
	if p == nil {
		return ocispec.Platform{}
	}
	return ocispec.Platform{
		OS:           p.OS,
		Architecture: p.Architecture,
		Variant:      p.Variant,
		OSVersion:    p.OSVersion,
		OSFeatures:   slices.Clone(p.OSFeatures),
	}
}

func (d *decoder) source(src *pb.SourceOp, p ocispec.Platform) (Op, error) {
	scheme, rest, _ := strings.Cut(src.GetIdentifier(), "://")
	if err := checkAttrs(scheme, src.Attrs); err != nil {
		return nil, err
	}
	switch scheme {
	case "docker-image":
		img := Image{Ref: rest, Platform: p}
		if r, ok := d.client.image(imageKey(rest, p)); ok {
			img.Digest = r.digest
		} else if _, dgst, ok := strings.Cut(rest, "@"); ok {
			img.Digest = digest.Digest(dgst)
		}
		return img, nil
	case "oci-layout":
		r, ok := d.client.image(imageKey(src.Attrs[pb.AttrOCILayoutStoreID], p))
		if !ok {
			return nil, fmt.Errorf("OCI layout %s was never resolved", rest)
		}
		return Image{Ref: r.ref, Digest: r.digest, Layout: true, Platform: p}, nil
	case "local":
		return d.local(rest, src.Attrs)
	case "git":
		return gitSource(rest, src.Attrs)
	case "http", "https":
		if src.Identifier == uploadURL {
			return Upload{Filename: src.Attrs[pb.AttrHTTPFilename]}, nil
		}
		return httpSource(src.Identifier, src.Attrs)
	default:
		return nil, unsupportedSource(src.Identifier)
	}
}

func (c *client) image(key string) (resolved, bool) {
	c.seen.mu.Lock()
	defer c.seen.mu.Unlock()
	r, ok := c.seen.images[key]
	return r, ok
}

func (d *decoder) local(name string, attrs map[string]string) (Op, error) {
	l, ok := d.client.contexts.locals[name]
	if !ok {
		return nil, fmt.Errorf("no directory was given for %q", name)
	}
	op := Local{Name: l.name, Dir: l.dir}
	for key, list := range map[string]*[]string{
		pb.AttrIncludePatterns: &op.Include,
		pb.AttrExcludePatterns: &op.Exclude,
		pb.AttrFollowPaths:     &op.Follow,
	} {
		if v, ok := attrs[key]; ok {
			if err := json.Unmarshal([]byte(v), list); err != nil {
				return nil, fmt.Errorf("decode %s: %w", key, err)
			}
		}
	}
	return op, nil
}

func decodeExec(exec *pb.ExecOp, p ocispec.Platform, in refs) (Op, error) {
	meta := exec.GetMeta()
	if len(meta.GetArgs()) == 0 {
		return nil, errors.New("there is no command to run")
	}
	op := Exec{
		Root:     Scratch,
		Args:     meta.Args,
		Env:      meta.Env,
		Dir:      meta.Cwd,
		User:     meta.User,
		Hostname: meta.Hostname,
		Platform: p,
		Insecure: exec.Security == pb.SecurityMode_INSECURE,

		CgroupParent: meta.CgroupParent,
		Proxy: Proxy{
			HTTP:  meta.GetProxyEnv().GetHttpProxy(),
			HTTPS: meta.GetProxyEnv().GetHttpsProxy(),
			FTP:   meta.GetProxyEnv().GetFtpProxy(),
			No:    meta.GetProxyEnv().GetNoProxy(),
			All:   meta.GetProxyEnv().GetAllProxy(),
		},
	}
	switch exec.Network {
	case pb.NetMode_UNSET:
		op.Network = NetworkDefault
	case pb.NetMode_NONE:
		op.Network = NetworkNone
	case pb.NetMode_HOST:
		op.Network = NetworkHost
	default:
		return nil, &unsupported{what: fmt.Sprintf("the network mode %s is unknown", exec.Network), hint: "use --network=default, none or host"}
	}
	for _, h := range meta.ExtraHosts {
		op.Hosts = append(op.Hosts, Host{Name: h.GetHost(), IP: h.GetIP()})
	}
	for _, u := range meta.Ulimit {
		op.Ulimits = append(op.Ulimits, Ulimit{Name: u.GetName(), Soft: u.GetSoft(), Hard: u.GetHard()})
	}
	for _, s := range exec.Secretenv {
		op.Mounts = append(op.Mounts, Mount{Kind: MountSecret, From: Scratch, ID: s.GetID(), Env: s.GetName(), Optional: s.GetOptional()})
	}
	for _, m := range exec.Mounts {
		if err := op.mount(m, in); err != nil {
			return nil, err
		}
	}
	return op, nil
}

func (e *Exec) mount(m *pb.Mount, in refs) error {
	from, err := in.at(m.GetInput())
	if err != nil {
		return err
	}
	selector := m.Selector
	if selector == "/" {
		selector = ""
	}
	if m.Dest == pb.RootMount {
		if m.MountType != pb.MountType_BIND || m.Readonly || selector != "" {
			return errors.New("a root file system that cannot be changed is not supported")
		}
		e.Root = from
		return nil
	}
	out := Mount{From: from, Selector: selector, Target: m.Dest, ReadOnly: m.Readonly}
	switch m.MountType {
	case pb.MountType_BIND:
		out.Kind = MountBind
	case pb.MountType_TMPFS:
		out.Kind, out.Size = MountTmpfs, m.GetTmpfsOpt().GetSize()
		if m.Dest == "/dev/shm" && out.Size > 0 {
			e.ShmSize = out.Size
			return nil
		}
	case pb.MountType_CACHE:
		out.Kind, out.ID = MountCache, m.GetCacheOpt().GetID()
		switch s := m.GetCacheOpt().GetSharing(); s {
		case pb.CacheSharingOpt_SHARED:
			out.Sharing = SharingShared
		case pb.CacheSharingOpt_PRIVATE:
			out.Sharing = SharingPrivate
		case pb.CacheSharingOpt_LOCKED:
			out.Sharing = SharingLocked
		default:
			return fmt.Errorf("unknown cache sharing mode %s", s)
		}
	case pb.MountType_SECRET:
		s := m.GetSecretOpt()
		out.Kind, out.ID, out.Optional = MountSecret, s.GetID(), s.GetOptional()
		out.UID, out.GID, out.Mode = int(s.GetUid()), int(s.GetGid()), s.GetMode()
	case pb.MountType_SSH:
		s := m.GetSSHOpt()
		out.Kind, out.ID, out.Optional = MountSSH, s.GetID(), s.GetOptional()
		out.UID, out.GID, out.Mode = int(s.GetUid()), int(s.GetGid()), s.GetMode()
	default:
		return fmt.Errorf("unknown kind of mount %s", m.MountType)
	}
	e.Mounts = append(e.Mounts, out)
	return nil
}

func decodeMerge(m *pb.MergeOp, in refs) (Op, error) {
	var op Merge
	for _, i := range m.Inputs {
		ref, err := in.at(i.GetInput())
		if err != nil {
			return nil, err
		}
		op.Inputs = append(op.Inputs, ref)
	}
	return op, nil
}

func decodeDiff(m *pb.DiffOp, in refs) (Op, error) {
	lower, err := in.at(m.GetLower().GetInput())
	if err != nil {
		return nil, err
	}
	upper, err := in.at(m.GetUpper().GetInput())
	if err != nil {
		return nil, err
	}
	return Diff{Lower: lower, Upper: upper}, nil
}

// decodeFiles accepts the chains that a Dockerfile gives: each action works on
// the one before, and only what the last one leaves is the output.
func decodeFiles(f *pb.FileOp, in refs) (Op, error) {
	if len(f.Actions) == 0 {
		return nil, errors.New("decode step: it changes no files")
	}
	base, err := in.at(f.Actions[0].GetInput())
	if err != nil {
		return nil, err
	}
	op := Files{Base: base}
	for i, a := range f.Actions {
		if i > 0 && a.Input != int64(len(in)+i-1) {
			return nil, fmt.Errorf("decode step: change %d does not work on the one before", i)
		}
		if last := i == len(f.Actions)-1; last != (a.Output == 0) || (!last && a.Output != int64(pb.SkipOutput)) {
			return nil, fmt.Errorf("decode step: change %d is an output of its own", i)
		}
		action, err := decodeAction(a, in)
		if err != nil {
			return nil, err
		}
		op.Actions = append(op.Actions, action)
	}
	return op, nil
}

func decodeAction(a *pb.FileAction, in refs) (Action, error) {
	switch v := a.Action.(type) {
	case *pb.FileAction_Copy:
		return decodeCopy(v.Copy, a.SecondaryInput, in)
	case *pb.FileAction_Mkdir:
		owner, err := decodeOwner(v.Mkdir.Owner, in)
		return Mkdir{
			Path:        v.Mkdir.Path,
			Mode:        os.FileMode(v.Mkdir.Mode) & os.ModePerm,
			MakeParents: v.Mkdir.MakeParents,
			Owner:       owner,
			Timestamp:   timestamp(v.Mkdir.Timestamp),
		}, err
	case *pb.FileAction_Mkfile:
		owner, err := decodeOwner(v.Mkfile.Owner, in)
		return Mkfile{
			Path:      v.Mkfile.Path,
			Mode:      os.FileMode(v.Mkfile.Mode) & os.ModePerm,
			Data:      v.Mkfile.Data,
			Owner:     owner,
			Timestamp: timestamp(v.Mkfile.Timestamp),
		}, err
	case *pb.FileAction_Symlink:
		owner, err := decodeOwner(v.Symlink.Owner, in)
		return Symlink{
			Old:       v.Symlink.Oldpath,
			New:       v.Symlink.Newpath,
			Owner:     owner,
			Timestamp: timestamp(v.Symlink.Timestamp),
		}, err
	case *pb.FileAction_Rm:
		return Remove{Path: v.Rm.Path, AllowNotFound: v.Rm.AllowNotFound, Wildcard: v.Rm.AllowWildcard}, nil
	default:
		return nil, fmt.Errorf("unknown change of files %T", v)
	}
}

func decodeCopy(c *pb.FileActionCopy, from int64, in refs) (Action, error) {
	src, err := in.at(from)
	if err != nil {
		return nil, err
	}
	owner, err := decodeOwner(c.Owner, in)
	if err != nil {
		return nil, err
	}
	return Copy{
		From:               src,
		Src:                c.Src,
		Dst:                c.Dest,
		Owner:              owner,
		Mode:               decodeMode(c),
		FollowSymlink:      c.FollowSymlink,
		ContentsOnly:       c.DirCopyContents,
		Unpack:             c.AttemptUnpackDockerCompatibility,
		CreateDestPath:     c.CreateDestPath,
		Wildcard:           c.AllowWildcard,
		AllowEmptyWildcard: c.AllowEmptyWildcard,
		ReplaceExisting:    c.AlwaysReplaceExistingDestPaths,
		Include:            c.IncludePatterns,
		Exclude:            c.ExcludePatterns,
		Required:           c.RequiredPaths,
		Timestamp:          timestamp(c.Timestamp),
	}, nil
}

func decodeMode(c *pb.FileActionCopy) *Mode {
	switch {
	case c.ModeStr != "":
		return &Mode{Symbolic: c.ModeStr}
	case c.Mode == -1:
		return nil
	default:
		return &Mode{Bits: uint32(c.Mode)}
	}
}

func timestamp(nano int64) *time.Time {
	if nano == -1 {
		return nil
	}
	t := time.Unix(0, nano).UTC()
	return &t
}

// decodeOwner applies BuildKit's rule that a numeric user brings the group of
// the same number and a named one the group of its passwd entry.
func decodeOwner(o *pb.ChownOpt, in refs) (*Owner, error) {
	if o == nil {
		return nil, nil
	}
	owner := &Owner{NamesFrom: Scratch}
	switch u := o.GetUser().GetUser().(type) {
	case *pb.UserOpt_ByName:
		owner.UserName, owner.GID = u.ByName.GetName(), GroupOfUser
	case *pb.UserOpt_ByID:
		owner.UID, owner.GID = int(u.ByID), int(u.ByID)
	}
	switch g := o.GetGroup().GetUser().(type) {
	case *pb.UserOpt_ByName:
		owner.GroupName = g.ByName.GetName()
	case *pb.UserOpt_ByID:
		owner.GID = int(g.ByID)
	}
	if owner.UID > maxID || owner.GID > maxID {
		return nil, &unsupported{what: "a negative id cannot own a file", hint: "use a user and a group from 0 to 2147483647"}
	}
	return owner, owner.names(o, in)
}

// maxID is the largest id; BuildKit wraps negative ones around to more.
const maxID = 1<<31 - 1

// names finds the tree whose passwd and group files give the names a meaning.
func (owner *Owner) names(o *pb.ChownOpt, in refs) error {
	for _, u := range []*pb.UserOpt{o.GetUser(), o.GetGroup()} {
		named := u.GetByName()
		if named == nil {
			continue
		}
		from, err := in.at(named.GetInput())
		if err != nil {
			return err
		}
		if from == Scratch {
			return &unsupported{
				what: fmt.Sprintf("the name %q cannot be looked up, because scratch has no /etc/passwd and no /etc/group", named.GetName()),
				hint: "use numeric ids",
			}
		}
		owner.NamesFrom = from
	}
	return nil
}

// locations gives each vertex the first place that asked for it.
func locations(src *pb.Source) map[string]Location {
	where := map[string]Location{}
	for dgst, locs := range src.GetLocations() {
		for _, l := range locs.GetLocations() {
			lines := pbLines(l.GetRanges())
			if i := int(l.GetSourceIndex()); i >= 0 && i < len(src.Infos) && len(lines) > 0 {
				where[dgst] = Location{File: src.Infos[i].GetFilename(), Lines: lines, Source: src.Infos[i].GetData()}
				break
			}
		}
	}
	return where
}

func pbLines(ranges []*pb.Range) []Range {
	var lines []Range
	for _, r := range ranges {
		start := int(r.GetStart().GetLine())
		lines = append(lines, Range{Start: start, End: max(start, int(r.GetEnd().GetLine()))})
	}
	return joinLines(lines)
}

func parserLines(ranges []parser.Range) []Range {
	var lines []Range
	for _, r := range ranges {
		lines = append(lines, Range{Start: r.Start.Line, End: max(r.Start.Line, r.End.Line)})
	}
	return joinLines(lines)
}

// joinLines sorts, drops what is no line, and joins ranges that touch: the
// parser gives every line of an instruction as a range of its own.
func joinLines(lines []Range) []Range {
	slices.SortFunc(lines, func(a, b Range) int { return a.Start - b.Start })
	var joined []Range
	for _, r := range lines {
		if r.Start < 1 {
			continue
		}
		if n := len(joined); n > 0 && r.Start <= joined[n-1].End+1 {
			joined[n-1].End = max(joined[n-1].End, r.End)
			continue
		}
		joined = append(joined, r)
	}
	return joined
}
