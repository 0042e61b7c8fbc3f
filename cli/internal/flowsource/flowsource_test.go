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
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/cli/internal/flowmatch"
	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/gen/observer"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

// list is a stream made of words: f1, f2... are flows of that second, L is a loss, anything else an error.
type list []string

func (l *list) Recv() (*observerv1.GetFlowsResponse, error) {
	if len(*l) == 0 {
		return nil, io.EOF
	}
	word := (*l)[0]
	*l = (*l)[1:]
	var second int64
	switch {
	case word == "L":
		return &observerv1.GetFlowsResponse{Item: &observerv1.GetFlowsResponse_Gap{Gap: &observerv1.Gap{}}}, nil
	case strings.HasPrefix(word, "f"):
		if _, err := fmt.Sscanf(word, "f%d", &second); err != nil {
			return nil, err
		}
		return wrap(&observer.GetFlowsResponse{ResponseTypes: &observer.GetFlowsResponse_Flow{Flow: &flow.Flow{Time: &timestamppb.Timestamp{Seconds: second}}}}), nil
	}
	return nil, errors.New(word)
}

func words(s Stream) string {
	var out []string
	for {
		r, err := s.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return strings.Join(out, " ")
		case err != nil:
			return strings.Join(append(out, "!"+err.Error()), " ")
		case isFlow(r):
			out = append(out, fmt.Sprintf("f%d", r.GetResponse().GetFlow().GetTime().GetSeconds()))
		default:
			out = append(out, "L")
		}
	}
}

func TestStages(t *testing.T) {
	many := strings.Repeat("L ", maxOthers+10)
	tests := []struct {
		in   string
		make func(Stream) Stream
		want string
	}{
		{"f1 f2 f3", func(s Stream) Stream { return Tail(s, 2) }, "f2 f3"},
		{"f1", func(s Stream) Stream { return Tail(s, 2) }, "f1"},
		{"", func(s Stream) Stream { return Tail(s, 2) }, ""},
		{"L f1 L f2 f3 L", func(s Stream) Stream { return Tail(s, 2) }, "L f2 f3 L"},
		{"f1 x", func(s Stream) Stream { return Tail(s, 2) }, "!x"},
		{"f1 " + many, func(s Stream) Stream { return Tail(s, 1) }, strings.TrimSpace(strings.Repeat("L ", maxOthers))},
		{"f1 L f2 L f3", func(s Stream) Stream { return Head(s, 2) }, "f1 L f2"},
		{"f1 L f5 f3", func(s Stream) Stream { return NotBefore(s, time.Unix(3, 0)) }, "L f5 f3"},
	}
	for _, tt := range tests {
		l := list(strings.Fields(tt.in))
		if got := words(tt.make(&l)); got != tt.want {
			t.Errorf("%.40s: got %.80s, want %.80s", tt.in, got, tt.want)
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
			r, err := s.Recv()
			if err != nil {
				return
			}
			if r.GetItem() == nil {
				t.Fatal("a record without content")
			}
		}
	})
}
