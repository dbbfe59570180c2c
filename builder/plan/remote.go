package plan

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

// uploadURL stands for the archive that the caller sends: the frontend knows
// such a context only as a file from a server (RFC 6761 reserves the name).
const uploadURL = "http://upload.invalid/context"

// gitSource reads the attributes that llb.Git and the Dockerfile frontend give. The host keys among them are left
// out: llb.Git asks the server itself for them, so they prove nothing.
func gitSource(id string, attrs map[string]string) (Op, error) {
	where, fragment, _ := strings.Cut(id, "#")
	ref, subdir, _ := strings.Cut(fragment, ":")
	op := Git{
		Remote:         attrs[pb.AttrFullRemoteURL],
		Ref:            ref,
		Subdir:         subdir,
		Checksum:       attrs[pb.AttrGitChecksum],
		KeepGitDir:     attrs[pb.AttrKeepGitDir] == "true",
		SkipSubmodules: attrs[pb.AttrGitSkipSubmodules] == "true",
		CommitTime:     attrs[pb.AttrGitMTime] == "commit",
		FetchByCommit:  attrs[pb.AttrGitFetchByCommit] == "true",
		TokenSecret:    attrs[pb.AttrAuthTokenSecret],
		HeaderSecret:   attrs[pb.AttrAuthHeaderSecret],
		SSH:            attrs[pb.AttrMountSSHSock],
	}
	if op.Remote == "" {
		op.Remote = "https://" + where
	}
	if t := attrs[pb.AttrGitMTime]; t != "" && t != "commit" && t != "checkout" {
		return nil, fmt.Errorf("the time %q of a git source is neither commit nor checkout", t)
	}
	return op, nil
}

func httpSource(url string, attrs map[string]string) (Op, error) {
	op := HTTP{URL: url, Filename: attrs[pb.AttrHTTPFilename], HeaderSecret: attrs[pb.AttrHTTPAuthHeaderSecret]}
	if sum := attrs[pb.AttrHTTPChecksum]; sum != "" {
		var err error
		if op.Checksum, err = digest.Parse(sum); err != nil {
			return nil, fmt.Errorf("checksum %q: %w", sum, err)
		}
	}
	if perm := attrs[pb.AttrHTTPPerm]; perm != "" {
		n, err := strconv.ParseUint(perm, 0, 32)
		if err != nil {
			return nil, fmt.Errorf("mode %q: %w", perm, err)
		}
		mode := os.FileMode(n).Perm()
		op.Mode = &mode
	}
	for key, id := range map[string]*int{pb.AttrHTTPUID: &op.UID, pb.AttrHTTPGID: &op.GID} {
		if v := attrs[key]; v != "" {
			n, err := strconv.ParseUint(v, 0, 31)
			if err != nil {
				return nil, fmt.Errorf("owner %q: %w", v, err)
			}
			*id = int(n)
		}
	}
	for key, v := range attrs {
		if name, ok := strings.CutPrefix(key, pb.AttrHTTPHeaderPrefix); ok {
			op.Header = append(op.Header, name+": "+v)
		}
	}
	slices.Sort(op.Header)
	return op, nil
}
