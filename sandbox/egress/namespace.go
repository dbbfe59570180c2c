package egress

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The addresses of the only interface, beside loopback's own. They belong to
// nobody, so nobody becomes unreachable (RFC 7600; a random ULA). Programs ask
// for the addresses of a family to learn whether the machine has it.
var (
	own4 = netip.MustParseAddr("192.0.0.8")
	own6 = netip.MustParseAddr("fd6e:a84c:2c1d::8")
	// dnsAddr is where Docker's is, too: a loopback address that no image uses.
	dnsAddr = netip.MustParseAddr("127.0.0.11")
)

// lo is the index of the first interface of every network namespace.
const lo = 1

// families are the versions of IP that the machine has.
type families struct{ v4, v6 bool }

// inside are the descriptors that outlive the thread that was in the namespace.
type inside struct {
	namespace *os.File
	listeners []*net.TCPListener
	dnsUDP    *net.UDPConn
	dnsTCP    *net.TCPListener
	holder    *holder // nil where connections cannot be held (see holder)
	redirects bool    // false if listeners stand on their ports themselves
}

// Close closes what there is of it.
func (in *inside) Close() error {
	var errs []error
	for _, l := range in.listeners {
		errs = append(errs, l.Close())
	}
	if in.dnsUDP != nil {
		errs = append(errs, in.dnsUDP.Close())
	}
	if in.dnsTCP != nil {
		errs = append(errs, in.dnsTCP.Close())
	}
	if in.holder != nil {
		errs = append(errs, in.holder.Close())
	}
	if in.namespace != nil {
		errs = append(errs, in.namespace.Close())
	}
	return errors.Join(errs...)
}

// hinted is an error with a next step for people.
type hinted struct {
	error
	hint string
}

func (h *hinted) Hint() string  { return h.hint }
func (h *hinted) Unwrap() error { return h.error }

// inNewNamespace calls f in a fresh network namespace. The thread is given up:
// the way back would take a privilege over the machine's own namespace. The
// namespace lives on in what f leaves open.
func inNewNamespace(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: a thread whose goroutine ends like this ends as well
		if unix.Gettid() == unix.Getpid() {
			// but the main thread cannot end; while we keep it, the next is another
			done <- inNewNamespace(f)
			runtime.UnlockOSThread()
			return
		}
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- unshareError(err)
			return
		}
		done <- f()
	}()
	return <-done
}

func unshareError(err error) error {
	e := &hinted{fmt.Errorf("make a network namespace: %w", err), "inside a container, its seccomp profile must allow unshare; --network=host and --network=none do without"}
	if errors.Is(err, unix.ENOSPC) {
		e.hint = "the limit of network namespaces is reached; ask the administrator to raise it (sysctl user.max_net_namespaces), or use --network=host"
	}
	return e
}

// build fills a new network namespace. want are the kinds of rules to try.
func build(have families, ports []uint16, want ability) (_ *inside, err error) {
	in := &inside{}
	defer func() {
		if err != nil {
			err = errors.Join(err, in.Close())
		}
	}()
	return in, inNewNamespace(func() error {
		var err error
		// of this thread: /proc/self is the main one's
		if in.namespace, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		if err := loopback(have); err != nil {
			return &hinted{fmt.Errorf("set up the loopback interface: %w", err), "a security module may deny privileges inside user namespaces; --network=host and --network=none do without"}
		}
		// As in Docker: what is only reachable from inside needs no privilege.
		// It fails where /proc/sys is read-only, and then such ports do need it.
		_ = os.WriteFile("/proc/sys/net/ipv4/ip_unprivileged_port_start", []byte("0"), 0)
		if err := in.serveDNS(); err != nil {
			return err
		}
		return in.intercept(have, ports, want)
	})
}

// loopback brings lo up and makes every address in the world local to it.
func loopback(have families) error {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer handle.Close()
	link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: lo, Name: "lo"}}
	if err := handle.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up: %w", err)
	}
	add := func(own netip.Addr) error {
		ip := net.IP(own.AsSlice())
		// The kernel leaves it to a worker to make an IPv6 address local. A route
		// to it that is not would send packets astray until then; ours is.
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(own.BitLen(), own.BitLen())}, Flags: unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE}
		if err := handle.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add address %s: %w", own, err)
		}
		everywhere := &net.IPNet{IP: make(net.IP, len(ip)), Mask: net.CIDRMask(0, own.BitLen())}
		route := &netlink.Route{LinkIndex: lo, Dst: everywhere, Src: ip, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST, Table: unix.RT_TABLE_MAIN}
		if own.Is6() {
			route.Scope = unix.RT_SCOPE_UNIVERSE // IPv6 routes have none
		}
		if err := handle.RouteAdd(route); err != nil {
			return fmt.Errorf("add local route %s: %w", everywhere, err)
		}
		return nil
	}
	if have.v4 {
		if err := add(own4); err != nil {
			return err
		}
	}
	if have.v6 {
		return add(own6)
	}
	return nil
}

func (in *inside) serveDNS() error {
	udp, err := socket(netip.AddrPortFrom(dnsAddr, 53), unix.SOCK_DGRAM)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", dnsAddr, err)
	}
	defer udp.Close()
	packets, err := net.FilePacketConn(udp)
	if err != nil {
		return err
	}
	in.dnsUDP = packets.(*net.UDPConn)
	in.dnsTCP, err = listenTCP(netip.AddrPortFrom(dnsAddr, 53))
	return err
}

// An ability is a way to catch connections; each includes the smaller ones.
type ability int

const (
	// atPorts: a listener on each wanted port, where every address is local.
	atPorts ability = iota
	// redirected: every TCP connection arrives at one listener.
	redirected
	// held: and only once its destination has accepted it.
	held
)

// intercept makes TCP connections to the world arrive at listeners of ours, by
// the best way that the kernel has.
func (in *inside) intercept(have families, ports []uint16, want ability) error {
	if want == atPorts {
		return in.listenAt(have, ports)
	}
	var at targets
	for _, family := range []struct {
		have bool
		addr netip.Addr
		port *uint16
	}{{have.v4, netip.MustParseAddr("127.0.0.1"), &at.v4}, {have.v6, netip.IPv6Loopback(), &at.v6}} {
		if !family.have {
			continue
		}
		l, err := listenTCP(netip.AddrPortFrom(family.addr, 0))
		if err != nil {
			return err
		}
		in.listeners = append(in.listeners, l)
		*family.port = l.Addr().(*net.TCPAddr).AddrPort().Port()
	}
	in.redirects = true
	var errs []error
	if want == held {
		holder, err := newHolder(have)
		if err == nil {
			if err = install(at, true); err == nil {
				in.holder = holder
				return nil
			}
			holder.Close()
		}
		errs = append(errs, err)
	}
	err := install(at, false)
	if err == nil {
		return nil
	}
	// whatever the reason is: without rules there is nothing to redirect
	for _, l := range in.listeners {
		l.Close()
	}
	in.listeners, in.redirects = nil, false
	if err2 := in.listenAt(have, ports); err2 != nil {
		return &hinted{errors.Join(append(errs, err, err2)...), "--network=host and --network=none do without"}
	}
	return nil
}

func (in *inside) listenAt(have families, ports []uint16) error {
	for _, port := range ports {
		for _, family := range []struct {
			have bool
			addr netip.Addr
		}{{have.v4, netip.IPv4Unspecified()}, {have.v6, netip.IPv6Unspecified()}} {
			if !family.have {
				continue
			}
			l, err := listenTCP(netip.AddrPortFrom(family.addr, port))
			if err != nil {
				return err
			}
			in.listeners = append(in.listeners, l)
		}
	}
	return nil
}

func listenTCP(at netip.AddrPort) (*net.TCPListener, error) {
	f, err := socket(at, unix.SOCK_STREAM)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", at, err)
	}
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", at, err)
	}
	return l.(*net.TCPListener), nil
}

// socket makes a bound one by hand: package net asks once per process what
// kinds of sockets the machine has, and this namespace is not the machine.
func socket(at netip.AddrPort, kind int) (*os.File, error) {
	family, addr := unix.AF_INET, sockaddr(at)
	if at.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), at.String())
	if family == unix.AF_INET6 {
		err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1))
	}
	if err == nil {
		err = os.NewSyscallError("bind", unix.Bind(fd, addr))
	}
	if err == nil && kind == unix.SOCK_STREAM {
		err = os.NewSyscallError("listen", unix.Listen(fd, backlog))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// backlog is as much as the kernel gives by default.
const backlog = 4096

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// hostFamilies returns which versions of IP reach further than the machine,
// and all its addresses.
func hostFamilies() (families, []netip.Addr, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return families{}, nil, fmt.Errorf("addresses of the machine: %w", err)
	}
	var have families
	var own []netip.Addr
	for _, a := range addrs {
		ipnet, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		addr, ok := netip.AddrFromSlice(ipnet.IP)
		if !ok {
			continue
		}
		addr = addr.Unmap()
		own = append(own, addr)
		if addr.IsLoopback() || addr.Is6() && addr.IsLinkLocalUnicast() {
			continue
		}
		if addr.Is4() {
			have.v4 = true
		} else {
			have.v6 = true
		}
	}
	have.v6 = have.v6 && !disabled("/proc/sys/net/ipv6/conf/all/disable_ipv6")
	return have, own, nil
}

func disabled(path string) bool {
	b, err := os.ReadFile(path)
	return err == nil && strings.TrimSpace(string(b)) == "1"
}
