// SPDX-License-Identifier: Apache-2.0

package command

import (
	"bytes"
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
)

func TestTarget(t *testing.T) {
	for _, tt := range []struct {
		text string
		want end
		ok   bool
	}{
		{"shop/web", end{namespace: "shop", name: "web"}, true}, {"web", end{namespace: "default", name: "web"}, true},
		{"host/visitor", end{name: "visitor"}, true}, {"node/node1", end{node: "node1"}, true},
		{"", end{}, false}, {"shop/", end{}, false}, {"a/b/c", end{}, false},
	} {
		if got, err := target(tt.text); got != tt.want || (err == nil) != tt.ok {
			t.Errorf("target(%q) = %+v, %v", tt.text, got, err)
		}
	}
}

// fakeLab answers GetLab.
type fakeLab struct {
	labv1.LabServiceClient
	response *labv1.GetLabResponse
}

func (f fakeLab) GetLab(context.Context, *labv1.GetLabRequest, ...grpc.CallOption) (*labv1.GetLabResponse, error) {
	return f.response, nil
}

func TestResolve(t *testing.T) {
	pod := func(namespace, name, hash string) *labv1.Pod {
		return &labv1.Pod{Namespace: namespace, Name: name, Labels: map[string]string{"pod-template-hash": hash}}
	}
	lab := fakeLab{response: &labv1.GetLabResponse{Pods: []*labv1.Pod{
		pod("shop", "web-1a-x", "1a"), pod("shop", "web-1a-y", "1a"), pod("shop", "db-2b-x", "2b"), pod("shop", "web-db-3c-x", "3c"), {Namespace: "shop", Name: "db-alone"},
	}}}
	for _, tt := range []struct {
		namespace, name, want string
		ok                    bool
	}{
		{"shop", "db", "db-2b-x", true}, {"shop", "db-alone", "db-alone", true}, {"shop", "web-1a-y", "web-1a-y", true},
		{"shop", "web-db", "web-db-3c-x", true}, {"shop", "web", "", false}, {"shop", "nobody", "nobody", true}, {"default", "db", "db", true}, {"", "web", "web", true},
	} {
		got, err := resolve(t.Context(), lab, tt.namespace, tt.name)
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("resolve(%s, %s) = %q, %v, want %q", tt.namespace, tt.name, got, err, tt.want)
		}
	}
}

func TestStatus(t *testing.T) {
	now := time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC)
	ago := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(-d)) }
	var out bytes.Buffer
	err := printStatus(&out, &labv1.GetLabResponse{
		Name: "demo", Pid: 7, Observer: "127.0.0.1:4245", Started: ago(90 * time.Minute),
		Nodes: []*labv1.Node{{Name: "node1", Addresses: []string{"172.30.0.11", "fd30::11"}, PodCidrs: []string{"10.244.1.0/24"}}},
		Parts: []*labv1.Part{{Name: "relay", State: "stopped", Log: "/l"}},
		Pods: []*labv1.Pod{
			{Namespace: "default", Name: "web", Status: "Running", Ready: 1, Containers: 1, Addresses: []string{"10.244.1.5"}, Node: "node1", Created: ago(5 * time.Second)},
			{Namespace: "default", Name: "new", Status: "CrashLoopBackOff", Containers: 1, Restarts: 3, Message: "back-off 4s", Created: ago(50 * time.Hour)},
		},
		Services: []*labv1.Service{{Namespace: "default", Name: "web", ClusterIps: []string{"10.96.1.0"}, ExternalIps: []string{"198.18.0.1"}, Ports: []string{"80:30000/TCP"}}},
		Policies: []*labv1.Policy{
			{Kind: "NetworkPolicy", Namespace: "default", Name: "deny", Generation: 2, Valid: "True", EnforcedGeneration: 2, EnforcingNodes: 2, Nodes: 2, Created: ago(5 * time.Second)},
			{Kind: "CiliumClusterwideNetworkPolicy", Name: "all", Generation: 3, Valid: "False", Message: "spec: bad", EnforcedGeneration: 1, EnforcingNodes: 1, Nodes: 2, Created: ago(5 * time.Second)},
			{Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "new", Generation: 1, Created: ago(time.Second)},
		},
		Hosts:          []*labv1.Host{{Name: "visitor", Status: "Running", Ready: 1, Containers: 1, Addresses: []string{"203.0.113.10"}, Created: ago(3 * time.Hour)}},
		ManifestErrors: []string{"f.yaml:1: kind: required"},
	}, now)
	if err != nil {
		t.Fatal(err)
	}
	const want = `Lab demo, pid 7, up 90m, observer 127.0.0.1:4245

NODE    ADDRESSES              POD CIDRS
node1   172.30.0.11,fd30::11   10.244.1.0/24

PART    STATE     PID   RESTARTS   AGE   LOG
relay   stopped   0     0          -     /l

NAMESPACE   NAME   READY   STATUS             RESTARTS   AGE   IP           NODE
default     web    1/1     Running            0          5s    10.244.1.5   node1
default     new    0/1     CrashLoopBackOff   3          2d    <none>       <none>

NAMESPACE   SERVICE   CLUSTER-IP   EXTERNAL-IP   PORTS          ENDPOINTS
default     web       10.96.1.0    198.18.0.1    80:30000/TCP   <none>

NAMESPACE   POLICY   KIND                             GENERATION   VALID     IN FORCE                    AGE
default     deny     NetworkPolicy                    2            True      2/2 nodes                   5s
<none>      all      CiliumClusterwideNetworkPolicy   3            False     generation 1 on 1/2 nodes   5s
default     new      CiliumNetworkPolicy              1            unknown   -                           1s

HOST      READY   STATUS    RESTARTS   AGE   ADDRESSES
visitor   1/1     Running   0          3h    203.0.113.10

pod default/new: back-off 4s

CiliumClusterwideNetworkPolicy all: spec: bad

manifest error, the last good state stays: f.yaml:1: kind: required
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}
