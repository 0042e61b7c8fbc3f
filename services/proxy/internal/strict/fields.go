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
	// header and values are what is read into: nil, or of an earlier message that nobody needs any more.
	header http.Header
	values []string
	// host and the number of Host lines.
	host  string
	hosts int
	// framed: there is a field that may say how long the body is; hop: one that may concern the connection alone, or an expectation. Most requests have neither.
	framed, hop bool
}

// fewFields is how many headers a map holds that is cheap to make, to look into and to keep.
const fewFields = 8

// begin makes room for n fields.
func (f *fields) begin(n int) {
	if f.header == nil || n > fewFields || len(f.header) > fewFields {
		f.header = make(http.Header, max(n, fewFields))
	} else {
		clear(f.header)
	}
	// All values share one array: most headers have one.
	if cap(f.values) < n || cap(f.values) > fewFields {
		f.values = make([]string, 0, max(n, fewFields))
	}
	f.values = f.values[:0]
}

func (f *fields) add(name, value string) {
	f.framed = f.framed || name == "Content-Length" || name == "Transfer-Encoding"
	f.hop = f.hop || Hop(name) || name == "Expect"
	if old, ok := f.header[name]; ok {
		f.header[name] = append(old, value)
		return
	}
	f.values = append(f.values, value)
	n := len(f.values)
	f.header[name] = f.values[n-1 : n : n]
}

// Hop reports whether a field, by its canonical name, concerns one connection alone.
func Hop(name string) bool {
	switch name {
	case "Connection", "Keep-Alive", "Proxy-Connection", "Transfer-Encoding", "Http2-Settings", "Te", "Trailer", "Upgrade":
		return true
	}
	return false
}

// parse reads lines up to and with the empty one.
func (f *fields) parse(text string) error {
	n := max(0, strings.Count(text, "\n")-1)
	if n > f.count {
		return errHeadCount
	}
	f.begin(n)
	for {
		line, rest, ok := strings.Cut(text, "\r\n")
		if !ok {
			return refuse("header")
		}
		if line == "" {
			if rest != "" {
				return refuse("header")
			}
			return nil
		}
		text = rest
		name, value, err := field(line)
		if err != nil {
			return err
		}
		if name == "Host" {
			f.host, f.hosts = value, f.hosts+1
			continue
		}
		f.add(name, value)
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
	value = trim(value)
	if !ValidValue(value) {
		return "", "", refuse("header-value")
	}
	return textproto.CanonicalMIMEHeaderKey(name), value, nil
}

// trim takes spaces and tabs off both ends.
func trim(s string) string {
	for s != "" && (s[0] == ' ' || s[0] == '\t') {
		s = s[1:]
	}
	for s != "" && (s[len(s)-1] == ' ' || s[len(s)-1] == '\t') {
		s = s[:len(s)-1]
	}
	return s
}

// Trailer reads the trailer of a chunked body, up to and with the empty line.
func Trailer(b []byte, l Limits) (http.Header, error) {
	f := fields{count: l.Count}
	if err := f.parse(string(b)); err != nil {
		return nil, err
	}
	if f.hosts > 0 {
		return nil, refuse("trailer")
	}
	for name := range f.header {
		if !ValidTrailer(name) {
			return nil, refuse("trailer")
		}
	}
	return f.header, nil
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
