package main

import (
	"fmt"
	"strings"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// parsePlatforms reads --platform, or the environment's default where the flag is not given.
func parsePlatforms(given []string, unset string) ([]ocispec.Platform, error) {
	flag := "--platform"
	if len(given) == 0 && unset != "" {
		given, flag = []string{unset}, "DOCKER_DEFAULT_PLATFORM"
	}
	var out []ocispec.Platform
	seen := map[string]bool{}
	for _, s := range given {
		for _, one := range strings.Split(s, ",") {
			p, err := parsePlatform(one)
			if err != nil {
				return nil, usageError{fmt.Errorf("%s %q: %w", flag, s, err)}
			}
			name := platforms.FormatAll(p)
			if seen[name] {
				return nil, usageError{fmt.Errorf("%s: %s is given twice", flag, name)}
			}
			seen[name] = true
			out = append(out, p)
		}
	}
	return out, nil
}

func parsePlatform(s string) (ocispec.Platform, error) {
	if strings.EqualFold(s, "local") {
		return platforms.Normalize(platforms.DefaultSpec()), nil
	}
	if strings.ContainsAny(s, "*") || s == "" {
		return ocispec.Platform{}, fmt.Errorf("%q is not OS/ARCHITECTURE[/VARIANT], such as linux/arm64", s)
	}
	p, err := platforms.Parse(s)
	return platforms.Normalize(p), err
}
