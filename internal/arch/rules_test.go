package arch

import "testing"

// house is the shape of this repository. When an arrow has to point somewhere new, change it here and in docs/architecture.md, in the
// commit that needs it.
func house() Rules {
	const (
		exits  = "only commands end the process; return an error"
		prints = "only commands print; report through an event or an error"
		env    = "only commands read the environment; take a value"
	)
	sameProgram := Except{"sandbox/userns.start", "the program enters its namespaces by running itself again, with its own streams"}
	return Rules{
		Module: "github.com/cooper-build/cooper",
		Own: map[string][]string{
			"cmd/cooper":                    {"builder/...", "snapshot/...", "sandbox/..."},
			"builder":                       {"builder/...", "snapshot/...", "sandbox/...", "owner", "ahead"},
			"builder/plan":                  nil,
			"builder/policy":                nil,
			"builder/image":                 {"ahead", "snapshot/lease", "clone"},
			"builder/sign":                  nil,
			"builder/account":               nil,
			"builder/remote":                nil,
			"builder/sshagent":              nil,
			"builder/files":                 {"builder/plan", "builder/account", "snapshot/layer", "owner", "clone"},
			"snapshot":                      {"snapshot/layer", "snapshot/lease", "clone", "ahead"},
			"snapshot/layer":                {"owner", "snapshot/layer/gunzip"},
			"snapshot/layer/gunzip":         nil,
			"snapshot/lease":                nil,
			"sandbox/emulate":               nil,
			"sandbox":                       {"sandbox/first", "sandbox/filter", "sandbox/userns", "sandbox/chroot", "sandbox/egress", "sandbox/rootemu", "owner", "clone"},
			"sandbox/doctor":                {"sandbox/userns", "sandbox/chroot", "sandbox/egress"},
			"sandbox/rootemu":               {"sandbox/notify", "owner"},
			"sandbox/egress":                nil,
			"sandbox/first":                 nil,
			"sandbox/filter":                nil,
			"sandbox/notify":                nil,
			"sandbox/userns":                {"sandbox/chroot"},
			"sandbox/chroot":                {"sandbox/first", "sandbox/filter", "sandbox/notify"},
			"owner":                         nil,
			"ahead":                         nil,
			"clone":                         nil,
			"internal/arch":                 nil,
			"internal/bench":                nil,
			"internal/killpoint":            nil,
			"internal/ladder":               nil,
			"internal/nstest":               {"sandbox/userns"},
			"internal/ocidiff":              nil,
			"internal/testimage":            nil,
			"internal/testimage/cmd/mkbase": {"internal/testimage"},
			"internal/testreport":           nil,
		},
		Foreign: []Foreign{
			{"github.com/moby/buildkit", []string{"builder/plan"}, "LLB is the format in which plans arrive, and its types stay in that room"},
			{"github.com/moby/buildkit/client", []string{"builder/plan", "cmd/cooper"}, "progressui is fed with its SolveStatus"},
			{"github.com/moby/buildkit/solver/pb", []string{"builder/plan", "cmd/cooper"}, "a SolveStatus points at source lines with its types"},
			{"github.com/moby/buildkit/util/progress", []string{"cmd/cooper"}, "progress is drawn on a terminal"},
			{"github.com/google/go-containerregistry", []string{"builder/image", "internal/testimage"}, "images enter and leave in one place"},
			{"github.com/docker/cli", []string{"builder/image"}, "registry credentials are read in one place"},
			{"github.com/opencontainers/umoci", []string{"snapshot/layer"}, "the tar form of a change set is one package's secret"},
			{"github.com/opencontainers/runc", nil, "a RUN starts by package first; docs/decisions/first-process.md"},
			{"github.com/seccomp", []string{"sandbox/filter"}, "filters are compiled in one place"},
			{"github.com/opencontainers/runtime-spec", []string{"sandbox"}, "how a process is isolated is the sandbox's secret"},
			{"github.com/google/nftables", []string{"sandbox/egress"}, "how connections are caught is one package's secret"},
			{"github.com/mdlayher/netlink", []string{"sandbox/egress"}, "how connections are caught is one package's secret"},
			{"github.com/vishvananda/netlink", []string{"sandbox/egress"}, "how connections are caught is one package's secret"},
			{"golang.org/x/net", []string{"sandbox/egress"}, "it reads DNS, and nothing else does"},
			{"go.podman.io/storage", []string{"sandbox/userns"}, "id maps are made in one place"},
			{"github.com/spf13", []string{"cmd/..."}, "flags become a builder.Request before anything else sees them"},
			{"github.com/in-toto", []string{"builder/sign"}, "statements are written where they are signed"},
			{"github.com/secure-systems-lab", []string{"builder/sign"}, "envelopes are made where they are signed"},
			{"golang.org/x/crypto/ssh", []string{"builder/remote", "builder/sshagent"}, "ssh is spoken to git servers and to agents"},
			{"github.com/pjbgf/sha1cd", []string{"builder/remote"}, "git objects are named in one place"},
			{"testing", []string{"internal/nstest", "internal/testimage"}, "test support does not belong in the binary"},
			{"github.com/rogpeppe/go-internal", nil, "it is for tests"},
			{"github.com/google/go-cmp", nil, "it is for tests"},
		},
		Inits:   []Except{{"sandbox/first.init", "main's goroutine stays on the first thread only if it is tied to it before main begins"}},
		Callers: []string{"cmd/...", "internal/bench", "internal/nstest", "internal/testimage/...", "internal/testreport"},
		Calls: []Call{
			{"os", "Exit", exits, nil},
			{"log", "Fatal*", exits, nil},
			{"log", "Panic*", exits, nil},
			{"", "panic", exits, nil},
			{"fmt", "Print*", prints, nil},
			{"log", "Print*", prints, nil},
			{"", "print", prints, nil},
			{"", "println", prints, nil},
			{"os", "Stdin", "only commands read the terminal; take a reader", []Except{sameProgram}},
			{"os", "Stdout", prints, []Except{sameProgram}},
			{"os", "Stderr", prints, []Except{sameProgram}},
			{"os", "Getenv", env, nil},
			{"os", "LookupEnv", env, nil},
			{"os", "Environ", env, nil},
			{"os", "ExpandEnv", env, nil},
			{"os", "Setenv", env, nil},
			{"os", "UserHomeDir", env, nil},
			{"os", "UserCacheDir", env, nil},
			{"os", "UserConfigDir", env, nil},
		},
	}
}

func TestTheHouseKeepsItsShape(t *testing.T) {
	found, err := Check("../..", house())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		t.Error(f)
	}
}
