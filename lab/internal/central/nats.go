// SPDX-License-Identifier: Apache-2.0

package central

import (
	"context"
	"log/slog"

	"golang.org/x/sync/errgroup"

	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/internal/bus"
	"github.com/weirmesh/weir/internal/flags"
	"github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/internal/status"
)

// RunNATS starts the embedded NATS server, and its status on a unix socket if there is to be one. Stop it.
func RunNATS(ctx context.Context, common flags.Common, store string, log *slog.Logger) (*NATS, error) {
	tls, err := spiffe.Load(common.TLS)
	if err != nil {
		return nil, err
	}
	// SyncAlways: identity numbers must not be forgotten by a power failure.
	broker, err := bus.NewServer(bus.ServerConfig{Listen: common.Listen, StoreDir: store, TLS: tls, SyncAlways: true, Log: log})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	group, ctx := errgroup.WithContext(ctx)
	n := &NATS{broker: broker, cancel: cancel, group: group}
	if common.Socket == "" {
		group.Go(func() error { <-ctx.Done(); return nil })
		return n, nil
	}
	listener, err := server.ListenUnix(common.Socket)
	if err != nil {
		n.Stop()
		return nil, err
	}
	own := server.New(server.Config{
		Name: "nats", Log: log,
		Authorize: server.Table{"/" + statusv1.StatusService_ServiceDesc.ServiceName + "/": {server.Local}},
	})
	status.New("nats", "").Register(own.GRPC())
	own.SetServing("", true)
	group.Go(func() error { return own.Serve(ctx, listener) })
	return n, nil
}
