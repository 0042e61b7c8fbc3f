// SPDX-License-Identifier: Apache-2.0

// Package httpproxy is the HTTP data path: what an HttpConnectionManager and its RouteConfiguration say, done to connections.
//
// The library's servers (net/http behind a guard that reads strictly, x/net/http2) turn connections into requests; an exchange takes each through normalisation,
// routing, the filters and the router to an upstream connection of its client, and back.
package httpproxy

import (
	"log/slog"
	"sync/atomic"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"

	"github.com/weirmesh/weir/services/proxy/internal/match"
	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/route"
	"github.com/weirmesh/weir/services/proxy/internal/upstream"
)

// Routes is a compiled route configuration.
type Routes = route.Table

// Env is what a Manager needs of the rest of the proxy.
type Env struct {
	Clusters model.Clusters
	// Logger takes the access log; nil = none.
	Logger model.Logger
	Limits model.Limits
	// Routes finds the current routes by name, at each request; nil = not known (yet), which answers 404. Not asked when the manager has its routes inline.
	Routes func(name string) *Routes
	// Upstreams is shared by all managers, so that a newer manager keeps the connections of the one before it.
	Upstreams *upstream.Pool
	// Matchers compiles what requests are matched with.
	Matchers *match.Compiler
	Log      *slog.Logger
	// Library serves HTTP/1 by the library's server, behind the guard: the oracle of tests.
	Library bool
}

// Manager serves HTTP connections as one HttpConnectionManager says. Safe for concurrent use.
type Manager struct {
	env     Env
	cfg     *config
	buffers buffers
	next    atomic.Pointer[Manager]
}

// Compile compiles a connection manager. What is not implemented is an error that names the field's path.
func Compile(hcm *hcmv3.HttpConnectionManager, env Env) (*Manager, error) {
	cfg, err := compileConfig(hcm, env.Matchers)
	if err != nil {
		return nil, err
	}
	return &Manager{env: env, cfg: cfg}, nil
}

// CompileRoutes compiles a route configuration.
func CompileRoutes(c *routev3.RouteConfiguration, matchers *match.Compiler) (*Routes, error) {
	return route.Compile(c, compiler{matchers}.override, matchers)
}

// RouteName is the route configuration that the manager follows by discovery; "" = it has its own.
func (m *Manager) RouteName() string { return m.cfg.routeName }

// Clusters are the names of the clusters that the manager's own routes lead to.
func (m *Manager) Clusters() []string {
	if m.cfg.routes == nil {
		return nil
	}
	return m.cfg.routes.Clusters()
}

// Adopt makes new requests of m's live connections be judged and routed by next.
func (m *Manager) Adopt(next *Manager) {
	if next != m {
		m.next.Store(next)
	}
}

// current is the newest manager of m's connections.
func (m *Manager) current() *Manager {
	for {
		n := m.next.Load()
		if n == nil {
			return m
		}
		m = n
	}
}

func (m *Manager) table() *Routes {
	if m.cfg.routes != nil {
		return m.cfg.routes
	}
	return m.env.Routes(m.cfg.routeName)
}
