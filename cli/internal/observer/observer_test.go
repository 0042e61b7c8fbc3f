// SPDX-License-Identifier: Apache-2.0

package observer

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/gen/observer"
)

// parse gives args to the server's flags.
func parse(t *testing.T, args ...string) *Config {
	t.Helper()
	c := &Config{}
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	c.Register(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestValidate(t *testing.T) {
	tests := []struct {
		args string
		want string // "" = fine
	}{
		{"", ""},
		{"--tls --tls-client-cert-file=c --tls-client-key-file=k", ""},
		{"--server=tls://a:1 --tls-client-cert-file=c --tls-client-key-file=k", ""},
		{"--tls --tls-client-cert-file=c", "certificate and private key are both required"},
		{"--tls-client-cert-file=c --tls-client-key-file=k", "transport layer security required"},
		{"--tls --basic-auth-username=u", "user name and password are both required"},
		{"--basic-auth-username=u --basic-auth-password=p", "basic authentication needs transport layer security"},
		{"--server=", "--server must not be empty"},
		{"--timeout=0s", "timeouts must be greater than 0"},
	}
	for _, tt := range tests {
		err := parse(t, strings.Fields(tt.args)...).Validate()
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.args, err, tt.want)
		}
	}
	// All faults at once.
	err := parse(t, "--server=", "--tls", "--tls-client-cert-file=c", "--basic-auth-username=u").Validate()
	if n := strings.Count(err.Error(), "\n") + 1; n != 3 {
		t.Errorf("%d faults: %v", n, err)
	}
}

func TestDialFaults(t *testing.T) {
	for args, want := range map[string]string{
		"--tls --tls-ca-cert-files=/nonexistent.pem":                             "read --tls-ca-cert-files: open /nonexistent.pem",
		"--tls --tls-ca-cert-files=/dev/null":                                    "/dev/null holds no PEM certificate",
		"--tls --tls-client-cert-file=/dev/null --tls-client-key-file=/dev/null": "load the client's certificate",
	} {
		if _, err := parse(t, strings.Fields(args)...).Dial(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", args, err, want)
		}
	}
}

func call(t *testing.T, c *Config) error {
	t.Helper()
	conn, err := c.Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), c.RequestTimeout)
	defer cancel()
	_, err = observer.NewObserverClient(conn).ServerStatus(ctx, &observer.ServerStatusRequest{})
	return c.Explain("ServerStatus", err)
}

func TestExplainRealFailures(t *testing.T) {
	// A port that nobody listens on.
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := ln.Addr().String()
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	want := "cannot reach an observer at " + closed + ": dial tcp " + closed + ": connect: connection refused: start a lab with `weir lab up`, or name a server with --server or WEIR_SERVER"
	if err := call(t, parse(t, "--server="+closed)); err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}

	// A gRPC server without TLS and without the service.
	if ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	served := make(chan error, 1)
	go func() { served <- server.Serve(ln) }()
	defer func() { server.Stop(); <-served }()
	open := ln.Addr().String()
	if err := call(t, parse(t, "--server="+open)); err == nil || !strings.HasPrefix(err.Error(), "the server at "+open+" lacks the call ServerStatus (") {
		t.Error(err)
	}
	if err := call(t, parse(t, "--server=tls://"+open)); err == nil || !strings.HasSuffix(err.Error(), "it speaks without TLS, so leave out --tls") {
		t.Error(err)
	}

	// Something that accepts and stays silent: --timeout ends it.
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	c := parse(t, "--server="+silent.Addr().String(), "--timeout=100ms", "--request-timeout=1m")
	if err := call(t, c); err == nil || !strings.HasPrefix(err.Error(), "cannot reach an observer at "+c.Server) {
		t.Error(err)
	}

	// unix:// works; nothing is there.
	if err := call(t, parse(t, "--server=unix:///nonexistent/observer.sock")); err == nil || !strings.Contains(err.Error(), "dial unix /nonexistent/observer.sock: connect: no such file or directory") {
		t.Error(err)
	}
}

func TestExplainCodes(t *testing.T) {
	c := &Config{Server: "s:1", RequestTimeout: time.Second}
	for code, want := range map[codes.Code]string{
		codes.Unknown:           "why",
		codes.InvalidArgument:   "why",
		codes.DeadlineExceeded:  "the server at s:1 did not answer in time (why): raise --request-timeout, or see `weir status`",
		codes.PermissionDenied:  "the server at s:1 refused the call GetNodes: why",
		codes.ResourceExhausted: "the server at s:1 is out of resources: why",
		codes.Internal:          "the server at s:1 failed: why (Internal)",
	} {
		if got := c.Explain("GetNodes", status.Error(code, "why")); got.Error() != want {
			t.Errorf("%v: %v, want %s", code, got, want)
		}
	}
	plain := errors.New("plain")
	if got := c.Explain("x", plain); !errors.Is(got, plain) {
		t.Errorf("plain error became %v", got)
	}
	if got := c.Explain("x", nil); got != nil {
		t.Errorf("nil became %v", got)
	}
}
