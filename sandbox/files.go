package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/egress"
)

// generateFiles writes the private files of /etc into dir and returns how to
// mount them. They belong to this run: what the process writes to them is gone
// afterwards.
func generateFiles(s Spec, dir string) ([]Mount, error) {
	resolv, err := resolvConf(s)
	if err != nil {
		return nil, err
	}
	var mounts []Mount
	for _, f := range []struct{ name, content string }{
		{"hostname", s.Hostname + "\n"},
		{"hosts", hosts(s.Hosts, s.Hostname)},
		{"resolv.conf", resolv},
	} {
		source := filepath.Join(dir, f.name)
		if err := os.WriteFile(source, []byte(f.content), 0o644); err != nil {
			return nil, err
		}
		if err := os.Chmod(source, 0o644); err != nil { // whatever our umask is
			return nil, err
		}
		mounts = append(mounts, Mount{Kind: Bind, Source: source, Target: "/etc/" + f.name})
	}
	return mounts, nil
}

func hosts(entries []HostEntry, hostname string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "127.0.0.1\tlocalhost %s\n::1\tlocalhost ip6-localhost ip6-loopback\n", hostname)
	for _, e := range entries {
		fmt.Fprintf(&b, "%s\t%s\n", e.IP, e.Name)
	}
	return b.String()
}

// machineResolvConf is where the machine says how names are resolved.
const machineResolvConf = "/etc/resolv.conf"

// resolvConf returns the resolver configuration of the process. On the host's
// network it is the machine's: resolvers on the loopback interface stay in, the
// process shares it. Without a network there is nobody to ask.
func resolvConf(s Spec) (string, error) {
	switch s.Network {
	case None:
		return "", nil
	case Private:
		conf, err := readResolvConf(machineResolvConf)
		if err != nil {
			return "", err
		}
		return egress.ParseResolvConf(conf).For(egress.Nameserver()), nil
	}
	return readResolvConf(machineResolvConf)
}

// readResolvConf returns "" for a file that is not there, which means the
// resolver on the local machine.
func readResolvConf(path string) (string, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	const limit = 64 << 10
	b, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	if len(b) == limit {
		return "", fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return string(b), nil
}

// openEgress opens the network of s, if it has one of its own.
func openEgress(ctx context.Context, s Spec) (*egress.Network, error) {
	if s.Network != Private {
		return nil, nil
	}
	o := s.Egress
	if o.Resolvers == nil {
		conf, err := readResolvConf(machineResolvConf)
		if err != nil {
			return nil, err
		}
		o.Resolvers = egress.ParseResolvConf(conf).Resolvers
	}
	o.Hosts = slices.Clone(o.Hosts)
	for _, h := range s.Hosts {
		o.Hosts = append(o.Hosts, egress.Host{Name: h.Name, Addr: netip.MustParseAddr(h.IP)}) // validate has parsed it
	}
	if o.Note == nil {
		o.Note = s.Note
	}
	return egress.Open(ctx, o)
}

// homeOf finds the home directory of a user in the passwd file of root, and / when there is none.
func homeOf(root string, uid uint32) (string, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(dir)
	fd, err := openInRoot(dir, "etc/passwd")
	if err != nil {
		return "/", nil
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return "/", err
	}
	f, err := os.Open("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return "", err
	}
	defer f.Close()
	const limit = 1 << 20
	text, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Split(strings.TrimSpace(line), ":")
		if len(fields) > 5 && fields[2] == strconv.FormatUint(uint64(uid), 10) && fields[5] != "" {
			return fields[5], nil
		}
	}
	return "/", nil
}
