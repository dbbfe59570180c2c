package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/types"
	"github.com/google/go-containerregistry/pkg/authn"
)

const (
	maxDockerConfig = 1 << 20
	maxHelperOutput = 64 << 10
	helperTimeout   = 10 * time.Second
	dockerHub       = "index.docker.io" // what go-containerregistry calls docker.io
	dockerHubKey    = "https://index.docker.io/v1/"
)

// credentials finds what docker's config.json in dir has for one repository: an entry belongs to exactly
// the host and port it names. problem says why a credential helper gave none; the registry is then asked
// without credentials, since most base images need none, and problem is told only when it refuses.
func credentials(ctx context.Context, dir, host, repository string) (auth authn.Authenticator, problem error, err error) {
	config, err := readDockerConfig(dir)
	if err != nil || config == nil {
		return authn.Anonymous, nil, err
	}
	key := host
	if host == dockerHub {
		key = dockerHubKey
	}
	helper := config.CredentialHelpers[host]
	if helper == "" {
		helper = config.CredentialHelpers[key]
	}
	if helper == "" {
		helper = config.CredentialsStore
	}
	if helper != "" {
		found, err := askHelper(ctx, helper, key)
		if found != nil {
			return authn.FromConfig(*found), nil, nil
		}
		problem = err
	}
	for _, k := range configKeys(host, repository) {
		if a, ok := config.AuthConfigs[k]; ok && hasSecret(a) {
			return authn.FromConfig(authn.AuthConfig{
				Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken,
			}), nil, nil
		}
	}
	return authn.Anonymous, problem, nil
}

func hasSecret(a types.AuthConfig) bool {
	return a.Password != "" || a.IdentityToken != "" || a.RegistryToken != ""
}

func readDockerConfig(dir string) (*configfile.ConfigFile, error) {
	if dir == "" {
		return nil, nil
	}
	name := filepath.Join(dir, "config.json")
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("docker config: %w", err)
	}
	defer f.Close()
	config := configfile.New(name)
	if err := config.LoadFromReader(io.LimitReader(f, maxDockerConfig)); err != nil {
		return nil, fmt.Errorf("docker config %s: %w", name, err)
	}
	return config, nil
}

// configKeys lists the names under which config.json may keep the credentials of a repository, the most
// special first: podman's per-repository keys, the host, and the URLs old versions of docker wrote.
func configKeys(host, repository string) []string {
	var keys []string
	hosts := []string{host}
	if host == dockerHub {
		hosts = []string{"docker.io", host}
	}
	for _, h := range hosts {
		for p := repository; p != ""; {
			keys = append(keys, h+"/"+p)
			i := strings.LastIndexByte(p, '/')
			p = p[:max(i, 0)]
		}
	}
	for _, h := range hosts {
		keys = append(keys, h)
		for _, path := range []string{"", "/", "/v1/", "/v2/", "/v1", "/v2"} {
			keys = append(keys, "https://"+h+path, "http://"+h+path)
		}
	}
	return keys
}

var helperName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// askHelper runs a credential helper, a program that prints the credentials of one server. It returns nil
// and no error when the helper knows none.
func askHelper(ctx context.Context, helper, server string) (*authn.AuthConfig, error) {
	if !helperName.MatchString(helper) {
		return nil, fmt.Errorf("docker config: credential helper %q is not a name", helper)
	}
	program := "docker-credential-" + helper
	ctx, cancel := context.WithTimeoutCause(ctx, helperTimeout, fmt.Errorf("%s gave no answer in %s", program, helperTimeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "get")
	cmd.Stdin = strings.NewReader(server)
	out := &cappedBuffer{max: maxHelperOutput}
	cmd.Stdout = out
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if out.full {
		return nil, fmt.Errorf("%s: more than %d bytes of output", program, maxHelperOutput)
	}
	if err != nil {
		text := strings.TrimSpace(out.buf.String())
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case strings.Contains(text, "credentials not found"):
			return nil, nil
		case text != "" && len(text) < 1000:
			return nil, fmt.Errorf("%s: %s", program, text)
		}
		return nil, fmt.Errorf("%s: %w", program, err)
	}
	var answer struct{ Username, Secret string }
	if err := json.Unmarshal(out.buf.Bytes(), &answer); err != nil {
		return nil, fmt.Errorf("%s gave no valid answer", program) // the text may hold a secret
	}
	switch {
	case answer.Secret == "":
		return nil, nil
	case answer.Username == "<token>":
		return &authn.AuthConfig{IdentityToken: answer.Secret}, nil
	}
	return &authn.AuthConfig{Username: answer.Username, Password: answer.Secret}, nil
}

// cappedBuffer does not embed its buffer: io.Copy would find ReadFrom and pass by the cap.
type cappedBuffer struct {
	buf  bytes.Buffer
	max  int
	full bool
}

func (b *cappedBuffer) Write(p []byte) (int, error) {
	if b.buf.Len()+len(p) > b.max {
		b.full = true
		return 0, errors.New("too much output")
	}
	return b.buf.Write(p)
}
