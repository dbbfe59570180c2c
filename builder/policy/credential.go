package policy

import (
	"bytes"
	"path"
	"regexp"
	"strings"
	"sync"
)

// maxCredential is how much of a file with a credential's name is read to see whether it holds one.
const maxCredential = 1 << 20

// credentialKind is one kind of file that programs keep credentials in.
type credentialKind struct {
	kind  string
	extra bool                   // looked for only when the policy names the kind
	name  func(path string) bool // of the path without a leading slash
	// holds looks at the beginning of the content. Nil: the name is proof enough for a file that is not empty.
	holds *regexp.Regexp
}

// credentialTable is the table behind P12, made when it is first needed. A scan records all kinds, a policy says
// which it minds.
var credentialTable = sync.OnceValue(credentialKinds)

func credentialKinds() []credentialKind {
	return []credentialKind{
		{kind: "ssh private key", name: base("id_rsa", "id_dsa", "id_ecdsa", "id_ecdsa_sk", "id_ed25519", "id_ed25519_sk"),
			holds: regexp.MustCompile(`PRIVATE KEY`)},
		{kind: "netrc", name: base(".netrc", "_netrc"), holds: regexp.MustCompile(`(?m)(^|\s)password\s+\S`)},
		{kind: "npmrc", name: base(".npmrc", "npmrc"),
			holds: regexp.MustCompile(`(?m)^[^;#\n]*(_authToken|_auth|_password)\s*=\s*["']?[^\s"'$]`)},
		{kind: "yarnrc", name: base(".yarnrc.yml"), holds: regexp.MustCompile(`(?m)^\s*["']?npmAuth(Token|Ident)["']?:\s*["']?[^\s"'$]`)},
		{kind: "pypirc", name: base(".pypirc"), holds: regexp.MustCompile(`(?m)^\s*password\s*[=:]\s*\S`)},
		{kind: "pip.conf", name: base("pip.conf"), holds: regexp.MustCompile(`://[^\s/@:$]*:[^\s/@$]+@`)},
		{kind: "git credentials", name: base(".git-credentials"), holds: regexp.MustCompile(`://[^\s/@]+@`)},
		{kind: "aws credentials", name: suffix(".aws/credentials"), holds: regexp.MustCompile(`(?mi)^\s*aws_(secret_access_key|session_token)\s*=\s*\S`)},
		{kind: "gcloud credentials", name: base("application_default_credentials.json"),
			holds: regexp.MustCompile(`"(refresh_token|private_key)"\s*:\s*"[^"]`)},
		{kind: "azure tokens", name: suffix(".azure/accessTokens.json", ".azure/msal_token_cache.json"), holds: regexp.MustCompile(`"[^"]{20}`)},
		{kind: "registry credentials", name: suffix(".docker/config.json", ".dockercfg", "containers/auth.json"),
			holds: regexp.MustCompile(`"(auth|identitytoken|registrytoken|password)"\s*:\s*"[^"]`)},
		{kind: "kubeconfig", name: suffix(".kube/config", "kubeconfig", "etc/kubernetes/admin.conf"),
			holds: regexp.MustCompile(`(?m)["']?(client-key-data|token|password)["']?\s*:\s*["']?[^\s"'{]`)},
		{kind: "github token", name: suffix("gh/hosts.yml"), holds: regexp.MustCompile(`(?m)oauth_token:\s*\S`)},
		{kind: "cargo token", name: suffix(".cargo/credentials", ".cargo/credentials.toml"), holds: regexp.MustCompile(`(?m)^\s*token\s*=\s*["']\S`)},
		{kind: "gem credentials", name: suffix(".gem/credentials"), holds: regexp.MustCompile(`(?m):\s*\S{16}`)},
		{kind: "maven settings", name: suffix(".m2/settings.xml"), holds: regexp.MustCompile(`<(password|passphrase)>\s*[^\s<$]`)},
		{kind: "composer auth", name: suffix("composer/auth.json"), holds: regexp.MustCompile(`"[^"]{16,}"`)},
		{kind: "postgres password", name: base(".pgpass"), holds: regexp.MustCompile(`(?m)^[^#\n]*:[^:\n]*:[^:\n]*:[^:\n]*:[^\s:]`)},
		{kind: "mysql password", name: base(".my.cnf", ".mylogin.cnf"), holds: regexp.MustCompile(`(?m)^\s*password\s*=\s*\S`)},
		{kind: "vault token", name: base(".vault-token")},
		{kind: "terraform token", name: suffix(".terraformrc", "credentials.tfrc.json"), holds: regexp.MustCompile(`"?token"?\s*[=:]\s*"[^"]`)},
		{kind: "terraform state", name: ext(".tfstate"), holds: regexp.MustCompile(`"terraform_version"`)},
		{kind: "dotenv", extra: true, name: dotenv,
			holds: regexp.MustCompile(`(?mi)^\s*(export\s+)?\w*(secret|token|passw|key|credential)\w*\s*=\s*["']?[^\s"'$]`)},
		{kind: "keystore", extra: true, name: ext(".p12", ".pfx", ".jks", ".keystore", ".kdbx", ".keytab")},
	}
}

func base(names ...string) func(string) bool {
	return func(p string) bool {
		for _, n := range names {
			if path.Base(p) == n {
				return true
			}
		}
		return false
	}
}

// suffix matches whole path elements from the end.
func suffix(names ...string) func(string) bool {
	return func(p string) bool {
		for _, n := range names {
			if p == n || strings.HasSuffix(p, "/"+n) {
				return true
			}
		}
		return false
	}
}

func ext(names ...string) func(string) bool {
	return func(p string) bool {
		for _, n := range names {
			if strings.HasSuffix(strings.ToLower(p), n) {
				return true
			}
		}
		return false
	}
}

func dotenv(p string) bool {
	b := path.Base(p)
	if b == ".env" {
		return true
	}
	switch strings.TrimPrefix(b, ".env.") {
	case b, "example", "sample", "template", "dist":
		return false
	}
	return true
}

func (k credentialKind) match(content []byte) bool {
	if len(bytes.TrimSpace(content)) == 0 {
		return false
	}
	return k.holds == nil || k.holds.Match(content)
}

// extraKind says that a kind is minded only by a policy that names it.
func extraKind(kind string) bool {
	for _, k := range credentialTable() {
		if k.kind == kind {
			return k.extra
		}
	}
	return false
}
