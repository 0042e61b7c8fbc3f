// SPDX-License-Identifier: Apache-2.0

package observer_test

import (
	"context"
	"errors"
	"io"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/weirmesh/weir/gen/flow"
	hubble "github.com/weirmesh/weir/gen/observer"
	"github.com/weirmesh/weir/services/observer/internal/testflow"
)

// cpu returns the CPU time of this process.
func cpu() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkQuery asks for all flows in memory over gRPC on loopback. Its CPU figure is of the observer
// and of the client, which decodes every flow, together; the flows are made in advance.
func BenchmarkQuery(b *testing.B) {
	c := newCluster(b)
	const batches, perBatch = 40, 512
	start := time.Now().Add(-time.Minute)
	for i := range batches {
		c.publish(testflow.Flows("node-1", 1, uint64(1+i*perBatch), perBatch, start.Add(time.Duration(i)*time.Second)))
	}
	o := c.observer(nil)
	o.await("all flows", &hubble.GetFlowsRequest{Number: 1}, func(a *answer) bool {
		s, err := o.hubble.ServerStatus(context.Background(), &hubble.ServerStatusRequest{})
		return err == nil && s.GetNumFlows() == batches*perBatch
	})
	mask := &fieldmaskpb.FieldMask{Paths: []string{"time", "verdict", "ethernet", "IP", "l4", "source.identity", "source.namespace", "source.pod_name",
		"destination.identity", "destination.namespace", "destination.pod_name", "Type", "node_name", "l7", "event_type", "source_service",
		"destination_service", "is_reply", "Summary", "ip_trace_id"}}
	pods := []*flow.FlowFilter{{SourcePod: []string{"default/client"}}, {DestinationPod: []string{"default/client"}}}
	for _, bb := range []struct {
		name    string
		request *hubble.GetFlowsRequest
		want    int
	}{
		{"plain", &hubble.GetFlowsRequest{}, batches * perBatch},
		{"mask", &hubble.GetFlowsRequest{FieldMask: mask}, batches * perBatch},
		{"filter", &hubble.GetFlowsRequest{Whitelist: pods}, batches * perBatch},
		{"filter and mask", &hubble.GetFlowsRequest{Whitelist: pods, FieldMask: mask}, batches * perBatch},
		{"filter by header", &hubble.GetFlowsRequest{Whitelist: []*flow.FlowFilter{{Verdict: []flow.Verdict{flow.Verdict_DROPPED}}}}, 0},
	} {
		b.Run(bb.name, func(b *testing.B) {
			before := cpu()
			for b.Loop() {
				stream, err := o.hubble.GetFlows(context.Background(), bb.request)
				if err != nil {
					b.Fatal(err)
				}
				n := 0
				for {
					r, err := stream.Recv()
					if errors.Is(err, io.EOF) {
						break
					}
					if err != nil {
						b.Fatal(err)
					}
					if r.GetFlow() != nil {
						n++
					}
				}
				if n != bb.want {
					b.Fatalf("%d flows, want %d", n, bb.want)
				}
			}
			flows := float64(b.N) * batches * perBatch
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/flows, "ns/flow")
			b.ReportMetric(float64((cpu()-before).Nanoseconds())/flows, "cpu-ns/flow")
		})
	}
}
