// SPDX-License-Identifier: Apache-2.0

// Package cluster chooses endpoints and connects to them: load balancing, health, circuit breakers, outlier detection, upstream sockets and TLS.
package cluster

import (
	"fmt"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	leastv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/least_request/v3"
	randomv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/random/v3"
	roundv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/round_robin/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/match"
	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/resource"
	"github.com/weirmesh/weir/services/proxy/internal/sockets"
	"github.com/weirmesh/weir/services/proxy/internal/tlsconf"
)

// kind is how a cluster finds its endpoints.
type kind uint8

const (
	static kind = iota
	eds
	original
)

// policy is how it chooses one.
type policy uint8

const (
	roundRobin policy = iota
	leastRequest
	random
)

const (
	// defaultConnectTimeout is Envoy's.
	defaultConnectTimeout = 5 * time.Second
	defaultChoices        = 2
	httpOptions           = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
)

// config is a compiled cluster without its endpoints.
type config struct {
	name, edsName    string
	kind             kind
	policy           policy
	choices          uint32
	protocol         model.Protocol
	connectTimeout   time.Duration
	panicPercent     float64
	options          []sockets.Option
	portMin, portMax uint16
	tls              *tlsconf.Client
	matchers         *match.Compiler // of names in certificates
	breakers         breakers
	outlier          *outlier
}

// known are the fields that are done, and those that change nothing here: names of statistics, buffer sizes, what concerns DNS only.
var known = []string{
	"name", "alt_stat_name", "type", "cluster_type", "eds_cluster_config", "connect_timeout", "lb_policy", "load_assignment", "circuit_breakers",
	"common_http_protocol_options", "http_protocol_options", "http2_protocol_options", "typed_extension_protocol_options", "outlier_detection",
	"cleanup_interval", "upstream_bind_config", "common_lb_config", "transport_socket", "metadata", "protocol_selection", "load_balancing_policy",
	"least_request_lb_config", "round_robin_lb_config", "per_connection_buffer_limit_bytes", "dns_lookup_family", "upstream_connection_options",
	"original_dst_lb_config", "respect_dns_ttl", "track_cluster_stats", "ignore_health_on_host_removal", "wait_for_warm_on_init",
	"max_requests_per_connection", "connection_pool_per_downstream_connection", "dns_refresh_rate", "track_timeout_budgets",
}

func compile(in *clusterv3.Cluster, matchers *match.Compiler) (*config, error) {
	path := "cluster"
	if in.GetName() == "" {
		return nil, fmt.Errorf("%s.name is empty", path)
	}
	if err := fields.Only(in, path, known...); err != nil {
		return nil, err
	}
	c := &config{name: in.GetName(), matchers: matchers}
	var err error
	if c.connectTimeout, err = resource.Duration(path+".connect_timeout", in.GetConnectTimeout(), defaultConnectTimeout); err != nil {
		return nil, err
	}
	for _, step := range []func(string, *clusterv3.Cluster) error{
		c.discovery, c.balancing, c.protocols, c.binding, c.protection,
	} {
		if err := step(path, in); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// discovery reads the type.
func (c *config) discovery(path string, in *clusterv3.Cluster) error {
	if in.GetClusterType() != nil {
		return fmt.Errorf("%s.cluster_type %q is not supported", path, in.GetClusterType().GetName())
	}
	switch in.GetType() {
	case clusterv3.Cluster_STATIC:
		c.kind = static
	case clusterv3.Cluster_EDS:
		c.kind = eds
		c.edsName = in.GetEdsClusterConfig().GetServiceName()
		if c.edsName == "" {
			c.edsName = c.name
		}
		source := in.GetEdsClusterConfig().GetEdsConfig()
		if source.GetAds() == nil && source.GetSelf() == nil {
			return fmt.Errorf("%s.eds_cluster_config.eds_config: only ads is supported", path)
		}
	case clusterv3.Cluster_ORIGINAL_DST:
		c.kind = original
		if in.GetOriginalDstLbConfig() != nil {
			// A header or another port would let a request choose where it goes, past the kernel's policy.
			return fields.Only(in.GetOriginalDstLbConfig(), path+".original_dst_lb_config")
		}
	case clusterv3.Cluster_STRICT_DNS, clusterv3.Cluster_LOGICAL_DNS:
		return fmt.Errorf("%s.type %s is not supported", path, in.GetType())
	}
	if c.kind != static && in.GetLoadAssignment() != nil {
		return fmt.Errorf("%s.load_assignment is for static clusters only", path)
	}
	return nil
}

// balancing reads how an endpoint is chosen.
func (c *config) balancing(path string, in *clusterv3.Cluster) error {
	if (in.GetLbPolicy() == clusterv3.Cluster_CLUSTER_PROVIDED) != (c.kind == original) && in.GetLoadBalancingPolicy() == nil {
		return fmt.Errorf("%s.lb_policy %s is not supported with type %s", path, in.GetLbPolicy(), in.GetType())
	}
	c.choices = defaultChoices
	switch in.GetLbPolicy() {
	case clusterv3.Cluster_ROUND_ROBIN, clusterv3.Cluster_CLUSTER_PROVIDED:
	case clusterv3.Cluster_LEAST_REQUEST:
		c.policy = leastRequest
	case clusterv3.Cluster_RANDOM:
		c.policy = random
	case clusterv3.Cluster_LOAD_BALANCING_POLICY_CONFIG:
		if in.GetLoadBalancingPolicy() == nil {
			return fmt.Errorf("%s.load_balancing_policy is empty", path)
		}
	case clusterv3.Cluster_RING_HASH, clusterv3.Cluster_MAGLEV:
		return fmt.Errorf("%s.lb_policy %s is not supported", path, in.GetLbPolicy())
	}
	if least := in.GetLeastRequestLbConfig(); least != nil {
		if err := fields.Only(least, path+".least_request_lb_config", "choice_count"); err != nil {
			return err
		}
		c.setChoices(least.GetChoiceCount().GetValue())
	}
	if round := in.GetRoundRobinLbConfig(); round != nil {
		if err := fields.Only(round, path+".round_robin_lb_config"); err != nil {
			return err
		}
	}
	if err := c.extensionPolicy(path+".load_balancing_policy", in.GetLoadBalancingPolicy()); err != nil {
		return err
	}
	common := in.GetCommonLbConfig()
	if common == nil {
		return nil
	}
	c.panicPercent = common.GetHealthyPanicThreshold().GetValue()
	return fields.Only(common, path+".common_lb_config", "healthy_panic_threshold", "update_merge_window", "ignore_new_hosts_until_first_hc",
		"close_connections_on_host_set_change", "zone_aware_lb_config")
}

func (c *config) setChoices(n uint32) {
	if n >= 2 {
		c.choices = min(n, 32)
	}
}

// extensionPolicy reads the newer way of naming a policy: the first one of the list that is known counts.
func (c *config) extensionPolicy(path string, in *clusterv3.LoadBalancingPolicy) error {
	if in == nil {
		return nil
	}
	var names []string
	for i, p := range in.GetPolicies() {
		config := p.GetTypedExtensionConfig().GetTypedConfig()
		at := fields.Index(path, "policies", i)
		switch {
		case config.MessageIs(&roundv3.RoundRobin{}):
			c.policy = roundRobin
			return fields.Only(&roundv3.RoundRobin{}, at)
		case config.MessageIs(&leastv3.LeastRequest{}):
			var least leastv3.LeastRequest
			if err := resource.Unpack(at, config, &least); err != nil {
				return err
			}
			c.policy = leastRequest
			c.setChoices(least.GetChoiceCount().GetValue())
			return fields.Only(&least, at, "choice_count")
		case config.MessageIs(&randomv3.Random{}):
			c.policy = random
			return nil
		}
		names = append(names, p.GetTypedExtensionConfig().GetName())
	}
	return fmt.Errorf("%s: none of %q is supported", path, names)
}

// protocols reads what the servers speak, and TLS.
func (c *config) protocols(path string, in *clusterv3.Cluster) error {
	if in.GetHttp2ProtocolOptions() != nil { //nolint:staticcheck // tenants still write the old field
		c.protocol = model.HTTP2
	}
	if in.GetProtocolSelection() == clusterv3.Cluster_USE_DOWNSTREAM_PROTOCOL { //nolint:staticcheck // as above
		c.protocol = model.SameAsClient
	}
	for name, config := range in.GetTypedExtensionProtocolOptions() {
		at := fields.Key(path, "typed_extension_protocol_options", name)
		if name != httpOptions {
			return fmt.Errorf("%s is not supported", at)
		}
		var options httpv3.HttpProtocolOptions
		if err := resource.Unpack(at, config, &options); err != nil {
			return err
		}
		if err := c.httpOptions(at, &options); err != nil {
			return err
		}
	}
	var alpn []string
	switch c.protocol {
	case model.HTTP1:
		alpn = []string{"http/1.1"}
	case model.HTTP2:
		alpn = []string{"h2"}
	case model.SameAsClient:
	}
	var err error
	c.tls, err = tlsconf.NewClient(path+".transport_socket", in.GetTransportSocket(), alpn, c.matchers)
	return err
}

func (c *config) httpOptions(path string, in *httpv3.HttpProtocolOptions) error {
	if err := fields.Only(in, path, "common_http_protocol_options", "explicit_http_config", "use_downstream_protocol_config"); err != nil {
		return err
	}
	switch o := in.GetUpstreamProtocolOptions().(type) {
	case *httpv3.HttpProtocolOptions_UseDownstreamProtocolConfig:
		c.protocol = model.SameAsClient
	case *httpv3.HttpProtocolOptions_ExplicitHttpConfig_:
		switch o.ExplicitHttpConfig.GetProtocolConfig().(type) {
		case *httpv3.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions:
			c.protocol = model.HTTP1
		case *httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions:
			c.protocol = model.HTTP2
		default:
			return fmt.Errorf("%s.explicit_http_config: only HTTP/1 and HTTP/2 are supported", path)
		}
	}
	return nil
}

// binding reads how upstream sockets are made.
func (c *config) binding(path string, in *clusterv3.Cluster) error {
	if o := in.GetUpstreamConnectionOptions(); o != nil {
		// Keepalive is always on; the rest of the options is not done.
		if err := fields.Only(o, path+".upstream_connection_options", "tcp_keepalive"); err != nil {
			return err
		}
	}
	bind := in.GetUpstreamBindConfig()
	if bind == nil {
		return nil
	}
	path += ".upstream_bind_config"
	if err := fields.Only(bind, path, "source_address", "freebind", "socket_options"); err != nil {
		return err
	}
	// A source address other than "any" would be one that this node does not tell from its own.
	if a := bind.GetSourceAddress(); a != nil && a.GetAddress() != "0.0.0.0" && a.GetAddress() != "::" {
		return fmt.Errorf("%s.source_address %s is not supported", path, a.GetAddress())
	}
	options, err := resource.Options(path, bind.GetSocketOptions())
	if err != nil {
		return err
	}
	c.options, c.portMin, c.portMax = sockets.PortRange(options)
	return nil
}

// protection reads circuit breakers and outlier detection.
func (c *config) protection(path string, in *clusterv3.Cluster) error {
	c.breakers = defaultBreakers()
	cb := in.GetCircuitBreakers()
	if err := fields.Only(cb, path+".circuit_breakers", "thresholds"); cb != nil && err != nil {
		return err
	}
	for i, t := range cb.GetThresholds() {
		at := fields.Index(path+".circuit_breakers", "thresholds", i)
		if err := fields.Only(t, at, "priority", "max_connections", "max_pending_requests", "max_requests", "max_retries", "retry_budget",
			"track_remaining", "max_connection_pools"); err != nil {
			return err
		}
		// Requests of high priority are not told apart: they count with the others.
		if t.GetPriority() == corev3.RoutingPriority_DEFAULT {
			c.breakers.read(t)
		}
	}
	var err error
	c.outlier, err = compileOutlier(path+".outlier_detection", in.GetOutlierDetection())
	return err
}
