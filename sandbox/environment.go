package sandbox

import (
	"fmt"
	"slices"
	"strings"
)

// environment is that of the process: of variables of one name the last one, and a HOME.
func environment(s Spec) ([]string, error) {
	var env []string
	seen := map[string]bool{"HOME": variable(s.Env, "HOME") == ""}
	for _, v := range slices.Backward(s.Env) {
		name, _, ok := strings.Cut(v, "=")
		if !ok || name == "" || strings.Contains(v, "\x00") {
			return nil, fmt.Errorf("environment variable %q is not NAME=VALUE", v)
		}
		if !seen[name] {
			env = append(env, v)
		}
		seen[name] = true
	}
	slices.Reverse(env)
	if variable(env, "HOME") != "" {
		return env, nil
	}
	home, err := homeOf(s.Root, s.UID)
	if err != nil {
		return nil, err
	}
	return append(env, "HOME="+home), nil
}

// variable returns the value that the last variable of a name has.
func variable(env []string, name string) string {
	value := ""
	for _, v := range env {
		if n, text, _ := strings.Cut(v, "="); n == name {
			value = text
		}
	}
	return value
}
