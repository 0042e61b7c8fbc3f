// SPDX-License-Identifier: Apache-2.0

// Package proxy is the node's L7 proxy: what the xDS server says, done to the connections that the kernel programs hand over.
package proxy

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/internal/client"
	"github.com/weirmesh/weir/internal/flags"
	"github.com/weirmesh/weir/services/proxy/internal/limit"
)

// Config is the configuration of a proxy.
type Config struct {
	flags.Common
	// Node is the name of the node, and the id by which the xDS server knows the proxy.
	Node string
	// XDS are the addresses of the xDS servers, tried in this order.
	XDS []string
	// AdminListen is the loopback address of the operator's page; empty = none.
	AdminListen string
	// AccessLog is the path of the agent's socket, told to the xDS server, which puts it into the configuration.
	AccessLog string
	// HotRestartSocket is the path by which a new process takes over; empty = none does.
	HotRestartSocket string
	// HotRestartWait is how long a new process waits for its configuration before it gives up; default 30 s.
	HotRestartWait time.Duration
	// Drain is how long connections may go on after SIGTERM; default 5 s. ParentDrain: after a new process took over; default 10 min.
	Drain, ParentDrain time.Duration
	// ListenerDrain is how long connections of a removed listener may go on; default 1 min.
	ListenerDrain time.Duration
	// ListenerConnections bounds the connections of one listener; 0 = no bound.
	ListenerConnections int64
	// Limits of tenants. TotalConnections 0 = a quarter of the descriptors that the process may have.
	Limits limit.Config
	// LogStreamBytes and LogTotalBytes bound the access log's entries that wait, of one listener and of all; default 1 MiB and 32 MiB.
	LogStreamBytes, LogTotalBytes int64
	// ChoosePorts makes the proxy choose upstream ports itself, as on kernels before 6.3.
	ChoosePorts bool
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	return Config{
		Common:              flags.Default(""),
		AdminListen:         "127.0.0.1:9901",
		HotRestartWait:      30 * time.Second,
		Drain:               5 * time.Second,
		ParentDrain:         10 * time.Minute,
		ListenerDrain:       time.Minute,
		ListenerConnections: 0,
		Limits: limit.Config{
			Connections: 16384, Requests: 16384, Buffer: 64 << 20, AcceptRate: 10000,
			TotalConnections: 0, TotalRequests: 65536, TotalBuffer: 256 << 20,
		},
		LogStreamBytes: 1 << 20,
		LogTotalBytes:  32 << 20,
	}
}

// AddFlags adds the flags; the values that c holds are their defaults.
func (c *Config) AddFlags(set *pflag.FlagSet) {
	c.Add(set)
	set.StringVar(&c.Node, "node", c.Node, "`name` of this node")
	set.StringSliceVar(&c.XDS, "xds", c.XDS, "`addresses` of the xDS servers")
	set.StringVar(&c.AdminListen, "admin-listen", c.AdminListen, "loopback `address` of the operator's page; empty = none")
	set.StringVar(&c.AccessLog, "access-log", c.AccessLog, "`path` of the socket that takes the access log, told to the xDS server")
	set.StringVar(&c.HotRestartSocket, "hot-restart-socket", c.HotRestartSocket, "`path` of the socket by which a new process takes over; empty = none does")
	set.DurationVar(&c.HotRestartWait, "hot-restart-wait", c.HotRestartWait, "`time` that a new process waits for its configuration before it gives up")
	set.DurationVar(&c.Drain, "drain-time", c.Drain, "`time` that connections may go on after the process was told to end")
	set.DurationVar(&c.ParentDrain, "parent-drain-time", c.ParentDrain, "`time` that connections may go on after a new process took over")
	set.DurationVar(&c.ListenerDrain, "listener-drain-time", c.ListenerDrain, "`time` that connections of a removed listener may go on")
	set.Int64Var(&c.ListenerConnections, "listener-connections", c.ListenerConnections, "`number` of connections of one listener; 0 = no bound")
	set.Int64Var(&c.Limits.Connections, "tenant-connections", c.Limits.Connections, "`number` of connections of one namespace; 0 = no bound")
	set.Int64Var(&c.Limits.Requests, "tenant-requests", c.Limits.Requests, "`number` of requests in flight of one namespace; 0 = no bound")
	set.Int64Var(&c.Limits.Buffer, "tenant-buffer-bytes", c.Limits.Buffer, "`bytes` that wait in the proxy for one namespace; 0 = no bound")
	set.Float64Var(&c.Limits.AcceptRate, "tenant-accept-rate", c.Limits.AcceptRate, "new connections a `second` of one namespace; 0 = no bound")
	set.Int64Var(&c.Limits.TotalConnections, "max-connections", c.Limits.TotalConnections, "`number` of connections in all; 0 = by the limit of open files")
	set.Int64Var(&c.Limits.TotalRequests, "max-requests", c.Limits.TotalRequests, "`number` of requests in flight in all; 0 = no bound")
	set.Int64Var(&c.Limits.TotalBuffer, "max-buffer-bytes", c.Limits.TotalBuffer, "`bytes` that wait in the proxy in all; 0 = no bound")
	set.Int64Var(&c.LogStreamBytes, "access-log-stream-bytes", c.LogStreamBytes, "`bytes` of one listener's access log that may wait")
	set.Int64Var(&c.LogTotalBytes, "access-log-total-bytes", c.LogTotalBytes, "`bytes` of the access log that may wait in all")
	set.BoolVar(&c.ChoosePorts, "choose-upstream-ports", c.ChoosePorts, "choose upstream ports here instead of in the kernel (which needs 6.3)")
}

// Validate reports all faults joined.
func (c *Config) Validate() error {
	errs := []error{c.Common.Validate(), c.TLS.Validate(), client.CheckAddresses("xds", c.XDS), c.Limits.Validate()}
	check := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New(what))
		}
	}
	check(c.Node != "", "node is empty")
	if c.AdminListen != "" {
		host, _, err := net.SplitHostPort(c.AdminListen)
		addr, addrErr := netip.ParseAddr(host)
		// The page tells everything about everyone: it is for the node alone.
		check(err == nil && addrErr == nil && addr.IsLoopback(), fmt.Sprintf("admin-listen: %q is not a loopback address with a port", c.AdminListen))
	}
	check(c.Drain >= 0 && c.ParentDrain >= 0 && c.ListenerDrain >= 0, "a drain time is negative")
	check(c.HotRestartWait > 0, "hot-restart-wait is not above 0")
	check(c.ListenerConnections >= 0, "listener-connections is negative")
	check(c.LogStreamBytes > 0 && c.LogTotalBytes > 0, "the access log's bytes are not above 0")
	return errors.Join(errs...)
}

// descriptorsPerConnection: a connection through the proxy has two sockets, and up to two pipes while the kernel moves its bytes.
const descriptorsPerConnection = 4

// totalConnections is how many connections fit into the limit of open files.
func totalConnections() (int64, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("limit of open files: %w", err)
	}
	return int64(min(limit.Cur, 1<<20)) / descriptorsPerConnection, nil //nolint:gosec // bounded above
}
