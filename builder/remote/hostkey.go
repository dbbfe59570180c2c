package remote

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha1"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"path"
	"strings"

	"golang.org/x/crypto/ssh"
)

// trust says which keys an ssh server at addr may have, and which kinds of key to ask it for.
//
// Of a host that the known hosts list, only a key that they list is taken. Of any other, BuildKit takes every key every time and tells
// nobody; here the caller is told of the key (Options.NewHostKey) and a later connection to the host must find the same one.
func (c *Client) trust(knownHosts, addr string) (ssh.HostKeyCallback, []string, error) {
	good, revoked, err := keysOf(knownHosts, addr)
	if err != nil {
		return nil, nil, fmt.Errorf("known hosts: %w", err)
	}
	if len(good) == 0 && len(revoked) == 0 {
		return c.trustOnFirstUse(addr), nil, nil
	}
	var algorithms []string
	for _, k := range good {
		algorithms = append(algorithms, algorithmsOf(k.Type())...)
	}
	return func(_ string, _ net.Addr, key ssh.PublicKey) error {
		if contains(revoked, key) {
			return withHint(fmt.Errorf("the key of %s is revoked", addr), "somebody else may be answering in its place")
		}
		if !contains(good, key) {
			return withHint(fmt.Errorf("%s has the key %s, which the known hosts do not list", addr, ssh.FingerprintSHA256(key)),
				"either the host has a new key, or somebody else is answering in its place; ask its owner")
		}
		return nil
	}, algorithms, nil
}

func (c *Client) trustOnFirstUse(addr string) ssh.HostKeyCallback {
	return func(_ string, _ net.Addr, key ssh.PublicKey) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if had, ok := c.hostKeys[addr]; ok {
			if !bytes.Equal(had.Marshal(), key.Marshal()) {
				return withHint(fmt.Errorf("%s has another key than a moment ago", addr), "somebody else may be answering in its place")
			}
			return nil
		}
		if c.NewHostKey == nil {
			return withHint(fmt.Errorf("the key of %s is not known", addr), "ssh-keyscan prints a host's keys; compare them with what its owner publishes")
		}
		c.hostKeys[addr] = key
		c.NewHostKey(addr, ssh.FingerprintSHA256(key))
		return nil
	}
}

// algorithmsOf are the signatures a key of a type makes. SHA-1 is not among them.
func algorithmsOf(keyType string) []string {
	if keyType == ssh.KeyAlgoRSA {
		return []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}
	}
	return []string{keyType}
}

func contains(keys []ssh.PublicKey, key ssh.PublicKey) bool {
	for _, k := range keys {
		if bytes.Equal(k.Marshal(), key.Marshal()) {
			return true
		}
	}
	return false
}

// keysOf finds a host in text in the form of known_hosts. Certificate authorities are left out.
func keysOf(knownHosts, addr string) (good, revoked []ssh.PublicKey, err error) {
	rest := []byte(knownHosts)
	for {
		marker, hosts, key, _, next, err := ssh.ParseKnownHosts(rest)
		if err != nil {
			if len(bytes.TrimSpace(rest)) == 0 || err.Error() == "EOF" {
				return good, revoked, nil
			}
			return nil, nil, err
		}
		rest = next
		if !matches(hosts, addr) {
			continue
		}
		switch marker {
		case "":
			good = append(good, key)
		case "revoked":
			revoked = append(revoked, key)
		}
	}
}

func matches(patterns []string, addr string) bool {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	name := strings.ToLower(host)
	if port != "22" {
		name = "[" + name + "]:" + port
	}
	found := false
	for _, p := range patterns {
		if hashed, ok := strings.CutPrefix(p, "|1|"); ok {
			found = found || sameHash(hashed, name)
			continue
		}
		p, not := strings.CutPrefix(p, "!")
		if !wild(strings.ToLower(p), name) {
			continue
		}
		if not {
			return false
		}
		found = true
	}
	return found
}

// wild compares with * and ?; brackets are no pattern in known hosts.
func wild(pattern, name string) bool {
	ok, err := path.Match(strings.NewReplacer("[", `\[`, "]", `\]`, `\`, `\\`).Replace(pattern), name)
	return ok && err == nil
}

func sameHash(hashed, name string) bool {
	salt64, sum64, _ := strings.Cut(hashed, "|")
	salt, err1 := base64.StdEncoding.DecodeString(salt64)
	sum, err2 := base64.StdEncoding.DecodeString(sum64)
	if errors.Join(err1, err2) != nil {
		return false
	}
	h := hmac.New(sha1.New, salt)
	h.Write([]byte(name))
	return hmac.Equal(h.Sum(nil), sum)
}
