// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	sourcev1 "github.com/weirmesh/weir/gen/weir/source/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/internal/spiffe"
)

func nodeDoc(i int) string {
	return fmt.Sprintf(`kind: Node
metadata: {name: n%d}
spec: {podCIDRs: [10.244.%d.0/24]}
status: {addresses: [{type: InternalIP, address: 172.30.0.1%d}]}
`, i, i, i)
}

func podDoc(name, node, app string) string {
	return fmt.Sprintf(`kind: Pod
metadata: {name: %s, namespace: default, uid: %s, labels: {app: %s}}
spec: {nodeName: %s}
`, name, name, app, node)
}

func endpoint(uid, node string, addresses ...string) *policyv1.Endpoint {
	return &policyv1.Endpoint{Uid: uid, Node: node, Addresses: addresses}
}

const (
	added    = sourcev1.WatchResponse_TYPE_ADDED
	modified = sourcev1.WatchResponse_TYPE_MODIFIED
	deleted  = sourcev1.WatchResponse_TYPE_DELETED
)

func TestSync(t *testing.T) {
	c := newCluster(t, nodeDoc(1), nodeDoc(2), podDoc("a", "n1", "x"))
	c.start()
	one, two := c.connect("n1"), c.connect("n2")
	one.until("first state", func() bool { return one.synced })
	two.until("first state", func() bool { return two.synced })
	if !one.has("pod a") || two.has("pod a") {
		t.Errorf("pod a belongs to n1 only: n1 has %v, n2 has %v", one.keys(), two.keys())
	}

	// A registration spreads, and is answered when the other node holds it.
	one.register(endpoint("a", "n1", "10.244.1.5"))
	two.until("the address", func() bool { return two.has("endpoint a") })
	one.until("the answer", func() bool { return one.spreads["a"] != nil })
	if s := one.spreads["a"]; s.GetError() != "" || len(s.GetLateNodes()) != 0 {
		t.Errorf("answer is %v", s)
	}
	if got := two.state["endpoint a"].GetEndpoint(); got.GetIdentity() != one.state["pod a"].GetPod().GetIdentity() ||
		got.GetName() != "a" || got.GetAddresses()[0] != "10.244.1.5" {
		t.Errorf("endpoint is %v", got)
	}

	// A pod is told to its node before it starts; when it goes, so does its endpoint.
	c.source.send(added, podDoc("b", "n2", "w"))
	two.until("pod b", func() bool { return two.has("pod b") })
	c.source.send(deleted, podDoc("a", "n1", "x"))
	two.until("the end of a", func() bool { return !two.has("endpoint a") })

	// A broken object is skipped: its last good form stays, and later objects come through.
	c.source.send(modified, "kind: Pod\nmetadata: {name: b, namespace: default, uid: b}\nspec: {nodeName: n2, containers: [{name: c, ports: [{name: p, containerPort: 99999}]}]}")
	c.source.send(added, podDoc("c", "n2", "z"))
	two.until("pod c", func() bool { return two.has("pod c") })
	if !two.has("pod b") {
		t.Error("the last good form of pod b is gone")
	}
}

func TestLateNodesAreNamed(t *testing.T) {
	c := newCluster(t, nodeDoc(1), nodeDoc(2), podDoc("a", "n1", "x"))
	c.start()
	one, two := c.connect("n1"), c.connect("n2")
	two.noAck = true
	one.until("first state", func() bool { return one.synced })
	two.until("first state", func() bool { return two.synced })
	one.register(endpoint("a", "n1", "10.244.1.5"))
	one.until("the answer", func() bool { return one.spreads["a"] != nil })
	if late := one.spreads["a"].GetLateNodes(); len(late) != 1 || late[0] != "n2" {
		t.Errorf("late nodes are %v, want n2", late)
	}
	// A node that disconnects is waited for no longer.
	if err := two.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	two.end()
	one.register(endpoint("a", "n1", "10.244.1.6"))
	delete(one.spreads, "a")
	one.until("the second answer", func() bool { return one.spreads["a"] != nil })
	if late := one.spreads["a"].GetLateNodes(); len(late) != 0 {
		t.Errorf("late nodes are %v", late)
	}
}

func TestRefused(t *testing.T) {
	c := newCluster(t, nodeDoc(1), nodeDoc(2), podDoc("a", "n1", "x"))
	c.start()
	first := func(id spiffe.ID, messages ...*policyv1.SyncRequest) codes.Code {
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		defer cancel()
		stream, err := c.dial(id).Sync(ctx, grpc.WaitForReady(true))
		if err != nil {
			return grpcstatus.Code(err)
		}
		for _, m := range messages {
			_ = stream.Send(m) // the answer is in Recv
		}
		for {
			if _, err := stream.Recv(); err != nil {
				return grpcstatus.Code(err)
			}
		}
	}
	hello := func(node string) *policyv1.SyncRequest {
		return &policyv1.SyncRequest{Message: &policyv1.SyncRequest_Hello{Hello: &policyv1.Hello{Node: node}}}
	}
	register := func(e *policyv1.Endpoint) *policyv1.SyncRequest {
		return &policyv1.SyncRequest{Message: &policyv1.SyncRequest_Register{Register: e}}
	}
	agent := func(node string) spiffe.ID { return spiffe.ID{Service: "agent", Node: node} }
	tests := []struct {
		name     string
		id       spiffe.ID
		messages []*policyv1.SyncRequest
		want     codes.Code
	}{
		{"another service", spiffe.ID{Service: "relay"}, []*policyv1.SyncRequest{hello("n1")}, codes.PermissionDenied},
		{"an agent without a node", spiffe.ID{Service: "agent"}, []*policyv1.SyncRequest{hello("n1")}, codes.PermissionDenied},
		{"another node's name", agent("n2"), []*policyv1.SyncRequest{hello("n1")}, codes.PermissionDenied},
		{"no hello", agent("n1"), []*policyv1.SyncRequest{register(endpoint("a", "n1", "10.244.1.5"))}, codes.InvalidArgument},
		{"another node's pod", agent("n2"), []*policyv1.SyncRequest{hello("n2"), register(endpoint("a", "n2", "10.244.2.5"))}, codes.PermissionDenied},
		{"endpoint of another node", agent("n2"), []*policyv1.SyncRequest{hello("n2"), register(endpoint("a", "n1", "10.244.1.5"))}, codes.PermissionDenied},
		{"acknowledges the future", agent("n1"), []*policyv1.SyncRequest{hello("n1"), {Message: &policyv1.SyncRequest_Ack{Ack: 1 << 40}}}, codes.InvalidArgument},
		{"hello twice", agent("n1"), []*policyv1.SyncRequest{hello("n1"), hello("n1")}, codes.InvalidArgument},
	}
	// The pod must be known before it can be refused.
	one := c.connect("n1")
	one.until("first state", func() bool { return one.synced })
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := first(tt.id, tt.messages...); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}

	// An address that the pod may not have is refused without ending the stream.
	two := c.connect("n1")
	two.register(endpoint("a", "n1", "10.244.2.5"))
	two.until("the refusal", func() bool { return two.spreads["a"] != nil })
	if two.spreads["a"].GetError() == "" {
		t.Error("an address of another node was taken")
	}
}

func TestNewerStreamDisplacesOlder(t *testing.T) {
	c := newCluster(t, nodeDoc(1))
	c.start()
	old := c.connect("n1")
	old.until("first state", func() bool { return old.synced })
	fresh := c.connect("n1")
	if got := old.end(); got != codes.Aborted {
		t.Errorf("the old stream ended with %v, want Aborted", got)
	}
	fresh.until("first state", func() bool { return fresh.synced })
}

func TestRestartKeepsAddresses(t *testing.T) {
	pod := "kind: Pod\nmetadata: {name: a, namespace: default, uid: a, labels: {app: x}}\nspec: {nodeName: n1}\nstatus: {podIPs: [{ip: 10.244.1.5}]}\n"
	c := newCluster(t, nodeDoc(1), nodeDoc(2), pod)
	c.broker.setDown(true)
	c.start()
	// With the broker down the state is not whole, so synced must not come.
	two := c.connect("n2")
	two.until("the nodes", func() bool { return two.has("node n1") && two.has("node n2") })
	if two.synced {
		t.Error("synced without the numbers of all pods")
	}
	c.broker.setDown(false)
	two.until("first state", func() bool { return two.synced })
	if !two.has("endpoint a") {
		t.Errorf("n1's agent is not back yet, and its pod's address is gone: %v", two.keys())
	}
	// When the agent is back and does not register the pod, the pod has no address.
	one := c.connect("n1")
	one.until("first state", func() bool { return one.synced })
	two.until("the end of a", func() bool { return !two.has("endpoint a") })
}

func TestAgentReconnects(t *testing.T) {
	c := newCluster(t, nodeDoc(1), nodeDoc(2), podDoc("a", "n1", "x"), podDoc("b", "n1", "x"))
	stop := c.start()
	two := c.connect("n2")
	one := c.connect("n1", endpoint("a", "n1", "10.244.1.5"), endpoint("b", "n1", "10.244.1.6"))
	one.until("first state", func() bool { return one.synced })
	two.until("both addresses", func() bool { return two.has("endpoint a") && two.has("endpoint b") })

	// The agent goes: its endpoints stay. It comes back with one of them: the other goes.
	one.noAck = true
	if err := one.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	one.end()
	c.source.send(added, podDoc("marker", "n2", "w"))
	two.until("the marker", func() bool { return two.has("pod marker") })
	if !two.has("endpoint a") || !two.has("endpoint b") {
		t.Errorf("endpoints went with their agent's stream: %v", two.keys())
	}
	one = c.connect("n1", endpoint("a", "n1", "10.244.1.5"))
	one.until("first state", func() bool { return one.synced })
	two.until("the end of b", func() bool { return !two.has("endpoint b") })
	if !two.has("endpoint a") {
		t.Error("a was registered again and is gone")
	}

	// A stopping service ends the streams so that agents go elsewhere.
	go stop()
	if got := two.end(); got != codes.Unavailable {
		t.Errorf("the stream of a stopping service ended with %v", got)
	}
}

func TestSourceBreaks(t *testing.T) {
	c := newCluster(t, nodeDoc(1), podDoc("a", "n1", "x"), podDoc("b", "n1", "x"))
	c.start()
	one := c.connect("n1")
	one.until("first state", func() bool { return one.synced && one.has("pod a") && one.has("pod b") })
	// While the watch was broken, a went and c came.
	c.source.cut(nodeDoc(1), podDoc("b", "n1", "x"), podDoc("c", "n1", "x"))
	one.until("the new objects", func() bool { return !one.has("pod a") && one.has("pod b") && one.has("pod c") })
}

func TestStatus(t *testing.T) {
	c := newCluster(t, nodeDoc(1), podDoc("a", "n1", "x"))
	c.start()
	one := c.connect("n1")
	one.until("first state", func() bool { return one.synced })
	conn, err := grpc.NewClient("unix://"+c.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	got, err := statusv1.NewStatusServiceClient(conn).GetStatus(ctx, &statusv1.GetStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]string{}
	for _, d := range got.GetDetails() {
		values[d.GetName()] = d.GetValue()
	}
	if !got.GetReady() || got.GetPart() != "policy" || values["agents"] != "1" || values["identities"] != "1" || values["agent n1"] == "" {
		t.Errorf("status is %v", got)
	}
	// The socket gives no access to what agents use.
	stream, err := policyv1.NewPolicyServiceClient(conn).Sync(ctx)
	if err == nil {
		_, err = stream.Recv()
	}
	if grpcstatus.Code(err) != codes.PermissionDenied {
		t.Errorf("Sync over the unix socket: %v", err)
	}
}

func TestValidate(t *testing.T) {
	c := DefaultConfig()
	c.Listen, c.LogLevel = "", "loud"
	err := c.Validate()
	if err == nil {
		t.Fatal("an empty configuration is valid")
	}
	for _, want := range []string{"source", "identity", "listen", "log-level", "tls-cert"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("fault %q is not reported: %v", want, err)
		}
	}
	if _, err := New(c, nil); err == nil {
		t.Error("New took it")
	}
}
