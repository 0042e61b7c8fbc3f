// SPDX-License-Identifier: Apache-2.0

package render

import "github.com/weirmesh/weir/internal/expression"

// Options are what renders alike everywhere; replicas must have the same.
type Options struct {
	// RequestHeaders and ResponseHeaders go into the access log, beside what is always there.
	RequestHeaders, ResponseHeaders []string
	// NamespaceBytes bounds what all configurations of one namespace may weigh on one node; default 8 MiB.
	NamespaceBytes int
	// NamespaceInstructions bounds the regular expressions of the configurations and HTTP rules of one namespace on one node: what they cost the proxy is memory and
	// compiling, which neighbours would feel. Rules come first, and are in the proxy twice: a filter is asked what it does and what it would do; default expression.MaxInstructions.
	NamespaceInstructions int
}

// DefaultOptions returns the defaults.
func DefaultOptions() Options {
	return Options{
		RequestHeaders: []string{
			"content-type", "content-length", "traceparent", "tracestate", "b3", "x-b3-traceid", "x-request-id", "x-forwarded-for", "referer",
			"user-agent", "grpc-timeout",
		},
		ResponseHeaders:       []string{"content-type", "content-length", "location", "server", "grpc-status", "grpc-message"},
		NamespaceBytes:        8 << 20,
		NamespaceInstructions: expression.MaxInstructions,
	}
}

// Names that the design fixes.
const (
	// OriginalDst is the cluster that leads to where the client wanted to go.
	OriginalDst = "original-dst"
	// AccessLog is the cluster of the agent's access-log service.
	AccessLog = "weir-access-log"

	proxyPortBase = 20000
	maxSlot       = 4095
	// Upstream sockets have these source ports.
	upstreamPortMin, upstreamPortMax = 52000, 60999
	// Marks of upstream sockets: the stage that has been passed.
	markRoute, markEgress, markIngress = 0x100, 0x300, 0x500

	deniedBody = "Access denied\r\n"
)
