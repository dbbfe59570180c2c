package egress

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// A holder keeps a command's connect waiting until we know how the connection
// to the destination went, so that it ends as it would without us: accepted,
// refused or never. Otherwise every connect would succeed at once, and who
// tries several addresses, or waits for a server to come up, would be misled.
//
// The packet filter gives us the first packet of a connection and drops it. To
// accept we send the same packet again, with a mark that lets it pass to our
// listener; to refuse we answer it.
type holder struct {
	held, refused *netlink.Conn
	raw4, raw6    *os.File
	closeOnce     sync.Once
	closeErr      error
}

// snapLength is enough for the headers of a first packet with all options.
const snapLength = 256

// newHolder opens its sockets in the network namespace of the thread.
func newHolder(have families) (_ *holder, err error) {
	h := &holder{}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Close())
		}
	}()
	if h.held, err = packetLog(groupHeld); err != nil {
		return nil, err
	}
	if h.refused, err = packetLog(groupRefused); err != nil {
		return nil, err
	}
	if have.v4 {
		if h.raw4, err = rawSocket(unix.AF_INET); err != nil {
			return nil, err
		}
	}
	if have.v6 {
		if h.raw6, err = rawSocket(unix.AF_INET6); err != nil {
			return nil, err
		}
	}
	return h, nil
}

func (h *holder) Close() error {
	h.closeOnce.Do(func() {
		var errs []error
		if h.held != nil {
			errs = append(errs, h.held.Close())
		}
		if h.refused != nil {
			h.refused.Close() // for the second time, if it has served its purpose
		}
		for _, f := range []*os.File{h.raw4, h.raw6} {
			if f != nil {
				errs = append(errs, f.Close())
			}
		}
		h.closeErr = errors.Join(errs...)
	})
	return h.closeErr
}

// rawSocket sends whole packets, headers included.
func rawSocket(family int) (*os.File, error) {
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "raw")
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark); err != nil {
		return nil, errors.Join(os.NewSyscallError("setsockopt", err), f.Close())
	}
	return f, nil
}

// Of linux/netfilter/nfnetlink_log.h.
const (
	nfLogSubsystem  = 4
	nfLogConfig     = 1
	nfLogPayload    = 9
	nfLogCmd        = 1
	nfLogMode       = 2
	nfLogQThreshold = 5
	nfLogBind       = 1
	nfLogCopyPacket = 2
)

// packetLog subscribes to what the filter logs to a group.
func packetLog(group uint16) (_ *netlink.Conn, err error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("packet log: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("packet log: %w", err), conn.Close())
		}
	}()
	// A burst may be more than fits; clients send their packets again.
	if err := conn.SetOption(netlink.NoENOBUFS, true); err != nil {
		return nil, err
	}
	mode := append(binary.BigEndian.AppendUint32(nil, snapLength), nfLogCopyPacket, 0)
	attributes, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: nfLogCmd, Data: []byte{nfLogBind}},
		{Type: nfLogMode, Data: mode},
		{Type: nfLogQThreshold, Data: binary.BigEndian.AppendUint32(nil, 1)}, // deliver each at once
	})
	if err != nil {
		return nil, err
	}
	header := binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, 0}, group)
	_, err = conn.Execute(netlink.Message{
		Header: netlink.Header{Type: nfLogSubsystem<<8 | nfLogConfig, Flags: netlink.Request | netlink.Acknowledge},
		Data:   append(header, attributes...),
	})
	if err != nil {
		return nil, err
	}
	return conn, nil
}

// packets calls f for each packet that conn logs, until it is closed or f
// returns false.
func packets(conn *netlink.Conn, f func([]byte) bool) {
	for {
		messages, err := conn.Receive()
		if err != nil {
			return
		}
		for _, m := range messages {
			if len(m.Data) < 4 {
				continue
			}
			attributes, err := netlink.UnmarshalAttributes(m.Data[4:])
			if err != nil {
				continue
			}
			for _, a := range attributes {
				if a.Type == nfLogPayload && !f(a.Data) {
					return
				}
			}
		}
	}
}

// flow is a connection as its client sees it.
type flow struct{ client, server netip.AddrPort }

const (
	flagFIN = 1
	flagSYN = 2
	flagRST = 4
	flagACK = 16
)

// firstPacket is the one that asks for a connection.
type firstPacket struct {
	flow
	packet []byte // headers included
	tcp    int    // offset of the TCP header
}

// parseFirst reads a packet of IPv4 or IPv6. Those with IP options or further
// headers are none: the kernel makes none, and no build asks for one.
func parseFirst(b []byte) (firstPacket, bool) {
	var p firstPacket
	if len(b) == 0 {
		return p, false
	}
	var source, target netip.Addr
	switch {
	case b[0] == 0x45 && len(b) >= 40 && b[9] == unix.IPPROTO_TCP:
		p.tcp = 20
		source, target = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	case b[0]>>4 == 6 && len(b) >= 60 && b[6] == unix.IPPROTO_TCP:
		p.tcp = 40
		source, target = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	default:
		return p, false
	}
	tcp := b[p.tcp:]
	size := int(tcp[12]>>4) * 4
	if tcp[13]&(flagFIN|flagSYN|flagRST|flagACK) != flagSYN || size < 20 || len(tcp) < size {
		return p, false
	}
	p.packet = slices.Clone(b[:p.tcp+size]) // without data: nobody has agreed to any yet
	if p.tcp == 20 {
		binary.BigEndian.PutUint16(p.packet[2:], uint16(p.tcp+size))
	} else {
		binary.BigEndian.PutUint16(p.packet[4:], uint16(size))
	}
	p.client = netip.AddrPortFrom(source, binary.BigEndian.Uint16(tcp))
	p.server = netip.AddrPortFrom(target, binary.BigEndian.Uint16(tcp[2:]))
	return p, true
}

// accept lets the connection happen, between the client and our listener.
func (h *holder) accept(p firstPacket) error {
	return h.send(p.server.Addr(), checksummed(p.packet, p.tcp))
}

// refuse answers as a closed port does.
func (h *holder) refuse(p firstPacket) error {
	return h.send(p.client.Addr(), refusalOf(p))
}

func (h *holder) send(to netip.Addr, packet []byte) error {
	raw := h.raw4
	if to.Is6() {
		raw = h.raw6
	}
	if raw == nil {
		return fmt.Errorf("no socket to send to %s", to)
	}
	conn, err := raw.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = conn.Write(func(fd uintptr) bool {
		sent = unix.Sendto(int(fd), packet, 0, sockaddr(netip.AddrPortFrom(to, 0)))
		return !errors.Is(sent, unix.EAGAIN)
	})
	return errors.Join(err, os.NewSyscallError("sendto", sent))
}

// refusalOf makes the reset that answers a first packet (RFC 9293, 3.5.2).
func refusalOf(p firstPacket) []byte {
	tcp := p.packet[p.tcp:]
	b := append([]byte(nil), p.packet[:p.tcp]...)
	if p.tcp == 20 {
		copy(b[12:16], p.packet[16:20])
		copy(b[16:20], p.packet[12:16])
		binary.BigEndian.PutUint16(b[2:], 40)
	} else {
		copy(b[8:24], p.packet[24:40])
		copy(b[24:40], p.packet[8:24])
		binary.BigEndian.PutUint16(b[4:], 20)
	}
	b = append(b, tcp[2], tcp[3], tcp[0], tcp[1], 0, 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, binary.BigEndian.Uint32(tcp[4:])+1)
	b = append(b, 5<<4, flagRST|flagACK, 0, 0, 0, 0, 0, 0)
	return checksummed(b, p.tcp)
}

// checksummed returns a copy with TCP's checksum, which the kernel leaves to
// the device when it can, and so out of what it logs.
func checksummed(packet []byte, tcp int) []byte {
	b := append([]byte(nil), packet...)
	segment := b[tcp:]
	segment[16], segment[17] = 0, 0
	addresses := b[12:20]
	if tcp == 40 {
		addresses = b[8:40]
	}
	sum := uint32(unix.IPPROTO_TCP) + uint32(len(segment)) + onesSum(addresses) + onesSum(segment)
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(segment[16:], ^uint16(sum))
	return b
}

func onesSum(b []byte) uint32 {
	var sum uint32
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	return sum
}
