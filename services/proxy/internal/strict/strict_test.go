// SPDX-License-Identifier: Apache-2.0

package strict

import (
	"bufio"
	"bytes"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
)

var limits = Limits{Bytes: 8 << 10, Count: 50}

// FuzzRequest: what is accepted, the library accepts too, and reads as the same message.
func FuzzRequest(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: h\r\n\r\n", "POST /a?b HTTP/1.1\r\nHost: h:1\r\nContent-Length: 3\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n", "GET http://h/x HTTP/1.1\r\nHost: h\r\n\r\n",
		"GET / HTTP/1.0\r\nConnection: keep-alive, X-A\r\nX-A: 1\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", "CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		n, err := End(in, 0, limits)
		if err != nil || n == 0 {
			return
		}
		// However it arrives, its end is the same.
		for i := range n {
			if m, err := End(in[:i], max(0, i-1), limits); err == nil && m != 0 {
				t.Fatalf("end of %q at %d, but %d of its begin", in, n, m)
			}
		}
		r, err := Parse(in[:n], limits)
		if err != nil {
			return
		}
		if !ValidTarget(r.Target) || r.Host != "" && !ValidHost(r.Host) || !ValidMethod(r.Method) && len(r.Method) <= maxMethod {
			t.Fatalf("accepted %+v", r)
		}
		if r.Method == http.MethodConnect {
			return
		}
		lib, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(append(slices.Clone(in[:n]), "0\r\n\r\n"...))))
		if err != nil {
			// The library knows fewer targets and hosts, which is no other reading.
			if !strings.Contains(err.Error(), "parse") && !strings.Contains(err.Error(), "malformed Host") {
				t.Fatalf("the library refuses %q: %v", in[:n], err)
			}
			return
		}
		if lib.Method != r.Method || lib.ContentLength != r.Length || !strings.EqualFold(lib.Host, r.Host) || lib.ProtoMinor != r.Minor {
			t.Fatalf("%q: %+v, the library %+v", in[:n], r, lib)
		}
		for name := range r.Header {
			if !slices.Equal(r.Header[name], lib.Header[name]) && name != "Te" && name != "Trailer" {
				t.Fatalf("%q: %s: %q, the library %q", in[:n], name, r.Header[name], lib.Header[name])
			}
		}
		if extra := slices.Collect(maps.Keys(r.Header)); slices.Contains(extra, "Connection") || slices.Contains(extra, "Transfer-Encoding") {
			t.Fatalf("%q: kept %v", in[:n], extra)
		}
	})
}

func FuzzTrailer(f *testing.F) {
	f.Add([]byte("X-A: 1\r\nX-B: 2\r\n\r\n"))
	f.Add([]byte("\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		h, err := Trailer(in, limits)
		if err != nil {
			return
		}
		for name, values := range h {
			for _, v := range values {
				if !ValidName(name) || !ValidValue(v) || !ValidTrailer(name) {
					t.Fatalf("accepted %q: %q", name, v)
				}
			}
		}
	})
}

func FuzzChunkSize(f *testing.F) {
	for _, s := range []string{"0", "a", "FF;x=y", "0000000000000001", "7fffffffffffffff"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		n, err := ChunkSize(in)
		if err == nil && (n < 0 || bytes.ContainsAny(in, "\r\n\x00")) {
			t.Fatalf("%q: %d", in, n)
		}
	})
}

func TestParse(t *testing.T) {
	head := "POST /a HTTP/1.1\r\nHost: h\r\nX: 1\r\nx: 2\r\nY:\t 3 \t\r\nContent-Length: 5\r\nTE: trailers, gzip\r\nConnection: close, y\r\n\r\n"
	r, err := Parse([]byte(head), limits)
	if err != nil {
		t.Fatal(err)
	}
	want := http.Header{"X": {"1", "2"}, "Content-Length": {"5"}, "Te": {"trailers"}}
	if !maps.EqualFunc(r.Header, want, slices.Equal) || r.Length != 5 || !r.Close || r.Host != "h" || r.Bytes != len(head) {
		t.Errorf("got %+v", r)
	}
}
