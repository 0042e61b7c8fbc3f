// SPDX-License-Identifier: Apache-2.0

// Command weir-proxy is the node's L7 proxy, configured by the xDS server.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
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
	if os.Getenv("GOGC") == "" {
		// Little lives long but the configuration: the default would collect every few MiB.
		debug.SetGCPercent(200)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	service, err := proxy.New(config, log)
	if err != nil {
		return err
	}
	log.Info("proxy started", "version", version.Version, "node", config.Node, "xds", config.XDS)
	return service.Run(ctx)
}
