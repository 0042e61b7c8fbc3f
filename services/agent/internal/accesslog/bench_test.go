// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"testing"

	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/services/agent/internal/flow"
)

// perMessage is how many entries a message has under load.
const perMessage = 64

func load(b *testing.B) (*fixture, []byte) {
	b.Helper()
	f := start(func(c *Config) { c.Put = func(*flow.Request) {} })
	var entries []*datav3.HTTPAccessLogEntry
	for range perMessage / 2 {
		const rule = "shop/api/ingress[1]#0"
		entries = append(entries, f.entry(datav3.AccessLogType_DownstreamStart, 0, rule), f.entry(datav3.AccessLogType_DownstreamEnd, 200, rule))
	}
	raw, err := proto.Marshal(logs("slot-1", entries...))
	if err != nil {
		b.Fatal(err)
	}
	return f, raw
}

// BenchmarkTake is the way of an entry from the stream's bytes to the queue, BenchmarkGenerated the same with the generated code.
func BenchmarkTake(b *testing.B) {
	f, raw := load(b)
	st := f.newStream()
	b.ReportAllocs()
	for b.Loop() {
		if err := st.take(raw); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/perMessage, "ns/entry")
}

func BenchmarkGenerated(b *testing.B) {
	f, raw := load(b)
	o := oracle{fixture: f}
	b.ReportAllocs()
	for b.Loop() {
		m := &accesslogv3.StreamAccessLogsMessage{}
		if err := proto.Unmarshal(raw, m); err != nil || !o.take(m) {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/perMessage, "ns/entry")
}
