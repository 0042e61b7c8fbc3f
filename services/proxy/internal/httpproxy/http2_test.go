// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/services/proxy/internal/model"
)

// service answers as the interoperability tests of gRPC want, as far as is needed here.
type service struct {
	testgrpc.UnimplementedTestServiceServer
}

func (service) UnaryCall(ctx context.Context, r *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
	if r.GetResponseStatus().GetCode() != 0 {
		return nil, status.Error(codes.Code(r.GetResponseStatus().GetCode()), r.GetResponseStatus().GetMessage())
	}
	md, _ := metadata.FromIncomingContext(ctx)
	grpc.SetTrailer(ctx, metadata.Pairs("x-sum", strings.Join(md.Get("x-in"), ",")))
	return &testgrpc.SimpleResponse{Payload: r.GetPayload()}, nil
}

func (service) EmptyCall(ctx context.Context, _ *testgrpc.Empty) (*testgrpc.Empty, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func (service) FullDuplexCall(s grpc.BidiStreamingServer[testgrpc.StreamingOutputCallRequest, testgrpc.StreamingOutputCallResponse]) error {
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := s.Send(&testgrpc.StreamingOutputCallResponse{Payload: m.GetPayload()}); err != nil {
			return err
		}
	}
}

func grpcBackend(t testing.TB, name string) *cluster {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	testgrpc.RegisterTestServiceServer(s, service{})
	ended := make(chan struct{})
	go func() { defer close(ended); s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-ended })
	c := clusterAt(name, l.Addr())
	c.protocol = model.SameAsClient
	return c
}

func (b *bench) grpc() testgrpc.TestServiceClient {
	b.t.Helper()
	cc, err := grpc.NewClient("passthrough:///"+b.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { cc.Close() })
	return testgrpc.NewTestServiceClient(cc)
}

func TestGRPC(t *testing.T) {
	b := newBench(t, plainManager(""), toBackend, grpcBackend(t, "b"))
	cl := b.grpc()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "x-in", "v"), 20*time.Second)
	defer cancel()
	var trailer metadata.MD
	r, err := cl.UnaryCall(ctx, &testgrpc.SimpleRequest{Payload: &testgrpc.Payload{Body: []byte("hi")}}, grpc.Trailer(&trailer))
	if err != nil || string(r.GetPayload().GetBody()) != "hi" || strings.Join(trailer.Get("x-sum"), "") != "v" {
		t.Fatalf("unary: %v, %v, %v", r, err, trailer)
	}
	_, err = cl.UnaryCall(ctx, &testgrpc.SimpleRequest{ResponseStatus: &testgrpc.EchoStatus{Code: 9, Message: "täxt"}})
	if status.Code(err) != codes.FailedPrecondition || status.Convert(err).Message() != "täxt" {
		t.Errorf("trailers-only: %v", err)
	}
	s, err := cl.FullDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		body := bytes.Repeat([]byte{byte(i)}, i*100)
		if err := s.Send(&testgrpc.StreamingOutputCallRequest{Payload: &testgrpc.Payload{Body: body}}); err != nil {
			t.Fatal(err)
		}
		// Each is answered before the next is sent: nothing may wait in a buffer.
		m, err := s.Recv()
		if err != nil || !bytes.Equal(m.GetPayload().GetBody(), body) {
			t.Fatalf("message %d: %v", i, err)
		}
	}
	s.CloseSend()
	if _, err := s.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("end of stream: %v", err)
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := cl.EmptyCall(short, &testgrpc.Empty{}); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("deadline: %v", err)
	}
}

func TestGRPCDenialAndTimeout(t *testing.T) {
	routes := `{"name":"r","virtual_hosts":[{"name":"v","domains":["*"],"routes":[
		{"match":{"prefix":"/"},"route":{"cluster":"b","timeout":"0s","max_stream_duration":{"grpc_timeout_header_max":"0.05s"}}}],
		"typed_per_filter_config":{"rbac":{"@type":"type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBACPerRoute","rbac":{"rules":{"policies":{
		"ns/p/ingress[0]":{"permissions":[{"url_path":{"path":{"exact":"/grpc.testing.TestService/EmptyCall"}}}],"principals":[{"any":true}]}}}}}}}]}`
	b := newBench(t, plainManager(rbacFilter), routes, grpcBackend(t, "b"))
	cl := b.grpc()
	_, err := cl.UnaryCall(t.Context(), &testgrpc.SimpleRequest{})
	if status.Code(err) != codes.PermissionDenied || status.Convert(err).Message() != "Access denied" {
		t.Errorf("denial: %v", err)
	}
	if e := b.log.next(t); !e.Denied {
		t.Errorf("entry %+v", e)
	}
	// The server never answers: the proxy does, in the time that the route allows although the client would wait longer.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := cl.EmptyCall(ctx, &testgrpc.Empty{}); status.Code(err) != codes.Unavailable {
		t.Errorf("timeout: %v", err)
	}
}

// h2Client speaks frames.
type h2Client struct {
	t   *testing.T
	nc  net.Conn
	fr  *http2.Framer
	enc *hpack.Encoder
	buf bytes.Buffer
	// quiet: somebody else writes.
	quiet bool
}

func (b *bench) frames(t *testing.T) *h2Client {
	nc, err := net.Dial("tcp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(20 * time.Second))
	c := &h2Client{t: t, nc: nc, fr: http2.NewFramer(nc, nc)}
	c.enc = hpack.NewEncoder(&c.buf)
	c.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	io.WriteString(nc, http2.ClientPreface)
	c.fr.WriteSettings()
	return c
}

func (c *h2Client) headers(pairs ...string) []byte {
	c.buf.Reset()
	for i := 0; i < len(pairs); i += 2 {
		c.enc.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	return bytes.Clone(c.buf.Bytes())
}

// outcome reads until stream id, or the connection, has ended: the status, or what the reset or GOAWAY said, or "closed".
func (c *h2Client) outcome(id uint32) string {
	for {
		f, err := c.fr.ReadFrame()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return "nothing"
		}
		if err != nil {
			return "closed"
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() && !c.quiet {
				c.fr.WriteSettingsAck()
			}
		case *http2.MetaHeadersFrame:
			if f.StreamID == id {
				return f.PseudoValue("status")
			}
		case *http2.RSTStreamFrame:
			if f.StreamID == id {
				return f.ErrCode.String()
			}
		case *http2.GoAwayFrame:
			if f.ErrCode != http2.ErrCodeNo {
				return "goaway " + f.ErrCode.String()
			}
		}
	}
}

func TestHTTP2Frames(t *testing.T) {
	get := func(extra ...string) []string {
		return append([]string{":method", "GET", ":scheme", "http", ":path", "/", ":authority", "h"}, extra...)
	}
	request := func(pairs ...string) func(*h2Client) {
		return func(c *h2Client) {
			c.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: c.headers(pairs...), EndHeaders: true, EndStream: true})
		}
	}
	replaced := func(name, value string) func(*h2Client) {
		p := get()
		for i := 0; i < len(p); i += 2 {
			if p[i] == name {
				p[i+1] = value
			}
		}
		return request(p...)
	}
	tests := []struct {
		name string
		do   func(*h2Client)
		want string
	}{
		{"plain", request(get()...), "200"},
		{"te trailers", request(get("te", "trailers")...), "200"},
		{"same host", request(get("host", "h")...), "200"},
		{"other host", request(get("host", "other")...), "400|PROTOCOL_ERROR"},
		{"upper-case name", request(get("X-A", "1")...), "PROTOCOL_ERROR"},
		{"connection header", request(get("connection", "close")...), "400|PROTOCOL_ERROR"},
		{"transfer-encoding", request(get("transfer-encoding", "chunked")...), "400|PROTOCOL_ERROR"},
		{"upgrade", request(get("upgrade", "h2c")...), "400|PROTOCOL_ERROR"},
		{"line feed in value", request(get("x-a", "1\r\nx-b: 2")...), "PROTOCOL_ERROR"},
		{"nul in value", request(get("x-a", "1\x00")...), "PROTOCOL_ERROR"},
		{"space in path", replaced(":path", "/a HTTP/1.1\r\nx: y"), "400|PROTOCOL_ERROR"},
		{"blank in path", replaced(":path", "/a b"), "400"},
		{"fragment in path", replaced(":path", "/a#b"), "400"},
		{"no slash", replaced(":path", "a"), "400|PROTOCOL_ERROR"},
		{"empty path", replaced(":path", ""), "PROTOCOL_ERROR"},
		{"bad method", replaced(":method", "GE T"), "400|PROTOCOL_ERROR"},
		{"connect", request(":method", "CONNECT", ":authority", "h:1"), "400"},
		{"authority with user", replaced(":authority", "u@h"), "400|PROTOCOL_ERROR"},
		{"authority with path", replaced(":authority", "h/x"), "400|PROTOCOL_ERROR"},
		{"bad percent code", replaced(":path", "/%zz"), "400|PROTOCOL_ERROR"},
		{"encoded slash", replaced(":path", "/a%2fb"), "307"},
		{"pseudo after field", request(":method", "GET", ":scheme", "http", "x-a", "1", ":path", "/"), "PROTOCOL_ERROR"},
		{"pseudo twice", request(get(":path", "/b")...), "PROTOCOL_ERROR"},
		{"unknown pseudo", request(get(":x", "1")...), "PROTOCOL_ERROR"},
		{"length beyond data", request(get("content-length", "5")...), "400|PROTOCOL_ERROR"},
		{"two lengths", request(get("content-length", "5", "content-length", "6")...), "400|PROTOCOL_ERROR"},
		{"too many headers", request(get(strings.Split(strings.Repeat("x-a,1,", 110)+"x-a,1", ",")...)...), "431"},
		{"data on idle stream", func(c *h2Client) { c.fr.WriteData(5, true, []byte("x")) }, "goaway PROTOCOL_ERROR"},
		{"even stream", func(c *h2Client) {
			c.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 2, BlockFragment: c.headers(get()...), EndHeaders: true, EndStream: true})
		}, "goaway PROTOCOL_ERROR"},
		{"window overflow", func(c *h2Client) { c.fr.WriteWindowUpdate(0, 1<<31-1) }, "goaway FLOW_CONTROL_ERROR"},
		{"continuation alone", func(c *h2Client) { c.fr.WriteContinuation(1, true, c.headers(get()...)) }, "goaway PROTOCOL_ERROR"},
		{"broken hpack", func(c *h2Client) {
			c.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0xff, 0xff, 0xff, 0xff, 0xff}, EndHeaders: true, EndStream: true})
		}, "goaway COMPRESSION_ERROR"},
		{"push promise", func(c *h2Client) {
			c.fr.WritePushPromise(http2.PushPromiseParam{StreamID: 1, PromiseID: 2, BlockFragment: c.headers(get()...), EndHeaders: true})
		}, "goaway PROTOCOL_ERROR"},
		{"oversized frame", func(c *h2Client) {
			c.fr.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, 1<<20))
		}, "goaway FRAME_SIZE_ERROR|closed"},
		{"continuation flood", func(c *h2Client) {
			c.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: c.headers(get()...)})
			for i := range 10000 {
				if c.fr.WriteContinuation(1, false, c.headers("x-flood", fmt.Sprint(i, strings.Repeat("y", 1000)))) != nil {
					return
				}
			}
		}, "goaway PROTOCOL_ERROR|goaway ENHANCE_YOUR_CALM|closed|431"},
		{"hpack bomb", func(c *h2Client) {
			// One large entry of the table, named again and again.
			c.headers("x-bomb", strings.Repeat("z", 3000))
			block := c.headers(append(get(), strings.Split(strings.Repeat("x-bomb,"+strings.Repeat("z", 3000)+",", 200)+"x-a,1", ",")...)...)
			c.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: append([]byte{}, block[:min(len(block), 16000)]...), EndHeaders: true, EndStream: true})
		}, "431|goaway COMPRESSION_ERROR"},
		{"settings flood", func(c *h2Client) {
			for range 200000 {
				if c.fr.WriteSettings() != nil {
					return
				}
			}
		}, "goaway ENHANCE_YOUR_CALM|closed"},
	}
	c := backend(t, "b", echo)
	b := newBench(t, plainManager(""), toBackend, c)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cl := b.frames(t)
			tt.do(cl)
			if got := cl.outcome(1); !strings.Contains("|"+tt.want+"|", "|"+got+"|") {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
	if len(b.limits.causes()) < 5 {
		t.Errorf("causes counted: %v", b.limits.causes())
	}
	// A neighbour does not notice.
	if resp, _ := b.get("GET / HTTP/1.1\r\nHost: h\r\n\r\n"); resp.StatusCode != 200 {
		t.Errorf("a neighbour got %d", resp.StatusCode)
	}
}

func TestRapidReset(t *testing.T) {
	hold := make(chan struct{})
	c := backend(t, "b", func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-hold:
		}
	})
	defer close(hold)
	b := newBench(t, plainManager(""), toBackend, c)
	cl := b.frames(t)
	cl.quiet = true
	go func() {
		for id := uint32(1); id < 60000; id += 2 {
			block := cl.headers(":method", "GET", ":scheme", "http", ":path", "/", ":authority", "h")
			if cl.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndHeaders: true, EndStream: true}) != nil ||
				cl.fr.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
				return
			}
		}
	}()
	if got := cl.outcome(1 << 30); got != "goaway ENHANCE_YOUR_CALM" && got != "closed" {
		t.Errorf("got %s", got)
	}
	if b.limits.causes()["rapid-reset"] != 1 {
		t.Errorf("causes %v", b.limits.causes())
	}
}

// TestHTTP2Transport: what the library sends without TLS.
func TestHTTP2Transport(t *testing.T) {
	b := newBench(t, plainManager(""), toBackend, backend(t, "b", echo))
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: &protocols, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, b.addr)
	}}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr}).Post("http://h/x?y", "text/plain", strings.NewReader("body"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if resp.ProtoMajor != 2 || string(body) != "POST /x?y host=h body=body x=" {
		t.Errorf("got %s %q", resp.Proto, body)
	}
}

func http2Headers(c *h2Client, path string) http2.HeadersFrameParam {
	block := c.headers(":method", "GET", ":scheme", "http", ":path", path, ":authority", "h")
	return http2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndHeaders: true, EndStream: true}
}
