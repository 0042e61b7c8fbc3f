// SPDX-License-Identifier: Apache-2.0

// Command weir-identity runs Weir's identity broker.
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
	"github.com/weirmesh/weir/services/identity"
)

func main() {
	if err := run(os.Args[1:]); err != nil && !errors.Is(err, pflag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "weir-identity:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	config := identity.DefaultConfig()
	set := pflag.NewFlagSet("weir-identity", pflag.ContinueOnError)
	config.Add(set)
	set.StringVar(&config.NATS, "nats", config.NATS, "`url` of the NATS servers, comma-separated")
	set.IntVar(&config.Replicas, "nats-replicas", config.Replicas, "`number` of NATS servers that hold an identity before it is answered")
	set.DurationVar(&config.Allocator.Rest, "rest", config.Allocator.Rest, "how long a freed number is not given again")
	set.DurationVar(&config.Allocator.ReleaseWait, "release-wait", config.Allocator.ReleaseWait, "how long a released label set keeps its number")
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
	service, err := identity.New(config, log)
	if err != nil {
		return err
	}
	log.Info("configuration", "version", version.Version, "listen", config.Listen, "nats", config.NATS,
		"rest", config.Allocator.Rest, "release-wait", config.Allocator.ReleaseWait)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return service.Run(ctx)
}
