package builder

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"

	"github.com/opencontainers/go-digest"

	"github.com/cooper-build/cooper/builder/files"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/policy"
	"github.com/cooper-build/cooper/snapshot"
)

// A causeRecord is what the store keeps of a cause, beside the snapshot that it led to and for as long. It is for people:
// nothing is found because of it, and nothing left out but a comparison.
type causeRecord struct {
	Op     string           `json:"op"`     // a digest of the operation as it is in the key
	Fields map[string]field `json:"fields"` // what the operation says
	Parts  []part           `json:"parts,omitempty"`
}

// A field is a value to show, a digest of one that is long, or nothing of one that may be secret.
type field struct {
	Value  string `json:"value,omitempty"`
	Digest string `json:"digest,omitempty"`
	Hidden bool   `json:"hidden,omitempty"`
}

// longestValue is what is shown of a value.
const longestValue = 160

func recordKey(cause snapshot.Key) snapshot.Key { return newKey("cause").str(string(cause)).sum() }

func listingKey(d digest.Digest) snapshot.Key { return newKey("listing").str(d.String()).sum() }

// recordCause keeps what led to a snapshot, for the explanation of a later miss.
func (b *build) recordCause(s plan.Step, c *cause, id snapshot.ID) error {
	for d, l := range c.lists {
		if err := b.recordListing(d, l, id); err != nil {
			return err
		}
	}
	key := c.key()
	if err := b.store.SetFact(recordKey(key), b.describe(c), snapshot.OfSnapshot(id)); err != nil {
		return err
	}
	b.notebook.add(journalEntry{placeOf(s), c.kind, key})
	return nil
}

// recordListing keeps what a selection listed, for as long as a snapshot that is made from it or that it is of.
func (b *build) recordListing(d digest.Digest, l files.Listing, id snapshot.ID) error {
	saved, err := l.Save()
	if err != nil {
		return fmt.Errorf("list files: %w", err)
	}
	return b.store.SetFact(listingKey(d), saved, snapshot.OfSnapshot(id))
}

func (b *build) listing(d digest.Digest) files.Listing {
	var saved []byte
	if ok, err := b.store.Fact(listingKey(d), &saved); err != nil || !ok {
		return nil
	}
	l, err := files.LoadListing(saved)
	if err != nil {
		return nil
	}
	return l
}

func (b *build) describe(c *cause) *causeRecord {
	r := &causeRecord{Op: digest.FromBytes(c.op).String(), Fields: map[string]field{}, Parts: c.parts}
	var op map[string]map[string]any
	if json.Unmarshal(c.op, &op) != nil {
		return r
	}
	for _, fields := range op { // of the one operation
		b.describeOp(r.Fields, fields)
	}
	return r
}

// mountField begins the name of a field that has the options of a mount.
const mountField = "mount "

func (b *build) describeOp(out map[string]field, fields map[string]any) {
	for name, v := range fields {
		switch name {
		case "Root", "Base": // told by the inputs
		case "Env":
			for _, e := range asList(v) {
				name, value, _ := strings.Cut(asString(e), "=")
				out["ENV "+name] = b.field(value, policy.NamedLikeSecret(name))
			}
		case "Args":
			out["command"] = longField(asJSON(v))
		case "Mounts":
			for _, m := range asList(v) {
				fields, ok := m.(map[string]any)
				if !ok {
					continue
				}
				// Which input it shows is a number that shifts with the other mounts, and told by the parts.
				fields["From"] = fields["From"] != float64(plan.Scratch)
				out[mountField+asString(fields["Target"])+asString(fields["Env"])] = longField(asJSON(fields))
			}
		case "Actions":
			b.describeActions(out, asList(v))
		default:
			out[fieldName(name)] = b.field(fieldText(name, v), false)
		}
	}
}

// describeActions names the fields of a file operation's actions; several of them are numbered.
func (b *build) describeActions(out map[string]field, actions []any) {
	for i, a := range actions {
		tagged, _ := a.(map[string]any)
		for _, v := range tagged {
			fields, _ := v.(map[string]any)
			for name, v := range fields {
				if name == "From" {
					continue
				}
				label := fieldName(name)
				if i > 0 {
					label = fmt.Sprintf("%s (%d)", label, i+1)
				}
				if name == "Data" {
					out[label] = longField(asText(v))
				} else if text := fieldText(name, v); text != "" {
					out[label] = b.field(text, false)
				}
			}
		}
	}
}

// fieldNames are the fields of operations that people know under another name.
func fieldNames() map[string]string {
	return map[string]string{
		"Dir": "working directory", "Src": "source", "Dst": "destination", "Owner": "owner (--chown)", "Mode": "mode (--chmod)",
		"Exclude": "--exclude", "Include": "what is included", "Unpack": "unpacking", "Data": "content", "Hosts": "--add-host",
		"Ulimits": "--ulimit", "Network": "network", "Insecure": "--security", "Path": "path", "ShmSize": "--shm-size",
	}
}

func fieldName(name string) string {
	if known, ok := fieldNames()[name]; ok {
		return known
	}
	var out strings.Builder
	runes := []rune(name)
	for i, r := range runes {
		if i > 0 && unicode.IsUpper(r) && unicode.IsLower(runes[i-1]) {
			out.WriteByte(' ')
		}
		out.WriteRune(unicode.ToLower(r))
	}
	return out.String()
}

// field is a value as it may be kept. What a secret is in, and what is named like one, is not.
func (b *build) field(value string, named bool) field {
	switch {
	case value == "":
		return field{}
	case named || b.scan.FindsSecret([]byte(value)):
		return field{Hidden: true}
	case len(value) > longestValue:
		return longField(value)
	}
	return field{Value: value}
}

func longField(value string) field { return field{Digest: shortDigest(value)} }

// distance counts the parts that differ, and those that are the same.
func (r *causeRecord) distance(o *causeRecord) (differ, same int) {
	count := func(equal bool) {
		if equal {
			same++
		} else {
			differ++
		}
	}
	for _, name := range union(r.Fields, o.Fields) {
		if was, is := r.Fields[name], o.Fields[name]; was != (field{}) || is != (field{}) {
			count(was == is || r.Op == o.Op) // the same may have been written down in another way
		}
	}
	before, now := grouped(r.Parts), grouped(o.Parts)
	for _, name := range union(before, now) {
		count(sameValues(before[name], now[name]))
	}
	return differ, same
}

// resembles says whether the operation may be one of another Dockerfile that was edited. All file operations have their flags in
// common, and often the image: what counts is what they read and where it goes.
func (r *causeRecord) resembles(o *causeRecord, kind string) bool {
	if differ, same := r.distance(o); same <= differ {
		return false
	}
	if kind != "files" {
		return true
	}
	for _, name := range []string{"source", "destination", "path", "content"} {
		if was, ok := r.Fields[name]; ok && was == o.Fields[name] {
			return true
		}
	}
	selected := string(filesPart) + " "
	was, is := grouped(r.Parts)[selected], grouped(o.Parts)[selected]
	return len(is) > 0 && sameValues(was, is)
}

func union[V any](a, b map[string]V) []string {
	names := slices.Sorted(maps.Keys(a))
	for name := range b {
		if _, ok := a[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// grouped are parts by role and name, of which there may be several.
func grouped(parts []part) map[string][]part {
	out := map[string][]part{}
	for _, p := range parts {
		name := string(p.Role) + " " + p.Name
		out[name] = append(out[name], p)
	}
	return out
}

func sameValues(a, b []part) bool {
	return slices.EqualFunc(a, b, func(x, y part) bool { return x.Value == y.Value })
}
