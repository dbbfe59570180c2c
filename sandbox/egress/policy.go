package egress

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Policy says which connections are let out. The zero value lets out all but
// those to the machine itself, its links and cloud metadata services (see
// refusals).
type Policy struct {
	// Allow, if it is not empty, lets out nothing else. Names are then only
	// resolved where a rule names them.
	Allow []Rule

	// Bound, if set, lets out nothing that its rules do not allow as well. It
	// opens nothing: what is refused by default takes a rule in both lists.
	Bound *Bound
}

// Bound is a list of rules that whoever gives Policy.Allow cannot go beyond.
type Bound struct {
	Name  string // what a refusal calls it, such as "policy strict.yaml"
	Allow []Rule // empty: nothing is let out
}

// Rule allows connections to a name or to addresses, on some ports or on all.
// It is made by ParseRules.
type Rule struct {
	text        string
	host        string       // a name, or the parent of names, or "" for a prefix
	below       bool         // names below host; with host "", every name and address
	prefix      netip.Prefix // valid if this rule is about addresses
	first, last uint16       // ports
}

// String returns the rule as it was written.
func (r Rule) String() string { return r.text }

// ParseRules reads rules that are separated by commas:
//
//	example.com         *.example.com:443    *:443
//	198.51.100.7:8000-8080    10.0.0.0/8    [2001:db8::/32]:443
//
// Without a port a rule is about all of them. *.example.com is about what lies
// below example.com at any depth and not about example.com.
func ParseRules(s string) ([]Rule, error) {
	var rules []Rule
	for text := range strings.SplitSeq(s, ",") {
		r, err := parseRule(strings.TrimSpace(text))
		if err != nil {
			return nil, fmt.Errorf("rule %q: %w", text, err)
		}
		rules = append(rules, r)
	}
	return rules, nil
}

func parseRule(text string) (Rule, error) {
	r := Rule{text: text, last: 65535}
	host, ports, err := splitPorts(text)
	if err != nil {
		return r, err
	}
	if ports != "" {
		if r.first, r.last, err = parsePorts(ports); err != nil {
			return r, err
		}
	}
	if r.prefix, err = parsePrefix(host); err == nil {
		if loopback4.Overlaps(r.prefix) && r.prefix.Bits() >= loopback4.Bits() || r.prefix == loopback6 {
			return r, errors.New("inside a RUN this is the RUN's own loopback interface, never the machine's; let the service listen on another address of the machine and allow that")
		}
		return r, nil
	}
	if strings.ContainsAny(host, "/[]") || strings.Contains(host, ":") {
		return r, errors.New("this is neither an address nor a network such as 10.0.0.0/8; brackets go around IPv6: [2001:db8::1]:443")
	}
	r.prefix = netip.Prefix{}
	if host == "*" {
		r.below = true
		return r, nil
	}
	r.host, r.below = strings.CutPrefix(host, "*.")
	if r.host, err = canonical(r.host); err != nil {
		return r, err
	}
	if digits := strings.TrimLeft(r.host[strings.LastIndexByte(r.host, '.')+1:], "0123456789"); digits == "" {
		return r, errors.New("this looks like an address and is none")
	}
	return r, nil
}

// splitPorts parts a host from what follows the colon.
func splitPorts(text string) (host, ports string, err error) {
	if rest, ok := strings.CutPrefix(text, "["); ok {
		host, rest, ok = strings.Cut(rest, "]")
		if !ok {
			return "", "", errors.New("the closing bracket is missing")
		}
		if rest == "" {
			return host, "", nil
		}
		ports, ok = strings.CutPrefix(rest, ":")
		if !ok || ports == "" {
			return "", "", fmt.Errorf("a port such as :443 is expected after the bracket, not %q", rest)
		}
		return host, ports, nil
	}
	if strings.Count(text, ":") > 1 { // IPv6 without brackets, thus without a port
		return text, "", nil
	}
	host, ports, found := strings.Cut(text, ":")
	if host == "" {
		return "", "", errors.New("a host is missing, as in example.com:443")
	}
	if found && ports == "" {
		return "", "", errors.New("a port is missing after the colon")
	}
	return host, ports, nil
}

func parsePorts(s string) (first, last uint16, err error) {
	from, to, isRange := strings.Cut(s, "-")
	if !isRange {
		to = from
	}
	a, errA := strconv.ParseUint(from, 10, 16)
	b, errB := strconv.ParseUint(to, 10, 16)
	if errA != nil || errB != nil || a == 0 || a > b {
		return 0, 0, fmt.Errorf("%q is not a port from 1 to 65535 or a range such as 8000-8080", s)
	}
	return uint16(a), uint16(b), nil
}

func parsePrefix(s string) (netip.Prefix, error) {
	if strings.Contains(s, "/") {
		p, err := netip.ParsePrefix(s)
		return p.Masked(), err
	}
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Prefix{}, errors.New("not an address")
	}
	a = a.Unmap()
	return netip.PrefixFrom(a, a.BitLen()), nil
}

// canonical returns a host name as names are compared: in lower case and
// without the final dot.
func canonical(name string) (string, error) {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if name == "" || len(name) > 253 {
		return "", fmt.Errorf("%q is not a host name", name)
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 {
			return "", fmt.Errorf("%q is not a host name", name)
		}
	}
	odd := func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.')
	}
	if i := strings.IndexFunc(name, odd); i >= 0 {
		return "", fmt.Errorf("%q is not a host name: a star stands only at the beginning, as in *.example.com, and names of other scripts are written as xn--", name)
	}
	return name, nil
}

func (r Rule) coversPort(port uint16) bool { return r.first <= port && port <= r.last }

// everything reports whether the rule is a star.
func (r Rule) everything() bool { return r.below && r.host == "" }

func (r Rule) coversName(name string) bool {
	switch {
	case r.prefix.IsValid():
		return false
	case r.everything():
		return true
	case r.below:
		return strings.HasSuffix(name, "."+r.host)
	}
	return name == r.host
}

// A refusal is a reason for which an address is never let out unless a rule
// asks for exactly it or for a part of what the reason is about.
type refusal struct {
	prefix netip.Prefix
	reason string
}

var (
	loopback4 = netip.MustParsePrefix("127.0.0.0/8")
	loopback6 = netip.MustParsePrefix("::1/128")
	nat64     = netip.MustParsePrefix("64:ff9b::/96")
	sixToFour = netip.MustParsePrefix("2002::/16")
)

const (
	reasonHost      = "an address of the machine that builds"
	reasonLoopback  = "the machine's loopback interface"
	reasonMetadata  = "a cloud metadata service"
	reasonLinkLocal = "a link-local address"
	reasonNoHost    = "not the address of a host"
	reasonMulticast = "a multicast or broadcast address"
)

// metadata are the addresses at which clouds hand out credentials of a
// machine to whoever asks from it. Those in 169.254.0.0/16 are link-local too;
// here they get their name.
var metadata = []string{
	"169.254.169.254", // AWS, Azure, Google, Oracle, DigitalOcean, OpenStack, Hetzner
	"169.254.170.2",   // AWS ECS
	"169.254.170.23",  // AWS EKS
	"169.254.0.23",    // Tencent
	"169.254.42.42",   // Scaleway
	"fd00:ec2::254", "fd00:ec2::23", "fd00:ec2::253",
	"fd20:ce::254",    // Google
	"fd00:42::42",     // Scaleway
	"fe80::a9fe:a9fe", // OpenStack
	"100.100.100.200", // Alibaba
	"168.63.129.16",   // Azure
	"192.0.0.192",     // Oracle
}

// metadataNames are their names.
var metadataNames = []string{
	"metadata", "metadata.google.internal", "metadata.goog", "metadata.azure.internal", "metadata.azure.com",
	"instance-data", "instance-data.ec2.internal", "metadata.tencentyun.com",
}

// refusals returns what is refused on a machine with the given addresses.
func refusals(own []netip.Addr) []refusal {
	list := []refusal{{loopback4, reasonLoopback}, {loopback6, reasonLoopback}}
	add := func(reason string, prefixes ...string) {
		for _, p := range prefixes {
			prefix, _ := parsePrefix(p)
			list = append(list, refusal{prefix, reason})
		}
	}
	for _, a := range own {
		list = append(list, refusal{netip.PrefixFrom(a.Unmap().WithZone(""), a.Unmap().BitLen()), reasonHost})
	}
	add(reasonMetadata, metadata...)
	add(reasonLinkLocal, "169.254.0.0/16", "fe80::/10")
	add(reasonMulticast, "224.0.0.0/4", "255.255.255.255", "ff00::/8")
	add(reasonNoHost, "0.0.0.0/8", "240.0.0.0/4", "::/128")
	return list
}

// judges are those of a policy's lists. What one of them refuses is refused.
type judges []*judge

func newJudges(p Policy, refusals []refusal) judges {
	all := judges{{allow: p.Allow, open: len(p.Allow) == 0, refusals: refusals}}
	if p.Bound != nil {
		all = append(all, &judge{allow: p.Bound.Allow, bound: p.Bound.Name, refusals: refusals})
	}
	return all
}

// judge applies one list of rules on one machine.
type judge struct {
	allow    []Rule
	open     bool   // there is no list: all is let out that is not refused by default
	bound    string // the name of the list if it is a Bound
	refusals []refusal
}

// verdict is what became of a connection or a name. It is let out if refused is empty.
type verdict struct {
	rule    string   // that lets it out
	refused string   // the rule that does not, and what to add
	byName  []*judge // who let it out for the sake of its name: what the connection says about itself must agree
}

// each asks all of them. Every refusal is told, for each has to be seen to.
func (all judges) each(ask func(*judge) verdict) (v verdict) {
	var rules, refused []string
	for _, j := range all {
		one := ask(j)
		if one.refused != "" {
			refused = append(refused, one.refused)
		} else if one.rule != "" {
			rules = append(rules, one.rule)
		}
		v.byName = append(v.byName, one.byName...)
	}
	if len(refused) > 0 {
		return verdict{refused: strings.Join(refused, "; and ")}
	}
	v.rule = strings.Join(rules, " and ")
	return v
}

func (all judges) address(dst netip.AddrPort, names []string) verdict {
	return all.each(func(j *judge) verdict { return j.address(dst, names) })
}

func (all judges) lookup(name string) verdict {
	return all.each(func(j *judge) verdict { return j.lookup(name) })
}

func (all judges) answer(name string, addr netip.Addr) verdict {
	return all.each(func(j *judge) verdict { return j.answer(name, addr) })
}

// said judges a connection that address let out by name, now that it has told
// its name. known says whether the destination was an answer for it.
func (v verdict) said(name string, port uint16, known bool) verdict {
	again := judges(v.byName).each(func(j *judge) verdict { return j.nameAndPort(name, port) })
	if again.refused == "" && !known {
		again.refused = fmt.Sprintf("it asks for %s at an address that was no answer for that name", name)
	}
	return again
}

// missing is the refusal of what no rule allows.
func (j *judge) missing(what, rule string) verdict {
	if j.bound != "" {
		return verdict{refused: fmt.Sprintf("%s has no egress rule for %s; to allow it, add %s there", j.bound, what, rule)}
	}
	return verdict{refused: fmt.Sprintf("no rule allows %s; to allow it: --egress allow=%s", what, rule)}
}

// special is the refusal of what it takes a rule of its own for.
func (j *judge) special(what, reason, rule string) verdict {
	if j.bound != "" {
		return j.missing(what, rule)
	}
	return verdict{refused: fmt.Sprintf("%s %s; if that is meant to be reached: --egress allow=%s", what, reason, rule)}
}

// address judges a connection by its destination. names are those for which
// the address was an answer.
func (j *judge) address(dst netip.AddrPort, names []string) verdict {
	addr := dst.Addr().Unmap().WithZone("")
	if refused := j.refusal(addr); refused != nil {
		for _, r := range j.allow {
			if r.prefix.IsValid() && r.coversPort(dst.Port()) && r.prefix.Contains(addr) && within(r.prefix, refused.prefix) {
				return verdict{rule: r.text}
			}
		}
		return j.special(addr.String(), "is "+refused.reason, netip.AddrPortFrom(addr, dst.Port()).String())
	}
	if j.open {
		return verdict{rule: "default"}
	}
	for _, r := range j.allow {
		if r.coversPort(dst.Port()) && (r.everything() || r.prefix.IsValid() && r.prefix.Contains(addr)) {
			return verdict{rule: r.text}
		}
	}
	for _, name := range names {
		if v := j.nameAndPort(name, dst.Port()); v.refused == "" {
			return v
		}
	}
	if len(names) > 0 {
		return j.nameAndPort(names[0], dst.Port())
	}
	return j.missing(dst.String(), netip.AddrPortFrom(addr, dst.Port()).String())
}

func (j *judge) nameAndPort(name string, port uint16) verdict {
	for _, r := range j.allow {
		if r.coversPort(port) && r.coversName(name) {
			return verdict{rule: r.text, byName: []*judge{j}}
		}
	}
	return j.missing(fmt.Sprintf("%s on port %d", name, port), fmt.Sprintf("%s:%d", name, port))
}

// lookup judges whether a name may be resolved. A name that nothing may
// connect to is not asked for: the question alone would carry data out.
func (j *judge) lookup(name string) verdict {
	if j.open {
		if slices.Contains(metadataNames, name) {
			return verdict{refused: fmt.Sprintf("%s is the name of %s", name, reasonMetadata)}
		}
		return verdict{rule: "default"}
	}
	for _, r := range j.allow {
		if r.coversName(name) && !(slices.Contains(metadataNames, name) && r.below) {
			return verdict{rule: r.text}
		}
	}
	return j.missing("the name "+name, name)
}

// answer judges an address that a name resolved to. A public name that
// resolves to a private service is how that service is reached by stealth.
func (j *judge) answer(name string, addr netip.Addr) verdict {
	addr = addr.Unmap()
	refused := j.refusal(addr)
	if refused == nil {
		return verdict{}
	}
	for _, r := range j.allow {
		if r.prefix.IsValid() && r.prefix.Contains(addr) && within(r.prefix, refused.prefix) {
			return verdict{}
		}
	}
	return j.special(name, fmt.Sprintf("resolves to %s, which is %s", addr, refused.reason), addr.String())
}

// refusal returns why nothing may go to addr unless asked for, or nil. IPv6
// addresses that are IPv4 ones on the other side of a gateway count as these.
func (j *judge) refusal(addr netip.Addr) *refusal {
	for i, r := range j.refusals {
		if r.prefix.Contains(addr) {
			return &j.refusals[i]
		}
	}
	if inner, ok := embedded(addr); ok {
		if r := j.refusal(inner); r != nil {
			return &refusal{netip.PrefixFrom(addr, addr.BitLen()), r.reason}
		}
	}
	return nil
}

// embedded returns the IPv4 address in an IPv6 one.
func embedded(addr netip.Addr) (netip.Addr, bool) {
	if !addr.Is6() {
		return addr, false
	}
	b := addr.As16()
	switch {
	case nat64.Contains(addr), compatible(b):
		return netip.AddrFrom4([4]byte(b[12:])), true
	case sixToFour.Contains(addr):
		return netip.AddrFrom4([4]byte(b[2:6])), true
	}
	return addr, false
}

// compatible: ::a.b.c.d, the form before IPv4-mapped addresses.
func compatible(b [16]byte) bool { return [12]byte(b[:12]) == [12]byte{} }

// within reports whether a is a part of b or b itself.
func within(a, b netip.Prefix) bool { return a.Bits() >= b.Bits() && b.Contains(a.Addr()) }
