package policy

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func configJSON(t *testing.T, img ocispec.Image) []byte {
	t.Helper()
	b, err := json.Marshal(img)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSecretAnywhereInTheConfigIsFoundWithItsLine(t *testing.T) {
	img := ocispec.Image{
		Config: ocispec.ImageConfig{
			User: "app", Env: []string{"PATH=/bin", "TOKEN=" + secretValue},
			Labels:     map[string]string{"a": "Basic " + base64.StdEncoding.EncodeToString([]byte("u:"+secretValue)), secretValue: "x", "ok": "fine"},
			Cmd:        []string{"run", "--token=" + secretValue},
			Entrypoint: []string{"/bin/sh"},
			Volumes:    map[string]struct{}{"/v/" + secretValue: {}},
		},
		History: []ocispec.History{
			{CreatedBy: "base"}, {CreatedBy: "ENV TOKEN=" + secretValue}, {CreatedBy: "LABEL a=b"}, {CreatedBy: "USER app"}, {CreatedBy: "CMD [...]"},
		},
	}
	facts, err := ScanConfig(configJSON(t, img), ConfigOptions{
		Base: configJSON(t, ocispec.Image{History: img.History[:1]}), Passwd: []byte("app:x:1000:1000::/:\n"), Secrets: testSecret, Lines: []int{0, 2, 3, 4, 5},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := ConfigFacts{
		User: "app", UserLine: 4, UIDs: []int64{1000}, Names: []NameFact{{In: "env", Name: "TOKEN", Line: 2}},
		Secrets: []ConfigSecret{
			{Secret: "token", In: "config.Cmd[1]", Form: "plain", Line: 5},
			{Secret: "token", In: "config.Env[1]", Form: "plain", Line: 2},
			{Secret: "token", In: "config.Labels.a", Form: "base64", Line: 3},
			{Secret: "token", In: "config.Labels (a key)", Form: "plain", Line: 3},
			{Secret: "token", In: "config.Volumes (a key)", Form: "plain"},
			{Secret: "token", In: "history[1].created_by", Form: "plain", History: true, Line: 2},
		},
	}
	if d := cmp.Diff(want, facts); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if b, err := json.Marshal(facts); err != nil || strings.Contains(string(b), "w0rd") {
		t.Errorf("the facts tell the secret: %s %v", b, err)
	}
}

func TestNamesLikeSecretsCountOnlyWhenOursAndSet(t *testing.T) {
	base := ocispec.Image{Config: ocispec.ImageConfig{Env: []string{"GPG_KEY=base"}}, History: []ocispec.History{{CreatedBy: "ARG BASE_TOKEN=x"}}}
	img := ocispec.Image{
		Config: ocispec.ImageConfig{Env: []string{
			"GPG_KEY=base", "API_KEY=x", "EMPTY_SECRET=", "PUBLIC_KEY=x", "KEYBOARD=x", "PASSWORD_FILE=/run/x", "authToken=x", "MY_PASSWORD=y",
		}},
		History: []ocispec.History{
			base.History[0], {CreatedBy: "ARG NPM_TOKEN=abc"}, {CreatedBy: "ARG GH_TOKEN"},
			{CreatedBy: "RUN |2 NPM_TOKEN=abc DB_PASSWD=q /bin/sh -c echo OTHER_TOKEN=1 # buildkit"},
		},
	}
	facts, err := ScanConfig(configJSON(t, img), ConfigOptions{Base: configJSON(t, base)})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, n := range facts.Names {
		got = append(got, n.In+" "+n.Name)
	}
	if d := cmp.Diff([]string{"arg DB_PASSWD", "arg NPM_TOKEN", "env API_KEY", "env MY_PASSWORD"}, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestConfigThatIsNoJSONIsAnError(t *testing.T) {
	for _, text := range []string{"", "[]", "{", `{"config": 3}`} {
		if _, err := ScanConfig([]byte(text), ConfigOptions{}); err == nil {
			t.Errorf("%q passes", text)
		}
	}
}
