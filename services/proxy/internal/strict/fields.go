// SPDX-License-Identifier: Apache-2.0

package strict

import (
	"bytes"
	"net/http"
	"net/textproto"
	"strings"
)

// fields reads header lines.
type fields struct {
	count int
	// host and the number of Host lines.
	host  string
	hosts int
}

// parse reads lines up to and with the empty one.
func (f *fields) parse(text string) (http.Header, error) {
	n := max(0, strings.Count(text, "\n")-1)
	if n > f.count {
		return nil, errHeadCount
	}
	h := make(http.Header, n)
	// All values share one array: most headers have one.
	values := make([]string, 0, n)
	for {
		line, rest, ok := strings.Cut(text, "\r\n")
		if !ok {
			return nil, refuse("header")
		}
		if line == "" {
			if rest != "" {
				return nil, refuse("header")
			}
			return h, nil
		}
		text = rest
		name, value, err := field(line)
		if err != nil {
			return nil, err
		}
		if name == "Host" {
			f.host, f.hosts = value, f.hosts+1
			continue
		}
		if old, ok := h[name]; ok {
			h[name] = append(old, value)
			continue
		}
		values = append(values, value)
		h[name] = values[len(values)-1 : len(values) : len(values)]
	}
}

func field(line string) (name, value string, err error) {
	if line[0] == ' ' || line[0] == '\t' {
		return "", "", refuse("obs-fold")
	}
	name, value, ok := strings.Cut(line, ":")
	// A space before the colon is no token character.
	if !ok || !validToken(name) {
		return "", "", refuse("header-name")
	}
	value = strings.Trim(value, " \t")
	if !ValidValue(value) {
		return "", "", refuse("header-value")
	}
	return textproto.CanonicalMIMEHeaderKey(name), value, nil
}

// Trailer reads the trailer of a chunked body, up to and with the empty line.
func Trailer(b []byte, l Limits) (http.Header, error) {
	f := fields{count: l.Count}
	h, err := f.parse(string(b))
	if err != nil {
		return nil, err
	}
	if f.hosts > 0 {
		return nil, refuse("trailer")
	}
	for name := range h {
		if !ValidTrailer(name) {
			return nil, refuse("trailer")
		}
	}
	return h, nil
}

// ValidTrailer reports whether a field, by its canonical name, may stand in a trailer: nothing that frames, routes or authenticates may.
func ValidTrailer(name string) bool {
	switch name {
	case "Content-Length", "Transfer-Encoding", "Host", "Trailer", "Te", "Connection", "Upgrade", "Expect", "Authorization", "Cookie", "Keep-Alive",
		"Proxy-Connection", "Content-Type", "Content-Encoding", "Content-Range", "Set-Cookie":
		return false
	}
	return true
}

// ChunkSize reads the line that begins a chunk, without its CRLF.
func ChunkSize(line []byte) (int64, error) {
	n, i := int64(0), 0
	for ; i < len(line); i++ {
		d := hexDigit(line[i])
		if d < 0 {
			break
		}
		if i >= maxHexDigits {
			return 0, refuse("chunk-size")
		}
		n = n<<4 | int64(d)
	}
	if i == 0 {
		return 0, refuse("chunk-size")
	}
	return n, chunkExtension(line[i:])
}

const maxHexDigits = 15

// chunkExtension checks what nobody uses: it must begin with a semicolon (spaces before it were once allowed, and are how readers come to differ).
func chunkExtension(ext []byte) error {
	if len(ext) == 0 {
		return nil
	}
	if ext[0] != ';' {
		return refuse("chunk-size")
	}
	for _, c := range ext {
		if c < ' ' && c != '\t' || c == 0x7f {
			return refuse("chunk-extension")
		}
	}
	return nil
}

func decimal(s string) (int64, bool) {
	// 18 digits fit; none means none.
	if s == "" || len(s) > 18 {
		return 0, false
	}
	n := int64(0)
	for i := range len(s) {
		if !digit(s[i]) {
			return 0, false
		}
		n = n*10 + int64(s[i]-'0')
	}
	return n, true
}

func digit(c byte) bool { return '0' <= c && c <= '9' }

func hexDigit(c byte) int {
	switch {
	case digit(c):
		return int(c - '0')
	case 'a' <= c && c <= 'f':
		return int(c-'a') + 10
	case 'A' <= c && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

// token are the characters of names and methods, host those of authorities.
var (
	token = table("!#$%&'*+-.^_`|~")
	host  = table("!$%&'()*+,-.:;=[]_~")
)

func table(marks string) (t [256]bool) {
	for c := range t {
		t[c] = digit(byte(c)) || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
	}
	for i := range len(marks) {
		t[marks[i]] = true
	}
	return t
}

// maxMethod bounds methods: none is longer than a word.
const maxMethod = 64

// ValidMethod reports whether s is a method.
func ValidMethod(s string) bool { return len(s) <= maxMethod && validToken(s) }

func validToken(s string) bool {
	for i := range len(s) {
		if !token[s[i]] {
			return false
		}
	}
	return s != ""
}

// ValidHost reports whether s is an authority as requests have it: no user, no path, no space.
func ValidHost(s string) bool {
	for i := range len(s) {
		if !host[s[i]] {
			return false
		}
	}
	return s != ""
}

// ValidTarget reports whether s has no character that could end a request line, and no fragment.
func ValidTarget(s string) bool {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c == 0x7f || c == '#' {
			return false
		}
	}
	return s != ""
}

// ValidValue reports whether s may be a header's value.
func ValidValue(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// ValidName reports whether s may be a header's name.
func ValidName(s string) bool { return validToken(s) }

// TrailerEnd looks for the end of a trailer that has fields: its length with the empty line, 0 when more is needed.
func TrailerEnd(b []byte, l Limits) (int, error) {
	n := bytes.Index(b, []byte("\r\n\r\n"))
	if n+4 > l.Bytes || n < 0 && len(b) > l.Bytes {
		return 0, errHeadSize
	}
	if n < 0 {
		return 0, nil
	}
	return n + 4, nil
}
