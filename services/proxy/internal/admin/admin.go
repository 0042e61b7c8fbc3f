// SPDX-License-Identifier: Apache-2.0

// Package admin is the proxy's page for the node's operator: what is configured and what goes on. It changes nothing, but that it can begin a drain.
package admin

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	adminv3 "github.com/envoyproxy/go-control-plane/envoy/admin/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weirmesh/weir/services/proxy/internal/cluster"
	"github.com/weirmesh/weir/services/proxy/internal/listener"
	"github.com/weirmesh/weir/services/proxy/internal/state"
	"github.com/weirmesh/weir/services/proxy/internal/xds"
)

// Config is where the page has what it shows.
type Config struct {
	Node, Version string
	Started       time.Time
	Dump          func() []state.Dumped
	Clusters      func() []cluster.Status
	Listeners     func() []listener.Status
	// State is LIVE, DRAINING or PRE_INITIALIZING.
	State func() string
	// Drain begins a drain, at whose end the process ends.
	Drain    func()
	Registry *prometheus.Registry
}

// Handler serves the page.
func Handler(c Config) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /config_dump", c.configDump)
	mux.HandleFunc("GET /clusters", c.clusters)
	mux.HandleFunc("GET /listeners", c.listeners)
	mux.HandleFunc("GET /server_info", c.serverInfo)
	mux.HandleFunc("GET /stats", c.stats)
	mux.Handle("GET /stats/prometheus", promhttp.HandlerFor(c.Registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		if state := c.State(); state != "LIVE" {
			http.Error(w, state, http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "LIVE")
	})
	mux.HandleFunc("POST /drain", func(w http.ResponseWriter, r *http.Request) {
		// A page in a browser on the node is not the operator.
		if r.Header.Get("Origin") != "" || r.Header.Get("Sec-Fetch-Site") != "" {
			http.Error(w, "not from a browser", http.StatusForbidden)
			return
		}
		c.Drain()
		fmt.Fprintln(w, "OK")
	})
	return local(mux)
}

// local refuses names that somebody else's DNS made to mean this host.
func local(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		addr, err := netip.ParseAddr(strings.Trim(host, "[]"))
		if host != "localhost" && (err != nil || !addr.IsLoopback()) {
			http.Error(w, "unknown host", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (c Config) configDump(w http.ResponseWriter, _ *http.Request) {
	clusters, listeners := &adminv3.ClustersConfigDump{}, &adminv3.ListenersConfigDump{}
	routes, endpoints := &adminv3.RoutesConfigDump{}, &adminv3.EndpointsConfigDump{}
	for _, d := range c.Dump() {
		body, failure := packed(d.Body), refusal(d)
		switch d.TypeURL {
		case xds.Cluster:
			clusters.DynamicActiveClusters = append(clusters.DynamicActiveClusters,
				&adminv3.ClustersConfigDump_DynamicCluster{VersionInfo: d.Version, Cluster: body, ErrorState: failure})
		case xds.Listener:
			l := &adminv3.ListenersConfigDump_DynamicListener{Name: d.Name, ErrorState: failure}
			if body != nil {
				l.ActiveState = &adminv3.ListenersConfigDump_DynamicListenerState{VersionInfo: d.Version, Listener: body}
			}
			listeners.DynamicListeners = append(listeners.DynamicListeners, l)
		case xds.Route:
			routes.DynamicRouteConfigs = append(routes.DynamicRouteConfigs,
				&adminv3.RoutesConfigDump_DynamicRouteConfig{VersionInfo: d.Version, RouteConfig: body, ErrorState: failure})
		case xds.Endpoint:
			endpoints.DynamicEndpointConfigs = append(endpoints.DynamicEndpointConfigs,
				&adminv3.EndpointsConfigDump_DynamicEndpointConfig{VersionInfo: d.Version, EndpointConfig: body, ErrorState: failure})
		}
	}
	dump := &adminv3.ConfigDump{}
	for _, part := range []proto.Message{clusters, endpoints, listeners, routes} {
		if a, err := anypb.New(part); err == nil {
			dump.Configs = append(dump.Configs, a)
		}
	}
	out, err := protojson.MarshalOptions{Multiline: true, Indent: " ", UseProtoNames: true}.Marshal(dump)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(out) // a reader that has gone needs no answer
}

// packed is a resource without its secrets.
func packed(m proto.Message) *anypb.Any {
	if m == nil {
		return nil
	}
	safe := proto.Clone(m)
	redact(safe.ProtoReflect())
	a, err := anypb.New(safe)
	if err != nil {
		return nil
	}
	return a
}

func refusal(d state.Dumped) *adminv3.UpdateFailureState {
	if d.Refused == "" {
		return nil
	}
	return &adminv3.UpdateFailureState{Details: d.Refused, VersionInfo: d.RefusedVersion}
}

func (c Config) clusters(w http.ResponseWriter, _ *http.Request) {
	var b strings.Builder
	for _, s := range c.Clusters() {
		line := func(name string, value any) { fmt.Fprintf(&b, "%s::%s::%v\n", s.Name, name, value) }
		n := s.Counters
		line("cx_active", n.Connections.Load())
		line("cx_total", n.TotalConnections.Load())
		line("cx_connect_fail", n.ConnectFailures.Load())
		line("rq_active", n.Requests.Load())
		line("rq_total", n.TotalRequests.Load())
		line("rq_error", n.FailedRequests.Load())
		line("rq_retry", n.TotalRetries.Load())
		line("overflow", n.Overflows.Load())
		line("no_endpoint", n.NoEndpoint.Load())
		line("ejections", n.Ejections.Load())
		for _, h := range s.Hosts {
			name := h.Path
			if name == "" {
				name = h.Address.String()
			}
			health := "healthy"
			if !h.Healthy {
				health = "/failed_eds_health"
			}
			if h.Ejected {
				health = "/failed_outlier_check"
			}
			line(name+"::rq_active", h.Active)
			line(name+"::weight", h.Weight)
			line(name+"::health_flags", health)
		}
	}
	text(w, b.String())
}

func (c Config) listeners(w http.ResponseWriter, _ *http.Request) {
	var b strings.Builder
	for _, l := range c.Listeners() {
		for _, a := range l.Addresses {
			fmt.Fprintf(&b, "%s::%s\n", l.Name, a)
		}
		if l.Waiting != "" {
			fmt.Fprintf(&b, "%s::waiting::%s\n", l.Name, l.Waiting)
			continue
		}
		fmt.Fprintf(&b, "%s::cx_active::%d\n%s::cx_total::%d\n", l.Name, l.Connections, l.Name, l.Total)
	}
	text(w, b.String())
}

func (c Config) serverInfo(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{ // a reader that has gone needs no answer
		"version": "weir-proxy/" + c.Version, "state": c.State(), "uptime_all_epochs": time.Since(c.Started).Round(time.Second).String(),
		"node": map[string]string{"id": c.Node},
	})
}

func (c Config) stats(w http.ResponseWriter, _ *http.Request) {
	families, err := c.Registry.Gather()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	var b strings.Builder
	for _, f := range families {
		for _, m := range f.GetMetric() {
			b.WriteString(f.GetName())
			for _, l := range m.GetLabel() {
				fmt.Fprintf(&b, ".%s", l.GetValue())
			}
			switch {
			case m.GetHistogram() != nil:
				fmt.Fprintf(&b, ": %d\n", m.GetHistogram().GetSampleCount())
			case m.GetSummary() != nil:
				fmt.Fprintf(&b, ": %d\n", m.GetSummary().GetSampleCount())
			default:
				fmt.Fprintf(&b, ": %v\n", m.GetCounter().GetValue()+m.GetGauge().GetValue()+m.GetUntyped().GetValue())
			}
		}
	}
	text(w, b.String())
}

func text(w http.ResponseWriter, s string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = io.WriteString(w, s) // a reader that has gone needs no answer
}
