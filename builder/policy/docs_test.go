package policy

import (
	"os"
	"reflect"
	"strings"
	"testing"
)

// The facts are a contract with other tools, and the digest of a profile is that of the text in the documentation.
func TestDocumentationShowsProfilesRulesAndEveryFact(t *testing.T) {
	b, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(b)
	for _, name := range []string{"default", "strict"} {
		text, _ := profileText(name)
		if !strings.Contains(doc, "```yaml\n"+string(text)+"```") {
			t.Errorf("docs/policy.md does not show the profile %s as it is", name)
		}
	}
	for _, id := range implemented {
		if !strings.Contains(doc, "| "+id+" |") {
			t.Errorf("docs/policy.md does not describe %s", id)
		}
	}
	for _, v := range []any{Finding{}, Input{}, BaseFacts{}, LayerFacts{}, PrivilegedFile{}, KeyHit{}, Credential{}, SecretHit{}, ConfigFacts{}, NameFact{}, ConfigSecret{}} {
		typ := reflect.TypeOf(v)
		for i := range typ.NumField() {
			name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			if !strings.Contains(doc, "`"+name+"`") {
				t.Errorf("docs/policy.md does not name %s of %s", name, typ.Name())
			}
		}
	}
}
