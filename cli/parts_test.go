// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"encoding/json"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/gen/observer"
	"github.com/weirmesh/weir/gen/relay"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	identityv1 "github.com/weirmesh/weir/gen/weir/identity/v1"
	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
)

// fakePart says of itself what it is told.
type fakePart struct {
	statusv1.UnimplementedStatusServiceServer
	ready atomic.Bool
	asked atomic.Int32
	reply *statusv1.GetStatusResponse
}

func (p *fakePart) GetStatus(context.Context, *statusv1.GetStatusRequest) (*statusv1.GetStatusResponse, error) {
	// The second look finds it ready: what --wait waits for.
	if p.asked.Add(1) > 1 {
		p.ready.Store(true)
	}
	r := proto.CloneOf(p.reply)
	if r.Ready = p.ready.Load(); r.Ready {
		r.WaitingFor = nil
	}
	return r, nil
}

type fakeLab struct {
	labv1.UnimplementedLabServiceServer
	observer string
}

func (l fakeLab) GetLab(context.Context, *labv1.GetLabRequest) (*labv1.GetLabResponse, error) {
	return &labv1.GetLabResponse{Name: "l", Observer: l.observer}, nil
}

// lab makes the sockets of a lab named "l" with two nodes and returns a command that finds them.
func lab(t *testing.T) (c *command, parts map[string]*fakePart, stop map[string]func()) {
	t.Helper()
	c = serve(t, func(s *grpc.Server) {
		f := &fakeObserver{
			status: &observer.ServerStatusResponse{NumFlows: 10, MaxFlows: 4095, SeenFlows: 1000, UptimeNs: 20e9, FlowsRate: 12.5, NumConnectedNodes: wrapperspb.UInt32(1)},
			nodes:  []*observer.Node{{Name: "default/n2", State: relay.NodeState_NODE_UNAVAILABLE}, {Name: "default/n1", State: relay.NodeState_NODE_CONNECTED}},
		}
		observer.RegisterObserverServer(s, f)
		observerv1.RegisterObserverServiceServer(s, &fakeWeir{fakeObserver: f, losses: &observerv1.GetLossesResponse{Losses: []*observerv1.LossCount{
			{NodeName: "default/n2", Place: flowv1.Place_PLACE_KERNEL, Cause: flowv1.Cause_CAUSE_FULL, Count: 17},
			{NodeName: "default/n1", Place: flowv1.Place_PLACE_OBSERVER, Cause: flowv1.Cause_CAUSE_SLOW_READER, Count: 2},
			{NodeName: "default/n1", Place: flowv1.Place_PLACE_RELAY, Cause: flowv1.Cause_CAUSE_MISSING},
		}}})
	})
	dir := shortDir(t)
	c.env = map[string]string{"WEIR_RUN_DIR": dir, "WEIR_REQUEST_TIMEOUT": "10s"}
	parts, stop = map[string]*fakePart{}, map[string]func(){}
	stop["lab"] = serveSocket(t, filepath.Join(dir, "l", "lab.sock"), func(s *grpc.Server) {
		labv1.RegisterLabServiceServer(s, fakeLab{observer: "passthrough:///memory"})
	})
	for _, name := range []string{"policy", "identity", "xds", "relay", "relay-2", "observer", "nodes/n1/agent", "nodes/n2/agent", "nodes/n1/dns", "nodes/n2/dns", "nodes/n1/proxy", "nodes/n2/proxy"} {
		part := &fakePart{reply: &statusv1.GetStatusResponse{Part: filepath.Base(name), Version: "v1", Started: timestamppb.New(now.Add(-90 * time.Second)), WaitingFor: []string{"NATS"}}}
		part.ready.Store(true)
		parts[name] = part
		stop[name] = serveSocket(t, filepath.Join(dir, "l", name+".sock"), func(s *grpc.Server) {
			statusv1.RegisterStatusServiceServer(s, part)
			switch node := filepath.Base(filepath.Dir(name)); node {
			case "n1", "n2":
				agentv1.RegisterAgentServiceServer(s, &fakeAgent{node: node})
			}
			if name == "identity" {
				identityv1.RegisterIdentityServiceServer(s, fakeBroker{})
			}
		})
	}
	return c, parts, stop
}

func TestStatusReady(t *testing.T) {
	c, parts, _ := lab(t)
	parts["nodes/n1/agent"].reply.Details = []*statusv1.Detail{{Name: "endpoints", Value: "3"}, {Name: "kernel path", Value: "tcx\x1b"}}
	parts["nodes/n1/agent"].reply.Losses = []*statusv1.Counter{{Place: "spool", Cause: "full", Count: 4}}
	want := `Lab l: ready

PART       STATE   UP      VERSION   DETAILS
policy     ready   1m30s   v1        
identity   ready   1m30s   v1        
xds        ready   1m30s   v1        
relay      ready   1m30s   v1        
relay-2    ready   1m30s   v1        
observer   ready   1m30s   v1        
agent/n1   ready   1m30s   v1        endpoints 3; kernel path tcx^[; lost 4 (spool full)
agent/n2   ready   1m30s   v1        
dns/n1     ready   1m30s   v1        
dns/n2     ready   1m30s   v1        
proxy/n1   ready   1m30s   v1        
proxy/n2   ready   1m30s   v1        

Flows (passthrough:///memory): 12.50/s, 1000 seen, 10/4095 in memory
Nodes: 1/2 connected: default/n2 unavailable
Losses:

NODE         PLACE      CAUSE         FLOWS
default/n1   observer   slow reader   2
default/n2   kernel     full          17
`
	if out := c.must(t, "status"); out != want {
		t.Errorf("got\n%swant\n%s", out, want)
	}
	if out := c.must(t, "status", "--lab", "l"); out != want {
		t.Errorf("with --lab\n%s", out)
	}
	// The lab names its observer to observe as well, when asked by name.
	if out, errOut, code := c.run(t, "list", "namespaces", "--lab", "l"); code != 0 || !strings.Contains(out, "kube-system") {
		t.Errorf("%d %s %s", code, out, errOut)
	}
}

// What must not be overlooked stands apart.
func TestStatusWarnings(t *testing.T) {
	c, parts, _ := lab(t)
	parts["nodes/n1/agent"].reply.Details = []*statusv1.Detail{
		{Name: "policy paused", Value: "pod shop/a, for another 4m59s: INC-1"}, {Name: "policy", Value: "state from x"},
		{Name: "policy refused CiliumNetworkPolicy shop/b", Value: "policy_peers is full"}, {Name: "map ct", Value: "90 of 100 entries, 90 % full"},
	}
	want := `
Warning: agent/n1: policy is PAUSED, drops pass as AUDIT: pod shop/a, for another 4m59s: INC-1
Warning: agent/n1: policy NOT in force: CiliumNetworkPolicy shop/b policy_peers is full
Warning: agent/n1: a table fills: ct 90 of 100 entries, 90 % full
Flows (`
	if out := c.must(t, "status"); !strings.Contains(out, want) {
		t.Errorf("no\n%s\nin\n%s", want, out)
	}
}

func TestStatusNotReady(t *testing.T) {
	c, parts, stop := lab(t)
	parts["relay"].ready.Store(false)
	parts["relay"].asked.Store(-100)
	stop["policy"]()
	out, errOut, code := c.run(t, "status")
	if want := "not ready: policy missing, relay not ready\n"; code != 1 || errOut != want {
		t.Errorf("exit code %d, stderr %q, want %q", code, errOut, want)
	}
	for _, line := range []string{"Lab l: NOT READY\n", "policy     missing     -", "relay      not ready   1m30s   v1        waiting for NATS\n"} {
		if !strings.Contains(out, line) {
			t.Errorf("no %q in\n%s", line, out)
		}
	}

	out, _, code = c.run(t, "status", "-o", "json")
	var got struct {
		Lab   string
		Ready bool
		Parts []struct {
			Name, State, Fault string
			Waiting            []string `json:"waiting_for"`
			Ready              bool
		}
		Observer struct {
			Server string
			Rate   float64 `json:"flows_per_second"`
			Status struct {
				Seen uint64 `json:"seen_flows"`
			}
			Nodes  []struct{ Name, State string }
			Losses struct {
				Losses []struct {
					Place string
					Count uint64
				}
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != 1 {
		t.Fatalf("%v, code %d:\n%s", err, code, out)
	}
	if got.Lab != "l" || got.Ready || len(got.Parts) != 12 || got.Parts[0].State != "missing" || got.Parts[0].Fault == "" ||
		got.Parts[3].Waiting[0] != "NATS" || !got.Parts[4].Ready || got.Observer.Rate != 12.5 || got.Observer.Status.Seen != 1000 ||
		got.Observer.Nodes[1].State != "NODE_UNAVAILABLE" || got.Observer.Losses.Losses[0].Count != 17 {
		t.Errorf("%+v", got)
	}
}

func TestStatusWait(t *testing.T) {
	c, parts, _ := lab(t)
	parts["relay"].ready.Store(false)
	out := c.must(t, "status", "--wait")
	if !strings.HasPrefix(out, "Lab l: ready\n") || strings.Count(out, "PART") != 1 {
		t.Errorf("%s", out)
	}
	// The limit ends it.
	c, parts, _ = lab(t)
	parts["relay"].ready.Store(false)
	parts["relay"].asked.Store(-1 << 30)
	if _, errOut, code := c.run(t, "status", "--wait", "--wait-duration", "1ms"); code != 1 || errOut != "not ready: relay not ready\n" {
		t.Errorf("exit code %d, %s", code, errOut)
	}
	// Nothing there to wait for.
	c = &command{env: map[string]string{"WEIR_RUN_DIR": shortDir(t)}}
	if _, errOut, code := c.run(t, "status", "--wait", "--wait-duration", "1ms"); code != 1 || !strings.Contains(errOut, "nothing of Weir runs here: start a lab with `weir lab up`") {
		t.Errorf("exit code %d, %s", code, errOut)
	}
}

func TestStatusWithoutObserver(t *testing.T) {
	c, _, _ := lab(t)
	c.dial = nil
	out, errOut, code := c.run(t, "status", "--server", "unix:///nonexistent/observer.sock")
	if code != 1 || errOut != "not ready: the observer's API\n" || !strings.Contains(out, "Flows (unix:///nonexistent/observer.sock): dial unix") {
		t.Errorf("exit code %d, %s%s", code, errOut, out)
	}
}

// What is typed wins over what is exported, and the more specific flag over the other.
func TestServerOrLab(t *testing.T) {
	c, _, _ := lab(t)
	for _, tt := range []struct {
		env, args string
		ok        bool
	}{
		{"", "--lab l", true},
		{"WEIR_LAB=l", "", true},
		{"WEIR_SERVER=unix:///nonexistent.sock", "--lab l", true},
		{"WEIR_SERVER=passthrough:///memory WEIR_LAB=nowhere", "", true},
		{"WEIR_LAB=l", "--server tls://", false},
		{"", "--lab nowhere", false},
	} {
		one := &command{dial: c.dial, env: map[string]string{"WEIR_RUN_DIR": c.env["WEIR_RUN_DIR"]}}
		for _, kv := range strings.Fields(tt.env) {
			k, v, _ := strings.Cut(kv, "=")
			one.env[k] = v
		}
		_, errOut, code := one.run(t, append([]string{"list", "namespaces"}, strings.Fields(tt.args)...)...)
		if (code == 0) != tt.ok {
			t.Errorf("%s weir %s: exit code %d, %s", tt.env, tt.args, code, errOut)
		}
	}
}

// fakeAgent is one node.
type fakeAgent struct {
	agentv1.UnimplementedAgentServiceServer
	node string
}

func (f *fakeAgent) ListEndpoints(context.Context, *agentv1.ListEndpointsRequest) (*agentv1.ListEndpointsResponse, error) {
	return &agentv1.ListEndpointsResponse{Endpoints: []*agentv1.LocalEndpoint{{
		Id: 7, Identity: 300, Labels: []string{"k8s:app=a", "k8s:x=y"}, Addresses: []string{"10.0.0.1", "fd00::1"},
		Namespace: "default", PodName: "p-" + f.node, State: "ready", Interface: "wr1",
		IngressEnforced: f.node == "n1", EgressEnforced: f.node == "n2", Audit: f.node == "n2"}}}, nil
}

func (f *fakeAgent) ListIdentities(context.Context, *agentv1.ListIdentitiesRequest) (*agentv1.ListIdentitiesResponse, error) {
	list := []*agentv1.IdentityEntry{{Number: 300, Labels: []string{"k8s:app=a"}}}
	if f.node == "n2" {
		list = append(list, &agentv1.IdentityEntry{Number: 256, Labels: []string{"k8s:app=b"}})
	}
	return &agentv1.ListIdentitiesResponse{Identities: list}, nil
}

func (f *fakeAgent) ListServices(context.Context, *agentv1.ListServicesRequest) (*agentv1.ListServicesResponse, error) {
	return &agentv1.ListServicesResponse{Services: []*agentv1.ServiceEntry{{Id: 1, Namespace: "default", Name: "web", Type: "ClusterIP",
		Frontend: "[fd00::a]:80", Protocol: "TCP", Backends: []string{"10.0.0.1:8080", "10.0.0.2:8080"}}}}, nil
}

func (f *fakeAgent) DumpConntrack(_ *agentv1.DumpConntrackRequest, s grpc.ServerStreamingServer[agentv1.DumpConntrackResponse]) error {
	for _, rtt := range []*uint32{nil, proto.Uint32(90)} {
		if err := s.Send(&agentv1.DumpConntrackResponse{Protocol: "TCP", Source: "10.0.0.1:5", Destination: "10.0.0.2:80", EndpointId: 7, Direction: "egress",
			State: "established", ForwardPackets: 3, ForwardBytes: 1 << 40, ReversePackets: 2, ReverseBytes: 100, PeerIdentity: 2, ExpiresIn: 59.7, SrttUs: rtt}); err != nil {
			return err
		}
	}
	return nil
}

func (f *fakeAgent) DumpIPCache(_ *agentv1.DumpIPCacheRequest, s grpc.ServerStreamingServer[agentv1.DumpIPCacheResponse]) error {
	return s.Send(&agentv1.DumpIPCacheResponse{Prefix: "10.0.0.0/24", Identity: 9})
}

func (f *fakeAgent) ListSlots(context.Context, *agentv1.ListSlotsRequest) (*agentv1.ListSlotsResponse, error) {
	return &agentv1.ListSlotsResponse{Slots: []*agentv1.SlotEntry{
		{Number: 1, Key: "http-a", Kind: policyv1.FilterKind_FILTER_KIND_HTTP, Direction: ingress, Port: 20001, KernelPort: 20001, Listening: true,
			Users: []string{"p1", "service/default/web"}},
		{Number: 2, Key: "dns-b", Kind: policyv1.FilterKind_FILTER_KIND_DNS, Direction: policyv1.Direction_DIRECTION_EGRESS, Visibility: true, Port: 10053,
			RestingSince: timestamppb.New(time.Unix(1, 0))},
	}}, nil
}

func (f *fakeAgent) DumpServices(_ *agentv1.DumpServicesRequest, s grpc.ServerStreamingServer[agentv1.DumpServicesResponse]) error {
	return s.Send(&agentv1.DumpServicesResponse{Id: 1, Frontend: "10.96.0.1:80", Protocol: "TCP", Backend: "10.0.0.1:8080"})
}

func (f *fakeAgent) Monitor(_ *agentv1.MonitorRequest, s grpc.ServerStreamingServer[agentv1.MonitorResponse]) error {
	return s.Send(&agentv1.MonitorResponse{Time: second(1), Cpu: 1, Text: "trace\x1b to-endpoint", Lost: 5})
}

type fakeBroker struct {
	identityv1.UnimplementedIdentityServiceServer
}

func (fakeBroker) List(context.Context, *identityv1.ListRequest) (*identityv1.ListResponse, error) {
	return &identityv1.ListResponse{Identities: []*identityv1.Identity{{Number: 2, Labels: []string{"reserved:world"}}, {Number: 300, Labels: []string{"k8s:app=a", "k8s:b=c"}}}}, nil
}

func TestAgentTables(t *testing.T) {
	c, _, _ := lab(t)
	for args, want := range map[string]string{
		"endpoint list": `NODE   ENDPOINT   POD            IDENTITY   ADDRESSES          STATE   POLICY           INTERFACE   LABELS
n1     7          default/p-n1   300        10.0.0.1,fd00::1   ready   ingress          wr1         k8s:app=a,k8s:x=y
n2     7          default/p-n2   300        10.0.0.1,fd00::1   ready   egress (audit)   wr1         k8s:app=a,k8s:x=y
`,
		"endpoint list --node n2 -o json": `[
  {
    "node": "n2",
    "id": 7,
    "identity": 300,
    "labels": [
      "k8s:app=a",
      "k8s:x=y"
    ],
    "addresses": [
      "10.0.0.1",
      "fd00::1"
    ],
    "namespace": "default",
    "pod_name": "p-n2",
    "interface": "wr1",
    "state": "ready",
    "egress_enforced": true,
    "audit": true
  }
]
`,
		"service list --node n1": `NODE   ID   SERVICE       TYPE        FRONTEND       PROTOCOL   BACKENDS
n1     1    default/web   ClusterIP   [fd00::a]:80   TCP        10.0.0.1:8080,10.0.0.2:8080
`,
		"identity list": `IDENTITY   LABELS
2          reserved:world
300        k8s:app=a,k8s:b=c
`,
		"identity list --node n1,n2": `IDENTITY   LABELS
256        k8s:app=b
300        k8s:app=a
`,
		"identity get world": `IDENTITY   LABELS
2          reserved:world
`,
		"identity get 300 -o json": `[
  {
    "number": 300,
    "labels": [
      "k8s:app=a",
      "k8s:b=c"
    ]
  }
]
`,
		"bpf ct list --node n1": `NODE   PROTOCOL   SOURCE       DESTINATION   ENDPOINT   DIRECTION   PEER        STATE         EXPIRES   FORWARD            REVERSE   RTT
n1     TCP        10.0.0.1:5   10.0.0.2:80   7          egress      2 (world)   established   60s       3/1099511627776B   2/100B    -
n1     TCP        10.0.0.1:5   10.0.0.2:80   7          egress      2 (world)   established   60s       3/1099511627776B   2/100B    90us
`,
		"bpf ipcache list --node n1": `NODE   PREFIX        IDENTITY         NODE ADDRESS
n1     10.0.0.0/24   9 (world-ipv4)   -
`,
		"bpf services list --node n1": `NODE   ID   FRONTEND       PROTOCOL   SLOT   BACKEND
n1     1    10.96.0.1:80   TCP        0      10.0.0.1:8080
`,
		"bpf slots list --node n1": `NODE   SLOT   FILTER   KIND              DIRECTION   PORT    LISTENER   KERNEL   USED BY
n1     1      http-a   http              ingress     20001   listens    20001    p1, service/default/web
n1     2      dns-b    dns, to be seen   egress      10053   none       -        nobody since 1970-01-01 00:00:01
`,
		"monitor --node n1":         "n1: 5 records lost: this reader is too slow\nJan  1 00:00:01.000000 n1 CPU 01: trace^[ to-endpoint\n",
		"monitor --node n1 -o json": `{"node":"n1","time":"1970-01-01T00:00:01Z","cpu":1,"text":"trace\u001b to-endpoint","lost":5}` + "\n",
	} {
		t.Run(args, func(t *testing.T) {
			if got := c.must(t, strings.Fields(args)...); got != want {
				t.Errorf("got\n%swant\n%s", got, want)
			}
		})
	}
	c.fails(t, `no node "n3"; there are: n1, n2`, "endpoint", "list", "--node", "n3")
	c.fails(t, "no identity 301", "identity", "get", "301")
}

// A node that is away is told, and the others are shown all the same.
func TestAgentAway(t *testing.T) {
	c, _, stop := lab(t)
	stop["nodes/n1/agent"]()
	out, errOut, code := c.run(t, "endpoint", "list")
	if code != 1 || !strings.Contains(out, "default/p-n2") || !strings.HasPrefix(errOut, "agent/n1 does not run: ") || !strings.HasSuffix(errOut, "\nno answer from n1\n") {
		t.Errorf("exit code %d\n%s%s", code, out, errOut)
	}
	// Without the broker the agents know their identities.
	stop["identity"]()
	out, errOut, code = c.run(t, "identity", "list", "--node", "n2")
	if code != 0 || !strings.Contains(out, "256        k8s:app=b") {
		t.Errorf("exit code %d\n%s%s", code, out, errOut)
	}
	if out, _, code = c.run(t, "identity", "get", "256"); code != 0 || !strings.Contains(out, "k8s:app=b") {
		t.Errorf("exit code %d\n%s", code, out)
	}
}

func TestSmallCommands(t *testing.T) {
	c := &command{}
	if out := c.must(t, "version"); !strings.HasPrefix(out, "weir v1.2.3 compiled with go") {
		t.Errorf("version: %s", out)
	}
	c.must(t, "lab", "up", "--name", "x", "--help", "-f")
	if got := strings.Join(c.lab, " "); got != "up --name x --help -f" {
		t.Errorf("weir-lab got %q", got)
	}
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if out := c.must(t, "completion", shell); !strings.Contains(out, "weir") {
			t.Errorf("completion %s: %.80s", shell, out)
		}
	}
	for args, want := range map[string]string{
		"__complete observe --verdict ": "DROPPED\n", "__complete observe -o ": "flat\n", "__complete observe --type tr": "trace:to-endpoint\n",
		"__complete observe --to-identity ": "world\n", "__complete observe --time-format ": "RFC3339Nano\n", "__complete identity get ": "kube-apiserver\n",
	} {
		words := strings.Split(args, " ")
		out, _, code := c.run(t, words...)
		if code != 0 || !strings.Contains(out, want) {
			t.Errorf("%s: %d %s", args, code, out)
		}
	}
}

// Every command has help with its flags and, where it does something, an example.
func TestHelp(t *testing.T) {
	c := &command{}
	root := New(c.environment(nil, nil))
	for _, cmd := range root.Commands() {
		for _, sub := range append(cmd.Commands(), cmd) {
			path := strings.Fields(sub.CommandPath())[1:]
			if path[0] == "lab" || path[0] == "completion" || path[0] == "help" {
				continue
			}
			out := c.must(t, append(path, "--help")...)
			if sub.Runnable() && !sub.HasSubCommands() && path[0] != "version" && !strings.Contains(out, "Examples:\n  weir ") {
				t.Errorf("weir %s has no example:\n%s", strings.Join(path, " "), out)
			}
			if !strings.Contains(out, "Global flags:\n") {
				t.Errorf("weir %s:\n%s", strings.Join(path, " "), out)
			}
		}
	}
	out := c.must(t, "observe", "--help")
	for _, heading := range []string{"Selectors:", "Filters:", "Raw filters:", "Format:", "Other:", "Global flags:", "--cel-expression", "--server", "--use-default-field-masks"} {
		if !strings.Contains(out, heading) {
			t.Errorf("no %s in the help", heading)
		}
	}
}
