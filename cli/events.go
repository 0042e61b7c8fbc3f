// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/cli/internal/printer"
	"github.com/weirmesh/weir/cli/internal/selection"
	"github.com/weirmesh/weir/cli/internal/stage"
	"github.com/weirmesh/weir/gen/observer"
)

// eventFlags are the flags of agent-events and debug-events.
type eventFlags struct {
	selection selection.Flags
	format    formatFlags
}

func (a *app) agentEventsCommand() *cobra.Command {
	return a.eventsCommand("agent-events", "Show what the agents did", `  weir observe agent-events --last 50     # endpoints, identities and services that came and went
  weir observe agent-events -f -o json`,
		func(ctx context.Context, f *eventFlags) error {
			return a.events(ctx, f, "GetAgentEvents", func(ctx context.Context, client observer.ObserverClient, plan selection.Plan, opts printer.Options) error {
				stream, err := client.GetAgentEvents(ctx, &observer.GetAgentEventsRequest{
					Number: plan.Number, First: plan.First, Follow: plan.Follow, Since: plan.Since, Until: plan.Until})
				if err != nil {
					return a.server.Explain("GetAgentEvents", err)
				}
				kept := window(stream.Recv, plan)
				return pump(ctx, a, "GetAgentEvents", opts, kept, (*printer.Printer).AgentEvent)
			})
		})
}

func (a *app) debugEventsCommand() *cobra.Command {
	return a.eventsCommand("debug-events", "Show debug events of the datapath", `  weir observe debug-events -f`,
		func(ctx context.Context, f *eventFlags) error {
			return a.events(ctx, f, "GetDebugEvents", func(ctx context.Context, client observer.ObserverClient, plan selection.Plan, opts printer.Options) error {
				stream, err := client.GetDebugEvents(ctx, &observer.GetDebugEventsRequest{
					Number: plan.Number, First: plan.First, Follow: plan.Follow, Since: plan.Since, Until: plan.Until})
				if err != nil {
					return a.server.Explain("GetDebugEvents", err)
				}
				kept := window(stream.Recv, plan)
				return pump(ctx, a, "GetDebugEvents", opts, kept, (*printer.Printer).DebugEvent)
			})
		})
}

func (a *app) eventsCommand(use, short, example string, run func(context.Context, *eventFlags) error) *cobra.Command {
	f := &eventFlags{}
	cmd := &cobra.Command{
		Use: use, Short: short, Example: example, Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), f) },
	}
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	registerSelection(fs, &f.selection)
	addGroup(cmd, "Selectors", fs)
	fs = pflag.NewFlagSet("", pflag.ContinueOnError)
	f.format.register(fs)
	addGroup(cmd, "Format", fs)
	// Hubble's command takes these here as well, without effect.
	fs = pflag.NewFlagSet("", pflag.ContinueOnError)
	fs.BoolP("silent-errors", "s", false, "No effect on events")
	fs.Bool("print-raw-filters", false, "No effect on events")
	fs.String("input-file", "", "No effect on events")
	fs.StringSlice("field-mask", nil, "No effect on events")
	fs.Bool("use-default-field-masks", false, "No effect on events")
	fs.VisitAll(func(f *pflag.Flag) { f.Hidden = true })
	addGroup(cmd, "Other", fs)
	complete(cmd, map[string][]string{"output": {"compact", "dict", "table", "json", "jsonpb", "flat"}})
	return cmd
}

func (a *app) events(ctx context.Context, f *eventFlags, method string,
	run func(context.Context, observer.ObserverClient, selection.Plan, printer.Options) error) error {
	opts, err := f.format.options()
	if err != nil {
		return err
	}
	if opts.Format == printer.Table && f.selection.Follow {
		return errTableFollow
	}
	plan, err := f.selection.ForEvents(a.Now(), opts.Location)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := a.dialObserver(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	a.log().Debug("calling", "method", method)
	return run(ctx, observer.NewObserverClient(conn), plan, opts)
}

// window does to a stream of events what the plan leaves to this side.
func window[T interface{ GetTime() *timestamppb.Timestamp }](recv stage.Recv[T], plan selection.Plan) stage.Recv[T] {
	counts := func(r T) (time.Time, bool) { return r.GetTime().AsTime(), true }
	if !plan.NotBefore.IsZero() {
		recv = stage.NotBefore(recv, counts, plan.NotBefore)
	}
	if plan.Tail > 0 {
		recv = stage.Tail(recv, counts, plan.Tail)
	}
	return recv
}
