// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/weirmesh/weir/cli/internal/health"
	"github.com/weirmesh/weir/cli/internal/listing"
	"github.com/weirmesh/weir/cli/internal/plainjson"
	"github.com/weirmesh/weir/cli/internal/printer"
	"github.com/weirmesh/weir/cli/internal/rundir"
	"github.com/weirmesh/weir/gen/relay"
)

// statusInterval is how often --wait looks.
const statusInterval = 300 * time.Millisecond

type statusFlags struct {
	output string
	wait   bool
	limit  time.Duration
}

func (a *app) statusCommand() *cobra.Command {
	f := &statusFlags{}
	cmd := &cobra.Command{
		Use: "status", Short: "Show how every part of the mesh is", Args: noArgs,
		Long: `Show how every part of the mesh is, one line each, how many flows come, and what was lost where.

The exit code is 0 when all parts are there and ready, and 1 otherwise.`,
		Example: `  weir status
  weir status --wait && weir observe -f
  weir status -o json | jq '.parts[] | select(.state != "ready")'`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.status(cmd.Context(), f) },
	}
	cmd.Flags().StringVarP(&f.output, "output", "o", "table", "Output format: table, json")
	cmd.Flags().BoolVar(&f.wait, "wait", false, "Wait until all parts are ready")
	cmd.Flags().DurationVar(&f.limit, "wait-duration", 5*time.Minute, "How long --wait waits")
	complete(cmd, map[string][]string{"output": {"table", "json"}})
	return cmd
}

func (a *app) status(ctx context.Context, f *statusFlags) error {
	if f.output != "table" && f.output != "json" {
		return fmt.Errorf("unknown output format: %s, expected table or json", f.output)
	}
	if err := a.server.Validate(); err != nil {
		return err
	}
	report, err := a.gather(ctx)
	if f.wait {
		report, err = a.waitReady(ctx, f.limit, report, err)
	}
	if err != nil {
		return err
	}
	if err := a.showStatus(f.output, report); err != nil {
		return err
	}
	if wanting := report.Wanting(); len(wanting) > 0 {
		return fmt.Errorf("not ready: %s", strings.Join(wanting, ", "))
	}
	return nil
}

// waitReady asks again until all is ready or the time is up; then the last report counts.
func (a *app) waitReady(ctx context.Context, limit time.Duration, report *health.Report, err error) (*health.Report, error) {
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(statusInterval)
	defer tick.Stop()
	for err != nil || len(report.Wanting()) > 0 {
		select {
		case <-ctx.Done():
			return nil, errors.New("interrupted while waiting")
		case <-deadline.C:
			return report, err
		case <-tick.C:
			report, err = a.gather(ctx)
		}
	}
	return report, nil
}

// gather asks everything once.
func (a *app) gather(ctx context.Context) (*health.Report, error) {
	place, err := rundir.Find(a.runDir, a.lab)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, a.server.RequestTimeout)
	defer cancel()
	conn, server, err := a.statusObserver(ctx, place)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return health.Gather(ctx, place, server, conn), nil
}

// statusObserver connects to the observer of the place that is shown: --server if given, else the one the lab names.
func (a *app) statusObserver(ctx context.Context, place rundir.Place) (*grpc.ClientConn, string, error) {
	config := a.server
	if !a.serverGiven && place.Lab != "" {
		lab, err := a.askLab(ctx, place)
		if err == nil && lab.GetObserver() != "" {
			config.Server = lab.GetObserver()
		} else {
			a.log().Debug("the lab does not name its observer", "error", err)
		}
	}
	conn, err := config.Dial(a.DialOptions...)
	return conn, config.Server, err
}

func (a *app) showStatus(output string, r *health.Report) error {
	if output == "json" {
		return a.statusJSON(r)
	}
	title := "Node of a cluster"
	if r.Lab != "" {
		title = "Lab " + r.Lab
	}
	state := "ready"
	if n := len(r.Wanting()); n > 0 {
		state = "NOT READY"
	}
	fmt.Fprintf(a.Out, "%s: %s\n\n", printer.Safe(title), state)

	var rows [][]string
	for _, p := range r.Parts {
		up := "-"
		if started := p.Status.GetStarted(); started != nil {
			up = a.Now().Sub(started.AsTime()).Round(time.Second).String()
		}
		version := p.Status.GetVersion()
		if version == "" {
			version = "-"
		}
		rows = append(rows, []string{p.Socket.Name(), p.State(), up, version, p.Details()})
	}
	if err := listing.Table(a.Out, []string{"PART", "STATE", "UP", "VERSION", "DETAILS"}, rows); err != nil {
		return err
	}
	fmt.Fprintln(a.Out)
	for _, w := range r.Warnings() {
		fmt.Fprintln(a.Out, "Warning:", printer.Safe(w))
	}
	return showObserver(a.Out, &r.Observer)
}

func showObserver(w io.Writer, o *health.Observer) error {
	if o.Fault != "" {
		_, err := fmt.Fprintf(w, "Flows (%s): %s\n", o.Server, printer.Safe(o.Fault))
		return err
	}
	s := o.Status
	fmt.Fprintf(w, "Flows (%s): %.2f/s, %d seen, %d/%d in memory\n", o.Server, o.FlowsPerSecond(), s.GetSeenFlows(), s.GetNumFlows(), s.GetMaxFlows())
	if len(o.Nodes) > 0 {
		connected := 0
		var away []string
		for _, n := range o.Nodes {
			if n.GetState() == relay.NodeState_NODE_CONNECTED {
				connected++
			} else {
				away = append(away, printer.Safe(n.GetName())+" "+strings.ToLower(nodeState(n.GetState())))
			}
		}
		line := fmt.Sprintf("Nodes: %d/%d connected", connected, len(o.Nodes))
		if len(away) > 0 {
			line += ": " + strings.Join(away, ", ")
		}
		fmt.Fprintln(w, line)
	}
	switch losses := o.LossRows(printer.Place, printer.Cause); {
	case o.Losses == nil:
		fmt.Fprintln(w, "Losses: this server does not say")
	case len(losses) == 0:
		fmt.Fprintln(w, "Losses: none")
	default:
		fmt.Fprint(w, "Losses:\n\n")
		var rows [][]string
		for _, l := range losses {
			rows = append(rows, []string{l.Node, l.Place, l.Cause, number(l.Count)})
		}
		return listing.Table(w, []string{"NODE", "PLACE", "CAUSE", "FLOWS"}, rows)
	}
	return nil
}

// statusJSON writes {"lab", "ready", "parts": [...], "observer": {...}}.
func (a *app) statusJSON(r *health.Report) error {
	b := []byte(`{"lab":`)
	b = plainjson.AppendString(b, r.Lab)
	b = fmt.Appendf(b, `,"ready":%t,"parts":[`, len(r.Wanting()) == 0)
	for i, p := range r.Parts {
		if i > 0 {
			b = append(b, ',')
		}
		fields := []plainjson.Field{{Name: "name", Value: p.Socket.Name()}, {Name: "state", Value: p.State()}, {Name: "socket", Value: p.Socket.Path}}
		if p.Fault != "" {
			fields = append(fields, plainjson.Field{Name: "fault", Value: p.Fault})
		}
		var err error
		if b, err = plainjson.Append(b, p.Status, fields...); err != nil {
			return err
		}
	}
	b = append(b, `],"observer":{"server":`...)
	b = plainjson.AppendString(b, r.Observer.Server)
	if r.Observer.Fault != "" {
		b = append(b, `,"fault":`...)
		b = plainjson.AppendString(b, r.Observer.Fault)
	} else {
		var err error
		b = fmt.Appendf(b, `,"flows_per_second":%g,"status":`, r.Observer.FlowsPerSecond())
		if b, err = plainjson.Append(b, r.Observer.Status); err != nil {
			return err
		}
		items := make([]listing.Item, 0, len(r.Observer.Nodes))
		for _, n := range r.Observer.Nodes {
			items = append(items, listing.Item{Message: n})
		}
		nodes, err := listing.Array(items)
		if err != nil {
			return err
		}
		b = append(append(b, `,"nodes":`...), nodes...)
		if r.Observer.Losses != nil {
			b = append(b, `,"losses":`...)
			if b, err = plainjson.Append(b, r.Observer.Losses); err != nil {
				return err
			}
		}
	}
	return listing.Indent(a.Out, append(b, '}', '}'))
}
