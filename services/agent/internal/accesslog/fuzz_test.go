// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"testing"
	"time"

	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/protobuf/proto"

	flowpb "github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/services/agent/internal/flow"
)

type noClock struct{}

func (noClock) Unix(m uint64) int64 { return int64(m) }

// Whatever a proxy sends: nothing crashes, and what becomes a flow can be read.
func FuzzEntries(f *testing.F) {
	x := start(nil)
	for _, m := range []*accesslogv3.StreamAccessLogsMessage{
		logs("slot-1", x.entry(datav3.AccessLogType_DownstreamEnd, 200, "shop/api/ingress[1]#0")), logs("slot-9", x.entry(datav3.AccessLogType_DownstreamStart, 0, "")),
		logs("", nil), {},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	e := flow.NewEncoder(flow.NewDirectory("default", time.Now), noClock{}, flow.Node{Cluster: "default", Name: "n"})
	f.Fuzz(func(t *testing.T, b []byte) {
		m := &accesslogv3.StreamAccessLogsMessage{}
		if proto.Unmarshal(b, m) != nil {
			return
		}
		x := start(nil)
		st := x.stream()
		_ = st.take(m) // a refusal is as good
		st.release(true)
		for _, r := range x.got {
			got, ok := e.EncodeRequest(r)
			if !ok {
				t.Fatalf("%+v makes no flow", r)
			}
			if err := proto.Unmarshal(got.Body, &flowpb.Flow{}); err != nil {
				t.Fatalf("%+v: %v", r, err)
			}
		}
	})
}
