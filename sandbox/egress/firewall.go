package egress

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	// mark is on packets that the builder sends into the namespace. Setting a
	// mark takes a capability over it, which no command has.
	mark = 0x636f6f70

	groupHeld    = 1 // of the packet log: beginnings of connections that wait for us
	groupRefused = 2 // what is neither TCP nor inside
)

// targets are the ports of our listeners; 0 if there is none.
type targets struct{ v4, v6 uint16 }

// install sets up the namespace's packet filter:
//
//	chain hold (filter output, before nat)    chain redirect (nat output)
//	  mark: accept                              to loopback and own: accept
//	  to loopback and own: accept               tcp: redirect to our listener
//	  tcp, first packet: log to us, drop
//	  tcp: accept
//	  log to us, reject
//
// Without hold, first packets of TCP connections pass as well.
func install(at targets, hold bool) error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("packet filter: %w", err)
	}
	table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "cooper"})
	chain := func(name string, kind nftables.ChainType, priority *nftables.ChainPriority) func(...[]expr.Any) {
		c := conn.AddChain(&nftables.Chain{Name: name, Table: table, Type: kind, Hooknum: nftables.ChainHookOutput, Priority: priority})
		return func(parts ...[]expr.Any) {
			var exprs []expr.Any
			for _, p := range parts {
				exprs = append(exprs, p...)
			}
			conn.AddRule(&nftables.Rule{Table: table, Chain: c, Exprs: exprs})
		}
	}
	accept := []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	drop := []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}
	home := []netip.Prefix{loopback4, netip.PrefixFrom(own4, 32), loopback6, netip.PrefixFrom(own6, 128)}

	rule := chain("hold", nftables.ChainTypeFilter, nftables.ChainPriorityMangle)
	rule(meta(expr.MetaKeyMARK, binary.NativeEndian.AppendUint32(nil, mark)), accept)
	for _, p := range home {
		rule(to(p), accept)
	}
	if hold {
		rule(protocol(unix.IPPROTO_TCP), firstOfTCP(), logTo(groupHeld), drop)
	}
	rule(protocol(unix.IPPROTO_TCP), accept)
	reject := []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH}}
	if hold {
		rule(logTo(groupRefused), reject)
	} else {
		rule(reject)
	}

	rule = chain("redirect", nftables.ChainTypeNAT, nftables.ChainPriorityNATDest)
	for _, p := range home {
		rule(to(p), accept)
	}
	if at.v4 != 0 {
		rule(meta(expr.MetaKeyNFPROTO, []byte{unix.NFPROTO_IPV4}), protocol(unix.IPPROTO_TCP), redirectTo(at.v4))
	}
	if at.v6 != 0 {
		rule(meta(expr.MetaKeyNFPROTO, []byte{unix.NFPROTO_IPV6}), protocol(unix.IPPROTO_TCP), redirectTo(at.v6))
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("packet filter: %w", err)
	}
	return nil
}

func meta(key expr.MetaKey, value []byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value}}
}

func protocol(number byte) []expr.Any { return meta(expr.MetaKeyL4PROTO, []byte{number}) }

// to matches destinations in p.
func to(p netip.Prefix) []expr.Any {
	family, offset, size := byte(unix.NFPROTO_IPV4), uint32(16), uint32(4)
	if p.Addr().Is6() {
		family, offset, size = unix.NFPROTO_IPV6, 24, 16
	}
	mask := make([]byte, size)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return append(meta(expr.MetaKeyNFPROTO, []byte{family}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: size, Mask: mask, Xor: make([]byte, size)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Masked().Addr().AsSlice()})
}

// firstOfTCP matches SYN without ACK, RST and FIN.
func firstOfTCP() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{flagFIN | flagSYN | flagRST | flagACK}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{flagSYN}},
	}
}

func logTo(group uint16) []expr.Any {
	return []expr.Any{&expr.Log{
		Key:     1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_SNAPLEN | 1<<unix.NFTA_LOG_QTHRESHOLD,
		Group:   group,
		Snaplen: snapLength, QThreshold: 1,
	}}
}

func redirectTo(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
		&expr.Redir{RegisterProtoMin: 1, RegisterProtoMax: 1},
	}
}
