package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cooper-build/cooper/builder/image"
	"github.com/cooper-build/cooper/builder/sign"
)

func newVerify() *cobra.Command {
	var key string
	c := &cobra.Command{
		Use:   "verify --key PUB oci:DIR[:TAG] | REF",
		Short: "Check an image's signature, the digest of every blob and the recorded policy verdict",
		Args:  oneArg("verify needs one image: cooper verify --key PUB oci:DIR[:TAG] | REF"),
		RunE: func(c *cobra.Command, args []string) error {
			return verify(c, key, args[0])
		},
	}
	c.Flags().StringVar(&key, "key", "", "the public key")
	if err := c.MarkFlagRequired("key"); err != nil {
		c.Long = err.Error()
	}
	return c
}

func verify(c *cobra.Command, keyFile, ref string) error {
	text, err := os.ReadFile(keyFile)
	if err != nil {
		return usageError{fmt.Errorf("--key: %w", err)}
	}
	public, err := sign.LoadPublic(text)
	if err != nil {
		return fmt.Errorf("--key %s: %w", keyFile, err)
	}
	if !strings.HasPrefix(ref, "oci:") {
		if ref, err = image.Normalize(ref); err != nil {
			return err
		}
	}
	options, err := registry(c, nil)
	if err != nil {
		return err
	}
	source, err := image.NewClient(options).Open(c.Context(), ref)
	if err != nil {
		return err
	}
	subject, err := source.Resolve(c.Context(), "")
	if err != nil {
		return err
	}
	report, err := sign.Verify(c.Context(), public, subject, source)
	printReport(c.OutOrStdout(), report)
	if err != nil {
		return unverified{fmt.Errorf("%s: %w", ref, err)}
	}
	return nil
}

// printReport says which artifact satisfied which demand.
func printReport(w io.Writer, r sign.Report) {
	fmt.Fprintf(w, "image %s: %d blobs with %d bytes are as their digests say\n", r.Image.Digest, r.Blobs, r.Bytes)
	for _, e := range r.Signatures {
		fmt.Fprintf(w, "signed: %s %s%s\n", e.Kind, e.Manifest, forName(e.Reference))
	}
	for _, e := range r.Verdicts {
		fmt.Fprintf(w, "approved: %s %s\n", e.Kind, e.Manifest)
	}
	if len(r.Verdicts) > 0 {
		fmt.Fprintf(w, "policy: passed %q (%s)\n", r.Verdict.Policy, r.Verdict.PolicyDigest)
		for _, f := range r.Verdict.Findings {
			fmt.Fprintf(w, "remark: %s\n", f)
		}
	}
	for _, rejected := range r.Rejected {
		fmt.Fprintf(w, "of no use: %s: %s\n", rejected.Artifact, rejected.Reason)
	}
}

func forName(reference string) string {
	if reference == "" {
		return ""
	}
	return " for " + reference
}
