// SPDX-License-Identifier: Apache-2.0

// Package route holds compiled route configurations: which virtual host and route a request meets, and what is done with it.
package route

import (
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
)

// Table is a compiled route configuration. It is immutable.
type Table struct {
	name string
}

// Name of the route configuration.
func (t *Table) Name() string { return t.name }

// Clusters are the names of the clusters that its routes lead to.
func (t *Table) Clusters() []string { return nil }

// Compile compiles a route configuration. What is not implemented is an error that names the field's path.
func Compile(c *routev3.RouteConfiguration) (*Table, error) {
	return &Table{name: c.GetName()}, nil
}
