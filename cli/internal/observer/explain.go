// SPDX-License-Identifier: Apache-2.0

package observer

import (
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Explain turns the error of a call named by method into one that says what
// happened and what to do. Errors that are no gRPC status stay as they are.
func (c *Config) Explain(method string, err error) error {
	s, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	switch text := s.Message(); s.Code() {
	case codes.Unavailable:
		return c.unavailable(text)
	case codes.Unimplemented:
		return fmt.Errorf("the server at %s lacks the call %s (%s): ask another server with --server", c.Server, method, text)
	case codes.DeadlineExceeded:
		return fmt.Errorf("the server at %s did not answer in time (%s): raise --request-timeout, or see `weir status`", c.Server, text)
	case codes.Unauthenticated, codes.PermissionDenied:
		return fmt.Errorf("the server at %s refused the call %s: %s", c.Server, method, text)
	case codes.Unknown, codes.InvalidArgument:
		// What the server says about the request; Hubble's says it without a code.
		return errors.New(text)
	case codes.ResourceExhausted:
		return fmt.Errorf("the server at %s is out of resources: %s", c.Server, text)
	default:
		return fmt.Errorf("the server at %s failed: %s (%s)", c.Server, text, s.Code())
	}
}

func (c *Config) unavailable(text string) error {
	var remedy string
	switch {
	case strings.Contains(text, "first record does not look like a TLS handshake"):
		remedy = "it speaks without TLS, so leave out --tls"
	case strings.Contains(text, "certificate") || strings.Contains(text, "x509:"):
		remedy = "see --tls-ca-cert-files and --tls-server-name"
	case strings.Contains(text, "error reading server preface") || strings.Contains(text, "handshake"):
		remedy = "it is no gRPC server, or it wants --tls"
	default:
		remedy = "start a lab with `weir lab up`, or name a server with --server or WEIR_SERVER"
	}
	return fmt.Errorf("cannot reach an observer at %s: %s: %s", c.Server, cause(text), remedy)
}

// cause cuts gRPC's own words off: connection error: desc = "transport: Error while dialing: dial tcp ...: connection refused".
func cause(text string) string {
	if _, after, ok := strings.Cut(text, `desc = "`); ok {
		text = strings.TrimSuffix(after, `"`)
	}
	text = strings.TrimPrefix(text, "transport: ")
	return strings.TrimPrefix(text, "Error while dialing: ")
}
