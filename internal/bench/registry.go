package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// A registry is Debian's docker-registry on a free port of loopback.
type registry struct {
	host   string
	server *exec.Cmd
}

// startRegistry serves what is, or will be pushed, in dir.
func startRegistry(ctx context.Context, dir, scratch string) (*registry, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	host := l.Addr().String()
	if err := l.Close(); err != nil {
		return nil, err
	}
	config := filepath.Join(scratch, "registry.yml")
	text := fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: %s}\n", dir, host)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(scratch, "registry.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	server := exec.CommandContext(ctx, "docker-registry", "serve", config)
	server.Stdout, server.Stderr = log, log
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := server.Start(); err != nil {
		return nil, err
	}
	r := &registry{host, server}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if resp, err := http.Get("http://" + host + "/v2/"); err == nil {
			resp.Body.Close()
			return r, nil
		}
		if time.Now().After(deadline) {
			r.stop()
			return nil, fmt.Errorf("docker-registry does not answer on %s:%s", host, tail(log.Name()))
		}
	}
}

func (r *registry) stop() {
	r.server.Process.Kill() //nolint:errcheck // it may have ended
	r.server.Wait()         //nolint:errcheck // its exit status is that of the signal
}

// push puts the image of an OCI layout directory into the registry, unless it is there.
func (r *registry) push(ctx context.Context, layout, name string) error {
	resp, err := http.Get("http://" + r.host + "/v2/" + name + "/tags/list")
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	cmd := exec.CommandContext(ctx, "skopeo", "copy", "--quiet", "--dest-tls-verify=false", "--insecure-policy",
		"oci:"+layout+":latest", "docker://"+r.host+"/"+name+":latest")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("push %s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}
