// SPDX-License-Identifier: Apache-2.0

// Command weir-observer merges the flows of all nodes and answers queries about them.
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
	"github.com/weirmesh/weir/services/observer"
)

// overhead is what the process needs besides the stored batches, and some room for garbage.
const overhead = 56 << 20

func main() {
	if err := run(); err != nil && !errors.Is(err, pflag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "weir-observer:", err)
		os.Exit(1)
	}
}

func run() error {
	config := observer.DefaultConfig()
	set := pflag.NewFlagSet("weir-observer", pflag.ContinueOnError)
	config.Add(set)
	set.IntVar(&config.ListenFD, "listen-fd", config.ListenFD, "`number` of an inherited listener to serve on instead of --listen")
	set.StringVar(&config.NATS, "nats", config.NATS, "`URL` of the NATS servers, comma separated")
	set.StringVar(&config.Instance, "instance", config.Instance, "`name` that tells observers apart")
	set.IntVar(&config.MemoryBytes, "memory-bytes", config.MemoryBytes, "`bytes` of flows kept in memory; older ones are read from NATS")
	set.Uint64Var(&config.ReplayBytes, "replay-bytes", config.ReplayBytes, "`bytes` of the stream's end that are read at the start")
	set.DurationVar(&config.Window, "order-window", config.Window, "`time` that a flow waits at most for earlier ones of other nodes")
	set.DurationVar(&config.Settle, "order-settle", config.Settle, "`time` that a flow waits at least")
	set.DurationVar(&config.Patience, "gap-patience", config.Patience, "`time` after which missing flows count as lost")
	set.DurationVar(&config.Silence, "node-silence", config.Silence, "`time` without batches after which a node counts as unavailable, unless a relay says that its agent is connected")
	if err := flags.Parse(set, os.Args[1:], os.LookupEnv); err != nil {
		return err
	}
	log, err := flags.Logger(os.Stderr, config.LogLevel)
	if err != nil {
		return err
	}
	flags.Collector(0, int64(config.MemoryBytes)+overhead)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	service, err := observer.New(config, log)
	if err != nil {
		return err
	}
	log.Info("observer started", "version", version.Version, "listen", service.Addr().String(), "nats", config.NATS)
	return service.Run(ctx)
}
