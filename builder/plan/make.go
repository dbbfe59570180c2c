package plan

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/frontend/dockerfile/dockerfile2llb"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerui"
	"github.com/moby/buildkit/frontend/subrequests/targets"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Make plans a build. A nil error means that every step of the graph can be
// run and that the layers of each target match the history in its config. An
// error is an *Error, with the line of the Dockerfile when one is to blame.
func Make(ctx context.Context, r Request, res Resolver) (*Graph, error) {
	c, err := newClient(r, res)
	if err != nil {
		return nil, at(Location{}, err)
	}
	out, err := interruptible(ctx, c.convert)
	if ctx.Err() != nil {
		return nil, at(Location{}, context.Cause(ctx))
	}
	if err := c.explained(err); err != nil {
		return nil, err
	}
	return c.graph(out)
}

// interruptible returns when ctx ends, whatever do is waiting for: the frontend asks ssh servers for their keys without
// a deadline. What do goes on with has no effect any more.
func interruptible[T any](ctx context.Context, do func(context.Context) (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		v, err := do(ctx)
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, context.Cause(ctx)
	}
}

// explained gives an error of the frontend its line and a next step.
func (c *client) explained(err error) error {
	if refused := c.seen.unreadable; refused != nil {
		return unreadable(refused)
	}
	if err != nil {
		return c.locate(err)
	}
	return nil
}

// converted is what the frontend makes of a Dockerfile.
type converted struct {
	dockerfile []byte
	targets    []convertedTarget
	index      bool
	warnings   []Warning
}

type convertedTarget struct {
	*dockerfile2llb.Result
	def *pb.Definition
}

// An entrypoint is a Dockerfile that was read, with all that goes with it.
type entrypoint struct {
	src      *dockerui.Source
	ui       *dockerui.Client
	opt      dockerfile2llb.ConvertOpt
	warnings []Warning
}

// read does the first part of what the Build of BuildKit's frontend/dockerfile/
// builder does, and convert the rest. That one is not called because its cache
// of resolved images has a data race as soon as a Dockerfile names two of them.
func (c *client) read(ctx context.Context) (*entrypoint, error) {
	ui, err := dockerui.NewClient(c)
	if err != nil {
		return nil, err
	}
	src, err := ui.ReadEntrypoint(ctx, "Dockerfile")
	if err != nil {
		return nil, err
	}
	c.seen.dockerfile = src.Data
	e := &entrypoint{src: src, ui: ui}
	if e.warnings, err = acceptSyntax(src.Filename, src.Data, ui.BuildArgs); err != nil {
		return nil, err
	}
	e.opt = dockerfile2llb.ConvertOpt{
		Config:       ui.Config,
		Client:       ui,
		SourceMap:    src.SourceMap,
		MetaResolver: c,
		Warn: func(rule, _, url, msg string, where []parser.Range) { // from several goroutines
			c.seen.mu.Lock()
			defer c.seen.mu.Unlock()
			e.warnings = append(e.warnings, Warning{
				Rule: rule, Message: msg, URL: url,
				Where: Location{File: src.Filename, Lines: parserLines(where), Source: src.Data},
			})
		},
	}
	return e, nil
}

func (c *client) convert(ctx context.Context) (*converted, error) {
	e, err := c.read(ctx)
	if err != nil {
		return nil, err
	}
	wanted := []*ocispec.Platform{nil}
	if n := len(e.ui.TargetPlatforms); n > 0 {
		wanted = nil
		for i := range n {
			wanted = append(wanted, &e.ui.TargetPlatforms[i])
		}
	}
	out := &converted{dockerfile: e.src.Data, index: e.ui.MultiPlatformRequested}
	for i, platform := range wanted {
		opt := e.opt
		opt.BuildArgs = maps.Clone(opt.BuildArgs)
		opt.TargetPlatform = platform
		if i > 0 {
			opt.Warn = nil // one finding in the Dockerfile is not one for each platform
		}
		result, err := dockerfile2llb.Dockerfile2LLB(ctx, e.src.Data, opt)
		if err != nil {
			return nil, err
		}
		def, err := result.State.Marshal(ctx)
		if err != nil {
			return nil, err
		}
		out.targets = append(out.targets, convertedTarget{result, def.ToPB()})
	}
	unknown, err := c.unknownStages(ctx, e.src.Data)
	if err != nil {
		return nil, err
	}
	out.warnings = append(e.warnings, unknown...)
	return out, nil
}

// unknownStages warns of names after --no-cache-filter that are no stage: the frontend says nothing.
func (c *client) unknownStages(ctx context.Context, dockerfile []byte) ([]Warning, error) {
	if c.opts["no-cache"] == "" {
		return nil, nil
	}
	list, err := dockerfile2llb.ListTargets(ctx, dockerfile)
	if err != nil {
		return nil, err
	}
	var warnings []Warning
	for _, name := range strings.Split(c.opts["no-cache"], ",") {
		if !slices.ContainsFunc(list.Targets, func(t targets.Target) bool { return strings.EqualFold(t.Name, name) }) {
			warnings = append(warnings, Warning{
				Rule: "NoCacheFilter", Message: fmt.Sprintf("no stage is called %q, so nothing is built again for it", name), Where: Location{File: c.file},
			})
		}
	}
	return warnings, nil
}

func newClient(r Request, res Resolver) (*client, error) {
	for _, p := range r.Platforms {
		if p.OS != "linux" {
			return nil, unsupportedOS(p.OS)
		}
	}
	named, err := namedContexts(r.Contexts)
	if err != nil {
		return nil, err
	}
	opts := options(r, named.opts)
	if opts["filename"], err = named.main(r, opts); err != nil {
		return nil, err
	}
	return &client{
		opts:     opts,
		worker:   platforms.Normalize(platforms.DefaultSpec()),
		contexts: named,
		resolver: res,
		file:     opts["filename"],
		seen:     &seen{asked: map[string]func() (resolved, error){}, images: map[string]resolved{}},
	}, nil
}

// options are what buildctl would send for the request.
func options(r Request, contexts map[string]string) map[string]string {
	opts := maps.Clone(contexts)
	if r.Target != "" {
		opts["target"] = r.Target
	}
	if r.NoCache || len(r.NoCacheStages) > 0 {
		opts["no-cache"] = strings.Join(r.NoCacheStages, ",")
	}
	if r.Pull {
		opts["image-resolve-mode"] = "pull"
	}
	var names []string
	for _, p := range r.Platforms {
		names = append(names, platforms.FormatAll(platforms.Normalize(p)))
	}
	if len(names) > 0 {
		opts["platform"] = strings.Join(names, ",")
	}
	if r.Network != NetworkDefault {
		opts["force-network-mode"] = r.Network.String()
	}
	var hosts []string
	for _, h := range r.Hosts {
		hosts = append(hosts, h.Name+"="+h.IP)
	}
	if len(hosts) > 0 {
		opts["add-hosts"] = strings.Join(hosts, ",")
	}
	if r.ShmSize > 0 {
		opts["shm-size"] = strconv.FormatInt(r.ShmSize, 10)
	}
	var limits []string
	for _, u := range r.Ulimits {
		limits = append(limits, fmt.Sprintf("%s=%d:%d", u.Name, u.Soft, u.Hard))
	}
	if len(limits) > 0 {
		opts["ulimit"] = strings.Join(limits, ",")
	}
	if r.CgroupParent != "" {
		opts["cgroup-parent"] = r.CgroupParent
	}
	if r.Epoch != nil {
		opts["build-arg:SOURCE_DATE_EPOCH"] = strconv.FormatInt(r.Epoch.Unix(), 10)
	}
	for k, v := range r.Args {
		opts["build-arg:"+k] = v
	}
	for k, v := range r.Labels {
		opts["label:"+k] = v
	}
	return opts
}

// CheckEpoch refuses a SOURCE_DATE_EPOCH that no image can have: its config and its history know years of four digits.
func CheckEpoch(epoch *time.Time) error {
	const last = 253402300799 // the end of 9999
	if epoch == nil || epoch.Unix() >= 0 && epoch.Unix() <= last {
		return nil
	}
	return &epochError{epoch.Unix(), last}
}

type epochError struct{ seconds, last int64 }

func (e *epochError) Error() string {
	return fmt.Sprintf("SOURCE_DATE_EPOCH=%d is a time that no image can have", e.seconds)
}

// Hint names the next step.
func (e *epochError) Hint() string {
	return fmt.Sprintf("give a number of seconds since 1970 from 0 to %d, the end of the year 9999", e.last)
}

func (c *client) graph(out *converted) (*Graph, error) {
	d := newDecoder(c)
	g := &Graph{Warnings: out.warnings, Dockerfile: out.dockerfile, Index: out.index}
	slices.SortStableFunc(g.Warnings, func(a, b Warning) int {
		return cmp.Or(cmp.Compare(a.Where.Line(), b.Where.Line()), cmp.Compare(a.Rule, b.Rule), cmp.Compare(a.Message, b.Message))
	})
	for _, target := range out.targets {
		t, err := c.target(d, target)
		if err != nil {
			return nil, c.failed(err)
		}
		g.Targets = append(g.Targets, t)
		if target.Epoch != nil {
			epoch := target.Epoch.UTC()
			g.Epoch = &epoch
		}
	}
	g.Steps = d.steps
	return g, nil
}

// target decodes the steps of one platform and describes their image.
func (c *client) target(d *decoder, out convertedTarget) (Target, error) {
	t := Target{Platform: out.Image.Platform}
	if t.Platform.OS == "" || t.Platform.Architecture == "" { // the base does not say
		t.Platform = c.worker
	}
	err := CheckEpoch(out.Epoch)
	if err != nil {
		return Target{}, err
	}
	if t.Result, err = d.add(out.def); err != nil {
		return Target{}, err
	}
	if t.Config, err = json.Marshal(out.Image); err != nil {
		return Target{}, fmt.Errorf("encode image config: %w", err)
	}
	if out.BaseImage != nil {
		if t.BaseConfig, err = json.Marshal(out.BaseImage); err != nil {
			return Target{}, fmt.Errorf("encode config of the base image: %w", err)
		}
	}
	return t, c.stand(d.steps, &t)
}

// failed leaves an error that has its line as it is.
func (c *client) failed(err error) error {
	var located *Error
	if errors.As(err, &located) {
		return located
	}
	return &Error{Where: Location{File: c.file}, Err: err}
}

// stand finds what the result stands on and holds it against the history.
func (c *client) stand(steps []Step, t *Target) error {
	var config, base ocispec.Image
	if err := json.Unmarshal(t.Config, &config); err != nil {
		return fmt.Errorf("decode image config: %w", err)
	}
	var err error
	if t.Base, t.Layers, err = chain(steps, t.Result); err != nil {
		return err
	}
	if t.BaseConfig == nil && t.Base != Scratch {
		// the frontend forgets the base of a stage that a build context replaces
		t.BaseConfig = c.baseConfig(steps[t.Base].Op.(Image))
	}
	if t.BaseConfig != nil {
		if err := json.Unmarshal(t.BaseConfig, &base); err != nil {
			return fmt.Errorf("decode config of the base image: %w", err)
		}
	}
	t.HistoryLines = historyLines(c.seen.dockerfile, c.opts["target"], config.History)
	return checkHistory(steps, t.Layers, layersIn(config.History)-layersIn(base.History))
}

func (c *client) baseConfig(img Image) []byte {
	c.seen.mu.Lock()
	defer c.seen.mu.Unlock()
	for _, r := range c.seen.images {
		if r.ref == img.Ref && r.digest == img.Digest {
			return r.config
		}
	}
	return nil
}

func layersIn(history []ocispec.History) int {
	n := 0
	for _, h := range history {
		if !h.EmptyLayer {
			n++
		}
	}
	return n
}

// checkHistory holds the steps against the config: only if they agree can a
// layer be said to come from an instruction.
func checkHistory(steps []Step, layers []Ref, want int) error {
	got := len(layers)
	if got > 0 && isTree(steps[layers[0]].Op) {
		got--
	}
	if got != want {
		return fmt.Errorf("the history of the image names %d layers, but %d steps make one", want, got)
	}
	return nil
}

// isTree tells whether op brings files from outside that are no image.
func isTree(op Op) bool {
	switch op.(type) {
	case Local, Git, HTTP, Upload:
		return true
	}
	return false
}

// chain walks from the result down to what it stands on.
func chain(steps []Step, result Ref) (base Ref, layers []Ref, err error) {
	for ref := result; ref != Scratch; {
		switch op := steps[ref].Op.(type) {
		case Image:
			slices.Reverse(layers)
			return ref, layers, nil
		case Local, Git, HTTP, Upload:
			layers = append(layers, ref)
			ref = Scratch
		case Exec:
			layers = append(layers, ref)
			ref = op.Root
		case Files:
			layers = append(layers, ref)
			ref = op.Base
		case Merge:
			if err := checkLink(steps, op); err != nil {
				return Scratch, nil, fmt.Errorf("%s: %w", steps[ref].Name, err)
			}
			layers = append(layers, ref)
			ref = op.Inputs[0]
		default:
			return Scratch, nil, fmt.Errorf("%s: a %T makes no layer", steps[ref].Name, op)
		}
	}
	slices.Reverse(layers)
	return Scratch, layers, nil
}

// checkLink holds a Merge to the form that COPY --link gives it, because only
// then is it one layer.
func checkLink(steps []Step, m Merge) error {
	if len(m.Inputs) == 2 && m.Inputs[1] != Scratch {
		if f, ok := steps[m.Inputs[1]].Op.(Files); ok && f.Base == Scratch {
			return nil
		}
	}
	return errors.New("this merge is more than one layer")
}

// locate gives an error of the frontend its line.
func (c *client) locate(err error) error {
	var located *Error
	if errors.As(err, &located) {
		return located
	}
	e := &Error{Where: Location{File: c.file, Source: c.seen.dockerfile}, Err: err, Advice: advice(err)}
	var l *parser.LocationError
	if errors.As(err, &l) {
		for _, ranges := range l.Locations {
			if e.Where.Lines = parserLines(ranges); len(e.Where.Lines) > 0 {
				return e
			}
		}
	}
	if strings.Contains(err.Error(), "invalid UTF-8") {
		e.Where.Lines, e.Advice = badText(c.seen.dockerfile), "save the Dockerfile as UTF-8"
		return e
	}
	e.Where.Lines = mountFrom(c.seen.dockerfile, c.seen.blamed(err))
	return e
}

// badText finds the first instruction that is not in UTF-8.
func badText(dockerfile []byte) []Range {
	ast, err := parser.Parse(bytes.NewReader(dockerfile))
	if err != nil {
		return nil
	}
	lines := bytes.Split(dockerfile, []byte("\n"))
	for _, node := range ast.AST.Children {
		end := min(node.EndLine, len(lines))
		if start := min(node.StartLine-1, end); start >= 0 && !utf8.Valid(bytes.Join(lines[start:end], nil)) {
			return []Range{{Start: node.StartLine, End: node.EndLine}}
		}
	}
	return nil
}

// blamed tells which name after from= an error without a line is about.
func (s *seen) blamed(err error) func(name string) bool {
	context := unusableContext.FindStringSubmatch(err.Error())
	return func(name string) bool {
		if context != nil {
			return name == context[2]
		}
		named, err := reference.ParseNormalizedNamed(name)
		return err == nil && reference.TagNameOnly(named).String() == s.unresolved
	}
}

var unusableContext = regexp.MustCompile(`(unsupported context source another target|invalid context specifier \S+) for (\S+)`)

// advice knows a next step for the errors that people meet.
func advice(err error) string {
	var u *unsupported
	if errors.As(err, &u) {
		return u.hint
	}
	if m := unusableContext.FindStringSubmatch(err.Error()); m != nil {
		return fmt.Sprintf("give %s as a directory, as docker-image://, oci-layout:// or https://, or as a git URL with its scheme", m[2])
	}
	if errors.Is(err, fs.ErrNotExist) && strings.Contains(err.Error(), "failed to read dockerfile") {
		return "give its path with -f, or run in the directory that has it"
	}
	return ""
}

func unreadable(err error) error {
	e := &Error{Err: err, Advice: "make it a readable regular file inside the build context"}
	var p *fs.PathError
	if errors.As(err, &p) {
		e.Where.File = p.Path
	}
	return e
}

// mountFrom finds the RUN --mount whose from is blamed for an error; the
// frontend does not say where it is.
func mountFrom(dockerfile []byte, blamed func(name string) bool) []Range {
	ast, err := parser.Parse(bytes.NewReader(dockerfile))
	if err != nil {
		return nil
	}
	for _, node := range ast.AST.Children {
		for _, flag := range node.Flags {
			for _, field := range strings.Split(strings.TrimPrefix(flag, "--mount="), ",") {
				if name, ok := strings.CutPrefix(field, "from="); ok && blamed(name) {
					return []Range{{Start: node.StartLine, End: node.EndLine}}
				}
			}
		}
	}
	return nil
}
