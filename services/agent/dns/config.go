// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/pflag"

	"github.com/weirmesh/weir/internal/flags"
	"github.com/weirmesh/weir/services/agent/internal/dnswire"
)

// Config is the configuration of a weir-dns.
type Config struct {
	flags.Common
	// Node is this node's name in the cluster.
	Node string
	// BPFFS is this node's folder in a bpf file system, Agent its agent's socket.
	BPFFS, Agent string
	// StateDir keeps names and rules; its own, not the agent's.
	StateDir string
	// Port is where the kernel brings queries, on 127.0.0.1 and ::1.
	Port uint16
	// MinTTL is the least time in seconds that an address is kept.
	MinTTL int
	// IdleGrace is how long an address is kept after its last connection.
	IdleGrace time.Duration
	// MaxPerName is how many addresses one endpoint may learn of one name, MaxPerEndpoint of all names, MaxNames what the node keeps in all, and
	// MaxDeferred what it keeps beside for live connections alone.
	MaxPerName, MaxPerEndpoint, MaxNames, MaxDeferred int
	// Reject says how refused queries are answered: refused or nameError.
	Reject string
	// Timeout of a query at its server, MapsTimeout of an answer that waits for the kernel's maps.
	Timeout, MapsTimeout time.Duration
	// MaxQueries in flight, in all and of one client.
	MaxQueries, MaxQueriesPerClient int
	// MaxConns are TCP connections of clients, in all and of one client.
	MaxConns, MaxConnsPerClient int
	// UDPSize is the largest UDP answer that servers are asked for, in bytes: larger ones come as fragments, which do not pass a proxy.
	UDPSize uint16
	// RecordsMax bounds records that wait for the agent.
	RecordsMax int
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	return Config{
		Common: flags.Default(""), BPFFS: "/sys/fs/bpf/weir", Agent: "/run/weir/agent.sock", StateDir: "/var/lib/weir/dns", Port: 10053,
		MaxPerName: 1000, MaxPerEndpoint: 20000, MaxNames: 50000, MaxDeferred: 10000, Reject: rejectRefused,
		Timeout: 10 * time.Second, MapsTimeout: time.Second, MaxQueries: 20000, MaxQueriesPerClient: 4096, MaxConns: 2048, MaxConnsPerClient: 256,
		UDPSize: 1232, RecordsMax: 16384,
	}
}

const (
	rejectRefused   = "refused"
	rejectNameError = "nameError"
)

// Add adds the flags; the values that c holds are their defaults.
func (c *Config) Add(set *pflag.FlagSet) {
	c.Common.Add(set)
	set.StringVar(&c.Node, "node", c.Node, "`name` of this node")
	set.StringVar(&c.BPFFS, "bpffs", c.BPFFS, "`folder` in a bpf file system, of this node alone")
	set.StringVar(&c.Agent, "agent", c.Agent, "`path` of the agent's unix socket")
	set.StringVar(&c.StateDir, "state-dir", c.StateDir, "`folder` that keeps names and rules")
	set.Uint16Var(&c.Port, "dns-port", c.Port, "`port` of 127.0.0.1 and ::1 to which the kernel brings queries")
	set.IntVar(&c.MinTTL, "tofqdns-min-ttl", c.MinTTL, "least `seconds` that an address is kept")
	set.DurationVar(&c.IdleGrace, "tofqdns-idle-connection-grace-period", c.IdleGrace, "how long an address is kept after its last connection")
	set.IntVar(&c.MaxPerName, "tofqdns-endpoint-max-ip-per-hostname", c.MaxPerName, "`number` of addresses of one name that one endpoint may learn")
	set.IntVar(&c.MaxDeferred, "tofqdns-max-deferred-connection-deletes", c.MaxDeferred, "`number` of addresses that live connections alone keep")
	set.IntVar(&c.MaxPerEndpoint, "names-per-endpoint-max", c.MaxPerEndpoint, "`number` of addresses of names that one endpoint may learn")
	set.IntVar(&c.MaxNames, "names-max", c.MaxNames, "`number` of addresses of names that the node keeps")
	set.StringVar(&c.Reject, "tofqdns-dns-reject-response-code", c.Reject, "how refused queries are answered: refused or nameError")
	set.DurationVar(&c.Timeout, "upstream-timeout", c.Timeout, "how long a server's answer is waited for")
	set.DurationVar(&c.MapsTimeout, "maps-timeout", c.MapsTimeout, "how long an answer waits until the kernel's maps hold its addresses")
	set.IntVar(&c.MaxQueries, "queries-max", c.MaxQueries, "`number` of queries in flight")
	set.IntVar(&c.MaxQueriesPerClient, "queries-per-client-max", c.MaxQueriesPerClient, "`number` of queries in flight of one address")
	set.IntVar(&c.MaxConns, "connections-max", c.MaxConns, "`number` of TCP connections of clients")
	set.IntVar(&c.MaxConnsPerClient, "connections-per-client-max", c.MaxConnsPerClient, "`number` of TCP connections of one address")
	set.Uint16Var(&c.UDPSize, "edns-udp-max", c.UDPSize, "largest UDP answer in `bytes` that servers are asked for")
	set.IntVar(&c.RecordsMax, "records-max", c.RecordsMax, "`number` of records that wait for the agent; more are lost, and counted")
}

// Validate reports all faults joined.
func (c *Config) Validate() error {
	errs := []error{c.Common.Validate()}
	if c.Node == "" {
		errs = append(errs, errors.New("node is empty"))
	}
	for _, p := range []struct{ name, value string }{{"bpffs", c.BPFFS}, {"agent", c.Agent}, {"state-dir", c.StateDir}} {
		if !filepath.IsAbs(p.value) {
			errs = append(errs, fmt.Errorf("%s %q is not an absolute path", p.name, p.value))
		}
	}
	if c.Reject != rejectRefused && c.Reject != rejectNameError {
		errs = append(errs, fmt.Errorf("tofqdns-dns-reject-response-code %q is not %s or %s", c.Reject, rejectRefused, rejectNameError))
	}
	for _, n := range []struct {
		name       string
		value, min int
	}{
		{"dns-port", int(c.Port), 1}, {"tofqdns-min-ttl", c.MinTTL, 0}, {"tofqdns-endpoint-max-ip-per-hostname", c.MaxPerName, 1},
		{"tofqdns-max-deferred-connection-deletes", c.MaxDeferred, 0}, {"names-per-endpoint-max", c.MaxPerEndpoint, 1}, {"names-max", c.MaxNames, 1},
		{"queries-max", c.MaxQueries, 1}, {"queries-per-client-max", c.MaxQueriesPerClient, 1}, {"connections-max", c.MaxConns, 1},
		{"connections-per-client-max", c.MaxConnsPerClient, 1}, {"edns-udp-max", int(c.UDPSize), 512}, {"records-max", c.RecordsMax, 1},
		{"upstream-timeout", int(c.Timeout), 1}, {"maps-timeout", int(c.MapsTimeout), 1},
		{"tofqdns-idle-connection-grace-period", int(c.IdleGrace), 0},
	} {
		if n.value < n.min {
			errs = append(errs, fmt.Errorf("%s is %d: want %d or more", n.name, n.value, n.min))
		}
	}
	return errors.Join(errs...)
}

func (c *Config) rejectCode() int {
	if c.Reject == rejectNameError {
		return dnswire.RCodeNameError
	}
	return dnswire.RCodeRefused
}
