package policy

import (
	"slices"
	"time"
)

// Input is everything that rules judge. It is the documented contract of docs/policy.md: its JSON form can be
// given to other tools, and it never holds the value of a secret.
type Input struct {
	Config ConfigFacts  `json:"config"`
	Layers []LayerFacts `json:"layers"` // ours, base first
	Base   BaseFacts    `json:"base"`
	Now    time.Time    `json:"now"` // for waivers
	// Sandbox is what the commands of the build were kept in: root, subids, single or chroot. Empty if it has none.
	Sandbox string `json:"sandbox,omitempty"`
	// Fixed says that the fixes of an earlier evaluation were made, so what a fix rule still finds is denied.
	Fixed bool `json:"fixed,omitempty"`
}

// BaseFacts is what the base image brought.
type BaseFacts struct {
	Name   string       `json:"name,omitempty"`
	Layers []LayerFacts `json:"layers,omitempty"` // base first; a light scan is enough
}

// LayerFacts is what a scan found in one layer. DiffID, Step and Line are left to the caller, who knows them.
type LayerFacts struct {
	DiffID string `json:"diffID,omitempty"`
	Step   string `json:"step,omitempty"`
	Line   int    `json:"line,omitempty"` // in the Dockerfile

	Light       bool             `json:"light,omitempty"` // only Privileged was looked for
	Entries     int64            `json:"entries"`
	Privileged  []PrivilegedFile `json:"privileged,omitempty"`
	Keys        []KeyHit         `json:"keys,omitempty"`
	Credentials []Credential     `json:"credentials,omitempty"`
	Secrets     []SecretHit      `json:"secrets,omitempty"`
	// Unsearched names the secrets whose values are too short to be told from chance.
	Unsearched []string `json:"unsearched,omitempty"`
}

// PrivilegedFile is a regular file that gives its caller more than the caller had.
type PrivilegedFile struct {
	Path   string `json:"path"`             // relative to the root, without a leading slash
	Mode   uint32 `json:"mode"`             // permission bits with 04000 setuid and 02000 setgid
	UID    int    `json:"uid"`              //
	GID    int    `json:"gid"`              //
	Caps   string `json:"caps,omitempty"`   // security.capability in hex, its version and root id normalised
	Digest string `json:"digest,omitempty"` // of the content
	Link   string `json:"link,omitempty"`   // the entry of the same layer that this is a hard link to
}

// same says that two files give the same privilege to run the same bytes.
func (f PrivilegedFile) same(g PrivilegedFile) bool {
	return f.Mode == g.Mode && f.UID == g.UID && f.GID == g.GID && f.Caps == g.Caps && f.Digest == g.Digest
}

// KeyHit is a private key in a file. Path is empty for bytes that belong to no entry.
type KeyHit struct {
	Path string `json:"path"`
	Kind string `json:"kind"` // the words of its header, as in "RSA PRIVATE KEY"
}

// Credential is a file that holds a credential, by its name and, where the name proves nothing, by its content.
type Credential struct {
	Path string `json:"path"`
	Kind string `json:"kind"`
}

// SecretHit is the value of a build secret in a layer. Path is empty for bytes that belong to no entry.
type SecretHit struct {
	Path   string `json:"path"`
	Secret string `json:"secret"` // id
	Form   string `json:"form"`   // plain, base64, hex, url or json
}

// ConfigFacts is what the image's config says.
type ConfigFacts struct {
	User     string  `json:"user"`
	UserLine int     `json:"userLine,omitempty"`
	UIDs     []int64 `json:"uids,omitempty"` // every id that the user can mean; empty when no account has the name
	// Names are variables and labels of ours that have a value and are named like a secret.
	Names      []NameFact     `json:"names,omitempty"`
	Secrets    []ConfigSecret `json:"secrets,omitempty"`
	Unsearched []string       `json:"unsearched,omitempty"`
}

// NameFact is a name that promises a secret.
type NameFact struct {
	In   string `json:"in"` // env or arg
	Name string `json:"name"`
	Line int    `json:"line,omitempty"`
}

// ConfigSecret is the value of a build secret in the config.
type ConfigSecret struct {
	Secret  string `json:"secret"` // id
	In      string `json:"in"`     // where, as in config.Env[3]
	Form    string `json:"form"`
	History bool   `json:"history,omitempty"`
	Line    int    `json:"line,omitempty"`
}

// A Secret is a value that the build was given and that must not be in the image. It prints as its id.
type Secret struct {
	ID    string
	Value []byte `json:"-"`
}

// String keeps the value out of logs.
func (s Secret) String() string { return "secret " + s.ID }

// GoString keeps the value out of %#v.
func (s Secret) GoString() string { return s.String() }

func sortedUnique(s []string) []string {
	slices.Sort(s)
	return slices.Compact(s)
}
