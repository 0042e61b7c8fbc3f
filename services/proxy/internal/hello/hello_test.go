// SPDX-License-Identifier: Apache-2.0

package hello_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/hello"
)

// record returns what a client of crypto/tls sends first.
func record(t testing.TB, config *tls.Config) []byte {
	t.Helper()
	client, server := net.Pipe()
	go func() {
		_ = tls.Client(client, config).HandshakeContext(t.Context()) // it fails: nobody answers
	}()
	head := make([]byte, 5)
	if _, err := io.ReadFull(server, head); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, int(head[3])<<8|int(head[4]))
	if _, err := io.ReadFull(server, body); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(server.Close(), client.Close()); err != nil {
		t.Fatal(err)
	}
	return append(head, body...)
}

// split puts the message of one record into several.
func split(whole []byte, size int) []byte {
	var out []byte
	for body := whole[5:]; len(body) > 0; {
		n := min(size, len(body))
		out = append(out, whole[0], whole[1], whole[2], byte(n>>8), byte(n))
		out = append(out, body[:n]...)
		body = body[n:]
	}
	return out
}

func TestParse(t *testing.T) {
	whole := record(t, &tls.Config{ServerName: "API.Example.org", NextProtos: []string{"h2", "http/1.1"}, MinVersion: tls.VersionTLS12})
	want := hello.Info{ServerName: "api.example.org", Protocols: []string{"h2", "http/1.1"}}
	check := func(name string, b []byte) {
		t.Helper()
		got, err := hello.Parse(b)
		if err != nil || got.ServerName != want.ServerName || !slices.Equal(got.Protocols, want.Protocols) {
			t.Errorf("%s: got %+v, %v, want %+v", name, got, err, want)
		}
		for i := range b {
			if _, err := hello.Parse(b[:i]); !errors.Is(err, hello.ErrMore) {
				t.Fatalf("%s: %d of %d bytes: %v, want ErrMore", name, i, len(b), err)
			}
		}
	}
	check("one record", whole)
	check("records of 40 bytes", split(whole, 40))
	check("records of 3 bytes", split(whole, 3))

	bare, err := hello.Parse(record(t, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}))
	if err != nil || bare.ServerName != "" || bare.Protocols != nil {
		t.Errorf("without names: %+v, %v", bare, err)
	}
}

func TestRefused(t *testing.T) {
	whole := record(t, &tls.Config{ServerName: "a.example", MinVersion: tls.VersionTLS12})
	edit := func(f func(b []byte) []byte) []byte { return f(slices.Clone(whole)) }
	for _, tc := range []struct {
		name string
		in   []byte
		want error
	}{
		{"http", []byte("GET / HTTP/1.1\r\n"), hello.ErrNotTLS},
		{"one byte of http", []byte("G"), hello.ErrNotTLS},
		{"record version", []byte{22, 2}, hello.ErrNotTLS},
		{"nothing", nil, hello.ErrMore},
		{"empty record", []byte{22, 3, 1, 0, 0}, hello.ErrMalformed},
		{"huge record", []byte{22, 3, 1, 0xff, 0xff}, hello.ErrMalformed},
		{"server hello", edit(func(b []byte) []byte { b[5] = 2; return b }), hello.ErrMalformed},
		{"alert in the middle", edit(func(b []byte) []byte { b = split(b, 40); b[45] = 21; return b }), hello.ErrMalformed},
		{"cut inside", edit(func(b []byte) []byte { b[8] -= 7; return b }), hello.ErrMalformed},
		{"huge message", []byte{22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff}, hello.ErrMalformed},
		{"endless", split(append([]byte{22, 3, 1, 0, 0, 1, 0, 0x40, 0}, make([]byte, 16000)...), 1)[:hello.MaxBytes], hello.ErrMalformed},
	} {
		if _, err := hello.Parse(tc.in); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
}

// FuzzParse: whatever comes, an answer that more bytes after the message do not change, and names that can be told.
func FuzzParse(f *testing.F) {
	f.Add(record(f, &tls.Config{ServerName: "a.example", NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS12}))
	f.Add(split(record(f, &tls.Config{ServerName: "b.example", MinVersion: tls.VersionTLS13}), 7))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := hello.Parse(b)
		if err != nil {
			return
		}
		if strings.ContainsAny(got.ServerName, " \x00\r\n") || strings.ToLower(got.ServerName) != got.ServerName {
			t.Fatalf("server name %q", got.ServerName)
		}
		again, err := hello.Parse(append(slices.Clone(b), "what follows"...))
		if err != nil || again.ServerName != got.ServerName || !slices.Equal(again.Protocols, got.Protocols) {
			t.Fatalf("%+v, with bytes behind it %+v, %v", got, again, err)
		}
	})
}

// TestAgainstStandard: where crypto/tls and this package both read a changed ClientHello, they read the same names.
func TestAgainstStandard(t *testing.T) {
	whole := record(t, &tls.Config{ServerName: "a.example", NextProtos: []string{"h2", "x"}, MinVersion: tls.VersionTLS12})
	random := rand.New(rand.NewPCG(1, 2))
	both := 0
	for range 20000 {
		b := slices.Clone(whole)
		for range 1 + random.IntN(3) {
			b[random.IntN(len(b))] = byte(random.IntN(256))
		}
		got, err := hello.Parse(b)
		name, protocols, ok := standard(b)
		if err != nil || !ok {
			continue
		}
		both++
		if got.ServerName != strings.ToLower(name) || !slices.Equal(got.Protocols, protocols) {
			t.Fatalf("got %+v, crypto/tls reads %q, %q of %x", got, name, protocols, b)
		}
	}
	if both < 1000 {
		t.Fatalf("only %d of the inputs were read by both", both)
	}
}

// oneWay gives a server's bytes and swallows its answers.
type oneWay struct{ io.Reader }

func (oneWay) Write(b []byte) (int, error)      { return len(b), nil }
func (oneWay) Close() error                     { return nil }
func (oneWay) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (oneWay) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (oneWay) SetDeadline(time.Time) error      { return nil }
func (oneWay) SetReadDeadline(time.Time) error  { return nil }
func (oneWay) SetWriteDeadline(time.Time) error { return nil }

func standard(b []byte) (name string, protocols []string, ok bool) {
	stop := errors.New("seen")
	server := tls.Server(oneWay{strings.NewReader(string(b))}, &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			name, protocols, ok = h.ServerName, h.SupportedProtos, true
			return nil, stop
		},
	})
	_ = server.HandshakeContext(context.Background()) // it ends in an error by construction
	return name, protocols, ok
}
