package plan

import (
	"fmt"
	"slices"
	"strings"

	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// unsupported is something that BuildKit can do and this program cannot.
type unsupported struct{ what, hint string }

func (u *unsupported) Error() string { return u.what }
func (u *unsupported) Hint() string  { return u.hint }

// refuse judges a vertex before it is decoded. A nil error means that decoding
// loses nothing of what it says.
func refuse(op *pb.Op, meta *pb.OpMetadata) error {
	if exec := op.GetExec(); exec != nil {
		if err := refuseExec(exec); err != nil {
			return err
		}
	}
	if src := op.GetSource(); src != nil {
		if err := refuseSource(src); err != nil {
			return err
		}
	}
	if op.GetBuild() != nil {
		return &unsupported{what: "a build inside a build is not supported", hint: "build it first and use its image as a build context"}
	}
	if os := op.GetPlatform().GetOS(); os != "" && os != "linux" {
		return unsupportedOS(os)
	}
	if err := unknownFields(op.ProtoReflect()); err != nil {
		return err
	}
	if meta == nil {
		return nil
	}
	return unknownFields(meta.ProtoReflect())
}

func refuseExec(exec *pb.ExecOp) error {
	if len(exec.CdiDevices) > 0 {
		return &unsupported{
			what: "RUN --device is not supported",
			hint: "steps see no devices of this machine; remove --device",
		}
	}
	if s := exec.Security; s != pb.SecurityMode_SANDBOX && s != pb.SecurityMode_INSECURE {
		return fmt.Errorf("the security mode %s is unknown", s)
	}
	return nil
}

func refuseSource(src *pb.SourceOp) error {
	scheme, _, _ := strings.Cut(src.GetIdentifier(), "://")
	switch scheme {
	case "docker-image", "oci-layout", "local", "git", "http", "https":
		return nil
	default:
		return unsupportedSource(src.Identifier)
	}
}

func unsupportedOS(os string) error {
	return &unsupported{what: fmt.Sprintf("the operating system %s is not supported", os), hint: "use a linux platform"}
}

func unsupportedSource(id string) error {
	return &unsupported{
		what: fmt.Sprintf("the source %s is not supported", id),
		hint: "use an image, an OCI layout, a directory, a git repository or an http(s) URL",
	}
}

// checkAttrs refuses what would change the content of a source unnoticed.
func checkAttrs(scheme string, attrs map[string]string) error {
	known := map[string][]string{
		"docker-image": {pb.AttrImageResolveMode},
		"oci-layout":   {pb.AttrOCILayoutSessionID, pb.AttrOCILayoutStoreID},
		"local": {
			pb.AttrLocalSessionID, pb.AttrLocalUniqueID, pb.AttrSharedKeyHint, pb.AttrLocalDiffer,
			pb.AttrIncludePatterns, pb.AttrExcludePatterns, pb.AttrFollowPaths,
		},
		"git": {
			pb.AttrKeepGitDir, pb.AttrFullRemoteURL, pb.AttrAuthTokenSecret, pb.AttrAuthHeaderSecret, pb.AttrMountSSHSock,
			pb.AttrKnownSSHHosts, pb.AttrGitChecksum, pb.AttrGitSkipSubmodules, pb.AttrGitMTime, pb.AttrGitAdvice, pb.AttrGitFetchByCommit,
		},
		"http": {
			pb.AttrHTTPChecksum, pb.AttrHTTPFilename, pb.AttrHTTPPerm, pb.AttrHTTPUID, pb.AttrHTTPGID, pb.AttrHTTPAuthHeaderSecret,
		},
	}
	known["https"] = known["http"]
	for key := range attrs {
		header := strings.HasPrefix(scheme, "http") && strings.HasPrefix(key, pb.AttrHTTPHeaderPrefix)
		if !header && !slices.Contains(known[scheme], key) {
			return fmt.Errorf("unknown attribute %s of a %s source", key, scheme)
		}
	}
	return nil
}

// knownFields are the fields that the decoder reads, or may ignore because they
// change no content. Any other that is set stops the build: a newer frontend
// must not be able to ask for something and not get it.
var knownFields = map[protoreflect.Name][]protoreflect.Name{
	"Op":                {"inputs", "exec", "source", "file", "merge", "diff", "platform", "constraints"},
	"Platform":          {"Architecture", "OS", "Variant", "OSVersion", "OSFeatures"},
	"Input":             {"digest", "index"},
	"WorkerConstraints": {},
	"ExecOp":            {"meta", "mounts", "network", "security", "secretenv"},
	"Meta":              {"args", "env", "cwd", "user", "proxy_env", "extraHosts", "hostname", "ulimit", "cgroupParent", "removeMountStubsRecursive"},
	"Ulimit":            {"Name", "Soft", "Hard"},
	"ProxyEnv":          {"http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy"},
	"HostIP":            {"Host", "IP"},
	"SecretEnv":         {"ID", "name", "optional"},
	"Mount":             {"input", "selector", "dest", "output", "readonly", "mountType", "TmpfsOpt", "cacheOpt", "secretOpt", "SSHOpt"},
	"TmpfsOpt":          {"size"},
	"CacheOpt":          {"ID", "sharing"},
	"SecretOpt":         {"ID", "uid", "gid", "mode", "optional"},
	"SSHOpt":            {"ID", "uid", "gid", "mode", "optional"},
	"SourceOp":          {"identifier", "attrs"},
	"FileOp":            {"actions"},
	"FileAction":        {"input", "secondaryInput", "output", "copy", "mkfile", "mkdir", "rm", "symlink"},
	"FileActionCopy": {
		"src", "dest", "owner", "mode", "followSymlink", "dirCopyContents", "attemptUnpackDockerCompatibility",
		"createDestPath", "allowWildcard", "allowEmptyWildcard", "timestamp", "include_patterns", "exclude_patterns",
		"alwaysReplaceExistingDestPaths", "modeStr", "required_paths",
	},
	"FileActionMkFile":  {"path", "mode", "data", "owner", "timestamp"},
	"FileActionMkDir":   {"path", "mode", "makeParents", "owner", "timestamp"},
	"FileActionSymlink": {"oldpath", "newpath", "owner", "timestamp"},
	"FileActionRm":      {"path", "allowNotFound", "allowWildcard"},
	"ChownOpt":          {"user", "group"},
	"UserOpt":           {"byName", "byID"},
	"NamedUserOpt":      {"name", "input"},
	"MergeOp":           {"inputs"},
	"MergeInput":        {"input"},
	"DiffOp":            {"lower", "upper"},
	"LowerDiffInput":    {"input"},
	"UpperDiffInput":    {"input"},
	"OpMetadata":        {"ignore_cache", "description", "export_cache", "caps", "progress_group"},
	"ExportCache":       {"Value"},
	"ProgressGroup":     {"id", "name", "weak"},
}

func unknownFields(m protoreflect.Message) error {
	name := m.Descriptor().Name()
	if len(m.GetUnknown()) > 0 {
		return fmt.Errorf("a field of %s is unknown to this version", name)
	}
	var err error
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if !slices.Contains(knownFields[name], f.Name()) {
			err = fmt.Errorf("the field %s of %s is not supported", f.Name(), name)
			return false
		}
		err = unknownFieldsIn(f, v)
		return err == nil
	})
	return err
}

func unknownFieldsIn(f protoreflect.FieldDescriptor, v protoreflect.Value) error {
	switch {
	case f.Message() == nil, f.IsMap():
		return nil // the maps hold strings and booleans
	case f.IsList():
		for i := range v.List().Len() {
			if err := unknownFields(v.List().Get(i).Message()); err != nil {
				return err
			}
		}
		return nil
	default:
		return unknownFields(v.Message())
	}
}
