// SPDX-License-Identifier: Apache-2.0

// Command weir-proxy is the node's L7 proxy, configured by the xDS server.
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
	"github.com/weirmesh/weir/services/proxy"
)

func main() {
	if err := run(); err != nil && !errors.Is(err, pflag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "weir-proxy:", err)
		os.Exit(1)
	}
}

func run() error {
	config := proxy.DefaultConfig()
	set := pflag.NewFlagSet("weir-proxy", pflag.ContinueOnError)
	config.AddFlags(set)
	if err := flags.Parse(set, os.Args[1:], os.LookupEnv); err != nil {
		return err
	}
	log, err := flags.Logger(os.Stderr, config.LogLevel)
	if err != nil {
		return err
	}
	memory := int64(0) // no limit where there is none of what it buffers
	if config.Limits.TotalBuffer > 0 {
		memory = gcMemory + config.Limits.TotalBuffer + config.LogTotalBytes
	}
	flags.Collector(gcPercent, memory)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	service, err := proxy.New(config, log)
	if err != nil {
		return err
	}
	log.Info("proxy started", "version", version.Version, "node", config.Node, "xds", config.XDS)
	return service.Run(ctx)
}

// gcPercent: little lives long but the configuration, about 13 MiB with 1,000 listeners, so the default would collect every few MiB. Requests cost a fifth less
// CPU than at 200 (BenchmarkProxy of package httpproxy).
const gcPercent = 400

// gcMemory is what the process may have, besides what it is configured to keep, before it collects more often than gcPercent says: the heap of a proxy with
// tens of thousands of connections must not grow to five times what lives.
const gcMemory = 512 << 20
