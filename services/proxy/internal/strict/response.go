// SPDX-License-Identifier: Apache-2.0

package strict

import (
	"bytes"
	"net/http"
	"strings"
)

// Response is the head of an answer.
type Response struct {
	Status, Minor int
	Header        http.Header
	// Trailer has the names that were announced.
	Trailer http.Header
	// Length of the body as it was said; -1 = not said, or Chunked.
	Length  int64
	Chunked bool
	// Close: the connection ends with this answer.
	Close bool
}

// ErrResponse is an answer that cannot be read in one way only.
var ErrResponse = &Error{Status: http.StatusBadGateway, Cause: "response"}

// ResponseEnd looks for the end of an answer's head, as End does. Servers may end lines with a line feed alone: their answers go to their own clients only, and are
// written anew.
func ResponseEnd(b []byte, from int, l Limits) (int, error) {
	for i := max(0, from-2); ; {
		n := bytes.IndexByte(b[i:], '\n')
		if n < 0 {
			break
		}
		i += n + 1
		if rest := b[i:]; len(rest) > 0 && rest[0] == '\n' {
			return bounded(i+1, l)
		} else if len(rest) > 1 && rest[0] == '\r' && rest[1] == '\n' {
			return bounded(i+2, l)
		}
	}
	if len(b) > l.Bytes {
		return 0, ErrResponse
	}
	return 0, nil
}

func bounded(n int, l Limits) (int, error) {
	if n > l.Bytes {
		return 0, ErrResponse
	}
	return n, nil
}

// Parse reads a complete head, as ResponseEnd has measured it, into r, whose former content is lost but for the values of its header: the map alone is used again.
func (r *Response) Parse(head []byte, l Limits) error {
	f := fields{count: l.Count, header: r.Header}
	*r = Response{Length: -1}
	text := string(head)
	line, rest := cutLine(text)
	if !r.statusLine(line) || !f.parseLenient(rest) {
		return ErrResponse
	}
	r.Header, r.Close = f.header, r.Minor == 0
	if f.framed && !r.frame() {
		return ErrResponse
	}
	if !f.hop {
		return nil
	}
	connection := r.Header["Connection"]
	r.Close = r.Minor == 0 && !hasOption(connection, "keep-alive") || hasOption(connection, "close")
	r.announced()
	return nil
}

// announced takes the names of the trailer off the header.
func (r *Response) announced() {
	for _, v := range r.Header["Trailer"] {
		for _, name := range strings.Split(v, ",") {
			name = http.CanonicalHeaderKey(trim(name))
			if validToken(name) && ValidTrailer(name) {
				if r.Trailer == nil {
					r.Trailer = http.Header{}
				}
				r.Trailer[name] = nil
			}
		}
	}
	delete(r.Header, "Trailer")
}

func (r *Response) statusLine(line string) bool {
	const version = "HTTP/1."
	if len(line) < len("HTTP/1.1 200") || line[:len(version)] != version || !digit(line[7]) || line[8] != ' ' {
		return false
	}
	r.Minor = int(line[7] - '0')
	code := line[9:12]
	if !digit(code[0]) || !digit(code[1]) || !digit(code[2]) || code[0] == '0' || len(line) > 12 && line[12] != ' ' {
		return false
	}
	r.Status = int(code[0]-'0')*100 + int(code[1]-'0')*10 + int(code[2]-'0')
	return true
}

func (r *Response) frame() bool {
	lengths, codings := r.Header["Content-Length"], r.Header["Transfer-Encoding"]
	if len(codings) > 0 {
		// Both are what smugglers write; a server has no reason to.
		if len(codings) > 1 || !strings.EqualFold(codings[0], "chunked") || len(lengths) > 0 || r.Minor == 0 {
			return false
		}
		delete(r.Header, "Transfer-Encoding")
		r.Chunked = true
		return true
	}
	for _, v := range lengths {
		n, ok := decimal(v)
		if !ok || r.Length >= 0 && n != r.Length {
			return false
		}
		r.Length = n
	}
	if len(lengths) > 1 {
		r.Header["Content-Length"] = lengths[:1]
	}
	return true
}

func cutLine(text string) (line, rest string) {
	line, rest, _ = strings.Cut(text, "\n")
	return strings.TrimSuffix(line, "\r"), rest
}

// parseLenient reads a server's header: lines may be folded, which is undone. false = it cannot be read.
func (f *fields) parseLenient(text string) bool {
	n := max(0, strings.Count(text, "\n")-1)
	if n > f.count {
		return false
	}
	f.begin(n)
	last := ""
	for {
		var line string
		line, text = cutLine(text)
		if line == "" {
			return true
		}
		if line[0] == ' ' || line[0] == '\t' {
			v := f.header[last]
			folded := trim(line)
			if len(v) == 0 || !ValidValue(folded) {
				return false
			}
			v[len(v)-1] += " " + folded
			continue
		}
		name, value, err := field(line)
		if err != nil {
			return false
		}
		last = name
		f.add(name, value)
	}
}
