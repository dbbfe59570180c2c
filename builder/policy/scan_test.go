package policy

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/url"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

// file is one tar entry; what is not set is that of an ordinary file.
type file struct {
	name  string
	body  string
	mode  int64
	typ   byte
	link  string
	xattr map[string]string
	uid   int
}

func layerTar(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: f.mode, Typeflag: f.typ, Linkname: f.link, Uid: f.uid, Size: int64(len(f.body))}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		for k, v := range f.xattr {
			if h.PAXRecords == nil {
				h.PAXRecords = make(map[string]string)
			}
			h.PAXRecords["SCHILY.xattr."+k] = v
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func scanned(t testing.TB, o ScanOptions, files ...file) LayerFacts {
	t.Helper()
	facts, err := ScanLayer(t.Context(), bytes.NewReader(layerTar(t, files...)), o)
	if err != nil {
		t.Fatal(err)
	}
	return facts
}

// netRaw is security.capability of version 2 with cap_net_raw permitted and effective.
var netRaw = string([]byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})

func TestPrivilegedFilesAreFoundWithModeCapsAndContent(t *testing.T) {
	empty := digest.FromString("").String()
	v3 := "\x01\x00\x00\x03" + netRaw[4:] + "\x00\x00\x00\x00"
	for _, light := range []bool{false, true} {
		facts := scanned(t, ScanOptions{Light: light},
			file{name: "./bin/su", mode: 0o4755, body: "su"},
			file{name: "/bin/wall", mode: 0o2755, uid: 5},
			file{name: "bin/ping", mode: 0o755, xattr: map[string]string{"security.capability": netRaw}},
			file{name: "bin/ping3", mode: 0o755, xattr: map[string]string{"security.capability": v3}},
			file{name: "bin/nothing", mode: 0o755, xattr: map[string]string{"security.capability": netRaw[:4] + strings.Repeat("\x00", 16)}},
			file{name: "tmp/../hidden/su", typ: tar.TypeLink, link: "./bin/su"},
			file{name: "var/mail", typ: tar.TypeDir, mode: 0o2775},
			file{name: "bin/plain", mode: 0o1755, body: "x"},
		)
		caps := "0100200000000000000000000000000000"
		want := []PrivilegedFile{
			{Path: "bin/ping", Mode: 0o755, Caps: caps, Digest: empty},
			{Path: "bin/ping3", Mode: 0o755, Caps: caps, Digest: empty},
			{Path: "bin/su", Mode: 0o4755, Digest: digest.FromString("su").String()},
			{Path: "bin/wall", Mode: 0o2755, UID: 5, Digest: empty},
			{Path: "hidden/su", Mode: 0o4755, Digest: digest.FromString("su").String(), Link: "bin/su"},
		}
		if d := cmp.Diff(want, facts.Privileged); d != "" {
			t.Errorf("light=%v: a file that gives privilege was missed or misread (-want +got):\n%s", light, d)
		}
	}
}

func TestCapabilityAttributeOfUnknownShapeIsAnError(t *testing.T) {
	tar := layerTar(t, file{name: "x", xattr: map[string]string{"security.capability": "short"}})
	_, err := ScanLayer(t.Context(), bytes.NewReader(tar), ScanOptions{Light: true})
	if err == nil || !strings.Contains(err.Error(), "x: security.capability has 5 bytes") {
		t.Errorf("got %v", err)
	}
}

const secretValue = "p@ss/w0rd+\"of<the>day\"~!"

var testSecret = []Secret{{ID: "token", Value: []byte(secretValue + "\n")}}

// wrap breaks a text into lines.
func wrap(s string, width int, eol string) string {
	var b strings.Builder
	for len(s) > width {
		b.WriteString(s[:width] + eol)
		s = s[width:]
	}
	return b.String() + s
}

func TestSecretIsFoundInEverySpelling(t *testing.T) {
	asJSON, err := json.Marshal(map[string]string{"k": secretValue})
	if err != nil {
		t.Fatal(err)
	}
	spellings := map[string]string{
		"plain":     secretValue,
		"in a line": "export T='" + secretValue + "'\n",
		"hex":       hex.EncodeToString([]byte(secretValue)),
		"HEX":       strings.ToUpper(hex.EncodeToString([]byte(secretValue))),
		"xxd -p":    wrap(hex.EncodeToString([]byte("0123456789"+secretValue)), 30, "\n"),
		"query":     "u=" + url.QueryEscape(secretValue) + "&",
		"path":      url.PathEscape(secretValue),
		"lower url": strings.ToLower(url.QueryEscape(secretValue)),
		"component": "p%40ss%2Fw0rd%2B%22of%3Cthe%3Eday%22~!",
		"json":      string(asJSON),
		"basic":     "Basic " + base64.StdEncoding.EncodeToString([]byte("user:"+secretValue)),
	}
	for skew := range 3 {
		for name, e := range map[string]*base64.Encoding{"std": base64.StdEncoding, "url": base64.URLEncoding, "raw": base64.RawStdEncoding} {
			text := e.EncodeToString([]byte(strings.Repeat("x", skew) + secretValue + strings.Repeat("y", skew)))
			spellings[fmt.Sprintf("base64 %s %d", name, skew)] = text
			spellings[fmt.Sprintf("base64 %s %d wrapped", name, skew)] = wrap(text, 30, "\r\n")
		}
	}
	for name, text := range spellings {
		facts := scanned(t, ScanOptions{Secrets: testSecret}, file{name: "a", body: "before"}, file{name: "opt/leak", body: text}, file{name: "z"})
		if len(facts.Secrets) != 1 || facts.Secrets[0].Path != "opt/leak" || facts.Secrets[0].Secret != "token" {
			t.Errorf("%s: an image would carry the secret as %q; facts %+v", name, text, facts.Secrets)
		}
		if b, err := json.Marshal(facts); err != nil || bytes.Contains(b, []byte("w0rd")) {
			t.Errorf("facts hold the value or do not marshal: %s %v", b, err)
		}
	}
}

func TestShortestSecretIsFoundInEveryAlignment(t *testing.T) {
	secret := []Secret{{ID: "s", Value: []byte("s3cr3t")}}
	for skew := range 3 {
		text := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("~", skew) + "s3cr3t" + "tail"))
		facts := scanned(t, ScanOptions{Secrets: secret}, file{name: "f", body: text})
		if len(facts.Secrets) != 1 {
			t.Errorf("base64 at skew %d not found in %q", skew, text)
		}
	}
}

// The window is far larger than a test file, so each run shifts the secret around the seam between two fills.
func TestSecretAcrossReadSeamsIsFound(t *testing.T) {
	long := make([]byte, 3000)
	random := mathrand.NewChaCha8([32]byte{7})
	if _, err := random.Read(long); err != nil {
		t.Fatal(err)
	}
	late := strings.Repeat("a", 40) + "bcdefghijklmn" // the part that is looked for first comes last
	for name, value := range map[string]string{"short": "s3cr3t", "plain": secretValue, "long": string(long), "late": late} {
		secrets := []Secret{{ID: "s", Value: []byte(value)}}
		m, _ := newMatcher(secrets, true)
		seam := windowStep + 2*(m.before+m.after)
		value = strings.TrimSpace(value)
		for _, text := range []string{value, wrap(base64.StdEncoding.EncodeToString([]byte(value)), 76, "\n")} {
			for _, d := range []int{-len(text) - 1, -len(text), -len(text) + 1, -len(text) / 2, -9, -6, -2, -1, 0, 1, -m.after, -m.after - len(text)/2, -m.after + 1, -m.after - 39, -m.after - 38, -m.after - 20, -m.after - 10} {
				pad := seam - 512 + d
				body := strings.Repeat(".", pad) + text + strings.Repeat(".", 2*m.after)
				facts := scanned(t, ScanOptions{Secrets: secrets}, file{name: "f", body: body}, file{name: "g"})
				if len(facts.Secrets) != 1 || facts.Secrets[0].Path != "f" {
					t.Errorf("%s secret at %d from the seam: leaked unseen: %+v", name, d, facts.Secrets)
				}
			}
		}
	}
}

func TestSecretIsFoundHoweverTheStreamArrives(t *testing.T) {
	tar := layerTar(t, file{name: "a", body: strings.Repeat("a", 5000)}, file{name: "b", body: secretValue}, file{name: "c"})
	for name, r := range map[string]io.Reader{
		"bytes": iotest.OneByteReader(bytes.NewReader(tar)), "halves": iotest.HalfReader(bytes.NewReader(tar)),
		"data with EOF": iotest.DataErrReader(bytes.NewReader(tar)),
	} {
		facts, err := ScanLayer(t.Context(), r, ScanOptions{Secrets: testSecret})
		if err != nil || len(facts.Secrets) != 1 || facts.Secrets[0].Path != "b" {
			t.Errorf("%s: %+v %v", name, facts.Secrets, err)
		}
	}
}

func TestSecretOutsideContentIsFound(t *testing.T) {
	secrets := []Secret{{ID: "s", Value: []byte("canary-0123456789")}}
	name := strings.Repeat("d", 90) + "/canary-0123456789/f"
	for what, f := range map[string]file{
		"name":      {name: "canary-0123456789"},
		"long name": {name: name},
		"link":      {name: "l", typ: tar.TypeSymlink, link: "/x/canary-0123456789"},
		"xattr":     {name: "x", xattr: map[string]string{"user.note": "canary-0123456789"}},
		"directory": {name: "canary-0123456789/", typ: tar.TypeDir},
	} {
		facts := scanned(t, ScanOptions{Secrets: secrets}, file{name: "a"}, f, file{name: "z"})
		if len(facts.Secrets) != 1 || facts.Secrets[0].Path != clean(f.name) {
			t.Errorf("%s: the secret would be published in metadata: %+v", what, facts.Secrets)
		}
	}
	split := []Secret{{ID: "s", Value: []byte("canary/0123456789")}}
	facts := scanned(t, ScanOptions{Secrets: split}, file{name: strings.Repeat("d", 90) + "/canary/0123456789"})
	if len(facts.Secrets) != 1 {
		t.Error("the secret would be published in a name that the header stores in two pieces")
	}
	trailing := append(layerTar(t, file{name: "a"}), make([]byte, 4*windowStep)...)
	trailing = append(trailing, "canary-0123456789"...)
	facts, err := ScanLayer(t.Context(), bytes.NewReader(trailing), ScanOptions{Secrets: secrets})
	if err != nil || len(facts.Secrets) != 1 || facts.Secrets[0].Path != "" {
		t.Errorf("the secret after the end of the archive: %+v %v", facts.Secrets, err)
	}
}

func TestEachFileWithASecretIsNamed(t *testing.T) {
	var files []file
	var want []SecretHit
	for i := range 300 {
		name := fmt.Sprintf("f%03d", i)
		body := strings.Repeat("-", i*37%2000)
		if i%3 == 0 {
			body += secretValue + secretValue
			want = append(want, SecretHit{Path: name, Secret: "token", Form: "plain"})
		}
		files = append(files, file{name: name, body: body})
	}
	facts := scanned(t, ScanOptions{Secrets: testSecret}, files...)
	if d := cmp.Diff(want, facts.Secrets); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestNearMissesAreNotSecrets(t *testing.T) {
	m := base64.StdEncoding.EncodeToString([]byte(secretValue))
	facts := scanned(t, ScanOptions{Secrets: testSecret},
		file{name: "a", body: secretValue[:len(secretValue)-1] + "?"}, file{name: "b", body: "q" + secretValue[1:]},
		file{name: "c", body: m[:20] + "x" + m[21:]}, file{name: "d", body: secretValue[:10] + "\n" + secretValue[10:]})
	if len(facts.Secrets) != 0 {
		t.Errorf("false alarm: %+v", facts.Secrets)
	}
}

func TestTooShortSecretIsReportedNotIgnored(t *testing.T) {
	facts := scanned(t, ScanOptions{Secrets: []Secret{{ID: "pin", Value: []byte("1234\n")}, {ID: "none"}}}, file{name: "f", body: "1234"})
	if d := cmp.Diff([]string{"pin"}, facts.Unsearched); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestCutOrMalformedArchiveIsAnError(t *testing.T) {
	whole := layerTar(t, file{name: "a", body: strings.Repeat("x", 2000)}, file{name: "b", body: "y"})
	for _, n := range []int{1, 100, 511, 513, 1500, 2561, 3000} {
		if _, err := ScanLayer(t.Context(), bytes.NewReader(whole[:n]), ScanOptions{}); err == nil {
			t.Errorf("%d of %d bytes passed as a whole layer", n, len(whole))
		}
	}
	broken := io.MultiReader(bytes.NewReader(whole[:1000]), iotest.ErrReader(io.ErrClosedPipe))
	if _, err := ScanLayer(t.Context(), broken, ScanOptions{}); err == nil {
		t.Error("a read error passed as a whole layer")
	}
	for name, tar := range map[string][]byte{"nothing": nil, "empty": make([]byte, 1024)} {
		if facts, err := ScanLayer(t.Context(), bytes.NewReader(tar), ScanOptions{}); err != nil || facts.Entries != 0 {
			t.Errorf("%s: %+v %v", name, facts, err)
		}
	}
}

// sparse is an old GNU sparse entry that holds its text at the beginning and claims to be size bytes long.
func sparse(name string, mode int64, text string, size int64) []byte {
	b := make([]byte, 512)
	copy(b, name)
	octal := func(at, n int, v int64) { copy(b[at:], fmt.Sprintf("%0*o\x00", n-1, v)) }
	octal(100, 8, mode)
	octal(108, 8, 0)
	octal(116, 8, 0)
	octal(124, 12, 512)
	octal(136, 12, 0)
	b[156] = tar.TypeGNUSparse
	copy(b[257:], "ustar  \x00")
	octal(386, 12, 0)
	octal(398, 12, 512)
	binary.BigEndian.PutUint64(b[483+4:], uint64(size))
	b[483] = 0x80
	for i := range 8 {
		b[148+i] = ' '
	}
	sum := int64(0)
	for _, c := range b {
		sum += int64(c)
	}
	octal(148, 7, sum)
	data := make([]byte, 512)
	copy(data, text)
	return append(b, data...)
}

func TestSparseFileIsNotExpandedAndStillSearched(t *testing.T) {
	const exabyte = 1 << 60
	archive := append(sparse("hole", 0o644, secretValue, exabyte), layerTar(t, file{name: "z", body: secretValue})...)
	facts, err := ScanLayer(t.Context(), bytes.NewReader(archive), ScanOptions{Secrets: testSecret})
	if err != nil || len(facts.Secrets) != 2 || facts.Secrets[0].Path != "hole" || facts.Secrets[1].Path != "z" {
		t.Errorf("%+v %v", facts.Secrets, err)
	}
	archive = append(sparse("hole", 0o4755, "x", exabyte), make([]byte, 1024)...)
	if _, err := ScanLayer(t.Context(), bytes.NewReader(archive), ScanOptions{Light: true}); err == nil || !strings.Contains(err.Error(), "holes") {
		t.Errorf("got %v: a base image can keep us busy for years", err)
	}
	archive = append(sparse("su", 0o4755, "x", 4096), make([]byte, 1024)...)
	facts, err = ScanLayer(t.Context(), bytes.NewReader(archive), ScanOptions{Light: true})
	want := digest.FromString("x" + strings.Repeat("\x00", 4095)).String()
	if err != nil || len(facts.Privileged) != 1 || facts.Privileged[0].Digest != want {
		t.Errorf("%+v %v", facts.Privileged, err)
	}
}

func TestScanStopsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(io.ErrNoProgress)
	if _, err := ScanLayer(ctx, bytes.NewReader(layerTar(t, file{name: "a"})), ScanOptions{}); err == nil || !strings.Contains(err.Error(), io.ErrNoProgress.Error()) {
		t.Errorf("got %v, want the cause", err)
	}
}

func TestLayerOfNothingButHitsStaysInMemoryBounds(t *testing.T) {
	body := strings.Repeat(secretValue, 1<<16)
	facts := scanned(t, ScanOptions{Secrets: testSecret}, file{name: "f", body: body})
	if len(facts.Secrets) != 1 {
		t.Errorf("%d facts", len(facts.Secrets))
	}
	long := strings.Repeat("d/", 2000)
	var files []file
	for i := range 4200 {
		files = append(files, file{name: fmt.Sprintf("%s%d", long, i), mode: 0o4755})
	}
	_, err := ScanLayer(t.Context(), bytes.NewReader(layerTar(t, files...)), ScanOptions{Light: true})
	if err == nil || !strings.Contains(err.Error(), "more findings than fit") {
		t.Errorf("got %v: what is beyond the bound must not be forgotten", err)
	}
}

func TestScanKeySeparatesScans(t *testing.T) {
	keys := make(map[string]string)
	for name, o := range map[string]ScanOptions{
		"light": {Light: true}, "full": {}, "one": {Secrets: testSecret},
		"other value": {Secrets: []Secret{{ID: "token", Value: []byte("different")}}},
		"other id":    {Secrets: []Secret{{ID: "t", Value: []byte(secretValue)}}},
	} {
		key, err := o.Key()
		if err != nil {
			t.Fatal(err)
		}
		if keys[key] != "" {
			t.Errorf("%s and %s share a key: remembered facts would hide a leak", name, keys[key])
		}
		keys[key] = name
	}
	a, b := Secret{ID: "a", Value: []byte("1")}, Secret{ID: "b", Value: []byte("2")}
	one, err1 := ScanOptions{Secrets: []Secret{a, b}}.Key()
	two, err2 := ScanOptions{Secrets: []Secret{b, a}}.Key()
	if one != two || err1 != nil || err2 != nil {
		t.Errorf("order changes the key: %s %s %v %v", one, two, err1, err2)
	}
}

func TestSecretDoesNotPrintItsValue(t *testing.T) {
	for _, format := range []string{"%v", "%+v", "%#v", "%s"} {
		if s := fmt.Sprintf(format, testSecret[0]); strings.Contains(s, "w0rd") {
			t.Errorf("%s prints %s", format, s)
		}
	}
	if b, err := json.Marshal(testSecret); err != nil || strings.Contains(string(b), "Value") {
		t.Errorf("marshals to %s %v", b, err)
	}
}

func pkcs8(t testing.TB, key any) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func TestPrivateKeysAreFoundInAllFormats(t *testing.T) {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	big, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(ec)
	if err != nil {
		t.Fatal(err)
	}
	noise := bytes.Repeat([]byte{0xa7, 0x13, 0x5e}, 120)
	armour := func(kind string, headers map[string]string, b []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Headers: headers, Bytes: b}))
	}
	edPEM := pkcs8(t, ed)
	keys := map[string]string{
		"ed25519":   edPEM,
		"p256":      pkcs8(t, ec),
		"sec1":      armour("EC PRIVATE KEY", nil, sec1),
		"rsa":       armour("RSA PRIVATE KEY", nil, x509.MarshalPKCS1PrivateKey(big)),
		"legacy":    armour("RSA PRIVATE KEY", map[string]string{"Proc-Type": "4,ENCRYPTED", "DEK-Info": "AES-128-CBC,00"}, noise),
		"openssh":   armour("OPENSSH PRIVATE KEY", nil, append([]byte("openssh-key-v1\x00"), noise...)),
		"pgp":       "-----BEGIN PGP PRIVATE KEY BLOCK-----\nVersion: GnuPG v2\n\n" + wrap(base64.StdEncoding.EncodeToString(append([]byte{0xc5}, noise...)), 64, "\n") + "\n=abcd\n-----END",
		"sigstore":  armour("ENCRYPTED SIGSTORE PRIVATE KEY", nil, append([]byte(`{"kdf":`), noise...)),
		"crlf":      strings.ReplaceAll(edPEM, "\n", "\r\n"),
		"json":      `{"private_key":"` + strings.ReplaceAll(edPEM, "\n", `\n`) + `"}`,
		"yaml":      "key: |\n    " + strings.ReplaceAll(edPEM, "\n", "\n    "),
		"c source":  `"` + strings.ReplaceAll(strings.TrimSpace(pkcs8(t, ec)), "\n", "\\n\"\n\"") + `"`,
		"in binary": "\x7fELF\x00\x01" + edPEM + "\x00\x02",
		"no end":    strings.Split(edPEM, "-----END")[0],
		"huge":      armour("RSA PRIVATE KEY", nil, append([]byte{0x30, 0x82, 0x9c, 0x40}, make([]byte, 40000)...)),
		"twice":     "-----BEGIN PRIVATE KEY-----\n" + edPEM,
		"encoded":   "tls.key: " + base64.StdEncoding.EncodeToString([]byte(edPEM)) + "\n",
		"folded":    wrap(base64.StdEncoding.EncodeToString([]byte(edPEM)), 76, "\n"),
	}
	for name, text := range keys {
		for _, pad := range []int{0, windowStep - 600} {
			facts := scanned(t, ScanOptions{}, file{name: "a", body: "x"}, file{name: "k.pem", body: strings.Repeat("=", pad) + text}, file{name: "z"})
			if len(facts.Keys) != 1 || facts.Keys[0].Path != "k.pem" {
				t.Errorf("%s at %d: a private key would be published: %+v", name, pad, facts.Keys)
			}
		}
	}
}

func TestTextAboutKeysIsNoKey(t *testing.T) {
	for name, text := range map[string]string{
		"header":      "A key starts with -----BEGIN RSA PRIVATE KEY----- and ends with -----END RSA PRIVATE KEY-----.",
		"strings":     "-----BEGIN OPENSSH PRIVATE KEY-----\x00-----END OPENSSH PRIVATE KEY-----\x00-----BEGIN PRIVATE KEY-----\x00",
		"abridged":    "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA1c7+9z5Pad7OejecsQ0bu3aumyfAPHVxdsYkq2mWhyphenated\n...\n-----END RSA PRIVATE KEY-----\n",
		"ssh example": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW\n...\n",
		"empty":       "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n",
		"certificate": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: make([]byte, 600)})),
		"public":      string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: append([]byte{0x30, 0x59}, make([]byte, 89)...)})),
		"words":       "-----BEGIN PRIVATE KEY-----\n" + strings.Repeat("lorem ipsum dolor sit amet ", 40),
		"pgp public":  "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n" + base64.StdEncoding.EncodeToString(append([]byte{0xc6}, make([]byte, 300)...)),
		"shell":       `echo "-----BEGIN PRIVATE KEY-----"; cat "$1" | base64; echo "-----END PRIVATE KEY-----"`,
		"cut":         "-----BEGIN PRIVATE KEY-----\nMC4C",
		"encoded":     base64.StdEncoding.EncodeToString([]byte("-----BEGIN CERTIFICATE-----\nMIIB" + strings.Repeat("A", 400))),
		"encoded cut": "LS0tLS1CRUdJTi",
	} {
		if facts := scanned(t, ScanOptions{}, file{name: "doc", body: text}); len(facts.Keys) != 0 {
			t.Errorf("%s: false alarm %+v for %q", name, facts.Keys, text)
		}
	}
}

func TestCredentialFilesNeedACredential(t *testing.T) {
	for _, c := range []struct{ name, body, kind string }{
		{"root/.npmrc", "//registry.npmjs.org/:_authToken=npm_abcdef\n", "npmrc"},
		{"root/.npmrc", "//registry.npmjs.org/:_authToken=${NPM_TOKEN}\n", ""},
		{"root/.npmrc", "registry=https://example.org\n; _authToken=x\n", ""},
		{"root/.netrc", "machine h login u password p\n", "netrc"},
		{"root/.netrc", "", ""},
		{"home/u/.aws/credentials", "[default]\naws_secret_access_key = abc\n", "aws credentials"},
		{"usr/share/doc/aws/credentials", "[default]\naws_secret_access_key = abc\n", ""},
		{"kaniko/.docker/config.json", `{"auths":{"r":{"auth":"dTpw"}}}`, "registry credentials"},
		{"root/.docker/config.json", `{"credsStore":"secretservice"}`, ""},
		{"root/.git-credentials", "https://u:p@example.org\n", "git credentials"},
		{"root/.pypirc", "[pypi]\nusername = u\npassword = p\n", "pypirc"},
		{"root/.kube/config", "users:\n- name: a\n  user:\n    token: abc\n", "kubeconfig"},
		{"root/.ssh/id_rsa", "-----BEGIN OPENSSH PRIVATE KEY-----\n", "ssh private key"},
		{"root/.ssh/id_rsa.pub", "ssh-rsa AAAA\n", ""},
		{"srv/terraform.tfstate", `{"version":4,"terraform_version":"1.9"}`, "terraform state"},
		{"app/.env", "API_KEY=abc\n", "dotenv"},
		{"app/.env.example", "API_KEY=abc\n", ""},
		{"app/.env", "PORT=80\n", ""},
		{"app/store.P12", "\x30", "keystore"},
	} {
		facts := scanned(t, ScanOptions{}, file{name: c.name, body: c.body})
		got := ""
		if len(facts.Credentials) > 0 {
			got = facts.Credentials[0].Kind
		}
		if got != c.kind {
			t.Errorf("%s with %q: got %q, want %q", c.name, c.body, got, c.kind)
		}
	}
	if facts := scanned(t, ScanOptions{}, file{name: ".netrc", typ: tar.TypeSymlink, link: "/x"}); len(facts.Credentials) != 0 {
		t.Errorf("a link holds nothing: %+v", facts.Credentials)
	}
}

// The matcher's table must agree with plain search on any text.
func FuzzMatcherAgreesWithPlainSearch(f *testing.F) {
	f.Add([]byte("hunter22"), []byte("xxhunter22yyhunter2"))
	f.Add([]byte("aaaaaaa"), []byte("aaaaaaaaaaaaaaaaaa"))
	f.Add([]byte("abcabcabd"), []byte("abcabcabcabdabc"))
	f.Fuzz(func(t *testing.T, value, text []byte) {
		m, unsearched := newMatcher([]Secret{{ID: "s", Value: value}}, true)
		value = bytes.TrimSpace(value)
		if len(unsearched) > 0 || len(value) == 0 {
			return
		}
		got := 0
		m.scan(text, 0, len(text), func(h match) {
			if h.pattern.form == "plain" {
				got++
			}
		})
		want := 0
		for i := range text {
			if bytes.HasPrefix(text[i:], value) {
				want++
			}
		}
		if got != want {
			t.Errorf("found %q %d times in %q, plain search %d", value, got, text, want)
		}
	})
}

func FuzzScanLayerNeverPanics(f *testing.F) {
	f.Add(layerTar(f, file{name: "k", body: "-----BEGIN PRIVATE KEY-----\nMIIE"}, file{name: "b", mode: 0o4755}))
	f.Add([]byte("-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = ScanLayer(t.Context(), bytes.NewReader(b), ScanOptions{Secrets: testSecret})
		if i := bytes.Index(b, []byte(keyMarker)); i >= 0 {
			privateKey(b[i:])
		}
	})
}

func BenchmarkScanLayer(b *testing.B) {
	noise := make([]byte, 64<<20)
	random := mathrand.NewChaCha8([32]byte{1})
	if _, err := random.Read(noise); err != nil {
		b.Fatal(err)
	}
	source := []byte(strings.Repeat("func (s *scan) entry(tr *tar.Reader, hdr *tar.Header, name string) error {\n\treturn nil\n}\n// The BEGIN of a key.\n", 64<<20/100))
	var five []Secret
	for i := range 5 {
		five = append(five, Secret{ID: fmt.Sprint(i), Value: []byte(fmt.Sprintf("s3cr3t%d", i))})
	}
	for _, c := range []struct {
		name    string
		body    []byte
		secrets []Secret
	}{
		{"binary", noise, nil},
		{"binary/one secret", noise, testSecret},
		{"binary/five short secrets", noise, five},
		{"text/five short secrets", source, five},
	} {
		layer := layerTar(b, file{name: "f", body: string(c.body)})
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(int64(len(layer)))
			for b.Loop() {
				if _, err := ScanLayer(b.Context(), bytes.NewReader(layer), ScanOptions{Secrets: c.secrets}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
