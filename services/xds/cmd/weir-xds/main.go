// SPDX-License-Identifier: Apache-2.0

// Command weir-xds serves the configuration of the nodes' proxies.
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
	"github.com/weirmesh/weir/services/xds"
)

func main() {
	if err := run(); err != nil && !errors.Is(err, pflag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "weir-xds:", err)
		os.Exit(1)
	}
}

func run() error {
	config := xds.DefaultConfig()
	set := pflag.NewFlagSet("weir-xds", pflag.ContinueOnError)
	config.Add(set)
	if err := flags.Parse(set, os.Args[1:], os.LookupEnv); err != nil {
		return err
	}
	log, err := flags.Logger(os.Stderr, config.LogLevel)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	service, err := xds.New(config, log)
	if err != nil {
		return err
	}
	log.Info("xds started", "version", version.Version, "listen", service.Addr().String(), "policy", config.Policy)
	return service.Run(ctx)
}
