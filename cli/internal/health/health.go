// SPDX-License-Identifier: Apache-2.0

// Package health gathers what all parts of a mesh say of themselves into one
// report, and decides whether everything is up.
package health

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/cli/internal/rundir"
	"github.com/weirmesh/weir/gen/observer"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
)

// Part is one part's state.
type Part struct {
	Socket rundir.Socket
	// Status is nil when the part did not answer; Fault says why.
	Status *statusv1.GetStatusResponse
	Fault  string
}

// State is ready, not ready, missing or down.
func (p Part) State() string {
	switch {
	case p.Socket.Missing:
		return "missing"
	case p.Status == nil:
		return "down"
	case !p.Status.GetReady():
		return "not ready"
	}
	return "ready"
}

// Observer is what the observer's API says.
type Observer struct {
	Server string
	Status *observer.ServerStatusResponse
	Nodes  []*observer.Node
	// Losses is nil when the server lacks the call.
	Losses *observerv1.GetLossesResponse
	// Fault says why there is no status.
	Fault string
}

// Report is everything.
type Report struct {
	// Lab is empty in a cluster.
	Lab      string
	Parts    []Part
	Observer Observer
}

// Wanting names what is not up, with the reason; empty = all is.
func (r *Report) Wanting() []string {
	var out []string
	for _, p := range r.Parts {
		if s := p.State(); s != "ready" {
			out = append(out, p.Socket.Name()+" "+s)
		}
	}
	if r.Observer.Fault != "" {
		out = append(out, "the observer's API")
	}
	return out
}

// FlowsPerSecond of the last minute, or since the server's start when it does not say.
func (o *Observer) FlowsPerSecond() float64 {
	if rate := o.Status.GetFlowsRate(); rate > 0 {
		return rate
	}
	if o.Status.GetUptimeNs() == 0 {
		return 0
	}
	return float64(o.Status.GetSeenFlows()) / (float64(o.Status.GetUptimeNs()) / 1e9)
}

// Loss is one row of what was lost.
type Loss struct {
	Node, Place, Cause string
	Count              uint64
}

// LossRows returns what the observer has counted, by node, place and cause.
func (o *Observer) LossRows(place, cause func(interface{ String() string }) string) []Loss {
	var out []Loss
	for _, l := range o.Losses.GetLosses() {
		if l.GetCount() > 0 {
			out = append(out, Loss{l.GetNodeName(), place(l.GetPlace()), cause(l.GetCause()), l.GetCount()})
		}
	}
	slices.SortFunc(out, func(x, y Loss) int {
		return cmp.Or(cmp.Compare(x.Node, y.Node), cmp.Compare(x.Place, y.Place), cmp.Compare(x.Cause, y.Cause))
	})
	return out
}

// Gather asks all sockets and the observer side by side; the context bounds it.
func Gather(ctx context.Context, place rundir.Place, server string, conn *grpc.ClientConn) *Report {
	sockets := place.Parts()
	r := &Report{Lab: place.Lab, Parts: make([]Part, len(sockets))}
	var wg sync.WaitGroup
	for i, s := range sockets {
		wg.Go(func() { r.Parts[i] = askPart(ctx, s) })
	}
	wg.Go(func() { r.Observer = askObserver(ctx, server, conn) })
	wg.Wait()
	return r
}

func askPart(ctx context.Context, s rundir.Socket) Part {
	p := Part{Socket: s}
	if s.Missing {
		p.Fault = s.Path + " does not exist"
		return p
	}
	conn, err := s.Dial()
	if err != nil {
		p.Fault = err.Error()
		return p
	}
	defer conn.Close()
	p.Status, err = statusv1.NewStatusServiceClient(conn).GetStatus(ctx, &statusv1.GetStatusRequest{})
	if err != nil {
		p.Status, p.Fault = nil, plain(err)
	}
	return p
}

func askObserver(ctx context.Context, server string, conn *grpc.ClientConn) Observer {
	o := Observer{Server: server}
	client := observer.NewObserverClient(conn)
	var err error
	if o.Status, err = client.ServerStatus(ctx, &observer.ServerStatusRequest{}); err != nil {
		o.Status, o.Fault = nil, plain(err)
		return o
	}
	// A node of Hubble's has neither of these calls, which is no fault.
	if nodes, err := client.GetNodes(ctx, &observer.GetNodesRequest{}); err == nil {
		o.Nodes = slices.SortedFunc(slices.Values(nodes.GetNodes()), func(x, y *observer.Node) int { return cmp.Compare(x.GetName(), y.GetName()) })
	}
	if losses, err := observerv1.NewObserverServiceClient(conn).GetLosses(ctx, &observerv1.GetLossesRequest{}); err == nil {
		o.Losses = losses
	}
	return o
}

// plain cuts gRPC's wrapping off an error.
func plain(err error) string {
	text := status.Convert(err).Message()
	if _, after, ok := strings.Cut(text, `desc = "`); ok {
		text = strings.TrimSuffix(after, `"`)
	}
	text = strings.TrimPrefix(text, "transport: ")
	return strings.TrimPrefix(text, "Error while dialing: ")
}

// pressing are the beginnings of details that an operator must not overlook, and what they are about.
var pressing = []struct{ detail, about string }{
	{"policy paused", "policy is PAUSED, drops pass as AUDIT"},
	{"policy refused ", "policy NOT in force"},
	{"map ", "a table fills"},
}

// Warnings are what parts say of themselves that must not be overlooked: paused policy, policies that are not in force, full tables.
func (r *Report) Warnings() []string {
	var out []string
	for _, p := range r.Parts {
		for _, d := range p.Status.GetDetails() {
			for _, kind := range pressing {
				if strings.HasPrefix(d.GetName(), kind.detail) {
					text := strings.TrimSpace(strings.TrimPrefix(d.GetName(), strings.TrimSuffix(kind.detail, " ")) + " " + d.GetValue())
					out = append(out, fmt.Sprintf("%s: %s: %s", p.Socket.Name(), kind.about, text))
				}
			}
		}
	}
	return out
}

// Details is what a part says of itself on one line: why it is not ready, details, losses.
func (p Part) Details() string {
	var out []string
	if p.Fault != "" {
		out = append(out, p.Fault)
	}
	if w := p.Status.GetWaitingFor(); len(w) > 0 {
		out = append(out, "waiting for "+strings.Join(w, ", "))
	}
	for _, d := range p.Status.GetDetails() {
		out = append(out, strings.TrimSpace(d.GetName()+" "+d.GetValue()))
	}
	for _, l := range p.Status.GetLosses() {
		out = append(out, fmt.Sprintf("lost %d (%s)", l.GetCount(), strings.TrimSpace(l.GetPlace()+" "+l.GetCause())))
	}
	return strings.Join(out, "; ")
}
