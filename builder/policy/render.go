package policy

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// WriteText writes the findings for people: a line for each, with its hint below.
func WriteText(w io.Writer, findings []Finding) error {
	for _, f := range findings {
		line := fmt.Sprintf("%-6s %s %s", f.Level, f.Rule, f.where())
		line = strings.TrimRight(line, " ") + ": " + oneLine(f.Message) + "\n"
		if f.Hint != "" {
			line += "       " + oneLine(f.Hint) + "\n"
		}
		if _, err := io.WriteString(w, line); err != nil {
			return err
		}
	}
	return nil
}

// where names the Dockerfile line, or the layer, and the path.
func (f Finding) where() string {
	var parts []string
	switch {
	case f.Line > 0:
		parts = append(parts, fmt.Sprintf("Dockerfile:%d", f.Line))
	case f.Layer >= 0:
		parts = append(parts, fmt.Sprintf("layer %d", f.Layer))
	}
	if f.Path != "" {
		parts = append(parts, oneLine(f.Path))
	}
	return strings.Join(parts, " ")
}

// oneLine makes text from an image harmless for a terminal: a file name may hold escape sequences.
func oneLine(s string) string {
	var b strings.Builder
	for _, r := range s {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r == 0x202e || r == 0x2028 || r == 0x2029 {
			fmt.Fprintf(&b, "\\u%04x", r)
			continue
		}
		b.WriteRune(r)
	}
	return b.String()
}

// WriteJSON writes the findings as a JSON array, one finding a line, empty as [].
func WriteJSON(w io.Writer, findings []Finding) error {
	lines := make([]string, 0, len(findings))
	for _, f := range findings {
		b, err := json.Marshal(f)
		if err != nil {
			return err
		}
		lines = append(lines, string(b))
	}
	text := "[]\n"
	if len(lines) > 0 {
		text = "[\n" + strings.Join(lines, ",\n") + "\n]\n"
	}
	_, err := io.WriteString(w, text)
	return err
}
