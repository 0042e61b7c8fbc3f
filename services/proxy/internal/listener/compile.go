// SPDX-License-Identifier: Apache-2.0

// Package listener opens the sockets that a configuration asks for and leads what connects through its filters.
package listener

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	httpinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	originaldstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	originalsrcv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_src/v3"
	inspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	networkrbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/match"
	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/netfilter"
	"github.com/weirmesh/weir/services/proxy/internal/resource"
	"github.com/weirmesh/weir/services/proxy/internal/sockets"
	"github.com/weirmesh/weir/services/proxy/internal/tlsconf"
)

// HTTP is a compiled connection manager.
type HTTP interface {
	// Serve blocks until the connection has ended; the end of ctx drains it.
	Serve(ctx context.Context, conn net.Conn, c *model.Conn)
	// RouteName is the route configuration that it waits for; "" = none.
	RouteName() string
	// Clusters are those that its own routes lead to.
	Clusters() []string
	// Adopt makes new requests of live connections be judged by next.
	Adopt(next HTTP)
}

// Builder makes what listeners are made of.
type Builder struct {
	// HTTP compiles a connection manager; logger is made of its access_log.
	HTTP func(hcm *hcmv3.HttpConnectionManager, logger model.Logger) (HTTP, error)
	// AccessLog compiles access logs.
	AccessLog func(path string, in []*accesslogv3.AccessLog) (model.Logger, error)
	// Net is for the filters that do not read HTTP.
	Net netfilter.Env
	// Matchers compiles what connections are matched with.
	Matchers *match.Compiler
	// PortMin and PortMax bound the source ports of upstream sockets in a client's name, unless the cluster says.
	PortMin, PortMax uint16
}

// defaultInspect and defaultHandshake are Envoy's.
const (
	defaultInspect   = 15 * time.Second
	defaultHandshake = 15 * time.Second
	// MetadataKey holds what Weir says of a listener.
	MetadataKey = "weir"
)

// plan is a compiled listener.
type plan struct {
	source      *listenerv3.Listener
	name        string
	namespace   string
	addresses   []netip.AddrPort
	socket      socketSpec
	inspectTLS  bool
	inspectHTTP bool
	inspectTime time.Duration
	carryOn     bool // when the inspection takes too long
	src         *model.Source
	chains      []*chain
	fallback    *chain
	logger      model.Logger
}

// chain is a compiled filter chain.
type chain struct {
	name   string
	match  matcher
	tls    *tls.Config
	within time.Duration // TLS handshake
	rbacs  []*netfilter.RBAC
	tcp    *netfilter.TCPProxy
	http   HTTP
	// config is the connection manager's, to know whether it changed.
	config *anypb.Any
	// drain ends when the chain has been removed.
	drain context.Context //nolint:containedctx // the chain's life
	end   context.CancelFunc
}

// socketSpec is how sockets are opened.
type socketSpec struct {
	transparent, freebind bool
	backlog               int
	options               []sockets.Option
}

var known = []string{
	"name", "address", "additional_addresses", "stat_prefix", "filter_chains", "use_original_dst", "default_filter_chain",
	"per_connection_buffer_limit_bytes", "metadata", "drain_type", "listener_filters", "listener_filters_timeout",
	"continue_on_listener_filters_timeout", "transparent", "freebind", "socket_options", "traffic_direction", "connection_balance_config",
	"reuse_port", "enable_reuse_port", "access_log", "tcp_backlog_size", "max_connections_to_accept_per_socket_event", "bind_to_port",
}

func (b *Builder) compile(in *listenerv3.Listener) (*plan, error) {
	path := "listener"
	if in.GetName() == "" {
		return nil, fmt.Errorf("%s.name is empty", path)
	}
	if err := fields.Only(in, path, known...); err != nil {
		return nil, err
	}
	if in.GetBindToPort() != nil && !in.GetBindToPort().GetValue() {
		return nil, fmt.Errorf("%s.bind_to_port false is not supported", path)
	}
	p := &plan{source: in, name: in.GetName(), carryOn: in.GetContinueOnListenerFiltersTimeout()}
	p.namespace = in.GetMetadata().GetFilterMetadata()[MetadataKey].GetFields()["namespace"].GetStringValue()
	p.socket = socketSpec{transparent: in.GetTransparent().GetValue(), freebind: in.GetFreebind().GetValue(), backlog: 4096}
	if n := in.GetTcpBacklogSize(); n != nil {
		p.socket.backlog = int(min(n.GetValue(), 65535))
	}
	var err error
	if p.socket.options, err = resource.Options(path, in.GetSocketOptions()); err != nil {
		return nil, err
	}
	if p.inspectTime, err = resource.Duration(path+".listener_filters_timeout", in.GetListenerFiltersTimeout(), defaultInspect); err != nil {
		return nil, err
	}
	if p.logger, err = b.AccessLog(path, in.GetAccessLog()); err != nil {
		return nil, err
	}
	for _, step := range []func(string, *listenerv3.Listener) error{p.listen, func(path string, in *listenerv3.Listener) error {
		return b.listenerFilters(p, path, in)
	}, func(path string, in *listenerv3.Listener) error { return b.filterChains(p, path, in) }} {
		if err := step(path, in); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// listen reads the addresses.
func (p *plan) listen(path string, in *listenerv3.Listener) error {
	first, err := resource.Address(path+".address", in.GetAddress())
	if err != nil {
		return err
	}
	p.addresses = []netip.AddrPort{first}
	for i, a := range in.GetAdditionalAddresses() {
		at := fields.Index(path, "additional_addresses", i)
		if err := fields.Only(a, at, "address"); err != nil {
			return err
		}
		address, err := resource.Address(at+".address", a.GetAddress())
		if err != nil {
			return err
		}
		p.addresses = append(p.addresses, address)
	}
	return nil
}

func (b *Builder) listenerFilters(p *plan, path string, in *listenerv3.Listener) error {
	for i, f := range in.GetListenerFilters() {
		at := fields.Index(path, "listener_filters", i)
		if err := fields.Only(f, at, "name", "typed_config"); err != nil {
			return err
		}
		config := f.GetTypedConfig()
		switch {
		case config.MessageIs(&originalsrcv3.OriginalSrc{}):
			var src originalsrcv3.OriginalSrc
			if err := resource.Unpack(at, config, &src); err != nil {
				return err
			}
			if err := fields.Only(&src, at, "mark"); err != nil {
				return err
			}
			p.src = &model.Source{Mark: src.GetMark(), PortMin: b.PortMin, PortMax: b.PortMax}
		case config.MessageIs(&inspectorv3.TlsInspector{}):
			var inspector inspectorv3.TlsInspector
			if err := resource.Unpack(at, config, &inspector); err != nil {
				return err
			}
			if err := fields.Only(&inspector, at, "initial_read_buffer_size", "enable_ja3_fingerprinting", "max_client_hello_size"); err != nil {
				return err
			}
			p.inspectTLS = true
		case config.MessageIs(&httpinspectorv3.HttpInspector{}):
			p.inspectHTTP = true
		case config.MessageIs(&originaldstv3.OriginalDst{}):
			// A transparent listener's connections have their original destination as they come.
			if !p.socket.transparent {
				return fmt.Errorf("%s: %s needs a transparent listener", at, f.GetName())
			}
		default:
			return fmt.Errorf("%s: listener filter %q (%s) is not supported", at, f.GetName(), config.GetTypeUrl())
		}
	}
	return nil
}

// maxChains bounds the filter chains of one listener: each connection is compared with all of them.
const maxChains = 1000

func (b *Builder) filterChains(p *plan, path string, in *listenerv3.Listener) error {
	if n := len(in.GetFilterChains()); n > maxChains {
		return fmt.Errorf("%s.filter_chains: %d, above %d", path, n, maxChains)
	}
	seen := map[string]bool{}
	for i, fc := range in.GetFilterChains() {
		at := fields.Index(path, "filter_chains", i)
		c, err := b.filterChain(at, fc)
		if err != nil {
			return err
		}
		if c.name == "" {
			c.name = fmt.Sprintf("#%d", i)
		}
		if seen[c.name] {
			return fmt.Errorf("%s.name %q is there twice", at, c.name)
		}
		seen[c.name] = true
		p.chains = append(p.chains, c)
	}
	if fc := in.GetDefaultFilterChain(); fc != nil {
		c, err := b.filterChain(path+".default_filter_chain", fc)
		if err != nil {
			return err
		}
		c.name = "default"
		if seen[c.name] {
			c.name = "#default"
		}
		p.fallback = c
	}
	if len(p.chains) == 0 && p.fallback == nil {
		return fmt.Errorf("%s has no filter chain", path)
	}
	return nil
}

func (b *Builder) filterChain(path string, in *listenerv3.FilterChain) (*chain, error) {
	if err := fields.Only(in, path, "filter_chain_match", "filters", "metadata", "transport_socket", "transport_socket_connect_timeout", "name"); err != nil {
		return nil, err
	}
	b.Matchers.Step()
	c := &chain{name: in.GetName()}
	var err error
	if c.match, err = compileMatch(path+".filter_chain_match", in.GetFilterChainMatch()); err != nil {
		return nil, err
	}
	if c.tls, err = tlsconf.Server(path+".transport_socket", in.GetTransportSocket(), b.Matchers); err != nil {
		return nil, err
	}
	if c.within, err = resource.Duration(path+".transport_socket_connect_timeout", in.GetTransportSocketConnectTimeout(), defaultHandshake); err != nil {
		return nil, err
	}
	for i, f := range in.GetFilters() {
		at := fields.Index(path, "filters", i)
		if c.tcp != nil || c.http != nil {
			return nil, fmt.Errorf("%s: %q stands behind a filter that ends the chain", at, f.GetName())
		}
		if err := b.filter(c, at, f); err != nil {
			return nil, err
		}
	}
	if c.tcp == nil && c.http == nil {
		return nil, fmt.Errorf("%s.filters: none of them ends the chain", path)
	}
	c.drain, c.end = context.WithCancel(context.Background())
	return c, nil
}

func (b *Builder) filter(c *chain, path string, f *listenerv3.Filter) error {
	if err := fields.Only(f, path, "name", "typed_config"); err != nil {
		return err
	}
	config := f.GetTypedConfig()
	path += ".typed_config"
	switch {
	case config.MessageIs(&networkrbacv3.RBAC{}):
		var in networkrbacv3.RBAC
		if err := resource.Unpack(path, config, &in); err != nil {
			return err
		}
		rbac, err := netfilter.CompileRBAC(path, &in, b.Matchers)
		c.rbacs = append(c.rbacs, rbac)
		return err
	case config.MessageIs(&tcpv3.TcpProxy{}):
		var in tcpv3.TcpProxy
		if err := resource.Unpack(path, config, &in); err != nil {
			return err
		}
		logger, err := b.AccessLog(path, in.GetAccessLog())
		if err != nil {
			return err
		}
		c.tcp, err = netfilter.CompileTCPProxy(path, &in, b.Net, logger)
		return err
	case config.MessageIs(&hcmv3.HttpConnectionManager{}):
		var in hcmv3.HttpConnectionManager
		if err := resource.Unpack(path, config, &in); err != nil {
			return err
		}
		logger, err := b.AccessLog(path, in.GetAccessLog())
		if err != nil {
			return err
		}
		c.config = config
		if c.http, err = b.HTTP(&in, logger); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		return nil
	}
	return fmt.Errorf("%s: network filter %q (%s) is not supported", path, f.GetName(), config.GetTypeUrl())
}

// all are the chains with the fallback.
func (p *plan) all() []*chain {
	if p.fallback == nil {
		return p.chains
	}
	return append(p.chains[:len(p.chains):len(p.chains)], p.fallback)
}

// routes are the names of the route configurations that the plan follows.
func (p *plan) routes() []string {
	var names []string
	for _, c := range p.all() {
		if c.http != nil && c.http.RouteName() != "" {
			names = append(names, c.http.RouteName())
		}
	}
	return names
}

// clusters are the names of the clusters that the plan's own filters lead to.
func (p *plan) clusters() []string {
	var names []string
	for _, c := range p.all() {
		if c.http != nil {
			names = append(names, c.http.Clusters()...)
		} else {
			names = append(names, c.tcp.Clusters()...)
		}
	}
	return names
}

// succeed makes p the plan after old: what did not change is kept, live connections are judged by what did, and chains that have gone are drained.
func (p *plan) succeed(old *plan) {
	next := map[string]*chain{}
	for _, c := range p.all() {
		next[c.name] = c
	}
	for _, was := range old.all() {
		c := next[was.name]
		if c == nil || (c.http == nil) != (was.http == nil) {
			was.end()
			continue
		}
		if c.http != nil {
			if proto.Equal(c.config, was.config) {
				c.http = was.http
			} else {
				was.http.Adopt(c.http)
			}
		}
		// Connections of the old chain end with the new one's.
		c.end()
		c.drain, c.end = was.drain, was.end
	}
}
