package policy

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"net/url"
	"slices"
	"strings"
)

const (
	// minSecret is the length below which a value is as likely chance as leak: any six bytes stand by chance
	// in one of 280,000 GB of noise, any four in one of 4 GB.
	minSecret = 6
	// maxSecret is what RUN --mount=type=secret accepts; it bounds the scanner's window.
	maxSecret = 512 << 10
	// maxAnchor bounds the part of a pattern that the search table is made of.
	maxAnchor = 16
	// keyMarker starts every PEM and PGP armoured block; what follows is checked by the PEM rules.
	keyMarker = "-----BEGIN "
	// encodedMarker is what base64 makes of the beginning of such a block.
	encodedMarker = "LS0tLS1CRUdJTi"
)

// pattern is one spelling of one thing to find. Its anchor, the bytes from at on, is found by table; then
// the whole is compared.
type pattern struct {
	secret int // index of the secret, or -1 for a private key
	form   string
	text   []byte
	at     int
	lines  bool // line breaks may stand anywhere in the text, as tools wrap base64 and hex
}

// reach is how many bytes before and after its anchor the pattern can need.
func (p pattern) reach() (before, after int) {
	slack := 0
	if p.lines {
		slack = len(p.text)/8 + 16
	}
	return p.at + slack, len(p.text) - p.at + slack
}

// matcher finds many patterns in one pass. It is Wu and Manber's algorithm with blocks of two bytes: it looks at
// the last block of a window as long as the shortest anchor, and where that block is in no anchor it moves on by
// almost the window. One look per five to ten bytes is what makes scanning cheaper than reading.
type matcher struct {
	ids      []string // of the secrets
	patterns []pattern
	window   int // length of the anchors
	shift    [1 << 16]uint8
	ending   map[uint16][]int // patterns whose anchor ends in the block
	before   int
	after    int
}

// newMatcher makes a matcher for the secrets and, with keys, for private keys. It returns the ids of the
// secrets that are too short to look for.
func newMatcher(secrets []Secret, keys bool) (m *matcher, unsearched []string) {
	m = &matcher{ending: make(map[uint16][]int)}
	if keys {
		m.patterns = append(m.patterns,
			pattern{secret: -1, form: "plain", text: []byte(keyMarker)}, pattern{secret: -1, form: "base64", text: []byte(encodedMarker)})
	}
	for _, s := range secrets {
		value := bytes.TrimSpace(s.Value) // $(cat secret) loses the line end, so the value is looked for without
		if len(value) == 0 {
			continue
		}
		if len(value) < minSecret || len(value) > maxSecret {
			unsearched = append(unsearched, s.ID)
			continue
		}
		m.patterns = append(m.patterns, spellings(len(m.ids), value)...)
		m.ids = append(m.ids, s.ID)
	}
	m.index()
	return m, sortedUnique(unsearched)
}

func (m *matcher) index() {
	m.window = maxAnchor
	for _, p := range m.patterns {
		m.window = min(m.window, len(p.text))
	}
	var anchored []pattern
	for _, p := range m.patterns {
		for _, at := range anchors(p.text, m.window, p.lines) {
			p.at = at
			anchored = append(anchored, p)
		}
	}
	m.patterns = anchored
	for i := range m.shift {
		m.shift[i] = uint8(m.window - 1)
	}
	for i, p := range m.patterns {
		anchor := p.text[p.at : p.at+m.window]
		for j := 0; j+2 <= m.window; j++ {
			b := block(anchor[j:])
			m.shift[b] = min(m.shift[b], uint8(m.window-2-j))
		}
		last := block(anchor[m.window-2:])
		m.ending[last] = append(m.ending[last], i)
		before, after := p.reach()
		m.before, m.after = max(m.before, before), max(m.after, after)
		if p.secret < 0 {
			m.after = max(m.after, maxKeyText)
		}
	}
}

func block(b []byte) uint16 { return uint16(b[0]) | uint16(b[1])<<8 }

// anchors chooses where in the text the table looks: the window with the most different bytes, so that runs of
// one byte do not make candidates. A text that may be wrapped gets two windows side by side: a line break can
// stand in one of them, and the other is found.
func anchors(text []byte, window int, lines bool) []int {
	span := window
	if lines && len(text) >= 2*window {
		span = 2 * window
	}
	best, most := 0, -1
	for i := 0; i+span <= min(len(text), 4096); i++ {
		var seen [256]bool
		n := 0
		for _, c := range text[i : i+span] {
			if !seen[c] {
				seen[c] = true
				n++
			}
		}
		if n > most {
			best, most = i, n
		}
	}
	if span == window {
		return []int{best}
	}
	return []int{best, best + window}
}

// match is one place where a pattern stands.
type match struct {
	pattern    *pattern
	start, end int // in the buffer
}

// scan reports every match whose anchor starts in buf[from:to]. It may look at all of buf to compare.
func (m *matcher) scan(buf []byte, from, to int, found func(match)) {
	if len(m.patterns) == 0 {
		return
	}
	w := m.window
	end := min(to+w-3, len(buf)-2) // of the last block of the last window
	for pos := from + w - 2; pos <= end; {
		b := block(buf[pos:])
		if s := m.shift[b]; s != 0 {
			pos += int(s)
			continue
		}
		for _, i := range m.ending[b] {
			p := &m.patterns[i]
			anchor := pos - (w - 2)
			if start, stop, ok := p.verify(buf, anchor); ok {
				found(match{p, start, stop})
			}
		}
		pos++
	}
}

// verify compares the whole pattern around its anchor.
func (p *pattern) verify(buf []byte, anchor int) (start, end int, ok bool) {
	if !p.lines {
		start, end = anchor-p.at, anchor-p.at+len(p.text)
		if start < 0 || end > len(buf) {
			return 0, 0, false
		}
		return start, end, bytes.Equal(buf[start:end], p.text)
	}
	start, end = anchor, anchor
	for i := p.at; i > 0; i-- {
		if start--; start >= 0 && isLineBreak(buf[start]) {
			start--
		}
		if start >= 0 && isLineBreak(buf[start]) {
			start--
		}
		if start < 0 || buf[start] != p.text[i-1] {
			return 0, 0, false
		}
	}
	for _, c := range p.text[p.at:] {
		for n := 0; n < 2 && end < len(buf) && end > anchor && isLineBreak(buf[end]); n++ {
			end++
		}
		if end >= len(buf) || buf[end] != c {
			return 0, 0, false
		}
		end++
	}
	return start, end, true
}

func isLineBreak(c byte) bool { return c == '\n' || c == '\r' }

// find returns the first match of each secret in a short text.
func (m *matcher) find(text []byte) []match {
	var all []match
	m.scan(text, 0, len(text), func(h match) {
		if h.pattern.secret < 0 {
			return
		}
		if !slices.ContainsFunc(all, func(o match) bool { return o.pattern.secret == h.pattern.secret }) {
			all = append(all, h)
		}
	})
	return all
}

// spellings lists the forms in which a value is known to end up in files.
func spellings(secret int, value []byte) []pattern {
	var all []pattern
	add := func(form, text string, lines bool) {
		if len(text) < minSecret || slices.ContainsFunc(all, func(p pattern) bool { return string(p.text) == text }) {
			return
		}
		all = append(all, pattern{secret: secret, form: form, text: []byte(text), lines: lines})
	}
	add("plain", string(value), false)
	for skew := range 3 {
		add("base64", base64Core(base64.StdEncoding, value, skew), true)
		add("base64", base64Core(base64.URLEncoding, value, skew), true)
	}
	hexed := hex.EncodeToString(value)
	add("hex", hexed, true)
	add("hex", strings.ToUpper(hexed), true)
	for _, s := range urlSpellings(string(value)) {
		add("url", s, false)
	}
	for _, s := range jsonSpellings(string(value)) {
		add("json", s, false)
	}
	return all
}

// base64Core is the part of the encoding that the value alone decides when skew bytes of something else stand
// before it and anything stands after it.
func base64Core(e *base64.Encoding, value []byte, skew int) string {
	padded := make([]byte, skew, skew+len(value)+2)
	padded = append(append(padded, value...), 0, 0)
	text := e.EncodeToString(padded)
	first := (8*skew + 5) / 6
	last := 8 * (skew + len(value)) / 6
	return text[first:last]
}

// urlSpellings are the percent encodings in use: Go's and Python's for queries, JavaScript's for components,
// strict RFC 3986, each with both cases of hex.
func urlSpellings(value string) []string {
	query := url.QueryEscape(value)
	strict := strings.ReplaceAll(query, "+", "%20")
	component := strict
	for _, c := range "!'()*" {
		component = strings.ReplaceAll(component, url.QueryEscape(string(c)), string(c))
	}
	path := url.PathEscape(value)
	all := []string{query, strict, component, path}
	for _, s := range all[:4:4] {
		all = append(all, lowerEscapes(s))
	}
	return all
}

func lowerEscapes(s string) string {
	b := []byte(s)
	for i := 0; i+2 < len(b); i++ {
		if b[i] == '%' {
			copy(b[i+1:i+3], bytes.ToLower(b[i+1:i+3]))
			i += 2
		}
	}
	return string(b)
}

// jsonSpellings are the value inside a JSON string, with and without the escapes for HTML.
func jsonSpellings(value string) []string {
	var all []string
	for _, html := range []bool{true, false} {
		var b bytes.Buffer
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(html)
		if e.Encode(value) != nil {
			continue
		}
		if s := strings.TrimSuffix(b.String(), "\n"); len(s) > 2 {
			all = append(all, s[1:len(s)-1])
		}
	}
	return all
}
