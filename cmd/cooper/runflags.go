package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/docker/go-units"

	"github.com/cooper-build/cooper/builder"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/sshagent"
	"github.com/cooper-build/cooper/sandbox"
	"github.com/cooper-build/cooper/sandbox/egress"
	"github.com/cooper-build/cooper/sandbox/userns"
)

// parseHosts reads --add-host: HOST:IP or HOST=IP, where IP may be several and IPv6 may be in brackets.
func parseHosts(given []string) ([]plan.Host, error) {
	var out []plan.Host
	for _, s := range given {
		name, ips, ok := strings.Cut(s, "=")
		if !ok {
			name, ips, ok = strings.Cut(s, ":")
		}
		if !ok || name == "" || ips == "" || strings.ContainsAny(name, " \t\n") {
			return nil, usageError{fmt.Errorf("--add-host %q: HOST:IP expected", s)}
		}
		if ips == "host-gateway" {
			return nil, usageError{hinted{fmt.Errorf("--add-host %q: host-gateway is an address in a daemon's network, and there is none", s), "give the IP address"}}
		}
		for _, ip := range strings.Split(ips, ",") {
			if len(ip) > 2 && ip[0] == '[' && ip[len(ip)-1] == ']' {
				ip = ip[1 : len(ip)-1]
			}
			if net.ParseIP(ip) == nil {
				return nil, usageError{fmt.Errorf("--add-host %q: %q is not an IP address", s, ip)}
			}
			out = append(out, plan.Host{Name: name, IP: ip})
		}
	}
	return out, nil
}

// parseShmSize reads --shm-size: bytes, or with a unit such as m.
func parseShmSize(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	n, err := units.RAMInBytes(s)
	if err != nil || n < 0 {
		return 0, usageError{fmt.Errorf("--shm-size %q: a size such as 128m is expected", s)}
	}
	return n, nil
}

// leastMemory is what the kernel and the sandbox need to start a command at all.
const leastMemory = 16 << 20

// limits reads the limits of each RUN. As in docker, 0 and a --pids-limit of -1 are no limit.
func (f *buildFlags) limits() (sandbox.Limits, error) {
	l := sandbox.Limits{CPUs: f.cpus, Processes: max(f.pidsLimit, 0), Time: f.stepTimeout}
	if f.memory != "" {
		n, err := units.RAMInBytes(f.memory)
		if err != nil || n < 0 {
			return l, usageError{fmt.Errorf("--memory %q: a size such as 512m is expected", f.memory)}
		}
		if n > 0 && n < leastMemory {
			return l, usageError{fmt.Errorf("--memory %q: less than %s is not enough to start a command", f.memory, units.BytesSize(leastMemory))}
		}
		l.Memory = n
	}
	switch {
	case !(f.cpus >= 0 && f.cpus <= 1<<20): // nor NaN
		return l, usageError{fmt.Errorf("--cpus %v: a number of processors such as 1.5 is expected", f.cpus)}
	case f.pidsLimit < -1:
		return l, usageError{fmt.Errorf("--pids-limit %d: a number of processes is expected", f.pidsLimit)}
	case f.stepTimeout < 0:
		return l, usageError{fmt.Errorf("--step-timeout %s: a time such as 10m is expected", f.stepTimeout)}
	}
	return l, nil
}

// parseUlimits reads --ulimit. Of several for one name the last counts.
func parseUlimits(given []string) ([]plan.Ulimit, error) {
	var out []plan.Ulimit
	for _, s := range given {
		u, err := units.ParseUlimit(s)
		if err != nil {
			return nil, usageError{fmt.Errorf("--ulimit %q: %w", s, err)}
		}
		out = slices.DeleteFunc(out, func(o plan.Ulimit) bool { return o.Name == u.Name })
		out = append(out, plan.Ulimit{Name: u.Name, Soft: u.Soft, Hard: u.Hard})
	}
	return out, nil
}

// parseAllow reads --allow.
func parseAllow(given []string) (builder.Entitlements, error) {
	var e builder.Entitlements
	for _, s := range given {
		name, _, _ := strings.Cut(s, "=")
		switch {
		case s == "":
		case s == "network.host":
			e.NetworkHost = true
		case s == "security.insecure":
			e.SecurityInsecure = true
		case name == "device":
			return e, usageError{fmt.Errorf("--allow %s: RUN --device is not supported, so there is nothing to allow", s)}
		case strings.HasPrefix(name, "fs"):
			return e, usageError{hinted{fmt.Errorf("--allow %s: only docker buildx bake knows it", s), "leave it out: a build reads what its command line names, and nothing else"}}
		default:
			return e, usageError{fmt.Errorf("--allow %q: network.host or security.insecure expected", s)}
		}
	}
	return e, nil
}

// kind reads --sandbox; 0 is auto.
func (f *buildFlags) kind() (userns.Kind, error) { return sandboxKind("--sandbox", f.sandbox) }

// sandboxKind is what a flag, or the environment, wants a RUN to be kept in.
func sandboxKind(flag, value string) (userns.Kind, error) {
	if value == "" {
		flag, value = "COOPER_SANDBOX", os.Getenv("COOPER_SANDBOX")
	}
	if value == "" || value == "auto" {
		return 0, nil
	}
	kind, ok := userns.ParseKind(value)
	if !ok {
		return 0, usageError{fmt.Errorf("%s %q: auto, root, subids, single or chroot expected", flag, value)}
	}
	return kind, nil
}

func parseNetwork(s string) (plan.Network, error) {
	switch s {
	case "", "default":
		return plan.NetworkDefault, nil
	case "host":
		return plan.NetworkHost, nil
	case "none":
		return plan.NetworkNone, nil
	}
	return plan.NetworkDefault, usageError{hinted{fmt.Errorf("--network %q: default, host or none expected", s), "there are no networks of a daemon to join"}}
}

// An agentSpec is a value of --ssh: an id and the socket or the keys behind it; none is the user's agent.
type agentSpec struct {
	id    string
	paths []string
}

func parseSSH(given []string) ([]agentSpec, error) {
	var out []agentSpec
	for _, s := range given {
		if s == "" {
			continue
		}
		id, paths, ok := strings.Cut(s, "=")
		a := agentSpec{id: id}
		if id == "" {
			a.id = "default"
		}
		if ok {
			a.paths = strings.Split(paths, ",")
			if slices.Contains(a.paths, "") {
				return nil, usageError{fmt.Errorf("--ssh %q: the name of a file is missing", s)}
			}
		}
		if slices.ContainsFunc(out, func(o agentSpec) bool { return o.id == a.id }) {
			return nil, usageError{fmt.Errorf("--ssh: the id %s is given twice", a.id)}
		}
		out = append(out, a)
	}
	return out, nil
}

// parseKeep reads --keep-storage, as builder.Request.KeepStorage has it.
func parseKeep(s string) (int64, error) {
	switch s {
	case "":
		return 0, nil
	case "none":
		return -1, nil
	}
	n, err := parseSize("--keep-storage", s)
	if err == nil && n == 0 {
		n = 1 // nothing may stay but what is in use
	}
	return n, err
}

// parseEgress reads --egress: allow=RULE,RULE.
func parseEgress(given []string) ([]egress.Rule, error) {
	var all []egress.Rule
	for _, s := range given {
		text, ok := strings.CutPrefix(s, "allow=")
		if !ok {
			return nil, usageError{fmt.Errorf("--egress %q: allow=HOST[:PORT],... is expected", s)}
		}
		rules, err := egress.ParseRules(text)
		if err != nil {
			return nil, usageError{fmt.Errorf("--egress %q: %w", s, err)}
		}
		all = append(all, rules...)
	}
	return all, nil
}

// knownHosts is what the user and the machine know of ssh servers, as ssh(1) reads it. A file that is not there knows nothing.
func knownHosts() string {
	files := []string{"/etc/ssh/ssh_known_hosts"}
	if home, err := os.UserHomeDir(); err == nil {
		files = append(files, filepath.Join(home, ".ssh", "known_hosts"))
	}
	var all strings.Builder
	for _, name := range files {
		if text, err := os.ReadFile(name); err == nil {
			all.Write(text)
			all.WriteByte('\n')
		}
	}
	return all.String()
}

// openAgents opens what --ssh names. A context that comes over ssh has the user's agent without asking, as in buildx.
func openAgents(specs []agentSpec, context, socket string) ([]builder.Agent, error) {
	implied := len(specs) == 0 && isSSH(context)
	if implied {
		if socket == "" {
			return nil, nil // the server says that it wants a key, if it does
		}
		specs = []agentSpec{{id: "default"}}
	}
	var out []builder.Agent
	for _, a := range specs {
		if len(a.paths) == 0 && socket == "" {
			return nil, usageError{hinted{fmt.Errorf("--ssh %s: no agent is running: SSH_AUTH_SOCK is not set", a.id),
				fmt.Sprintf("start ssh-agent and add your key, or name one: --ssh %s=KEY", a.id)}}
		}
		source, err := sshagent.Open(a.paths, socket)
		if err != nil {
			return nil, usageError{fmt.Errorf("--ssh %s: %w", a.id, err)}
		}
		out = append(out, builder.Agent{ID: a.id, Source: source})
	}
	return out, nil
}

// isSSH tells whether a git repository is reached over ssh.
func isSSH(context string) bool {
	if scheme, _, ok := strings.Cut(context, "://"); ok {
		return scheme == "ssh"
	}
	user, rest, ok := strings.Cut(context, "@")
	return ok && !strings.ContainsAny(user, "/:") && strings.Contains(rest, ":") && plan.IsRemote(context)
}

// longestSecret is BuildKit's limit.
const longestSecret = 500 << 10

// A secretSpec is a value of --secret. With neither file nor env, the variable named like the id is used when there is
// one, else the file.
type secretSpec struct{ id, file, env string }

func parseSecret(s string) (secretSpec, error) {
	f, err := fields("--secret", s, "id", "src", "source", "env", "type")
	if err != nil {
		return secretSpec{}, err
	}
	fail := func(format string, args ...any) (secretSpec, error) {
		return secretSpec{}, usageError{fmt.Errorf("--secret %q: %w", s, fmt.Errorf(format, args...))}
	}
	spec := secretSpec{id: f["id"], file: f["src"] + f["source"], env: f["env"]}
	if spec.id == "" {
		return fail("id=ID is missing")
	}
	if f["src"] != "" && f["source"] != "" {
		return fail("src and source are the same: give one")
	}
	switch t := f["type"]; {
	case t != "" && t != "file" && t != "env":
		return fail("type %q is none of file and env", t)
	case t == "env" && spec.env == "":
		spec.env, spec.file = spec.file, ""
	}
	if spec.env != "" && spec.file != "" {
		return fail("the value is in a file or in the environment: give one of src and env")
	}
	return spec, nil
}

// errReadOnce is what reading a secret from a pipe gives to a process that another will follow.
var errReadOnce = errors.New("it can be read once")

// read gives the value. final says that this process will do the build: what can be read once, such as a shell's
// <(command), is left alone until then.
func (s secretSpec) read(final bool) (builder.Secret, error) {
	env, file := s.env, s.file
	if env == "" && file == "" {
		if _, ok := os.LookupEnv(s.id); ok {
			env = s.id
		} else {
			file = s.id
		}
	}
	fail := func(err error) (builder.Secret, error) {
		return builder.Secret{}, usageError{fmt.Errorf("--secret id=%s: %w", s.id, err)}
	}
	if env != "" {
		v, ok := os.LookupEnv(env)
		if !ok {
			return fail(fmt.Errorf("the environment has no %s", env))
		}
		if len(v) > longestSecret {
			return fail(fmt.Errorf("more than %d bytes", longestSecret))
		}
		return builder.Secret{ID: s.id, Value: []byte(v)}, nil
	}
	info, err := os.Stat(file)
	if err != nil {
		return fail(err)
	}
	if !info.Mode().IsRegular() && !final {
		return fail(errReadOnce)
	}
	f, err := os.Open(file)
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	v, err := io.ReadAll(io.LimitReader(f, longestSecret+1))
	if err != nil {
		return fail(err)
	}
	if len(v) > longestSecret {
		return fail(fmt.Errorf("more than %d bytes", longestSecret))
	}
	return builder.Secret{ID: s.id, Value: v}, nil
}

// readSecrets reads every --secret. Of several with one id the last counts.
func readSecrets(given []string, final bool) ([]builder.Secret, error) {
	var out []builder.Secret
	for _, g := range given {
		if g == "" {
			continue
		}
		spec, err := parseSecret(g)
		if err != nil {
			return nil, err
		}
		secret, err := spec.read(final)
		if err != nil {
			return nil, err
		}
		out = slices.DeleteFunc(out, func(o builder.Secret) bool { return o.ID == secret.ID })
		out = append(out, secret)
	}
	return out, nil
}
