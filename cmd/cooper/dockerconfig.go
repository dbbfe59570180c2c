package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
)

// dockerConfig is the directory of docker's config.json: --config, $DOCKER_CONFIG, or that of the home directory. It is
// empty where there is none to look for.
func dockerConfig(c *cobra.Command) string {
	if dir := c.Flags().Lookup("config").Value.String(); dir != "" {
		return dir
	}
	if dir := os.Getenv("DOCKER_CONFIG"); dir != "" {
		return dir
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return ""
	}
	return filepath.Join(home, ".docker")
}

// proxyArgs are the build arguments that docker's config.json has for the network ("proxies"). Entries other than
// default belong to daemons.
func proxyArgs(dir string) (map[string]string, error) {
	if dir == "" {
		return nil, nil
	}
	file := filepath.Join(dir, "config.json")
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("docker's configuration: %w", err)
	}
	args, err := parseProxies(text)
	if err != nil {
		return nil, hinted{fmt.Errorf("docker's configuration %s: %w", file, err), "repair it, or name another directory with --config"}
	}
	return args, nil
}

func parseProxies(text []byte) (map[string]string, error) {
	var config struct {
		Proxies map[string]struct{ HTTPProxy, HTTPSProxy, NoProxy, FTPProxy string }
	}
	if err := json.Unmarshal(text, &config); err != nil {
		return nil, err
	}
	p := config.Proxies["default"]
	args := map[string]string{}
	for name, v := range map[string]string{"HTTP_PROXY": p.HTTPProxy, "HTTPS_PROXY": p.HTTPSProxy, "NO_PROXY": p.NoProxy, "FTP_PROXY": p.FTPProxy} {
		if v != "" {
			args[name] = v
		}
	}
	return args, nil
}
