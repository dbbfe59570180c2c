package policy

import (
	"bytes"
	"encoding/base64"
	"strings"
)

const (
	// maxKeyText bounds how much text after a key's header is looked at. A key whose text is longer is judged by
	// its beginning.
	maxKeyText = 24 << 10
	// minKeyBytes is less than the smallest private key in ASN.1: an Ed25519 key in PKCS8 has 48 bytes.
	minKeyBytes = 40
	// minPacketBytes is less than the smallest key in the other formats, and more than the one or two lines
	// that documentation shows of one.
	minPacketBytes = 150
)

// privateKey looks at a text that starts with keyMarker. It returns the words of the header if a private key
// follows it: a header that is merely quoted, in a manual, a program's strings or a shell script, has no key behind.
func privateKey(text []byte) (kind string, ok bool) {
	if len(text) > maxKeyText {
		text = text[:maxKeyText]
	}
	rest := text[len(keyMarker):]
	kind, rest, ok = keyLabel(rest)
	if !ok {
		return "", false
	}
	encrypted := false
	rest = skipBreaks(rest)
	for {
		line, after, more := armourHeader(rest)
		if !more {
			break
		}
		encrypted = encrypted || bytes.Contains(line, []byte("ENCRYPTED"))
		rest = skipBreaks(after)
	}
	body, whole := keyBody(rest)
	if len(body) < minKeyBytes {
		return "", false
	}
	return kind, plausibleKey(kind, body, whole, encrypted)
}

// encodedKey looks at a text that starts with encodedMarker, as the values of Kubernetes secrets and the client keys
// of a kubeconfig do.
func encodedKey(text []byte) (kind string, ok bool) {
	plain, _ := keyBody(text[:min(len(text), maxKeyText)])
	if !bytes.HasPrefix(plain, []byte(keyMarker)) {
		return "", false
	}
	kind, ok = privateKey(plain)
	return kind + ", base64 encoded", ok
}

// keyLabel reads "RSA PRIVATE KEY-----" and the like.
func keyLabel(text []byte) (label string, rest []byte, ok bool) {
	const longest = 64
	head := text[:min(len(text), longest)]
	end := bytes.Index(head, []byte("-----"))
	if end < 0 {
		return "", nil, false
	}
	label = string(head[:end])
	if !strings.HasSuffix(label, "PRIVATE KEY") && label != "PGP PRIVATE KEY BLOCK" {
		return "", nil, false
	}
	for _, c := range label {
		if c != ' ' && (c < 'A' || c > 'Z') && (c < '0' || c > '9') {
			return "", nil, false
		}
	}
	return label, text[end+len("-----"):], true
}

// armourHeader splits off a line such as "Proc-Type: 4,ENCRYPTED" or "Version: GnuPG v2".
func armourHeader(text []byte) (line, rest []byte, ok bool) {
	end := bytes.IndexAny(text[:min(len(text), 256)], "\n\\")
	if end < 0 || !bytes.Contains(text[:end], []byte(": ")) {
		return nil, nil, false
	}
	return text[:end], text[end:], true
}

// skipBreaks passes what may stand between a key's lines: line ends, also written \n and \r as in JSON and C,
// indentation, and the quotes and signs with which source code joins strings.
func skipBreaks(text []byte) []byte {
	for len(text) > 0 {
		switch {
		case text[0] == '\\' && len(text) > 1 && (text[1] == 'n' || text[1] == 'r' || text[1] == '\n'):
			text = text[2:]
		case strings.IndexByte("\r\n\t \"'", text[0]) >= 0:
			text = text[1:]
		default:
			return text
		}
	}
	return text
}

// keyBody decodes the base64 that text starts with. whole is false when the text went on past what was given.
func keyBody(text []byte) (body []byte, whole bool) {
	enc := make([]byte, 0, len(text))
	for len(text) > 0 && isBase64(text[0]) {
		enc = append(enc, text[0])
		text = text[1:]
		if len(text) > 0 && !isBase64(text[0]) {
			text = skipBreaks(text)
		}
	}
	whole = len(text) > 0
	// What is left of a group of four after the last full one are padding or the checksum of PGP.
	enc = enc[:len(enc)/4*4]
	body = make([]byte, base64.RawStdEncoding.DecodedLen(len(enc)))
	n, err := base64.RawStdEncoding.Decode(body, enc)
	if err != nil {
		return nil, whole
	}
	return body[:n], whole
}

func isBase64(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '+' || c == '/'
}

// plausibleKey checks the first bytes of what the header announced.
func plausibleKey(kind string, body []byte, whole, encrypted bool) bool {
	switch {
	case kind == "OPENSSH PRIVATE KEY":
		return len(body) >= minPacketBytes && bytes.HasPrefix(body, []byte("openssh-key-v1\x00"))
	case kind == "PGP PRIVATE KEY BLOCK":
		// A secret key packet, tag 5, in the new or the old packet format.
		return len(body) >= minPacketBytes && (body[0] == 0xc5 || body[0]&0xfc == 0x94)
	case strings.HasSuffix(kind, "SIGSTORE PRIVATE KEY") || strings.HasSuffix(kind, "COSIGN PRIVATE KEY"):
		return len(body) >= minPacketBytes && body[0] == '{'
	case encrypted:
		return true // ciphertext
	default:
		return wholeSequence(body, whole)
	}
}

// wholeSequence checks that body holds a complete ASN.1 sequence. The abridged keys of documentation start as
// real ones do and are not complete. The last group of a padded body is not decoded, hence the three bytes.
func wholeSequence(body []byte, whole bool) bool {
	if body[0] != 0x30 {
		return false
	}
	length, header := int(body[1]), 2
	if body[1]&0x80 != 0 {
		n := int(body[1] & 0x7f)
		if n == 0 || n > 3 {
			return false
		}
		length, header = 0, 2+n
		for _, b := range body[2:header] {
			length = length<<8 | int(b)
		}
	}
	return length >= minKeyBytes && (len(body)+3 >= header+length || !whole)
}
