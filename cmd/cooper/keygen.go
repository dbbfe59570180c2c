package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/cooper-build/cooper/builder/sign"
)

// passphraseVariable holds the passphrase of the signing key where nobody can be asked.
const passphraseVariable = "COOPER_PASSPHRASE"

func newKeygen() *cobra.Command {
	var prefix string
	c := &cobra.Command{
		Use:   "keygen",
		Short: "Make a key pair for signing images (ECDSA P-256)",
		Long: "Make PREFIX.key and PREFIX.pub. The private key is encrypted, in the format that cosign reads, when\n" +
			"a passphrase is given: in $" + passphraseVariable + ", or at the prompt. An empty one leaves the key unencrypted.",
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			pass, err := newPassphrase()
			if err != nil {
				return err
			}
			if _, err := os.Lstat(prefix + ".pub"); err == nil { // before the private key is written for nothing
				return keyExists(&os.PathError{Op: "write", Path: prefix + ".pub", Err: os.ErrExist})
			}
			private, public, err := sign.GenerateKey(pass)
			if err != nil {
				return err
			}
			if err := writeNew(prefix+".key", private, 0o600); err != nil {
				return err
			}
			if err := writeNew(prefix+".pub", public, 0o644); err != nil {
				return err
			}
			fmt.Fprintf(c.ErrOrStderr(), "private key %s.key, public key %[1]s.pub\n", prefix)
			if len(pass) == 0 {
				fmt.Fprintln(c.ErrOrStderr(), "the private key is not encrypted: keep the file to yourself")
			}
			return nil
		},
	}
	c.Flags().StringVarP(&prefix, "output", "o", "cooper", "write `PREFIX`.key and PREFIX.pub")
	return c
}

// writeNew never replaces a key: losing one cannot be undone.
func writeNew(name string, text []byte, mode os.FileMode) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if errors.Is(err, os.ErrExist) {
		return keyExists(err)
	}
	if err != nil {
		return err
	}
	if _, err := f.Write(text); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

func keyExists(err error) error {
	return hinted{err, "choose another name with --output, or move the old key away"}
}

func newPassphrase() ([]byte, error) {
	if p, ok := os.LookupEnv(passphraseVariable); ok {
		return []byte(p), nil
	}
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return nil, nil
	}
	first, err := ask("Passphrase for the private key (empty for none): ")
	if err != nil || len(first) == 0 {
		return first, err
	}
	second, err := ask("Once more: ")
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(first, second) {
		return nil, errors.New("the two passphrases differ")
	}
	return first, nil
}

// loadPrivate reads a signing key, and asks for its passphrase once: the answer is passed on to the process
// inside the user namespace.
func loadPrivate(name string) (sign.Signer, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, usageError{fmt.Errorf("--sign-key: %w", err)}
	}
	var pass []byte
	if bytes.Contains(text, []byte("ENCRYPTED")) {
		p, ok := os.LookupEnv(passphraseVariable)
		if !ok {
			if !term.IsTerminal(int(os.Stdin.Fd())) {
				return nil, hinted{fmt.Errorf("--sign-key %s is encrypted", name), "set $" + passphraseVariable}
			}
			asked, err := ask("Passphrase for " + name + ": ")
			if err != nil {
				return nil, err
			}
			p = string(asked)
			if err := os.Setenv(passphraseVariable, p); err != nil {
				return nil, err
			}
		}
		pass = []byte(p)
	}
	key, err := sign.LoadPrivate(text, pass)
	if err != nil {
		return nil, fmt.Errorf("--sign-key %s: %w", name, err)
	}
	return key, nil
}

func ask(prompt string) ([]byte, error) {
	fmt.Fprint(os.Stderr, prompt)
	defer fmt.Fprintln(os.Stderr)
	return term.ReadPassword(int(os.Stdin.Fd()))
}
