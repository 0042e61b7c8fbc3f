// SPDX-License-Identifier: Apache-2.0

package command

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/internal/bus"
	"github.com/weirmesh/weir/internal/flags"
	"github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/internal/status"
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
			return runNATS(ctx, common, store)
		},
	}
	common.Add(command.Flags())
	command.Flags().StringVar(&store, "store-dir", "", "`folder` of JetStream's files")
	return command
}

func runNATS(ctx context.Context, common flags.Common, store string) error {
	log, err := flags.Logger(os.Stderr, common.LogLevel)
	if err != nil {
		return err
	}
	tls, err := spiffe.Load(common.TLS)
	if err != nil {
		return err
	}
	broker, err := bus.NewServer(bus.ServerConfig{Listen: common.Listen, StoreDir: store, TLS: tls, SyncAlways: true, Log: log})
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return broker.Run(ctx) })
	if common.Socket != "" {
		listener, err := server.ListenUnix(common.Socket)
		if err != nil {
			broker.Shutdown()
			return err
		}
		reporter := status.New("nats", "")
		own := server.New(server.Config{
			Name: "nats", Log: log,
			Authorize: server.Table{"/" + statusv1.StatusService_ServiceDesc.ServiceName + "/": {server.Local}},
		})
		reporter.Register(own.GRPC())
		own.SetServing("", true)
		group.Go(func() error { return own.Serve(ctx, listener) })
	}
	if err := group.Wait(); err != nil {
		return fmt.Errorf("nats: %w", err)
	}
	return nil
}

func centralCommand() *cobra.Command { return &cobra.Command{Use: "central", Hidden: true} }
