// SPDX-License-Identifier: Apache-2.0

// Package hello reads the first message of a TLS client, without answering it: which server it names and which protocols it offers.
package hello

import (
	"errors"
	"strings"
)

// MaxBytes is how much of a connection is read for it.
const MaxBytes = 16 << 10

// Info is what the client says.
type Info struct {
	// ServerName in lower case; "" = it names none.
	ServerName string
	// Protocols of ALPN.
	Protocols []string
}

// Errors of Parse.
var (
	// ErrMore: the message is not complete.
	ErrMore = errors.New("more bytes are needed")
	// ErrNotTLS: these bytes begin no TLS connection.
	ErrNotTLS = errors.New("not TLS")
	// ErrMalformed: a TLS connection, but no ClientHello that can be read.
	ErrMalformed = errors.New("malformed ClientHello")
)

const (
	recordHandshake = 22
	typeClientHello = 1
	recordHeader    = 5
	messageHeader   = 4
	maxRecord       = 1 << 14
	extServerName   = 0
	extALPN         = 16
)

// Parse reads the bytes that a client sent so far.
func Parse(b []byte) (Info, error) {
	if len(b) > 0 && b[0] != recordHandshake || len(b) > 1 && b[1] != 3 {
		return Info{}, ErrNotTLS
	}
	message, err := reassemble(b)
	if err != nil {
		return Info{}, err
	}
	info, ok := parseHello(message)
	if !ok {
		return Info{}, ErrMalformed
	}
	return info, nil
}

// reassemble returns the body of the first handshake message, which may lie in several records.
func reassemble(b []byte) ([]byte, error) {
	var message []byte
	for read := 0; ; {
		if len(message) >= messageHeader {
			if message[0] != typeClientHello {
				return nil, ErrMalformed
			}
			length := int(message[1])<<16 | int(message[2])<<8 | int(message[3])
			if length > MaxBytes {
				return nil, ErrMalformed
			}
			if len(message)-messageHeader >= length {
				return message[messageHeader : messageHeader+length], nil
			}
		}
		if len(b) < recordHeader {
			return nil, more(read + len(b))
		}
		length := int(b[3])<<8 | int(b[4])
		if b[0] != recordHandshake || b[1] != 3 || length == 0 || length > maxRecord {
			return nil, ErrMalformed
		}
		body := b[recordHeader:]
		if len(body) < length {
			if len(message)+len(body) >= messageHeader && len(message) == 0 && body[0] != typeClientHello {
				return nil, ErrMalformed
			}
			return nil, more(read + len(b))
		}
		message = append(message, body[:length]...)
		read += recordHeader + length
		b = body[length:]
	}
}

func more(have int) error {
	if have >= MaxBytes {
		return ErrMalformed
	}
	return ErrMore
}

// cursor reads length-prefixed fields.
type cursor []byte

func (c *cursor) take(n int) ([]byte, bool) {
	if len(*c) < n {
		return nil, false
	}
	out := (*c)[:n]
	*c = (*c)[n:]
	return out, true
}

func (c *cursor) vector(lengthBytes int) (cursor, bool) {
	head, ok := c.take(lengthBytes)
	if !ok {
		return nil, false
	}
	n := 0
	for _, x := range head {
		n = n<<8 | int(x)
	}
	out, ok := c.take(n)
	return out, ok
}

func parseHello(message []byte) (Info, bool) {
	c := cursor(message)
	if _, ok := c.take(2 + 32); !ok { // version, random
		return Info{}, false
	}
	if id, ok := c.vector(1); !ok || len(id) > 32 {
		return Info{}, false
	}
	if suites, ok := c.vector(2); !ok || len(suites) == 0 || len(suites)%2 != 0 {
		return Info{}, false
	}
	if methods, ok := c.vector(1); !ok || len(methods) == 0 {
		return Info{}, false
	}
	if len(c) == 0 {
		return Info{}, true
	}
	extensions, ok := c.vector(2)
	if !ok || len(c) != 0 {
		return Info{}, false
	}
	return parseExtensions(extensions)
}

func parseExtensions(extensions cursor) (Info, bool) {
	var info Info
	seen := map[int]bool{}
	for len(extensions) > 0 {
		head, ok := extensions.take(2)
		if !ok {
			return Info{}, false
		}
		kind := int(head[0])<<8 | int(head[1])
		body, ok := extensions.vector(2)
		// An extension given twice could mean one thing here and another to the server.
		if !ok || seen[kind] {
			return Info{}, false
		}
		seen[kind] = true
		switch kind {
		case extServerName:
			info.ServerName, ok = serverName(body)
		case extALPN:
			info.Protocols, ok = protocols(body)
		}
		if !ok {
			return Info{}, false
		}
	}
	return info, true
}

// serverName reads the list, which has one host name and nothing else.
func serverName(body cursor) (string, bool) {
	list, ok := body.vector(2)
	if !ok || len(body) != 0 {
		return "", false
	}
	kind, ok := list.take(1)
	if !ok || kind[0] != 0 {
		return "", false
	}
	name, ok := list.vector(2)
	if !ok || len(list) != 0 || len(name) == 0 || len(name) > 255 {
		return "", false
	}
	for _, b := range name {
		if b <= ' ' || b >= 0x7f {
			return "", false
		}
	}
	return strings.ToLower(string(name)), true
}

func protocols(body cursor) ([]string, bool) {
	list, ok := body.vector(2)
	if !ok || len(body) != 0 || len(list) == 0 {
		return nil, false
	}
	var out []string
	for len(list) > 0 {
		name, ok := list.vector(1)
		if !ok || len(name) == 0 {
			return nil, false
		}
		out = append(out, string(name))
	}
	return out, true
}
