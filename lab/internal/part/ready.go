// SPDX-License-Identifier: Apache-2.0

package part

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
)

// readyPeriod is how often a part is asked.
const readyPeriod = 50 * time.Millisecond

// AwaitReady waits until the part behind a unix socket says that it is ready; the error says what it was waiting for. It ends early when
// hopeless returns an error.
func AwaitReady(ctx context.Context, socket string, hopeless func() error) error {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("open %s: %w", socket, err)
	}
	defer conn.Close()
	client := statusv1.NewStatusServiceClient(conn)
	last := fmt.Errorf("no answer on %s", socket)
	ticks := time.NewTicker(readyPeriod)
	defer ticks.Stop()
	for {
		attempt, cancel := context.WithTimeout(ctx, time.Second)
		response, err := client.GetStatus(attempt, &statusv1.GetStatusRequest{})
		cancel()
		switch {
		case err == nil && response.GetReady():
			return nil
		case err == nil:
			last = fmt.Errorf("it waits for %s", strings.Join(response.GetWaitingFor(), ", "))
		case ctx.Err() == nil:
			last = err
			conn.ResetConnectBackoff()
		}
		if err := hopeless(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return last
		case <-ticks.C:
		}
	}
}
