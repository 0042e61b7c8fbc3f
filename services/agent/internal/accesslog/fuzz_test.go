// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"bytes"
	"slices"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	flowpb "github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/services/agent/internal/flow"
)

type noClock struct{}

func (noClock) Unix(m uint64) int64 { return int64(m) }

// seeds are messages in which each field that makes a flow is set somewhere, and comes in pieces somewhere.
func seeds(t testing.TB, f *fixture) [][]byte {
	const begins, ends = datav3.AccessLogType_DownstreamStart, datav3.AccessLogType_DownstreamEnd
	second := durationpb.New(time.Second)
	full := f.entry(ends, 200, "shop/api/ingress[1]#0")
	full.Request.Scheme, full.Request.Referer, full.Request.ForwardedFor, full.Request.RequestId = "https", "a", "b", "c"
	full.CommonProperties.CustomTags = map[string]string{"weir.sequence": "5", "weir.lost": "2"}
	other := f.entry(0, 503, "/all/specs[2]/egress[0]#3")
	other.Request.RequestMethod, other.Request.RequestHeaders[":method"], other.ProtocolVersion = 0, "PURGE", datav3.HTTPAccessLogEntry_HTTP11
	other.CommonProperties.StreamId, other.CommonProperties.StartTime = "", nil
	other.CommonProperties.TimeToLastDownstreamTxByte, other.CommonProperties.Duration = &durationpb.Duration{Seconds: -1}, second
	first, last := f.entry(ends, 200, ""), f.entry(ends, 200, "")
	first.CommonProperties.TimeToLastDownstreamTxByte, first.CommonProperties.TimeToFirstDownstreamTxByte = nil, second
	last.CommonProperties.TimeToLastDownstreamTxByte, last.CommonProperties.TimeToLastUpstreamRxByte = nil, second
	last.Request.RequestMethod = 77
	named, internal := f.entry(ends, 200, ""), f.entry(ends, 200, "")
	named.CommonProperties.DownstreamLocalAddress.GetSocketAddress().PortSpecifier = &corev3.SocketAddress_NamedPort{NamedPort: "http"}
	internal.CommonProperties.DownstreamRemoteAddress = &corev3.Address{Address: &corev3.Address_EnvoyInternalAddress{}}
	connection := &datav3.TCPAccessLogEntry{CommonProperties: f.common(0, "")}
	connection.CommonProperties.TlsProperties = &datav3.TLSProperties{TlsSniHostname: "a.test"}
	connection.CommonProperties.ConnectionTerminationDetails = deniedWord
	value := structpb.NewStringValue
	judged := &datav3.TCPAccessLogEntry{CommonProperties: f.common(datav3.AccessLogType_TcpConnectionEnd, "")}
	judged.CommonProperties.Metadata = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{networkRBAC: {Fields: map[string]*structpb.Value{
		engineResult: value("allowed"), "x." + shadowPolicy: structpb.NewNumberValue(1),
		"b." + anyPolicy: value("/allow-localhost/[0]#0"), "a." + anyPolicy: value("")}}}}
	tcp := &accesslogv3.StreamAccessLogsMessage{Identifier: &accesslogv3.StreamAccessLogsMessage_Identifier{LogName: "slot-3"},
		LogEntries: &accesslogv3.StreamAccessLogsMessage_TcpLogs{TcpLogs: &accesslogv3.StreamAccessLogsMessage_TCPAccessLogEntries{
			LogEntry: []*datav3.TCPAccessLogEntry{connection, judged}}}}
	var all [][]byte
	for _, m := range []*accesslogv3.StreamAccessLogsMessage{
		logs("slot-1", f.entry(begins, 0, ""), full), logs("slot-9", f.entry(begins, 0, "")),
		logs("slot-1", f.entry(ends, 403, ""), other, first, last, named, internal), tcp, logs("", nil), {},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	// An entry twice is its parts in pieces.
	twice, err := proto.Marshal(full)
	if err != nil {
		t.Fatal(err)
	}
	again, err := proto.Marshal(other)
	if err != nil {
		t.Fatal(err)
	}
	twice = append(twice, again...)
	list := protowire.AppendBytes([]byte{entriesEntry}, twice)
	pieces := protowire.AppendBytes(append(bytes.Clone(all[0]), messageHTTP), list)
	return append(all, pieces, slices.Concat(all[0], all[3]), slices.Concat(all[3], all[2]))
}

// Whatever a proxy sends: nothing crashes, what becomes a flow can be read, and it is what the generated code would have made of it.
func FuzzEntries(f *testing.F) {
	for _, b := range seeds(f, start(nil)) {
		f.Add(b)
	}
	e := flow.NewEncoder(flow.NewDirectory("default", time.Now), noClock{}, flow.Node{Cluster: "default", Name: "n"})
	f.Fuzz(func(t *testing.T, b []byte) {
		x := start(nil)
		st := x.newStream()
		err := st.take(b) // a refusal is as good
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
		m := &accesslogv3.StreamAccessLogsMessage{}
		if proto.Unmarshal(b, m) != nil || ambiguous(m) {
			return
		}
		y := start(nil)
		o := oracle{fixture: y}
		if wanted := o.take(m); (err == nil) != wanted {
			t.Fatalf("taken: %v, by the generated code %v", err, wanted)
		}
		o.release()
		compare(t, x, y)
	})
}
