// SPDX-License-Identifier: Apache-2.0

package guard

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/strict"
)

// pieces is a connection that is read in pieces of one size.
type pieces struct {
	net.Conn
	r    io.Reader
	size int
}

func (p *pieces) Read(b []byte) (int, error)       { return p.r.Read(b[:min(len(b), p.size)]) }
func (p *pieces) SetReadDeadline(time.Time) error  { return nil }
func (p *pieces) SetWriteDeadline(time.Time) error { return nil }

func guarded(in []byte, size int) *Conn {
	return New(&pieces{r: bytes.NewReader(in), size: size}, nil, Config{
		Limits: strict.Limits{Bytes: 4 << 10, Count: 20}, Upgrades: func(string) bool { return false }, Refused: func(string) {},
	})
}

// limited is a connection that notes how long each read may take.
type limited struct {
	net.Conn
	in     []string // of each read
	limit  time.Time
	limits []bool
}

func (l *limited) Read(b []byte) (int, error) {
	l.limits = append(l.limits, !l.limit.IsZero())
	if len(l.in) == 0 {
		return 0, io.EOF
	}
	n := copy(b, l.in[0])
	l.in = l.in[1:]
	return n, nil
}

func (l *limited) SetReadDeadline(t time.Time) error {
	l.limit = t
	return nil
}

// A connection is idle until a request has come, and again when the handler has done with it: not while the server, which watches the client, has yet to
// call the handler.
func TestIdle(t *testing.T) {
	const request = "GET / HTTP/1.1\r\nHost: h\r\n\r\n"
	l := &limited{in: []string{request, "", "", request}}
	c := New(l, nil, Config{
		Limits: strict.Limits{Bytes: 4 << 10, Count: 20}, Idle: time.Hour, Upgrades: func(string) bool { return false }, Refused: func(string) {},
	})
	head := make([]byte, 4<<10)
	if _, err := c.Read(head); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := c.fillHead(); err != nil {
			t.Fatal(err)
		}
		if len(c.requests) > 0 {
			c.Next()
		}
	}
	c.Done()
	if _, err := c.Read(head); err != nil {
		t.Fatal(err)
	}
	if want := []bool{true, false, false, true}; !slices.Equal(l.limits, want) {
		t.Errorf("reads with a limit: %v, want %v", l.limits, want)
	}
}

// message is what came through.
type message struct {
	method, target, body string
	refused              bool
	broken               bool
}

// through reads what the library's server would, by the library's parser.
func through(t *testing.T, in []byte, size int) (out []message) {
	c := guarded(in, size)
	r := bufio.NewReader(c)
	for {
		req, err := http.ReadRequest(r)
		if err != nil {
			if len(c.requests) > 0 {
				t.Fatalf("%q: the library does not understand what the guard wrote: %v", in, err)
			}
			return out
		}
		q := c.Next()
		c.Done()
		if q.Err != nil {
			return append(out, message{refused: true})
		}
		if req.Method != q.Method || req.ContentLength != q.Length {
			t.Fatalf("%q: guard %s %d, library %s %d", in, q.Method, q.Length, req.Method, req.ContentLength)
		}
		body, err := io.ReadAll(req.Body)
		out = append(out, message{method: q.Method, target: q.Target, body: string(body), broken: err != nil})
		if err != nil || q.Close {
			return out
		}
	}
}

// FuzzConn: the library reads the messages that the guard has read, and no others, in whichever pieces they come.
func FuzzConn(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: h\r\n\r\nGET /2 HTTP/1.1\r\nHost: h\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabcGET /2 HTTP/1.1\r\nHost: h\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;a\r\nabc\r\n0\r\nX: y\r\n\r\nGET /2 HTTP/1.0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
		"\r\nHEAD /x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
	} {
		f.Add([]byte(s), 1)
		f.Add([]byte(s), 5000)
	}
	f.Fuzz(func(t *testing.T, in []byte, size int) {
		size = 1 + max(0, size)%8192
		got, whole := through(t, in, size), through(t, in, 1<<20)
		if len(got) != len(whole) {
			t.Fatalf("%q: %d messages in pieces of %d, %d as a whole", in, len(got), size, len(whole))
		}
		for i := range got {
			// Of a body that breaks, as much may have come through as had come.
			if g, w := got[i], whole[i]; g.broken != w.broken || g.refused != w.refused || g.target != w.target || !g.broken && g.body != w.body {
				t.Fatalf("%q: in pieces of %d %+v, as a whole %+v", in, size, g, w)
			}
		}
	})
}
