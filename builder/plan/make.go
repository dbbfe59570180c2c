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
	"unicode/utf8"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/frontend/dockerfile/dockerfile2llb"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerui"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Make plans a build. A nil error means that every step of the graph can be
// run and that its layers match the history in its config. An error is an
// *Error, with the line of the Dockerfile when one is to blame.
func Make(ctx context.Context, r Request, res Resolver) (*Graph, error) {
	c, err := newClient(r, res)
	if err != nil {
		return nil, at(Location{}, err)
	}
	out, err := c.convert(ctx)
	if refused := c.seen.unreadable; refused != nil {
		return nil, unreadable(refused)
	}
	if err != nil {
		return nil, c.locate(err)
	}
	return c.graph(out)
}

// converted is what the frontend makes of a Dockerfile.
type converted struct {
	*dockerfile2llb.Result
	def      *pb.Definition
	warnings []Warning
}

// convert does what the Build of BuildKit's frontend/dockerfile/builder does,
// for one platform. That one is not called because its cache of resolved images
// has a data race as soon as a Dockerfile names two of them.
func (c *client) convert(ctx context.Context) (*converted, error) {
	ui, err := dockerui.NewClient(c)
	if err != nil {
		return nil, err
	}
	src, err := ui.ReadEntrypoint(ctx, "Dockerfile")
	if err != nil {
		return nil, err
	}
	out := &converted{}
	if out.warnings, err = acceptSyntax(src.Filename, src.Data, ui.BuildArgs); err != nil {
		return nil, err
	}
	opt := dockerfile2llb.ConvertOpt{
		Config:       ui.Config,
		Client:       ui,
		SourceMap:    src.SourceMap,
		MetaResolver: c,
		Warn: func(rule, _, url, msg string, where []parser.Range) { // from several goroutines
			c.seen.mu.Lock()
			defer c.seen.mu.Unlock()
			out.warnings = append(out.warnings, Warning{
				Rule: rule, Message: msg, URL: url,
				Where: Location{File: src.Filename, Lines: parserLines(where), Source: src.Data},
			})
		},
	}
	if len(ui.TargetPlatforms) > 0 {
		opt.TargetPlatform = &ui.TargetPlatforms[0]
	}
	if out.Result, err = dockerfile2llb.Dockerfile2LLB(ctx, src.Data, opt); err != nil {
		return nil, err
	}
	def, err := out.State.Marshal(ctx)
	if err != nil {
		return nil, err
	}
	out.def = def.ToPB()
	return out, nil
}

func newClient(r Request, res Resolver) (*client, error) {
	if !isDir(r.Context) {
		return nil, badContext(r.Context)
	}
	if r.Platform.OS != "" && r.Platform.OS != "linux" {
		return nil, unsupportedOS(r.Platform.OS)
	}
	named, err := namedContexts(r.Contexts)
	if err != nil {
		return nil, err
	}
	dockerfile, file, err := dockerfileTree(r.Context, r.Dockerfile)
	if err != nil {
		return nil, err
	}
	named.locals["context"] = local{name: "context", tree: tree{dir: r.Context}}
	named.locals["dockerfile"] = local{name: "dockerfile", tree: dockerfile}
	return &client{
		opts:     options(r, file, named.opts),
		worker:   platforms.Normalize(platforms.DefaultSpec()),
		contexts: named,
		resolver: res,
		file:     file,
		seen:     &seen{asked: map[string]func() (resolved, error){}, images: map[string]resolved{}},
	}, nil
}

func badContext(dir string) error {
	if remoteContext.MatchString(dir) {
		return &unsupported{
			what: fmt.Sprintf("the remote build context %s is not supported yet", dir),
			hint: "clone or download it first and give the directory",
		}
	}
	return fmt.Errorf("the build context %q is not a directory", dir)
}

// options are what buildctl would send for the request.
func options(r Request, file string, contexts map[string]string) map[string]string {
	opts := maps.Clone(contexts)
	opts["filename"] = file
	if r.Target != "" {
		opts["target"] = r.Target
	}
	if r.NoCache {
		opts["no-cache"] = ""
	}
	if p := r.Platform; p.Architecture != "" {
		p.OS = "linux"
		opts["platform"] = platforms.FormatAll(platforms.Normalize(p))
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

func (c *client) graph(out *converted) (*Graph, error) {
	d, err := newDecoder(c, out.def)
	if err != nil {
		return nil, c.failed(err)
	}
	g := &Graph{Warnings: out.warnings, Dockerfile: c.seen.dockerfile, Platform: out.Image.Platform}
	if g.Platform.OS == "" || g.Platform.Architecture == "" { // the base does not say
		g.Platform = c.worker
	}
	slices.SortStableFunc(g.Warnings, func(a, b Warning) int {
		return cmp.Or(cmp.Compare(a.Where.Line(), b.Where.Line()), cmp.Compare(a.Rule, b.Rule), cmp.Compare(a.Message, b.Message))
	})
	if g.Result, err = d.result(out.def); err != nil {
		return nil, c.failed(err)
	}
	g.Steps = d.steps
	if g.Config, err = json.Marshal(out.Image); err != nil {
		return nil, c.failed(fmt.Errorf("encode image config: %w", err))
	}
	if out.BaseImage != nil {
		if g.BaseConfig, err = json.Marshal(out.BaseImage); err != nil {
			return nil, c.failed(fmt.Errorf("encode config of the base image: %w", err))
		}
	}
	if out.Epoch != nil {
		epoch := out.Epoch.UTC()
		g.Epoch = &epoch
	}
	if err := c.stand(g); err != nil {
		return nil, c.failed(err)
	}
	return g, nil
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
func (c *client) stand(g *Graph) error {
	var config, base ocispec.Image
	if err := json.Unmarshal(g.Config, &config); err != nil {
		return fmt.Errorf("decode image config: %w", err)
	}
	var err error
	if g.Base, g.Layers, err = chain(g.Steps, g.Result); err != nil {
		return err
	}
	if g.BaseConfig == nil && g.Base != Scratch {
		// the frontend forgets the base of a stage that a build context replaces
		g.BaseConfig = c.baseConfig(g.Steps[g.Base].Op.(Image))
	}
	if g.BaseConfig != nil {
		if err := json.Unmarshal(g.BaseConfig, &base); err != nil {
			return fmt.Errorf("decode config of the base image: %w", err)
		}
	}
	g.HistoryLines = historyLines(g.Dockerfile, c.opts["target"], config.History)
	return checkHistory(g, layersIn(config.History)-layersIn(base.History))
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
func checkHistory(g *Graph, want int) error {
	got := len(g.Layers)
	if got > 0 {
		if _, ok := g.Steps[g.Layers[0]].Op.(Local); ok {
			got--
		}
	}
	if got != want {
		return fmt.Errorf("the history of the image names %d layers, but %d steps make one", want, got)
	}
	return nil
}

// chain walks from the result down to what it stands on.
func chain(steps []Step, result Ref) (base Ref, layers []Ref, err error) {
	for ref := result; ref != Scratch; {
		switch op := steps[ref].Op.(type) {
		case Image:
			slices.Reverse(layers)
			return ref, layers, nil
		case Local:
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

var unusableContext = regexp.MustCompile(`unsupported context source (remote source|another target) for (\S+)`)

// advice knows a next step for the errors that people meet.
func advice(err error) string {
	var u *unsupported
	if errors.As(err, &u) {
		return u.hint
	}
	if m := unusableContext.FindStringSubmatch(err.Error()); m != nil {
		return fmt.Sprintf("fetch it first and give the directory: --build-context %s=DIR", m[2])
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
