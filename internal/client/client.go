// SPDX-License-Identifier: Apache-2.0

// Package client makes gRPC connections to other parts of Weir, which are found by a configured
// list of addresses.
package client

import (
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/health" // the client's side of health checks, for Balance
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/weirmesh/weir/internal/spiffe"
)

// Config says whom to connect to.
type Config struct {
	// Addresses are host:port of the replicas of one service. Calls go to the first that answers; when
	// that connection breaks, the list is tried again.
	Addresses []string
	// TLS is who we are. Nil = plain text, for tests and loopback only.
	TLS *spiffe.Source
	// Service is who must answer, such as "policy".
	Service string
	// Balance spreads calls over all addresses whose health service says that they serve, instead of
	// staying with the first that answers. Good for short calls to a service that sets its health.
	Balance bool
	// Options are added to the connection's own.
	Options []grpc.DialOption
}

// CheckAddresses reports every address that is not host:port.
func CheckAddresses(name string, addresses []string) error {
	if len(addresses) == 0 {
		return fmt.Errorf("%s is empty", name)
	}
	var errs []error
	for _, a := range addresses {
		if _, port, err := net.SplitHostPort(a); err != nil || port == "" {
			errs = append(errs, fmt.Errorf("%s: %q is not host:port", name, a))
		}
	}
	return errors.Join(errs...)
}

// New returns a connection, which the caller closes. It connects on its own, again and again, at
// most 2 s apart; a peer that vanished without a word is noticed within 15 s.
func New(config Config) (*grpc.ClientConn, error) {
	if err := CheckAddresses(config.Service, config.Addresses); err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	var creds credentials.TransportCredentials
	if config.TLS != nil {
		creds = config.TLS.ClientCredentials(config.Service)
	} else {
		creds = insecure.NewCredentials()
	}
	state := resolver.State{}
	for _, a := range config.Addresses {
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: a}}})
	}
	list := manual.NewBuilderWithScheme("weir")
	list.InitialState(state)
	options := []grpc.DialOption{
		grpc.WithResolvers(list),
		grpc.WithTransportCredentials(creds),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second,
			},
			MinConnectTimeout: 3 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true,
		}),
	}
	if config.Balance {
		options = append(options, grpc.WithDefaultServiceConfig(
			`{"loadBalancingConfig":[{"round_robin":{}}],"healthCheckConfig":{"serviceName":""}}`))
	}
	conn, err := grpc.NewClient("weir:///"+config.Service, append(options, config.Options...)...)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", config.Service, err)
	}
	return conn, nil
}
