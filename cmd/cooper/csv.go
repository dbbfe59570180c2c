package main

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// csvLine reads a flag value as buildx does: one CSV line, so that a part may hold a comma when it is quoted.
func csvLine(flag, s string) ([]string, error) {
	r := csv.NewReader(strings.NewReader(s))
	parts, err := r.Read()
	if err == nil {
		if _, more := r.Read(); !errors.Is(more, io.EOF) {
			err = errors.New("more than one line")
		}
	}
	if errors.Is(err, io.EOF) {
		err = errors.New("it is empty")
	}
	if err != nil {
		return nil, usageError{fmt.Errorf("%s %q: %w", flag, s, err)}
	}
	return parts, nil
}

// fields reads key=value,key=value. Keys are in any case, and each may be given once; without any known keys all are.
func fields(flag, s string, known ...string) (map[string]string, error) {
	parts, err := csvLine(flag, s)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, p := range parts {
		k, v, ok := strings.Cut(p, "=")
		k = strings.ToLower(strings.TrimSpace(k))
		if !ok || k == "" {
			return nil, usageError{fmt.Errorf("%s %q: %q is not key=value", flag, s, p)}
		}
		if len(known) > 0 && !slices.Contains(known, k) {
			return nil, usageError{fmt.Errorf("%s %q: unknown key %q (known: %s)", flag, s, k, strings.Join(known, ", "))}
		}
		if _, twice := out[k]; twice {
			return nil, usageError{fmt.Errorf("%s %q: %s is given twice", flag, s, k)}
		}
		out[k] = v
	}
	return out, nil
}
