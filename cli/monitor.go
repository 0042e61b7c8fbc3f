// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/weirmesh/weir/cli/internal/listing"
	"github.com/weirmesh/weir/cli/internal/printer"
	"github.com/weirmesh/weir/cli/internal/rundir"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
)

func (a *app) monitorCommand() *cobra.Command {
	f := &nodeFlags{}
	cmd := &cobra.Command{
		Use: "monitor", Short: "Show kernel records as they come, before names are added", Args: noArgs,
		Example: `  weir monitor --node node1
  weir monitor -o json | jq -r .text`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.monitor(cmd.Context(), f) },
	}
	f.register(cmd)
	return cmd
}

// monitor shows the streams of all chosen agents until they end or ctx does.
func (a *app) monitor(ctx context.Context, f *nodeFlags) error {
	if err := f.check(); err != nil {
		return err
	}
	agents, err := a.agents(f.nodes)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	records := make(chan fromNode[*agentv1.MonitorResponse], pumpQueue)
	failures := make([]error, len(agents))
	var wg sync.WaitGroup
	for i, agent := range agents {
		wg.Go(func() {
			if err := monitorOne(ctx, agent, records); !errors.Is(err, io.EOF) {
				failures[i] = explainSocket(agent, err)
			}
		})
	}
	go func() { wg.Wait(); close(records) }()

	out := bufio.NewWriterSize(a.Out, 64<<10)
	for {
		var r fromNode[*agentv1.MonitorResponse]
		var ok bool
		select {
		case r, ok = <-records:
		default:
			if err := out.Flush(); err != nil {
				return fmt.Errorf("write output: %w", err)
			}
			r, ok = <-records
		}
		if !ok {
			break
		}
		if err := f.writeRecord(out, r); err != nil {
			return err
		}
	}
	err = errors.Join(append([]error{out.Flush()}, failures...)...)
	if interrupted(ctx, err) {
		return nil
	}
	return err
}

func monitorOne(ctx context.Context, agent rundir.Socket, records chan<- fromNode[*agentv1.MonitorResponse]) error {
	conn, err := agent.Dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := agentv1.NewAgentServiceClient(conn).Monitor(ctx, &agentv1.MonitorRequest{})
	if err != nil {
		return err
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		select {
		case records <- fromNode[*agentv1.MonitorResponse]{nodeName(agent), r}:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (f *nodeFlags) writeRecord(w io.Writer, r fromNode[*agentv1.MonitorResponse]) error {
	if f.output == "json" {
		return listing.Line(w, listing.Item{Message: r.value, Node: r.node})
	}
	var b strings.Builder
	if r.value.GetLost() > 0 {
		fmt.Fprintf(&b, "%s: %d records lost: this reader is too slow\n", r.node, r.value.GetLost())
	}
	if text := r.value.GetText(); text != "" {
		fmt.Fprintf(&b, "%s %s CPU %02d: %s\n", r.value.GetTime().AsTime().Format(time.StampMicro), r.node, r.value.GetCpu(), printer.Safe(text))
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}
