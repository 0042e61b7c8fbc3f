// SPDX-License-Identifier: Apache-2.0

package route

import (
	"fmt"
	"net/http"
	"strings"
	"time"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/match"
)

// Forward sends a request to a cluster.
type Forward struct {
	clusters []Cluster
	total    uint64

	path pathRewrite
	host hostRewrite

	// Timeout of the whole answer; 0 = none.
	Timeout time.Duration
	// Idle timeout of the stream; negative = the connection manager's counts, 0 = none.
	Idle time.Duration
	// MaxStream is the longest that a stream may last; negative = the connection manager's counts, 0 = none.
	MaxStream time.Duration
	// GRPCTimeoutMax: the client's grpc-timeout is kept here too, but never beyond this (0 = as long as it says); negative = the header is not looked at.
	GRPCTimeoutMax time.Duration
	Retry          *Retry
	// BufferLimit of bodies that may be sent again; negative = the default counts.
	BufferLimit int64
	// NotFound answers when the cluster does not exist.
	NotFound int
	// Upgrades that the route switches on or off, by lower-case name.
	Upgrades map[string]bool
}

// Cluster is one of a route's clusters.
type Cluster struct {
	Name   string
	weight uint64
	host   string
	level  level
}

// defaultTimeout is Envoy's, for routes that say none.
const defaultTimeout = 15 * time.Second

func (c *compiler) forward(r *routev3.Route, v *routev3.VirtualHost, a *routev3.RouteAction, whole matched, path string) (*Forward, error) {
	if err := fields.Only(a, path, "cluster", "weighted_clusters", "cluster_not_found_response_code", "prefix_rewrite", "regex_rewrite",
		"host_rewrite_literal", "host_rewrite_header", "host_rewrite_path_regex", "timeout", "idle_timeout", "retry_policy", "max_grpc_timeout",
		"upgrade_configs", "max_stream_duration", "priority"); err != nil {
		return nil, err
	}
	if a.GetPriority() != 0 {
		return nil, fields.NotSupported(fields.Join(path, "priority"))
	}
	f := &Forward{Timeout: defaultTimeout, Idle: -1, MaxStream: -1, GRPCTimeoutMax: -1, BufferLimit: -1}
	steps := []func() error{
		func() error { return c.clustersOf(f, a, path) },
		func() (err error) {
			f.path, err = c.pathRewrite(a.GetPrefixRewrite(), a.GetRegexRewrite(), whole, path)
			return err
		},
		func() (err error) { f.host, err = c.hostRewrite(a, path); return err },
		func() error { return f.timeouts(a, path) },
		func() error { return c.retry(f, v, a, path) },
		func() error { return c.upgradesOf(f, a, path) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return nil, err
		}
	}
	f.BufferLimit = bufferLimit(r, v)
	f.NotFound = map[routev3.RouteAction_ClusterNotFoundResponseCode]int{
		routev3.RouteAction_NOT_FOUND:             http.StatusNotFound,
		routev3.RouteAction_INTERNAL_SERVER_ERROR: http.StatusInternalServerError,
	}[a.GetClusterNotFoundResponseCode()]
	if f.NotFound == 0 {
		f.NotFound = http.StatusServiceUnavailable
	}
	return f, nil
}

func bufferLimit(r *routev3.Route, v *routev3.VirtualHost) int64 {
	switch {
	case r.GetRequestBodyBufferLimit() != nil:
		return int64(min(r.GetRequestBodyBufferLimit().GetValue(), 1<<40))
	case r.GetPerRequestBufferLimitBytes() != nil: //nolint:staticcheck // the older field
		return int64(r.GetPerRequestBufferLimitBytes().GetValue()) //nolint:staticcheck // the older field
	case v.GetRequestBodyBufferLimit() != nil:
		return int64(min(v.GetRequestBodyBufferLimit().GetValue(), 1<<40))
	case v.GetPerRequestBufferLimitBytes() != nil: //nolint:staticcheck // the older field
		return int64(v.GetPerRequestBufferLimitBytes().GetValue()) //nolint:staticcheck // the older field
	}
	return -1
}

func (c *compiler) clustersOf(f *Forward, a *routev3.RouteAction, path string) error {
	switch s := a.GetClusterSpecifier().(type) {
	case *routev3.RouteAction_Cluster:
		f.clusters, f.total = []Cluster{{Name: s.Cluster, weight: 1}}, 1
	case *routev3.RouteAction_WeightedClusters:
		if err := c.weighted(f, s.WeightedClusters, fields.Join(path, "weighted_clusters")); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%s: no cluster", path)
	}
	for i := range f.clusters {
		if f.clusters[i].Name == "" {
			return fmt.Errorf("%s: empty name of a cluster", path)
		}
		c.clusters[f.clusters[i].Name] = struct{}{}
	}
	return nil
}

func (c *compiler) weighted(f *Forward, w *routev3.WeightedCluster, path string) error {
	if err := fields.Only(w, path, "clusters", "total_weight", "runtime_key_prefix"); err != nil {
		return err
	}
	for i, x := range w.GetClusters() {
		at := fields.Index(path, "clusters", i)
		if err := fields.Only(x, at, "name", "weight", "request_headers_to_add", "request_headers_to_remove", "response_headers_to_add",
			"response_headers_to_remove", "typed_per_filter_config", "host_rewrite_literal"); err != nil {
			return err
		}
		l, err := c.level(x, at)
		if err != nil {
			return err
		}
		weight := uint64(x.GetWeight().GetValue())
		f.clusters = append(f.clusters, Cluster{Name: x.GetName(), weight: weight, host: x.GetHostRewriteLiteral(), level: l})
		f.total += weight
	}
	if f.total == 0 || f.total > 1<<32-1 {
		return fmt.Errorf("%s: the weights' sum is %d", path, f.total)
	}
	//nolint:staticcheck // the deprecated field is held to what it says
	if t := w.GetTotalWeight(); t != nil && uint64(t.GetValue()) != f.total {
		return fmt.Errorf("%s: %d, but the weights' sum is %d", fields.Join(path, "total_weight"), t.GetValue(), f.total)
	}
	return nil
}

func (f *Forward) choose(pick func(uint64) uint64) *Cluster {
	if len(f.clusters) == 1 {
		return &f.clusters[0]
	}
	n := pick(f.total)
	for i := range f.clusters {
		if n < f.clusters[i].weight {
			return &f.clusters[i]
		}
		n -= f.clusters[i].weight
	}
	return &f.clusters[len(f.clusters)-1]
}

func (f *Forward) timeouts(a *routev3.RouteAction, path string) error {
	set := func(to *time.Duration, d *durationpb.Duration, name string) error {
		if d == nil {
			return nil
		}
		if d.AsDuration() < 0 || d.CheckValid() != nil {
			return fmt.Errorf("%s: not a duration of zero or more", fields.Join(path, name))
		}
		*to = d.AsDuration()
		return nil
	}
	if err := set(&f.Timeout, a.GetTimeout(), "timeout"); err != nil {
		return err
	}
	if err := set(&f.Idle, a.GetIdleTimeout(), "idle_timeout"); err != nil {
		return err
	}
	//nolint:staticcheck // the older name of grpc_timeout_header_max
	if err := set(&f.GRPCTimeoutMax, a.GetMaxGrpcTimeout(), "max_grpc_timeout"); err != nil {
		return err
	}
	s := a.GetMaxStreamDuration()
	if s == nil {
		return nil
	}
	if err := fields.Only(s, fields.Join(path, "max_stream_duration"), "max_stream_duration", "grpc_timeout_header_max"); err != nil {
		return err
	}
	if err := set(&f.MaxStream, s.GetMaxStreamDuration(), "max_stream_duration.max_stream_duration"); err != nil {
		return err
	}
	return set(&f.GRPCTimeoutMax, s.GetGrpcTimeoutHeaderMax(), "max_stream_duration.grpc_timeout_header_max")
}

func (c *compiler) upgradesOf(f *Forward, a *routev3.RouteAction, path string) error {
	for i, u := range a.GetUpgradeConfigs() {
		at := fields.Index(path, "upgrade_configs", i)
		if err := fields.Only(u, at, "upgrade_type", "enabled"); err != nil {
			return err
		}
		if f.Upgrades == nil {
			f.Upgrades = map[string]bool{}
		}
		name, on := strings.ToLower(u.GetUpgradeType()), u.GetEnabled() == nil || u.GetEnabled().GetValue()
		f.Upgrades[name] = on
		c.upgrades[name] = c.upgrades[name] || on
	}
	return nil
}

// Rewrite changes path and authority as the route says, after everything has been judged.
func (m *Match) Rewrite(r *match.Request) {
	f := m.Route.Forward
	before := r.URLPath()
	if m.Cluster.host != "" {
		r.Authority = m.Cluster.host
	} else {
		r.Authority = f.host.apply(r, before)
	}
	r.Path = f.path.apply(r.Path)
}
