// SPDX-License-Identifier: Apache-2.0

// Command weir-dns runs a node's DNS proxy.
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
	"github.com/weirmesh/weir/services/agent/dns"
)

const (
	// gcPercent: most of what a query needs ends with its answer, and the default would collect every few MiB.
	gcPercent = 400
	// gcMemory is where it collects more often: a full cache of names must not grow to five times itself.
	gcMemory = 256 << 20
)

func main() {
	if err := run(os.Args[1:]); err != nil && !errors.Is(err, pflag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "weir-dns:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	config := dns.DefaultConfig()
	set := pflag.NewFlagSet("weir-dns", pflag.ContinueOnError)
	config.Add(set)
	showVersion := set.Bool("version", false, "print the version and exit")
	if err := flags.Parse(set, args, os.LookupEnv); err != nil {
		return err
	}
	if *showVersion {
		fmt.Println(version.Version)
		return nil
	}
	log, err := flags.Logger(os.Stderr, config.LogLevel)
	if err != nil {
		return err
	}
	flags.Collector(gcPercent, gcMemory)
	service, err := dns.New(config, log)
	if err != nil {
		return err
	}
	log.Info("configuration", "version", version.Version, "config", fmt.Sprintf("%+v", config))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return service.Run(ctx)
}
