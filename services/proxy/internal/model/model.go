// SPDX-License-Identifier: Apache-2.0

// Package model is what the parts of the proxy tell each other: connections, clusters, what is logged, and the limits of tenants.
package model

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// Conn is an accepted connection.
type Conn struct {
	// Listener is its name, Namespace the tenant whose limits count ("" = the node's own).
	Listener, Namespace string
	// Remote is the client; Local the original destination.
	Remote, Local netip.AddrPort
	// ServerName of TLS, read or terminated; "" = none.
	ServerName string
	// TLS: it was terminated here.
	TLS bool
	// Direct: the client connected to the listener's own address, so there is no original destination.
	Direct bool
	// Source: upstream sockets bind to the client's address; nil = they have the node's own.
	Source *Source
}

// Source says how upstream sockets keep the client's address.
type Source struct {
	// Mark of upstream sockets: the stage that has been passed.
	Mark uint32
	// Ports that they may have.
	PortMin, PortMax uint16
}

// Endpoint is one address of a cluster. It is comparable.
type Endpoint struct {
	Address netip.AddrPort
	// Path of a unix socket, for which Address is invalid.
	Path    string
	Weight  uint32
	Healthy bool
}

// Protocol that a cluster speaks.
type Protocol uint8

// Protocols. SameAsClient: what the downstream connection speaks.
const (
	HTTP1 Protocol = iota
	HTTP2
	SameAsClient
)

// Why a request does not reach a cluster.
var (
	ErrNoCluster  = errors.New("no such cluster")
	ErrNoEndpoint = errors.New("no healthy endpoint")
	ErrOverflow   = errors.New("circuit breaker is open")
)

// Cluster chooses endpoints and connects to them. Safe for concurrent use; a newer configuration is another Cluster.
type Cluster interface {
	Name() string
	Protocol() Protocol
	ConnectTimeout() time.Duration
	// Acquire chooses an endpoint for one request (original-destination clusters: c.Local) and counts it until release, which is told whether it went
	// well. avoid are endpoints that a retry should not meet again. ErrNoEndpoint, ErrOverflow.
	Acquire(c *Conn, avoid []netip.AddrPort) (e Endpoint, release func(ok bool), err error)
	// Retry reports whether the retry budget allows one more; done ends it.
	Retry() (done func(), ok bool)
	// Dial connects to an endpoint: bound as c.Source says, TLS included.
	Dial(ctx context.Context, c *Conn, e Endpoint) (net.Conn, error)
}

// Clusters finds clusters by name in the newest configuration; nil = none.
type Clusters interface {
	Cluster(name string) Cluster
}

// Entry is one request, as the access log tells it: once when it was let through (Begin), and once when it ended, or when it was denied.
type Entry struct {
	Conn     *Conn
	LogName  string
	Begin    bool
	Start    time.Time
	Duration time.Duration
	// Protocol is "HTTP/1.1", "HTTP/2" or "HTTP/1.0".
	Protocol                             string
	Method, Scheme, Authority, Path      string // Path with its query, as it was judged
	RequestHeaders, ResponseHeaders      http.Header
	Trailers                             http.Header
	Status                               int
	RequestBytes, ResponseBytes          uint64
	RequestHeaderBytes, ResponseHdrBytes uint64
	// Denied by RBAC; Policy names the RBAC policy that allowed (or the shadow that would have).
	Denied bool
	Policy string
	// Flags as Envoy's response flags: "UH", "UF", "UO", "UT", "URX", "NR", "RL", "DC", "UC", "DPE", ...
	Flags   []string
	Details string
	// Upstream endpoint; invalid = none. Cluster "" = none.
	Upstream netip.AddrPort
	Cluster  string
	Route    string
	Attempts uint32
	// Stream is the number of bytes of a TCP connection: no HTTP fields then.
	Stream bool
	// Begun is the logger's: what it keeps of a request from its beginning to its end. Who makes entries leaves it alone.
	Begun any
}

// Logger takes entries. It never blocks: what it has no room for it counts. The entry, and the headers in it, are the caller's again when Log returns.
type Logger interface{ Log(*Entry) }

// Limits bound what one tenant may use. All methods return quickly; what is refused is counted under the tenant's name and the cause.
type Limits interface {
	// Connection admits one; release ends it.
	Connection(namespace string) (release func(), ok bool)
	// Request admits one in flight.
	Request(namespace string) (release func(), ok bool)
	// Buffer reserves bytes; release gives them back.
	Buffer(namespace string, n int) (release func(), ok bool)
	// Refused counts something that was refused for another cause, such as "header-size" or "rapid-reset".
	Refused(namespace, cause string)
}
