// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"maps"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/internal/spiffe"
)

// What a Table may name besides services.
const (
	// Any is every authenticated peer: any service of our trust domain, and Local.
	Any = "*"
	// Local is the root user on a unix socket of this part.
	Local = spiffe.Local
	// Plain is whoever reaches a TCP port without TLS. Any does not include it: name it only for what
	// may be open to the whole machine (the observer on loopback).
	Plain = "plain"
)

// Table says who may call what: full method ("/pkg.Service/Method") or whole service
// ("/pkg.Service/") -> services allowed. The method's own row is the only one that counts where it
// exists. What has no row is denied.
type Table map[string][]string

// withDefaults opens health, and reflection where it is served, to all, unless the table has a row.
func (t Table) withDefaults(reflection bool) Table {
	open := []string{"/" + healthpb.Health_ServiceDesc.ServiceName + "/"}
	if reflection {
		open = append(open, "/grpc.reflection.v1.ServerReflection/", "/grpc.reflection.v1alpha.ServerReflection/")
	}
	full := maps.Clone(t)
	if full == nil {
		full = Table{}
	}
	for _, row := range open {
		if _, ok := full[row]; !ok {
			full[row] = []string{Any, Plain}
		}
	}
	return full
}

// authorize decides a call, unary or stream, before its handler runs.
func (t Table) authorize(ctx context.Context) (context.Context, error) {
	method, ok := grpc.Method(ctx)
	if !ok {
		return ctx, status.Error(codes.PermissionDenied, "permission denied: the call has no method")
	}
	allowed, ok := t[method]
	if !ok {
		allowed = t[serviceOf(method)]
	}
	id, authenticated := spiffe.PeerID(ctx)
	if !authenticated {
		if slices.Contains(allowed, Plain) {
			return ctx, nil
		}
		return ctx, status.Errorf(codes.Unauthenticated, "%s needs a certificate of this cluster, or the unix socket as root", method)
	}
	// A certificate can not claim the names below: spiffe.ParseID refuses "local" and "*".
	if id.Service == Plain || !slices.Contains(allowed, Any) && !slices.Contains(allowed, id.Service) {
		return ctx, status.Errorf(codes.PermissionDenied, "%s may not be called by %s", method, describe(id))
	}
	return ctx, nil
}

func describe(id spiffe.ID) string {
	if id.Service == Local {
		return "a unix-socket peer"
	}
	return id.String()
}
