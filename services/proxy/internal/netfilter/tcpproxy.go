// SPDX-License-Identifier: Apache-2.0

package netfilter

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"

	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/resource"
)

// Env is what filters need of the proxy.
type Env struct {
	Clusters model.Clusters
	Limits   model.Limits
}

// TCPProxy passes a connection's bytes to a cluster.
type TCPProxy struct {
	env      Env
	logger   model.Logger
	targets  []target
	total    uint64
	idle     time.Duration // 0 = for ever
	longest  time.Duration // 0 = for ever
	attempts uint32

	logStart, logConnected bool
}

type target struct {
	cluster string
	sum     uint64
}

const defaultIdle = time.Hour

// CompileTCPProxy compiles the filter; logger is made of its access_log.
func CompileTCPProxy(path string, in *tcpv3.TcpProxy, env Env, logger model.Logger) (*TCPProxy, error) {
	if err := fields.Only(in, path, "stat_prefix", "cluster", "weighted_clusters", "idle_timeout", "access_log", "max_connect_attempts",
		"max_downstream_connection_duration", "access_log_options", "flush_access_log_on_connected"); err != nil {
		return nil, err
	}
	p := &TCPProxy{env: env, logger: logger, attempts: 1}
	switch t := in.GetClusterSpecifier().(type) {
	case *tcpv3.TcpProxy_Cluster:
		p.targets = []target{{cluster: t.Cluster, sum: 1}}
	case *tcpv3.TcpProxy_WeightedClusters:
		if err := fields.Only(t.WeightedClusters, path+".weighted_clusters", "clusters"); err != nil {
			return nil, err
		}
		for i, w := range t.WeightedClusters.GetClusters() {
			if err := fields.Only(w, fields.Index(path+".weighted_clusters", "clusters", i), "name", "weight"); err != nil {
				return nil, err
			}
			p.total += uint64(w.GetWeight())
			p.targets = append(p.targets, target{cluster: w.GetName(), sum: p.total})
		}
	}
	if len(p.targets) == 0 || p.targets[len(p.targets)-1].sum == 0 {
		return nil, fmt.Errorf("%s: no cluster", path)
	}
	p.total = p.targets[len(p.targets)-1].sum
	var err error
	if p.idle, err = resource.Duration(path+".idle_timeout", in.GetIdleTimeout(), defaultIdle); err != nil {
		return nil, err
	}
	if p.longest, err = resource.Duration(path+".max_downstream_connection_duration", in.GetMaxDownstreamConnectionDuration(), 0); err != nil {
		return nil, err
	}
	if a := in.GetMaxConnectAttempts(); a != nil {
		p.attempts = min(max(a.GetValue(), 1), 16)
	}
	if o := in.GetAccessLogOptions(); o != nil {
		if err := fields.Only(o, path+".access_log_options", "flush_access_log_on_connected", "flush_access_log_on_start"); err != nil {
			return nil, err
		}
		p.logConnected, p.logStart = o.GetFlushAccessLogOnConnected(), o.GetFlushAccessLogOnStart()
	}
	p.logConnected = p.logConnected || in.GetFlushAccessLogOnConnected() //nolint:staticcheck // the old field
	return p, nil
}

// Logger is where the filter's connections are told.
func (p *TCPProxy) Logger() model.Logger { return p.logger }

// Clusters are the names of the clusters that connections go to.
func (p *TCPProxy) Clusters() []string {
	var names []string
	for _, t := range p.targets {
		names = append(names, t.cluster)
	}
	return names
}

func (p *TCPProxy) pick() string {
	if len(p.targets) == 1 {
		return p.targets[0].cluster
	}
	at := rand.Uint64N(p.total) //nolint:gosec // which cluster is no secret
	for _, t := range p.targets {
		if at < t.sum {
			return t.cluster
		}
	}
	return p.targets[0].cluster
}

// Serve passes a connection on until both sides have ended, and closes it. policy is the RBAC policy that admitted it.
func (p *TCPProxy) Serve(ctx context.Context, down net.Conn, c *model.Conn, policy string) {
	entry := &model.Entry{Conn: c, Stream: true, Start: time.Now(), Policy: policy, Cluster: p.pick()}
	if p.logStart {
		begin := *entry
		begin.Begin = true
		p.logger.Log(&begin)
	}
	up, err := p.connect(ctx, c, entry)
	if err != nil {
		entry.Details = err.Error()
		reset(down)
	} else {
		if p.logConnected {
			begin := *entry
			begin.Begin = true
			p.logger.Log(&begin)
		}
		p.relay(down, up, c, entry)
	}
	entry.Duration = time.Since(entry.Start)
	p.logger.Log(entry)
}

// connect reaches an endpoint of the cluster.
func (p *TCPProxy) connect(ctx context.Context, c *model.Conn, entry *model.Entry) (net.Conn, error) {
	// A drain lets connections that have come get through.
	ctx = context.WithoutCancel(ctx)
	var avoid []netip.AddrPort
	for {
		cluster := p.env.Clusters.Cluster(entry.Cluster)
		if cluster == nil {
			entry.Flags = []string{"NC"}
			return nil, fmt.Errorf("%w: %s", model.ErrNoCluster, entry.Cluster)
		}
		e, release, err := cluster.Acquire(c, avoid)
		if err != nil {
			entry.Flags = flagOf(err)
			return nil, err
		}
		entry.Attempts++
		entry.Upstream = e.Address
		up, err := cluster.Dial(ctx, c, e)
		if err == nil {
			entry.Flags = nil
			return &releasing{Conn: up, release: sync.OnceFunc(func() { release(true) })}, nil
		}
		release(false)
		entry.Flags = flagOf(err)
		if entry.Attempts >= p.attempts {
			return nil, err
		}
		avoid = append(avoid, e.Address)
	}
}

func flagOf(err error) []string {
	switch {
	case errors.Is(err, model.ErrNoEndpoint):
		return []string{"UH"}
	case errors.Is(err, model.ErrOverflow):
		return []string{"UO"}
	}
	return []string{"UF"}
}

// releasing ends an endpoint's count with its connection.
type releasing struct {
	net.Conn

	release func()
}

// Close closes the connection.
func (r *releasing) Close() error {
	r.release()
	return r.Conn.Close()
}
