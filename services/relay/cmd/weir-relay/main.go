// SPDX-License-Identifier: Apache-2.0

// Command weir-relay takes the agents' flows and stores them in JetStream.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/weirmesh/weir/internal/flags"
	"github.com/weirmesh/weir/internal/version"
	"github.com/weirmesh/weir/services/relay"
)

func main() {
	if err := run(); err != nil && !errors.Is(err, pflag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "weir-relay:", err)
		os.Exit(1)
	}
}

func run() error {
	config := relay.DefaultConfig()
	set := pflag.NewFlagSet("weir-relay", pflag.ContinueOnError)
	config.Add(set)
	set.StringVar(&config.NATS, "nats", config.NATS, "`URL` of the NATS servers, comma separated")
	set.StringVar(&config.Instance, "instance", config.Instance, "`name` that tells relays apart")
	set.DurationVar(&config.Stream.MaxAge, "history-age", config.Stream.MaxAge, "`age` at which stored flows are removed; 0 = never")
	set.Int64Var(&config.Stream.MaxBytes, "history-bytes", config.Stream.MaxBytes, "size in `bytes` at which the oldest stored flows are removed; 0 = the server's limit")
	set.IntVar(&config.Stream.Replicas, "history-replicas", config.Stream.Replicas, "`number` of NATS servers that hold each batch")
	set.IntVar(&config.StreamBatches, "stream-batches", config.StreamBatches, "`number` of one agent's batches that may wait for their acknowledgement")
	set.Int64Var(&config.TotalBytes, "total-bytes", config.TotalBytes, "`bytes` of all agents' batches that may wait")
	set.DurationVar(&config.Hold, "hold", config.Hold, "`time` that a batch waits for NATS before the agent is told to try again")
	set.DurationVar(&config.AckTimeout, "ack-timeout", config.AckTimeout, "`time` that JetStream may take to store a batch")
	if err := flags.Parse(set, os.Args[1:], os.LookupEnv); err != nil {
		return err
	}
	log, err := flags.Logger(os.Stderr, config.LogLevel)
	if err != nil {
		return err
	}
	// Nearly nothing lives long here: the default would collect every few MiB.
	flags.Collector(400, 0)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	service, err := relay.New(config, log)
	if err != nil {
		return err
	}
	log.Info("relay started", "version", version.Version, "listen", service.Addr().String(), "nats", config.NATS)
	return service.Run(ctx)
}
