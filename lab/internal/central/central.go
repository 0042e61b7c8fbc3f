// SPDX-License-Identifier: Apache-2.0

// Package central runs NATS, the identity broker, the policy service, a relay and the observer in one process: what a small lab needs,
// at a fraction of the memory of five. They talk to each other over TCP and mutual TLS all the same.
package central

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"github.com/weirmesh/weir/internal/bus"
	"github.com/weirmesh/weir/internal/flags"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/services/identity"
	"github.com/weirmesh/weir/services/observer"
	"github.com/weirmesh/weir/services/policy"
	"github.com/weirmesh/weir/services/relay"
	"github.com/weirmesh/weir/services/xds"
)

// Service is what each of them is told.
type Service struct {
	Listen string       `json:"listen,omitempty"`
	Socket string       `json:"socket"`
	TLS    spiffe.Files `json:"tls"`
}

// Config is written by the supervisor and read by the process.
type Config struct {
	LogLevel    string  `json:"logLevel"`
	ClusterName string  `json:"clusterName"`
	NATS        Service `json:"nats"`
	// StoreDir is the folder of JetStream's files, NATSURL what clients connect to.
	StoreDir string  `json:"storeDir"`
	NATSURL  string  `json:"natsURL"`
	Identity Service `json:"identity"`
	Policy   Service `json:"policy"`
	// Source is where the policy service finds the cluster's objects.
	Source   string  `json:"source"`
	XDS      Service `json:"xds"`
	Relay    Service `json:"relay"`
	Observer Service `json:"observer"`
	// ObserverFD is the observer's inherited listener.
	ObserverFD int `json:"observerFD"`
	// PolicyArgs and so on are further arguments of those services, as on their own command lines.
	PolicyArgs   []string `json:"policyArgs,omitempty"`
	IdentityArgs []string `json:"identityArgs,omitempty"`
	XDSArgs      []string `json:"xdsArgs,omitempty"`
}

// Write writes the configuration for Read.
func (c Config) Write(path string) error {
	data, err := json.MarshalIndent(c, "", " ")
	if err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	if err := os.WriteFile(path, append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	return nil
}

// Read reads what Write wrote.
func Read(path string) (Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	var c Config
	if err := json.Unmarshal(data, &c); err != nil {
		return Config{}, fmt.Errorf("read configuration %s: %w", path, err)
	}
	return c, nil
}

// common are the flags that all services share.
func (c Config) common(s Service) flags.Common {
	common := flags.Default(s.Listen)
	common.Socket, common.TLS, common.LogLevel = s.Socket, s.TLS, c.LogLevel
	if c.ClusterName != "" {
		common.ClusterName = c.ClusterName
	}
	return common
}

// adder is a service's configuration, which knows its flags.
type adder interface{ Add(*pflag.FlagSet) }

// parse reads arguments into a configuration; the environment is the lab's and does not count.
func parse(service string, config adder, args []string) error {
	set := pflag.NewFlagSet(service, pflag.ContinueOnError)
	set.SetOutput(io.Discard)
	config.Add(set)
	if err := flags.Parse(set, args, func(string) (string, bool) { return "", false }); err != nil {
		return fmt.Errorf("%s: %w", service, err)
	}
	return nil
}

// Run runs all of them until ctx ends or one fails.
func Run(ctx context.Context, c Config, log *slog.Logger) error {
	group, ctx := errgroup.WithContext(ctx)
	// NATS goes last: what the others still have to say finds it there.
	broker, err := RunNATS(context.WithoutCancel(ctx), c.common(c.NATS), c.StoreDir, log.With("part", "nats"))
	if err != nil {
		return err
	}
	defer broker.Stop()
	services, err := c.services(log)
	if err != nil {
		return err
	}
	for name, run := range services {
		group.Go(func() error {
			if err := run(ctx); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	return group.Wait()
}

// services makes all services but NATS.
func (c Config) services(log *slog.Logger) (map[string]func(context.Context) error, error) {
	identityConfig := identity.DefaultConfig()
	identityConfig.Common, identityConfig.NATS = c.common(c.Identity), c.NATSURL
	if err := parse("identity", &identityConfig, c.IdentityArgs); err != nil {
		return nil, err
	}
	numbers, err := identity.New(identityConfig, log.With("part", "identity"))
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	policyConfig := policy.DefaultConfig()
	policyConfig.Common, policyConfig.Source, policyConfig.Identity = c.common(c.Policy), c.Source, []string{c.Identity.Listen}
	if err := parse("policy", &policyConfig, c.PolicyArgs); err != nil {
		return nil, err
	}
	desired, err := policy.New(policyConfig, log.With("part", "policy"))
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	xdsConfig := xds.DefaultConfig()
	xdsConfig.Common, xdsConfig.Policy = c.common(c.XDS), []string{c.Policy.Listen}
	if err := parse("xds", &xdsConfig, c.XDSArgs); err != nil {
		return nil, err
	}
	configuration, err := xds.New(xdsConfig, log.With("part", "xds"))
	if err != nil {
		return nil, fmt.Errorf("xds: %w", err)
	}
	relayConfig := relay.DefaultConfig()
	relayConfig.Common, relayConfig.NATS, relayConfig.Instance = c.common(c.Relay), c.NATSURL, "relay"
	intake, err := relay.New(relayConfig, log.With("part", "relay"))
	if err != nil {
		return nil, fmt.Errorf("relay: %w", err)
	}
	observerConfig := observer.DefaultConfig()
	observerConfig.Common, observerConfig.NATS, observerConfig.Instance = c.common(c.Observer), c.NATSURL, "observer"
	observerConfig.ListenFD = c.ObserverFD
	flows, err := observer.New(observerConfig, log.With("part", "observer"))
	if err != nil {
		return nil, fmt.Errorf("observer: %w", err)
	}
	return map[string]func(context.Context) error{
		"identity": numbers.Run, "policy": desired.Run, "xds": configuration.Run, "relay": intake.Run, "observer": flows.Run,
	}, nil
}

// NATS is the embedded server with its status socket.
type NATS struct {
	broker *bus.Server
	cancel context.CancelFunc
	group  *errgroup.Group
}

// Stop ends the server and returns when its files are closed.
func (n *NATS) Stop() {
	n.cancel()
	// What the status socket says at the end concerns nobody.
	_ = n.group.Wait()
	n.broker.Shutdown()
}

// Wait waits until the context of RunNATS ends.
func (n *NATS) Wait() error { return n.group.Wait() }
