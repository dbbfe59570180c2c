package builder

import (
	"strings"
	"testing"

	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/builder/policy"
)

func TestFindingsDoNotTellSecrets(t *testing.T) {
	b := &build{Request: Request{Secrets: []Secret{{ID: "k", Value: []byte("hunter22")}}}}
	findings := []policy.Finding{{Message: "link to /hunter22", Path: "/a/hunter22", Link: "/hunter22", Step: "RUN hunter22", Hint: "remove hunter22"}}
	b.maskFindings(findings)
	f := findings[0]
	if all := f.Message + f.Path + f.Link + f.Step + f.Hint; strings.Contains(all, "hunter22") || !strings.Contains(all, "/a/***") {
		t.Errorf("a finding says %q: a file named like a secret brings the secret into the log", all)
	}
}

func TestARunWithASecretIsNotFoundByABuildWithout(t *testing.T) {
	e := plan.Exec{Root: plan.Scratch, Args: []string{"x"}, Mounts: []plan.Mount{{Kind: plan.MountSecret, From: plan.Scratch, ID: "k", Optional: true}}}
	lenient, err := policy.Profile("default")
	if err != nil {
		t.Fatal(err)
	}
	key := func(secrets ...Secret) string {
		b := &build{Request: Request{Secrets: secrets, Policy: lenient}}
		c, err := b.execCause(t.Context(), e, inputs{}, false)
		if err != nil {
			t.Fatal(err)
		}
		return string(c.key())
	}
	with := key(Secret{ID: "k", Value: []byte("one")})
	if with == key() {
		t.Error("the result of a RUN that had the secret answers a build that has not: the secret in it is not looked for and gets past policy")
	}
	if with != key(Secret{ID: "k", Value: []byte("two")}) {
		t.Error("the value is part of the key: a new token runs everything again")
	}
}
