// SPDX-License-Identifier: Apache-2.0

package flowsource

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/cli/internal/flowmatch"
	"github.com/weirmesh/weir/cli/internal/stage"
	"github.com/weirmesh/weir/gen/flow"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

// words names the records of a stream: f1 is a flow of second 1, L a loss, !text an error.
func words(recv stage.Recv[*observerv1.GetFlowsResponse]) string {
	var out []string
	for {
		r, err := recv()
		if errors.Is(err, io.EOF) {
			return strings.Join(out, " ")
		}
		if err != nil {
			return strings.Join(append(out, "!"+err.Error()), " ")
		}
		if at, ok := FlowTime(r); ok {
			out = append(out, fmt.Sprintf("f%d", at.Unix()))
		} else {
			out = append(out, "L")
		}
	}
}

const flows = `{"flow":{"time":"1970-01-01T00:00:01Z","verdict":"FORWARDED"},"node_name":"n","time":"1970-01-01T00:00:01Z"}
{"flow":{"time":"1970-01-01T00:00:02Z","verdict":"DROPPED","tomorrow":1},"time":"1970-01-01T00:00:02Z"}

not json
{"lost_events":{"source":"PERF_EVENT_RING_BUFFER","num_events_lost":"17"},"time":"1970-01-01T00:00:02Z"}
{"gap":{"node_name":"n","place":"PLACE_RELAY","count":"3"},"node_name":"n"}
{"flow":{"time":"1970-01-01T00:00:03Z","nodeName":"camel","next":2},"time":"1970-01-01T00:00:03Z"}
{"gap":7}
{}
`

func read(t *testing.T, in string, allow []*flow.FlowFilter, since, until *timestamppb.Timestamp) (got, log string) {
	t.Helper()
	m, err := flowmatch.Compile(allow, nil)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	s := File(strings.NewReader(in), FileOptions{Matcher: m, Since: since, Until: until, Log: slog.New(slog.NewTextHandler(&b, nil))})
	return words(s), b.String()
}

func TestFile(t *testing.T) {
	got, log := read(t, flows, nil, nil, nil)
	if got != "f1 f2 L L f3" {
		t.Errorf("all: %s", got)
	}
	if n := strings.Count(log, "unknown fields"); n != 1 {
		t.Errorf("unknown fields are told %d times:\n%s", n, log)
	}
	if n := strings.Count(log, "cannot read a line"); n != 2 || !strings.Contains(log, "line=4 ") {
		t.Errorf("bad lines are told %d times:\n%s", n, log)
	}
	if got, _ = read(t, flows, []*flow.FlowFilter{{Verdict: []flow.Verdict{flow.Verdict_DROPPED}}}, nil, nil); got != "f2" {
		t.Errorf("filtered: %s", got)
	}
	if got, _ = read(t, flows, nil, &timestamppb.Timestamp{Seconds: 2}, &timestamppb.Timestamp{Seconds: 2}); got != "f2 L L" {
		t.Errorf("window: %s", got)
	}
	if got, _ = read(t, strings.Repeat("x", maxLine+1), nil, nil, nil); got != "!line 1 of the input is longer than 4194304 bytes" {
		t.Errorf("long line: %s", got)
	}
}

func FuzzFile(f *testing.F) {
	f.Add([]byte(flows))
	f.Add([]byte(`{"gap":{"count":1}}` + "\n" + `{"gap":`))
	f.Fuzz(func(t *testing.T, in []byte) {
		m, err := flowmatch.Compile(nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		s := File(bytes.NewReader(in), FileOptions{Matcher: m, Log: slog.New(slog.DiscardHandler)})
		lines := bytes.Count(in, []byte("\n")) + 1
		for n := 0; ; n++ {
			if n > lines {
				t.Fatalf("more records than the %d lines", lines)
			}
			r, err := s()
			if err != nil {
				return
			}
			if r.GetItem() == nil {
				t.Fatal("a record without content")
			}
		}
	})
}
