// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"time"

	"github.com/spf13/pflag"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/internal/client"
	"github.com/weirmesh/weir/internal/flags"
	"github.com/weirmesh/weir/services/agent/internal/accesslog"
)

// Config is the configuration of an agent.
type Config struct {
	flags.Common
	// Node is this node's name in the cluster.
	Node string
	// Policy and Relay are the addresses of the replicas of these services.
	Policy, Relay []string
	// StateDir keeps what a new agent must find again.
	StateDir string
	// BPFFS is this node's folder in a bpf file system; Cgroup its cgroup v2 folder, empty = no socket hooks.
	BPFFS, Cgroup string
	// Uplink is the interface to the other nodes.
	Uplink string
	// Aggregation is medium (new connections, new flags, reports) or none (every packet).
	Aggregation string
	// ReportInterval of a live connection; default 5s.
	ReportInterval time.Duration
	// RingBytes bounds all event rings together, ConntrackMax connections, SpoolBytes the batches that no relay has acknowledged.
	RingBytes, ConntrackMax, SpoolBytes int
	// ConntrackTimeouts say how long a silent connection of a kind is tracked: "udp" to "60s" and so on; what is not named has its default.
	ConntrackTimeouts map[string]string
	// Routing to pods of other nodes: native or vxlan.
	Routing string
	// PolicyPeersMax bounds the rows of policies, PolicyRangesMax their port ranges, IPCacheMax the prefixes with an identity.
	PolicyPeersMax, PolicyRangesMax, IPCacheMax int
	// ServicesMax bounds service frontends, BackendsMax the backends of all.
	ServicesMax, BackendsMax int
	// Masquerade gives pods' packets that leave the cluster the node's address.
	Masquerade bool
	// DNSPort is where weir-dns listens, ProxyAdminPort where the node's proxy has its admin interface: who listens there says that there is one (0 = it is
	// only known by its listeners).
	DNSPort, ProxyAdminPort uint16
	// AccessLogSocket takes the proxy's access log; empty = accesslog.sock beside Socket.
	AccessLogSocket string
	// L7Headers are those that flows show ("*" = all that proxies tell), L7RedactHeaders those of which they do not show the value. L7Query shows the
	// query of URLs.
	L7Headers, L7RedactHeaders []string
	L7Query                    bool
	// ForceClsact uses clsact filters even where the kernel has tcx.
	ForceClsact bool
	// ClockOffset shifts all times that this agent reports; for tests.
	ClockOffset time.Duration
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	d := datapath.DefaultConfig()
	return Config{
		Common:   flags.Default(""),
		StateDir: "/var/lib/weir", BPFFS: "/sys/fs/bpf/weir", Uplink: "eth0", Aggregation: "medium",
		ReportInterval: d.ReportInterval, RingBytes: d.RingBytes, ConntrackMax: d.ConntrackMax, SpoolBytes: 32 << 20,
		Routing: d.Routing.String(), PolicyPeersMax: d.PolicyPeersMax, PolicyRangesMax: d.PolicyRangesMax, IPCacheMax: d.IPCacheMax, ServicesMax: d.ServicesMax, BackendsMax: d.BackendsMax,
		Masquerade: true, DNSPort: 10053, ProxyAdminPort: 9901, L7Headers: []string{"*"}, L7RedactHeaders: accesslog.DefaultRedacted(),
	}
}

// Add adds the flags; the values that c holds are their defaults.
func (c *Config) Add(set *pflag.FlagSet) {
	c.Common.Add(set)
	set.StringVar(&c.Node, "node", c.Node, "`name` of this node")
	set.StringSliceVar(&c.Policy, "policy", c.Policy, "`addresses` of the policy service's replicas")
	set.StringSliceVar(&c.Relay, "relay", c.Relay, "`addresses` of the relays")
	set.StringVar(&c.StateDir, "state-dir", c.StateDir, "`folder` that keeps endpoints and the last policy state")
	set.StringVar(&c.BPFFS, "bpffs", c.BPFFS, "`folder` in a bpf file system, of this node alone")
	set.StringVar(&c.Cgroup, "cgroup", c.Cgroup, "cgroup v2 `folder` of this node's pods; empty = services are not translated")
	set.StringVar(&c.Uplink, "uplink", c.Uplink, "`interface` to the other nodes")
	set.StringVar(&c.Aggregation, "aggregation", c.Aggregation, "which packets make a flow: medium or none (every packet)")
	set.DurationVar(&c.ReportInterval, "report-interval", c.ReportInterval, "time between flows of a live connection, per direction")
	set.IntVar(&c.RingBytes, "ring-bytes", c.RingBytes, "`bytes` of all event rings together")
	set.IntVar(&c.ConntrackMax, "ct-max", c.ConntrackMax, "`number` of connections that are tracked; more are refused")
	set.StringToStringVar(&c.ConntrackTimeouts, "ct-timeouts", c.ConntrackTimeouts, "how long silent connections are tracked: `KIND=DURATION,...` of "+timeoutNames())
	set.IntVar(&c.SpoolBytes, "spool-bytes", c.SpoolBytes, "`bytes` of flows that wait for a relay; more are dropped, oldest first, and counted")
	set.StringVar(&c.Routing, "routing", c.Routing, "how packets get to pods of other nodes: native (the nodes' routes) or vxlan")
	set.IntVar(&c.PolicyPeersMax, "policy-peers-max", c.PolicyPeersMax, "`number` of rows of policies: one for each policy and peer that it tells apart")
	set.IntVar(&c.PolicyRangesMax, "policy-ranges-max", c.PolicyRangesMax, "`number` of port ranges of all different rows of policies")
	set.IntVar(&c.IPCacheMax, "ipcache-max", c.IPCacheMax, "`number` of prefixes with an identity")
	set.IntVar(&c.ServicesMax, "services-max", c.ServicesMax, "`number` of service frontends (address, port and protocol)")
	set.IntVar(&c.BackendsMax, "backends-max", c.BackendsMax, "`number` of backends of all frontends that differ")
	set.BoolVar(&c.Masquerade, "masquerade", c.Masquerade, "give packets of pods that leave the cluster the node's address")
	set.Uint16Var(&c.DNSPort, "dns-port", c.DNSPort, "`port` of weir-dns on 127.0.0.1 and ::1")
	set.Uint16Var(&c.ProxyAdminPort, "proxy-admin-port", c.ProxyAdminPort,
		"`port` of the proxy's admin interface on 127.0.0.1, by which it is known to be there; 0 = by its listeners alone")
	set.StringVar(&c.AccessLogSocket, "access-log-socket", c.AccessLogSocket, "unix `socket` for the proxy's access log; empty = accesslog.sock beside --socket")
	set.StringSliceVar(&c.L7Headers, "l7-headers", c.L7Headers, "`names` of the headers that flows show; * = all that the proxy tells")
	set.StringSliceVar(&c.L7RedactHeaders, "l7-redact-headers", c.L7RedactHeaders, "`names` of headers whose values flows do not show")
	set.BoolVar(&c.L7Query, "l7-query", c.L7Query, "show the query of URLs in flows")
	set.BoolVar(&c.ForceClsact, "force-clsact", c.ForceClsact, "attach by clsact even where the kernel has tcx")
	set.DurationVar(&c.ClockOffset, "clock-offset", c.ClockOffset, "shift of all reported times (tests)")
	_ = set.MarkHidden("clock-offset") // the flag exists
}

// nodePattern: a Kubernetes node name; it is a NATS subject token as well, less its dots.
var nodePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9.\-]{0,251}[a-z0-9])?$`)

// Validate reports all faults joined.
func (c *Config) Validate() error {
	errs := []error{
		c.Common.Validate(), c.TLS.Validate(),
		client.CheckAddresses("policy", c.Policy), client.CheckAddresses("relay", c.Relay),
	}
	if !nodePattern.MatchString(c.Node) {
		errs = append(errs, fmt.Errorf("node %q is not a node name", c.Node))
	}
	if c.Socket == "" {
		errs = append(errs, errors.New("socket is empty: the CNI plugin needs it"))
	}
	for _, p := range []struct{ name, value string }{{"state-dir", c.StateDir}, {"bpffs", c.BPFFS}} {
		if !filepath.IsAbs(p.value) {
			errs = append(errs, fmt.Errorf("%s %q is not an absolute path", p.name, p.value))
		}
	}
	if c.Cgroup != "" && !filepath.IsAbs(c.Cgroup) {
		errs = append(errs, fmt.Errorf("cgroup %q is not an absolute path", c.Cgroup))
	}
	if c.AccessLogSocket != "" && (!filepath.IsAbs(c.AccessLogSocket) || c.AccessLogSocket == c.Socket) {
		errs = append(errs, fmt.Errorf("access-log-socket %q is not an absolute path of its own", c.AccessLogSocket))
	}
	if c.DNSPort == 0 {
		errs = append(errs, errors.New("dns-port 0 is none"))
	}
	if c.Uplink == "" {
		errs = append(errs, errors.New("uplink is empty"))
	}
	if c.SpoolBytes < 1<<20 {
		errs = append(errs, fmt.Errorf("spool-bytes %d is less than 1 MiB", c.SpoolBytes))
	}
	if d, err := c.datapath(); err != nil {
		errs = append(errs, err)
	} else {
		errs = append(errs, d.Validate())
	}
	return errors.Join(errs...)
}

// accessLog is the path of the access log's socket.
func (c *Config) accessLog() string {
	if c.AccessLogSocket != "" {
		return c.AccessLogSocket
	}
	return filepath.Join(filepath.Dir(c.Socket), "accesslog.sock")
}

// datapath is the kernel part's configuration, less the node's addresses.
func (c *Config) datapath() (datapath.Config, error) {
	d := datapath.DefaultConfig()
	aggregation, err := datapath.ParseAggregation(c.Aggregation)
	if err != nil {
		return d, err
	}
	if d.Timeouts, err = parseTimeouts(c.ConntrackTimeouts); err != nil {
		return d, err
	}
	if d.Routing, err = datapath.ParseRouting(c.Routing); err != nil {
		return d, err
	}
	if d.Routing == datapath.RoutingVXLAN {
		d.OverlayIfIndex = 1 // until the device is there
	}
	d.ServicesMax, d.BackendsMax = c.ServicesMax, c.BackendsMax
	d.PolicyPeersMax, d.PolicyRangesMax, d.IPCacheMax = c.PolicyPeersMax, c.PolicyRangesMax, c.IPCacheMax
	d.PinPath, d.RingBytes, d.ConntrackMax = c.BPFFS, c.RingBytes, c.ConntrackMax
	d.Aggregation, d.ReportInterval, d.Masquerade, d.ForceClsact = aggregation, c.ReportInterval, c.Masquerade, c.ForceClsact
	return d, nil
}
