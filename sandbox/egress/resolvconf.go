package egress

import (
	"net/netip"
	"strings"
)

// ResolvConf is what a resolv.conf says.
type ResolvConf struct {
	Resolvers []netip.AddrPort
	Search    []string
	Options   []string
}

// ParseResolvConf reads a resolv.conf as the C library does: three resolvers
// at most, or else the one of the machine itself; the last list of search
// domains; all options.
func ParseResolvConf(text string) ResolvConf {
	var c ResolvConf
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) < 2 {
			continue
		}
		switch words[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(words[1]); err == nil && len(c.Resolvers) < 3 {
				c.Resolvers = append(c.Resolvers, netip.AddrPortFrom(a, 53))
			}
		case "search":
			c.Search = words[1:]
		case "domain":
			c.Search = words[1:2]
		case "options":
			c.Options = append(c.Options, words[1:]...)
		}
	}
	if c.Resolvers == nil {
		c.Resolvers = []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:53")}
	}
	return c
}

// For returns the text of a resolv.conf with the same search domains and
// options that asks nameserver.
func (c ResolvConf) For(nameserver netip.Addr) string {
	var b strings.Builder
	for _, line := range []struct {
		key   string
		words []string
	}{{"search", c.Search}, {"nameserver", []string{nameserver.String()}}, {"options", c.Options}} {
		if len(line.words) > 0 {
			b.WriteString(line.key + " " + strings.Join(line.words, " ") + "\n")
		}
	}
	return b.String()
}
