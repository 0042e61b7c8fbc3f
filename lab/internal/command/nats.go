// SPDX-License-Identifier: Apache-2.0

package command

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/weirmesh/weir/internal/flags"
	"github.com/weirmesh/weir/lab/internal/central"
)

// natsCommand is the lab's NATS server as a process of its own.
func natsCommand() *cobra.Command {
	common := flags.Default("")
	var store string
	command := &cobra.Command{
		Use:    "nats",
		Short:  "Run the embedded NATS server (the lab starts it)",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(command.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			log, err := flags.Logger(os.Stderr, common.LogLevel)
			if err != nil {
				return err
			}
			broker, err := central.RunNATS(ctx, common, store, log)
			if err != nil {
				return fmt.Errorf("nats: %w", err)
			}
			defer broker.Stop()
			return broker.Wait()
		},
	}
	common.Add(command.Flags())
	command.Flags().StringVar(&store, "store-dir", "", "`folder` of JetStream's files")
	return command
}

// centralCommand is all central services in one process.
func centralCommand() *cobra.Command {
	var path string
	command := &cobra.Command{
		Use:    "central",
		Short:  "Run NATS and all central services in one process (the lab starts it)",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(command.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			config, err := central.Read(path)
			if err != nil {
				return err
			}
			log, err := flags.Logger(os.Stderr, config.LogLevel)
			if err != nil {
				return err
			}
			return central.Run(ctx, config, log)
		},
	}
	command.Flags().StringVar(&path, "config", "", "`file` that the lab wrote")
	return command
}
