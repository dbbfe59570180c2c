// Package sshagent is what --ssh ID[=PATH[,PATH...]] gives to a build: the keys of the user's agent, or private key files, to sign with and
// never to take away.
//
// It knows nothing of ids, mounts or git. A Source holds no connection: each use of the user's agent is a new one.
package sshagent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// Source is an agent's socket, or keys.
type Source struct {
	socket string
	keys   agent.ExtendedAgent // nil where there is a socket
}

// Open finds out what paths are. None is the user's own agent, whose socket the caller knows. One that is a socket is the agent behind it.
// All others have to be private keys without a passphrase, which stay in memory.
func Open(paths []string, defaultSocket string) (*Source, error) {
	if len(paths) == 0 || (len(paths) == 1 && paths[0] == "") {
		if defaultSocket == "" {
			return nil, &hinted{errors.New("there is no ssh agent"),
				"set SSH_AUTH_SOCK (eval $(ssh-agent) && ssh-add), or name a socket or a private key: --ssh default=PATH"}
		}
		paths = []string{defaultSocket}
	}
	keys, ok := agent.NewKeyring().(agent.ExtendedAgent)
	if !ok {
		return nil, errors.New("the keyring cannot sign with flags")
	}
	for _, p := range paths {
		fi, err := os.Stat(p)
		switch {
		case err != nil:
			return nil, &hinted{fmt.Errorf("ssh agent or key: %w", err), "SSH_AUTH_SOCK may be of an agent that has ended"}
		case fi.Mode()&os.ModeSocket != 0 && len(paths) > 1:
			return nil, &hinted{fmt.Errorf("%s is an agent's socket", p), "an id of --ssh is one agent, or private keys; use two ids"}
		case fi.Mode()&os.ModeSocket != 0:
			return &Source{socket: p}, nil
		case !fi.Mode().IsRegular():
			return nil, fmt.Errorf("%s is neither a socket nor a private key", p)
		}
		key, err := readKey(p)
		if err != nil {
			return nil, err
		}
		if err := keys.Add(agent.AddedKey{PrivateKey: key}); err != nil {
			return nil, fmt.Errorf("key %s: %w", p, err)
		}
	}
	return &Source{keys: keys}, nil
}

func readKey(name string) (any, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 100<<10))
	if err != nil {
		return nil, err
	}
	key, err := ssh.ParseRawPrivateKey(text)
	var locked *ssh.PassphraseMissingError
	if errors.As(err, &locked) {
		return nil, &hinted{fmt.Errorf("key %s: it is protected by a passphrase", name), "give it to an agent, ssh-add " + name + ", and the agent to the build: --ssh default"}
	}
	if err != nil {
		return nil, &hinted{fmt.Errorf("key %s: %w", name, err), "--ssh takes an agent's socket, or private keys in PEM or OpenSSH form"}
	}
	return key, nil
}

func (s *Source) dial(ctx context.Context) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, "unix", s.socket)
	if err != nil {
		return nil, &hinted{fmt.Errorf("ssh agent: %w", err), "the agent may have ended; SSH_AUTH_SOCK names its socket"}
	}
	return conn, nil
}

// Agent is for signing in this process. It lists and signs, and refuses everything else.
func (s *Source) Agent() (agent.Agent, error) {
	if s.keys != nil {
		return readOnly{s.keys}, nil
	}
	conn, err := s.dial(context.Background()) // to say so now if nobody is there
	if err != nil {
		return nil, err
	}
	return eachTime{s}, conn.Close()
}

// Serve answers everyone who connects to l, until ctx ends, which is no error. It has closed l, and every connection, when it returns. Who
// connects may list the keys and have data signed; may not add, remove, lock or extend anything.
func (s *Source) Serve(ctx context.Context, l net.Listener) error {
	var all sync.WaitGroup
	defer all.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	defer l.Close()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("ssh agent: %w", err)
		}
		all.Go(func() { s.answer(ctx, conn) })
	}
}

// answer serves one connection. What goes wrong with it is the other side's to notice: its agent has gone.
func (s *Source) answer(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	keys := s.keys
	if keys == nil {
		upstream, err := s.dial(ctx)
		if err != nil {
			return
		}
		defer upstream.Close()
		defer context.AfterFunc(ctx, func() { upstream.Close() })()
		keys = agent.NewClient(upstream)
	}
	_ = agent.ServeAgent(readOnly{keys}, conn)
}

// readOnly is an agent that can be used and not changed.
type readOnly struct{ agent.ExtendedAgent }

var errReadOnly = errors.New("a build may only use the keys of the ssh agent")

func (readOnly) Add(agent.AddedKey) error                 { return errReadOnly }
func (readOnly) Remove(ssh.PublicKey) error               { return errReadOnly }
func (readOnly) RemoveAll() error                         { return errReadOnly }
func (readOnly) Lock([]byte) error                        { return errReadOnly }
func (readOnly) Unlock([]byte) error                      { return errReadOnly }
func (readOnly) Extension(string, []byte) ([]byte, error) { return nil, agent.ErrExtensionUnsupported }

// eachTime asks the agent over a new connection every time, so that there is none to close. It can change nothing either.
type eachTime struct{ s *Source }

func ask[T any](s *Source, f func(agent.ExtendedAgent) (T, error)) (T, error) {
	conn, err := s.dial(context.Background())
	if err != nil {
		var none T
		return none, err
	}
	defer conn.Close()
	return f(agent.NewClient(conn))
}

func (e eachTime) List() ([]*agent.Key, error) {
	return ask(e.s, func(a agent.ExtendedAgent) ([]*agent.Key, error) { return a.List() })
}

func (e eachTime) Sign(key ssh.PublicKey, data []byte) (*ssh.Signature, error) {
	return e.SignWithFlags(key, data, 0)
}

func (e eachTime) SignWithFlags(key ssh.PublicKey, data []byte, flags agent.SignatureFlags) (*ssh.Signature, error) {
	return ask(e.s, func(a agent.ExtendedAgent) (*ssh.Signature, error) { return a.SignWithFlags(key, data, flags) })
}

func (e eachTime) Signers() ([]ssh.Signer, error) {
	keys, err := e.List()
	if err != nil {
		return nil, err
	}
	var signers []ssh.Signer
	for _, k := range keys {
		pub, err := ssh.ParsePublicKey(k.Blob)
		if err != nil {
			continue // a kind of key that we do not know may still be the agent's
		}
		signers = append(signers, signer{e, pub})
	}
	return signers, nil
}

func (eachTime) Add(agent.AddedKey) error                 { return errReadOnly }
func (eachTime) Remove(ssh.PublicKey) error               { return errReadOnly }
func (eachTime) RemoveAll() error                         { return errReadOnly }
func (eachTime) Lock([]byte) error                        { return errReadOnly }
func (eachTime) Unlock([]byte) error                      { return errReadOnly }
func (eachTime) Extension(string, []byte) ([]byte, error) { return nil, agent.ErrExtensionUnsupported }

// signer is one key of an agent.
type signer struct {
	agent eachTime
	key   ssh.PublicKey
}

func (s signer) PublicKey() ssh.PublicKey { return s.key }

func (s signer) Sign(_ io.Reader, data []byte) (*ssh.Signature, error) {
	return s.agent.Sign(s.key, data)
}

// SignWithAlgorithm lets RSA keys sign with SHA-2, without which servers refuse them.
func (s signer) SignWithAlgorithm(_ io.Reader, data []byte, algorithm string) (*ssh.Signature, error) {
	var flags agent.SignatureFlags
	switch algorithm {
	case ssh.KeyAlgoRSASHA256:
		flags = agent.SignatureFlagRsaSha256
	case ssh.KeyAlgoRSASHA512:
		flags = agent.SignatureFlagRsaSha512
	}
	return s.agent.SignWithFlags(s.key, data, flags)
}

// hinted is an error with one next step.
type hinted struct {
	error
	hint string
}

func (h *hinted) Unwrap() error { return h.error }

// Hint is the next step.
func (h *hinted) Hint() string { return h.hint }
