// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/gen/observer"
	"github.com/weirmesh/weir/gen/relay"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

func TestObserveRequests(t *testing.T) {
	ago := timestamppb.New(now.Add(-5 * time.Minute))
	tests := []struct {
		args string
		want *observer.GetFlowsRequest
	}{
		{"observe", &observer.GetFlowsRequest{Number: 20}},
		{"observe flows", &observer.GetFlowsRequest{Number: 20}},
		{"observe --last 5", &observer.GetFlowsRequest{Number: 5}},
		{"observe --first 5", &observer.GetFlowsRequest{Number: 5, First: true}},
		{"observe --all", &observer.GetFlowsRequest{Number: math.MaxUint64}},
		{"observe --since 5m", &observer.GetFlowsRequest{Since: ago}},
		{"observe --since 5m --last 3", &observer.GetFlowsRequest{Number: 3}},
		{"observe --until 5m --last 3", &observer.GetFlowsRequest{Until: ago}},
		{"observe -o json", &observer.GetFlowsRequest{Number: 20}},
		{"observe --use-default-field-masks -o json", &observer.GetFlowsRequest{Number: 20}},
		{"observe --pod a --not --port 53", &observer.GetFlowsRequest{
			Number:    20,
			Whitelist: []*flow.FlowFilter{{SourcePod: []string{"a"}}, {DestinationPod: []string{"a"}}},
			Blacklist: []*flow.FlowFilter{{SourcePort: []string{"53"}}, {DestinationPort: []string{"53"}}},
		}},
		{`observe --verdict DROPPED --allowlist {"uuid":["u"]} --denylist {"uuid":["v"]}{"uuid":["w"]}`, &observer.GetFlowsRequest{
			Number:    20,
			Whitelist: []*flow.FlowFilter{{Verdict: []flow.Verdict{flow.Verdict_DROPPED}}, {Uuid: []string{"u"}}},
			Blacklist: []*flow.FlowFilter{{Uuid: []string{"v"}}, {Uuid: []string{"w"}}},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			f := &fakeObserver{}
			serveWeir(t, f).must(t, strings.Fields(tt.args)...)
			if got := f.asked(t); !proto.Equal(got, tt.want) {
				t.Errorf("got  %v\nwant %v", got, tt.want)
			}
		})
	}
}

func TestFieldMasks(t *testing.T) {
	f := &fakeObserver{}
	c := serveWeir(t, f)
	c.must(t, "observe", "-o", "json", "--field-mask", "time,source.pod_name", "--field-mask", "IP")
	if got := strings.Join(f.asked(t).GetFieldMask().GetPaths(), " "); got != "time source.pod_name IP" {
		t.Errorf("mask %q", got)
	}
	c.must(t, "observe", "--use-default-field-masks")
	paths := f.asked(t).GetFieldMask()
	if !paths.IsValid(&flow.Flow{}) || len(paths.GetPaths()) != len(printedFields) {
		t.Errorf("default mask %v", paths)
	}
	c.fails(t, "compact output format is not compatible with custom field mask", "observe", "--field-mask", "time")
	_, errOut, code := c.run(t, "observe", "-o", "json", "--field-mask", "nothing")
	if code != 1 || !strings.HasPrefix(errOut, "failed to construct field mask: ") {
		t.Errorf("%d %s", code, errOut)
	}
}

// The default mask leaves nothing out that a text format shows: masked and whole flows print the same.
func TestDefaultMaskIsComplete(t *testing.T) {
	g := newGenerator(1)
	var whole, masked []*observerv1.GetFlowsResponse
	for range 300 {
		r := g.response()
		if r.GetFlow() == nil {
			continue
		}
		whole = append(whole, envelope(r))
		m := proto.CloneOf(r)
		m.ResponseTypes = &observer.GetFlowsResponse_Flow{Flow: applyMask(r.GetFlow(), printedFields)}
		masked = append(masked, envelope(m))
	}
	for _, format := range []string{"compact", "dict", "table"} {
		args := []string{"observe", "-o", format, "--print-node-name", "--print-policy-names", "--print-stats"}
		want := serveWeir(t, &fakeObserver{flows: whole}).must(t, args...)
		if got := serveWeir(t, &fakeObserver{flows: masked}).must(t, args...); got != want {
			t.Errorf("%s differs at %s", format, firstDifference(got, want))
		}
	}
}

// applyMask keeps the fields at the paths, as a server does.
func applyMask(f *flow.Flow, paths []string) *flow.Flow {
	out := &flow.Flow{}
	from, to := f.ProtoReflect(), out.ProtoReflect()
	for _, p := range paths {
		parent, child, nested := strings.Cut(p, ".")
		fd := from.Descriptor().Fields().ByTextName(parent)
		if !from.Has(fd) {
			continue
		}
		if !nested {
			to.Set(fd, from.Get(fd))
			continue
		}
		sub := fd.Message().Fields().ByTextName(child)
		if v := from.Get(fd).Message(); v.Has(sub) {
			to.Mutable(fd).Message().Set(sub, v.Get(sub))
		}
	}
	return out
}

func TestObserveOutput(t *testing.T) {
	f := &fakeObserver{flows: []*observerv1.GetFlowsResponse{
		flowAt(1),
		gapOf(&observerv1.Gap{NodeName: "default/n1", Place: flowv1.Place_PLACE_KERNEL, Cause: flowv1.Cause_CAUSE_FULL, Count: 3, FirstTime: second(1)}),
		envelope(&observer.GetFlowsResponse{ResponseTypes: &observer.GetFlowsResponse_NodeStatus{NodeStatus: &relay.NodeStatusEvent{
			StateChange: relay.NodeState_NODE_UNAVAILABLE, NodeNames: []string{"default/n2"}}}, NodeName: "o", Time: second(1)}),
		flowAt(2, func(f *flow.Flow) {
			a, err := anypb.New(&observerv1.FlowStats{Forward: &observerv1.DirectionStats{Packets: 1, Bytes: 60}})
			if err != nil {
				t.Fatal(err)
			}
			f.Extensions = a
		}),
	}}
	c := serveWeir(t, f)
	out, errOut, code := c.run(t, "observe")
	if want := "Jan  1 00:00:01.000:  (unknown) <>  (unknown) UNKNOWN FORWARDED (s)\n" +
		"Jan  1 00:00:01.000 EVENTS LOST: default/n1 kernel full 3\n" +
		"Jan  1 00:00:02.000:  (unknown) <>  (unknown) UNKNOWN FORWARDED (s)\n"; out != want || code != 0 {
		t.Errorf("code %d\n%swant\n%s", code, out, want)
	}
	if want := "Jan  1 00:00:01.000 [o]: 1 nodes are unavailable: default/n2\n"; errOut != want {
		t.Errorf("stderr %q", errOut)
	}
	if _, errOut, _ = c.run(t, "observe", "-s"); errOut != "" {
		t.Errorf("-s: stderr %q", errOut)
	}
	out, errOut, _ = c.run(t, "observe", "-o", "flat", "-s")
	if want := `{"time":"1970-01-01T00:00:01Z","verdict":"FORWARDED","node_name":"default/n1","Summary":"s"}
{"time":"1970-01-01T00:00:02Z","verdict":"FORWARDED","node_name":"default/n1","Summary":"s","stats":{"forward":{"packets":1,"bytes":60},"final":false}}
`; out != want || errOut != "" {
		t.Errorf("flat, silent\n%s%s", out, errOut)
	}
	out, _, _ = c.run(t, "observe", "--time-format", "RFC3339", "--time-zone", "Asia/Kolkata", "-s")
	if !strings.HasPrefix(out, "1970-01-01T05:30:01+05:30: ") {
		t.Errorf("zone: %s", out)
	}
}

// A server without Weir's own service is asked by Hubble's call.
func TestObserveFallsBackToHubble(t *testing.T) {
	f := &fakeObserver{flows: []*observerv1.GetFlowsResponse{flowAt(1), flowAt(2)}}
	out := serveHubble(t, f).must(t, "observe", "--last", "2", "--to-port", "80")
	if strings.Count(out, "\n") != 2 {
		t.Errorf("output\n%s", out)
	}
	want := &observer.GetFlowsRequest{Number: 2, Whitelist: []*flow.FlowFilter{{DestinationPort: []string{"80"}}}}
	if got := f.asked(t); len(f.requests) != 1 || !proto.Equal(got, want) {
		t.Errorf("asked %v, want %v once", f.requests, want)
	}
}

func TestObserveNewest(t *testing.T) {
	f := &fakeObserver{}
	for i := range int64(6) {
		f.flows = append(f.flows, flowAt(now.Unix()-600+i*100))
	}
	// Since 250 s ago: of the server's newest flows those at -200 and -100 are young enough.
	out := serveWeir(t, f).must(t, "observe", "--since", "250s", "--last", "3", "--time-format", "RFC3339")
	if strings.Count(out, "\n") != 2 || !strings.HasPrefix(out, "2024-05-06T07:06:40Z") {
		t.Errorf("since and last\n%s", out)
	}
	out = serveWeir(t, f).must(t, "observe", "--until", "1s", "--last", "2", "--time-format", "RFC3339")
	if strings.Count(out, "\n") != 2 || !strings.HasPrefix(out, "2024-05-06T07:06:40Z") {
		t.Errorf("until and last\n%s", out)
	}
}

// lineWriter tells when a line has been written.
type lineWriter struct{ lines chan string }

func (w lineWriter) Write(p []byte) (int, error) {
	for l := range strings.Lines(string(p)) {
		w.lines <- l
	}
	return len(p), nil
}

func TestFollowUntilInterrupted(t *testing.T) {
	f := &fakeObserver{flows: []*observerv1.GetFlowsResponse{flowAt(1), flowAt(2)}}
	c := serveWeir(t, f)
	w := lineWriter{make(chan string, 10)}
	ctx, interrupt := context.WithCancel(context.Background())
	defer interrupt()
	code := make(chan int, 1)
	var errOut bytes.Buffer
	go func() { code <- Run(ctx, c.environment(w, &errOut), []string{"observe", "-f", "--last", "2"}) }()
	// Both lines appear although the stream goes on.
	<-w.lines
	<-w.lines
	interrupt()
	if got := <-code; got != 0 || errOut.Len() > 0 {
		t.Errorf("exit code %d, stderr %q", got, errOut.String())
	}
	if want := (&observer.GetFlowsRequest{Number: 2, Follow: true}); !proto.Equal(f.asked(t), want) {
		t.Errorf("asked %v", f.asked(t))
	}
}

func TestInterruptedReadingAPipe(t *testing.T) {
	r, w := io.Pipe()
	defer w.Close()
	c := &command{in: r}
	lines := lineWriter{make(chan string, 1)}
	ctx, interrupt := context.WithCancel(context.Background())
	defer interrupt()
	code := make(chan int, 1)
	go func() { code <- Run(ctx, c.environment(lines, io.Discard), []string{"observe", "--input-file", "-"}) }()
	if _, err := io.WriteString(w, `{"flow":{"verdict":"DROPPED"}}`+"\n"); err != nil {
		t.Fatal(err)
	}
	<-lines.lines
	interrupt()
	if got := <-code; got != 0 {
		t.Errorf("exit code %d", got)
	}
}

func TestObserveFailures(t *testing.T) {
	one := []*observerv1.GetFlowsResponse{flowAt(1)}
	tests := []struct {
		name string
		f    *fakeObserver
		want string
	}{
		{"a hubble server's word about a filter", &fakeObserver{err: status.Error(codes.Unknown, "invalid filter")}, "invalid filter"},
		{"weir's word about a filter", &fakeObserver{err: status.Error(codes.InvalidArgument, "whitelist[0].source_ip: bad\x1b")}, "whitelist[0].source_ip: bad^["},
		{"refused", &fakeObserver{err: status.Error(codes.PermissionDenied, "no")}, "the server at passthrough:///memory refused the call GetFlows: no"},
		{"ended", &fakeObserver{err: status.Error(codes.Unavailable, "shutting down"), flows: one}, "the observer at passthrough:///memory ended the stream: shutting down"},
		{"internal", &fakeObserver{err: status.Error(codes.Internal, "oops"), flows: one}, "the server at passthrough:///memory failed: oops (Internal)"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			out, errOut, code := serveWeir(t, tt.f).run(t, "observe")
			if code != 1 || errOut != tt.want+"\n" || strings.Count(out, "\n") != len(tt.f.flows) {
				t.Errorf("code %d, stdout %q\nstderr %swant   %s", code, out, errOut, tt.want)
			}
		})
	}
	// Neither service.
	out, errOut, code := (&command{}).run(t, "observe", "--server", "unix:///nonexistent.sock")
	if code != 1 || out != "" || !strings.HasPrefix(errOut, "cannot reach an observer at unix:///nonexistent.sock: ") {
		t.Errorf("%d %q %q", code, out, errOut)
	}
}

func TestBadValuesNeedNoServer(t *testing.T) {
	c := &command{}
	for args, want := range map[string]string{
		"observe -o foo":                         "invalid output format: foo",
		"observe -o table -f":                    "table output format is not compatible with follow mode",
		"observe --color maybe":                  "invalid --color: maybe, expected auto, always or never",
		"observe --time-format foo":              "invalid --time-format: foo",
		"observe --time-zone Nowhere/Land":       "invalid --time-zone: unknown time zone Nowhere/Land",
		"observe --since yesterday":              "failed to parse the since time: failed to convert yesterday to time",
		"observe --first 1 --last 2":             "cannot set both --first and --last",
		"observe --last x":                       `invalid argument "x" for "--last" flag: strconv.ParseUint: parsing "x": invalid syntax`,
		"observe --ip x":                         `invalid IP address "x" in filter: ParseAddr("x"): unable to parse IP`,
		"observe --port 99999":                   `invalid source port filter: invalid port "99999": strconv.ParseUint: parsing "99999": value out of range`,
		"observe --protocol x":                   `invalid protocol filter: unknown protocol: "x"`,
		"observe --http-path (":                  "invalid http path filter: error parsing regexp: missing closing ): `(`",
		"observe --http-status 200 -t drop":      "filtering by http status code requires the event type filter to only match 'l7' events",
		"observe --not":                          "trailing --not found in the arguments",
		"observe --allowlist x":                  "invalid --allowlist flag: failed to decode 'x': invalid character 'x' looking for beginning of value",
		"observe --nothing":                      "unknown flag: --nothing",
		"observe default/todoui":                 "weir observe takes no argument, got \"default/todoui\": see `weir observe --help`",
		"observe --input-file /nonexistent":      "open --input-file: open /nonexistent: no such file or directory",
		"observe --tls-client-cert-file x --tls": "invalid flag(s): certificate and private key are both required, but only one was provided",
		"observe agent-events -o table -f":       "table output format is not compatible with follow mode",
		"frobnicate":                             `unknown command "frobnicate" for "weir"`,
		"list pods":                              `unknown command "pods" for "weir list"`,
		"list nodes -o yaml":                     "unknown output format: yaml",
		"endpoint list -o yaml":                  "unknown output format: yaml, expected table or json",
		"status -o yaml":                         "unknown output format: yaml, expected table or json",
		"monitor -o yaml":                        "unknown output format: yaml, expected table or json",
		"identity get":                           "weir identity get takes one identity, a number or a reserved name, got 0",
		"identity get nobody":                    "invalid security identity, expected one of [host world unmanaged health init remote-node kube-apiserver ingress world-ipv4 world-ipv6] or a numeric value",
	} {
		t.Run(args, func(t *testing.T) { c.fails(t, want, strings.Fields(args)...) })
	}
}

func TestPrintRawFilters(t *testing.T) {
	c := &command{}
	if out := c.must(t, "observe", "--print-raw-filters"); out != "{}\n" {
		t.Errorf("none: %q", out)
	}
	out := c.must(t, "observe", "--print-raw-filters", "--pod", "a", "--not", "--verdict", "FORWARDED", "--denylist", `{"uuid":["it's"]}`)
	if want := `allowlist:
    - '{"source_pod":["a"]}'
    - '{"destination_pod":["a"]}'
denylist:
    - '{"verdict":["FORWARDED"]}'
    - '{"uuid":["it''s"]}'
`; out != want {
		t.Errorf("got\n%swant\n%s", out, want)
	}
}

// What -o json writes, --input-file reads: every format comes out the same.
func TestInputFileRoundTrip(t *testing.T) {
	g := newGenerator(2)
	f := &fakeObserver{}
	for range 200 {
		f.flows = append(f.flows, envelope(g.response()))
	}
	f.flows = append(f.flows, gapOf(&observerv1.Gap{NodeName: "n", Count: 2, FirstTime: second(3)}))
	server := serveWeir(t, f)
	text := server.must(t, "observe", "-o", "json")
	name := filepath.Join(t.TempDir(), "flows.json")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"compact", "dict", "table", "json", "flat"} {
		args := []string{"observe", "-o", format, "-s"}
		want := server.must(t, args...)
		if got := (&command{}).must(t, append(args, "--input-file", name)...); got != want {
			t.Errorf("%s from a file differs at %s", format, firstDifference(got, want))
		}
		if got := (&command{in: strings.NewReader(text)}).must(t, append(args, "--input-file", "-")...); got != want {
			t.Errorf("%s from stdin differs at %s", format, firstDifference(got, want))
		}
	}
	if got := (&command{}).must(t, "observe", "-o", "flat", "--input-file", name, "--first", "3"); strings.Count(got, "\n") != 3 {
		t.Errorf("first 3:\n%s", got)
	}
	all := (&command{}).must(t, "observe", "-o", "flat", "-s", "--input-file", name)
	lines := strings.SplitAfter(strings.TrimSuffix(all, "\n"), "\n")
	if got := (&command{}).must(t, "observe", "-o", "flat", "-s", "--input-file", name, "--last", "3"); got != strings.Join(lines[len(lines)-3:], "")+"\n" {
		t.Errorf("last 3:\n%s", got)
	}
	dropped := (&command{}).must(t, "observe", "-o", "json", "--input-file", name, "--verdict", "DROPPED")
	for l := range strings.Lines(dropped) {
		var r observer.GetFlowsResponse
		if err := protojson.Unmarshal([]byte(l), &r); err != nil || r.GetFlow().GetVerdict() != flow.Verdict_DROPPED {
			t.Errorf("%v: %s", err, l)
		}
	}
}

func firstDifference(a, b string) string {
	as, bs := strings.SplitAfter(a, "\n"), strings.SplitAfter(b, "\n")
	for i := range min(len(as), len(bs)) {
		if as[i] != bs[i] {
			return "line " + number(uint64(i+1)) + "\n got  " + as[i] + " want " + bs[i]
		}
	}
	return "the end: " + number(uint64(len(as))) + " lines, want " + number(uint64(len(bs)))
}

func TestColorChoice(t *testing.T) {
	f := &fakeObserver{flows: []*observerv1.GetFlowsResponse{flowAt(1)}}
	tests := []struct {
		flag     string
		terminal bool
		env      string
		want     bool
	}{
		{"auto", true, "", true},
		{"auto", false, "", false},
		{"auto", true, "NO_COLOR=1", false},
		{"auto", true, "TERM=dumb", false},
		{"always", false, "NO_COLOR=1", true},
		{"Never", true, "", false},
	}
	for _, tt := range tests {
		c := serveWeir(t, f)
		c.terminal = tt.terminal
		if k, v, ok := strings.Cut(tt.env, "="); ok {
			c.env[k] = v
		}
		out := c.must(t, "observe", "--color", tt.flag)
		if got := strings.Contains(out, "\x1b[32mFORWARDED\x1b[0m"); got != tt.want {
			t.Errorf("%+v: coloured %v", tt, got)
		}
	}
}

func TestEvents(t *testing.T) {
	type request struct {
		number        uint64
		first, follow bool
		since, until  int64
	}
	for args, want := range map[string]request{
		"":                      {number: 20},
		"-f":                    {number: 20, follow: true},
		"--last 3 -f":           {number: 3, follow: true},
		"--first 3":             {number: 3, first: true},
		"--all":                 {number: math.MaxUint64},
		"--since 5m --until 1m": {since: now.Unix() - 300, until: now.Unix() - 60},
	} {
		for kind, line := range map[string]string{
			"agent-events": "Jan  1 00:00:01.000: AGENT_STARTED (UNKNOWN)\n",
			"debug-events": "Jan  1 00:00:01.000: N/A DBG_EVENT_UNKNOWN MARK: N/A CPU: N/A (m)\n",
		} {
			var got request
			f := &fakeObserver{events: func(n uint64, first, follow bool, since, until *timestamppb.Timestamp) {
				got = request{n, first, follow, since.GetSeconds(), until.GetSeconds()}
			}}
			out := serveWeir(t, f).must(t, append([]string{"observe", kind}, strings.Fields(args)...)...)
			if got != want || out != line {
				t.Errorf("%s %s: asked %+v, want %+v; output %q", kind, args, got, want, out)
			}
		}
	}
	_, errOut, code := serveWeir(t, &fakeObserver{}).run(t, "observe", "agent-events")
	if code != 1 || !strings.HasPrefix(errOut, "the server at passthrough:///memory lacks the call GetAgentEvents (") {
		t.Errorf("%d %s", code, errOut)
	}
}

func TestEnvironment(t *testing.T) {
	number := func(env map[string]string, args ...string) uint64 {
		t.Helper()
		f := &fakeObserver{}
		c := serveWeir(t, f)
		for k, v := range env {
			c.env[k] = v
		}
		c.must(t, append([]string{"observe"}, args...)...)
		return f.asked(t).GetNumber()
	}
	if n := number(map[string]string{"WEIR_LAST": "7"}); n != 7 {
		t.Errorf("WEIR_LAST: %d", n)
	}
	if n := number(map[string]string{"WEIR_LAST": "7"}, "--last", "3"); n != 3 {
		t.Errorf("the flag does not win: %d", n)
	}
	// What is typed silences what would contradict it.
	if n := number(map[string]string{"WEIR_LAST": "7"}, "--all"); n != math.MaxUint64 {
		t.Errorf("--all: %d", n)
	}
	if n := number(map[string]string{"WEIR_FOLLOW": "true", "WEIR_LAST": "2"}, "--first", "4"); n != 4 {
		t.Errorf("--first: %d", n)
	}
	if n := number(map[string]string{"WEIR_LAST": "", "WEIR_NOT": "true"}); n != 20 {
		t.Errorf("empty variable: %d", n)
	}
	c := &command{env: map[string]string{"WEIR_NAMESPACE": "prod", "WEIR_ALLOWLIST": `{"uuid":["u"]}`}}
	if out := c.must(t, "observe", "--print-raw-filters"); !strings.Contains(out, `{"source_pod":["prod/"]}`) || !strings.Contains(out, `{"uuid":["u"]}`) {
		t.Errorf("filters from variables:\n%s", out)
	}
	c.fails(t, `variable WEIR_NAMESPACE: invalid argument "prod" for "-n, --namespace" flag: filters --ip and --namespace cannot be combined`, "observe", "--ip", "1.1.1.1")
	c = &command{env: map[string]string{"WEIR_TLS": "perhaps"}}
	c.fails(t, `variable WEIR_TLS: invalid argument "perhaps" for "--tls" flag: strconv.ParseBool: parsing "perhaps": invalid syntax`, "observe")
}
