// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	flowpb "github.com/weirmesh/weir/gen/flow"
	observerpb "github.com/weirmesh/weir/gen/observer"
	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/test/e2e/procnet"
	"github.com/weirmesh/weir/test/e2e/traffic"
)

// For is the same lab for a subtest, which its failures then end.
func (l *Lab) For(t testing.TB) *Lab {
	c := *l
	c.t = t
	return &c
}

// Down ends the lab before the test's end.
func (l *Lab) Down() {
	l.t.Helper()
	if out, err := exec.Command(Bin(l.t, "weir-lab"), "down", "--name", l.Name).CombinedOutput(); err != nil {
		l.t.Fatalf("weir lab down: %v\n%s", err, out)
	}
}

// Dial connects from inside a network namespace, given by its path.
func (l *Lab) Dial(ctx context.Context, netns, network, addr string) (net.Conn, error) {
	return dialIn(ctx, netns, network, addr)
}

// Listeners are the TCP addresses in a network namespace, other than loopback, on which somebody listens.
func (l *Lab) Listeners(ctx context.Context, netns string) []string {
	l.t.Helper()
	var found []string
	err := inNetns(ctx, netns, func(context.Context) error {
		served, err := procnet.Served("tcp")
		for _, a := range served {
			if !a.Addr().IsLoopback() {
				found = append(found, a.String())
			}
		}
		return err
	})
	if err != nil {
		l.t.Fatalf("listeners in %s: %v", netns, err)
	}
	return found
}

// NodeNetns is the path of a node's network namespace.
func (l *Lab) NodeNetns(ctx context.Context, node string) string {
	l.t.Helper()
	for _, n := range l.State(ctx).Nodes {
		if n.Name == node {
			return n.Netns
		}
	}
	l.t.Fatalf("the lab has no node %s", node)
	return ""
}

// HostNetns is the path of an outside host's network namespace.
func (l *Lab) HostNetns(ctx context.Context, host string) string {
	l.t.Helper()
	for _, h := range l.State(ctx).Hosts {
		if h.Name == host {
			return h.Netns
		}
	}
	l.t.Fatalf("the lab has no host %s", host)
	return ""
}

// Part is what the lab says of one of Weir's own parts.
func (l *Lab) Part(ctx context.Context, name string) *labv1.Part {
	l.t.Helper()
	for _, p := range l.State(ctx).Parts {
		if p.Name == name {
			return p
		}
	}
	l.t.Fatalf("the lab has no part %s", name)
	return nil
}

// Apply creates or changes objects.
func (l *Lab) Apply(ctx context.Context, manifests string) {
	l.t.Helper()
	if _, err := l.lab.Apply(ctx, &labv1.ApplyRequest{Files: []*labv1.ManifestFile{{Name: "-", Data: []byte(manifests)}}}); err != nil {
		l.t.Fatalf("apply: %v", err)
	}
}

// Delete removes objects.
func (l *Lab) Delete(ctx context.Context, manifests string) {
	l.t.Helper()
	if _, err := l.lab.Delete(ctx, &labv1.DeleteRequest{Files: []*labv1.ManifestFile{{Name: "-", Data: []byte(manifests)}}}); err != nil {
		l.t.Fatalf("delete: %v", err)
	}
}

// Details are what a part's status says, by name. The socket is relative to the lab's folder, such as nodes/node1/agent.sock.
func (l *Lab) Details(ctx context.Context, socket string) (map[string]string, error) {
	conn, err := grpc.NewClient("unix:///run/weir/"+l.Name+"/"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	status, err := statusv1.NewStatusServiceClient(conn).GetStatus(ctx, &statusv1.GetStatusRequest{})
	if err != nil {
		return nil, err
	}
	details := map[string]string{}
	for _, d := range status.Details {
		details[d.Name] = d.Value
	}
	return details, nil
}

// Ask runs `e2e-traffic ask` in a pod, or in host/NAME.
func (l *Lab) Ask(ctx context.Context, from, network string, to netip.AddrPort, limit time.Duration) (traffic.Asked, error) {
	out, err := l.Exec(ctx, from, "e2e-traffic", "ask", network, to.String(), limit.String())
	var a traffic.Asked
	if jsonErr := json.Unmarshal([]byte(out), &a); jsonErr != nil && err == nil {
		err = fmt.Errorf("ask: answer %q: %w", out, jsonErr)
	}
	return a, err
}

// Wanted is a flow that must come.
type Wanted struct {
	// What it is, for the message.
	What  string
	Match func(*flowpb.Flow) bool
}

// Expect waits until each wanted flow is there.
func (l *Lab) Expect(ctx context.Context, wanted ...Wanted) {
	l.t.Helper()
	Eventually(l.t, func() error {
		a, err := l.Flows(ctx, &observerpb.GetFlowsRequest{Number: 1 << 40})
		if err != nil {
			return err
		}
		var missing []string
		for _, w := range wanted {
			found := false
			for _, r := range a.Flows {
				if found = w.Match(r.GetFlow()); found {
					break
				}
			}
			if !found {
				missing = append(missing, w.What)
			}
		}
		if len(missing) > 0 {
			return fmt.Errorf("%d of %d flows did not come (of %d that did):\n%s", len(missing), len(wanted), len(a.Flows), strings.Join(missing, "\n"))
		}
		return nil
	})
}

// AskMany runs `e2e-traffic ask-many` in a pod, or in host/NAME, with further flags.
func (l *Lab) AskMany(ctx context.Context, from string, to netip.AddrPort, flags ...string) (traffic.Asks, error) {
	out, err := l.Exec(ctx, from, append(append([]string{"e2e-traffic", "ask-many"}, flags...), to.String())...)
	var a traffic.Asks
	if err != nil {
		return a, err
	}
	if err := json.Unmarshal([]byte(out), &a); err != nil {
		return a, fmt.Errorf("ask-many: answer %q: %w", out, err)
	}
	return a, nil
}
