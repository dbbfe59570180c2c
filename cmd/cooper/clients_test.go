package main

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// clientServers serves what package managers ask for - apt, pip, npm, go, git and curl - over TLS at an address of this machine that
// is not loopback, each as a host of its own: apt.example and so on. It puts address and port into $ADDRESS and $PORT, and into DIR the
// certificate of the authority and Go's own program.
func clientServers(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: client-servers DIR")
	}
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o755))
	address, err := ownAddress()
	ts.Check(err)
	repository := ts.MkAbs("repositories")
	ts.Check(makePackage(filepath.Join(repository, "apt")))
	ts.Check(makeGitRepository(filepath.Join(repository, "git")))
	git, err := gitBackend(filepath.Join(repository, "git"))
	ts.Check(err)
	hosts := map[string]http.Handler{
		"apt.example":   http.FileServer(http.Dir(filepath.Join(repository, "apt"))),
		"files.example": files(map[string]string{"/greeting": "hello by curl\n"}),
		"git.example":   git,
		"npm.example":   npmRegistry(),
		"proxy.example": goProxy(),
		"pypi.example":  pythonIndex(),
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, _, _ := net.SplitHostPort(r.Host)
		if h := hosts[name]; h != nil {
			h.ServeHTTP(w, r)
			return
		}
		http.NotFound(w, r)
	}))
	server.Listener.Close()
	server.Listener, err = net.Listen("tcp", net.JoinHostPort(address, "0"))
	ts.Check(err)
	authority, certificate, err := certify(slices.Sorted(maps.Keys(hosts))...)
	ts.Check(err)
	server.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	server.StartTLS()
	ts.Defer(server.Close)
	ts.Check(os.WriteFile(filepath.Join(dir, "ca.crt"), authority, 0o644))
	ts.Check(copyGo(dir))
	_, port, err := net.SplitHostPort(server.Listener.Addr().String())
	ts.Check(err)
	ts.Setenv("ADDRESS", address)
	ts.Setenv("PORT", port)
}

// ownAddress is one that others could reach this machine at.
func ownAddress() (string, error) {
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return "", err
	}
	for _, a := range addresses {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && n.IP.IsGlobalUnicast() {
			return n.IP.String(), nil
		}
	}
	return "", errors.New("this machine has no IPv4 address but loopback, and that is never let through to a RUN: give an interface one")
}

// certify makes an authority, as PEM, and a certificate by it.
func certify(names ...string) (authority []byte, leaf tls.Certificate, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, leaf, err
	}
	now := time.Now()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &key.PublicKey, key)
	if err != nil {
		return nil, leaf, err
	}
	server := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: names[0]}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		DNSNames: names, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	served, err := x509.CreateCertificate(rand.Reader, server, ca, &key.PublicKey, key)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), tls.Certificate{Certificate: [][]byte{served}, PrivateKey: key}, err
}

// copyGo copies what "go mod download" needs of Go.
func copyGo(dir string) error {
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("go env GOROOT: %w", err)
	}
	for _, file := range []string{"bin/go", "go.env", "VERSION"} {
		b, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(root)), file))
		if err != nil {
			return err
		}
		to := filepath.Join(dir, "go", file)
		if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, b, 0o755)); err != nil {
			return err
		}
	}
	return nil
}

// files serves contents by path.
func files(contents map[string]string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		content, ok := contents[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		if strings.HasSuffix(r.URL.Path, "/") {
			w.Header().Set("Content-Type", "text/html")
		}
		fmt.Fprint(w, content)
	})
}

// makePackage fills a directory as an apt repository of one package.
func makePackage(dir string) error {
	tree := filepath.Join(dir, "tree")
	for name, content := range map[string]string{
		"DEBIAN/control":     "Package: hello-test\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@example>\nDescription: says hello\n",
		"usr/bin/hello-test": "#!/bin/sh\necho hello by apt\n",
	} {
		file := filepath.Join(tree, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(content), 0o755)); err != nil {
			return err
		}
	}
	deb := filepath.Join(dir, "hello.deb")
	if out, err := exec.Command("dpkg-deb", "--root-owner-group", "--build", tree, deb).CombinedOutput(); err != nil {
		return fmt.Errorf("dpkg-deb: %w\n%s", err, out)
	}
	b, err := os.ReadFile(deb)
	if err != nil {
		return err
	}
	entry := fmt.Sprintf("Package: hello-test\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@example>\nDescription: says hello\nFilename: ./hello.deb\nSize: %d\nSHA512: %x\n", len(b), sha512.Sum512(b))
	return os.WriteFile(filepath.Join(dir, "Packages"), []byte(entry), 0o644)
}

func makeGitRepository(root string) error {
	dir := filepath.Join(root, "hello.git")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "hello"), []byte("hello by git\n"), 0o644); err != nil {
		return err
	}
	for _, args := range [][]string{{"init", "-q"}, {"add", "."}, {"-c", "user.name=n", "-c", "user.email=n@example", "commit", "-q", "-m", "one"}} {
		if out, err := exec.Command("git", append([]string{"-C", dir}, args...)...).CombinedOutput(); err != nil {
			return fmt.Errorf("git %s: %w\n%s", args[0], err, out)
		}
	}
	return nil
}

// pythonIndex is a simple repository (PEP 503) of one wheel.
func pythonIndex() http.Handler {
	const wheel = "hello_test-1.0-py3-none-any.whl"
	return files(map[string]string{
		"/simple/hello-test/": `<!DOCTYPE html><html><body><a href="/files/` + wheel + `">` + wheel + `</a></body></html>`,
		"/files/" + wheel: zipOf(
			"hello_test.py", "text = 'hello by pip'\n",
			"hello_test-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: hello-test\nVersion: 1.0\n",
			"hello_test-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
			"hello_test-1.0.dist-info/RECORD", "hello_test.py,,\nhello_test-1.0.dist-info/METADATA,,\nhello_test-1.0.dist-info/WHEEL,,\nhello_test-1.0.dist-info/RECORD,,\n",
		),
	})
}

// npmRegistry has one package. Its tarball is at the address that the question came to.
func npmRegistry() http.Handler {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for _, f := range [][2]string{{"package/package.json", `{"name":"hello-test","version":"1.0.0","main":"index.js"}`}, {"package/index.js", "module.exports = 'hello by npm'\n"}} {
		w.WriteHeader(&tar.Header{Name: f[0], Mode: 0o644, Size: int64(len(f[1]))})
		fmt.Fprint(w, f[1])
	}
	w.Close()
	z.Close()
	sum := sha512.Sum512(b.Bytes())
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/hello-test":
			version := map[string]any{"name": "hello-test", "version": "1.0.0", "dist": map[string]string{
				"tarball": "https://" + r.Host + "/hello-test.tgz", "integrity": "sha512-" + base64.StdEncoding.EncodeToString(sum[:]),
			}}
			w.Header().Set("Content-Type", "application/json")
			json.NewEncoder(w).Encode(map[string]any{
				"name": "hello-test", "dist-tags": map[string]string{"latest": "1.0.0"}, "versions": map[string]any{"1.0.0": version},
			})
		case "/hello-test.tgz":
			w.Write(b.Bytes())
		default:
			http.NotFound(w, r)
		}
	})
}

// goProxy has one module.
func goProxy() http.Handler {
	const at, module = "/hello.example/test/@v/", "module hello.example/test\n"
	return files(map[string]string{
		at + "list":        "v1.0.0\n",
		at + "v1.0.0.info": `{"Version":"v1.0.0","Time":"2020-01-01T00:00:00Z"}`,
		at + "v1.0.0.mod":  module,
		at + "v1.0.0.zip":  zipOf("hello.example/test@v1.0.0/go.mod", module, "hello.example/test@v1.0.0/hello", "hello by go\n"),
	})
}

// zipOf is an archive of files, given as name and content.
func zipOf(files ...string) string {
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for i := 0; i+1 < len(files); i += 2 {
		f, err := w.Create(files[i])
		if err == nil {
			_, err = f.Write([]byte(files[i+1]))
		}
		if err != nil {
			panic(err)
		}
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return b.String()
}
