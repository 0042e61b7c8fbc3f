// SPDX-License-Identifier: Apache-2.0

package observer_test

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/gen/flow"
	hubble "github.com/weirmesh/weir/gen/observer"
	"github.com/weirmesh/weir/services/observer/internal/testflow"
)

// TestStockClient runs the hubble binary that $HUBBLE names.
func TestStockClient(t *testing.T) {
	binary := os.Getenv("HUBBLE")
	if binary == "" {
		t.Skip("NOT RUN: $HUBBLE names no hubble binary")
	}
	c := newCluster(t)
	now := time.Now().Add(-time.Minute).Truncate(time.Second)
	c.publish(testflow.Flows("node-1", 1, 1, 6, now))
	dropped := testflow.Flow("node-2", 7, now.Add(10*time.Millisecond))
	dropped.Verdict, dropped.DropReasonDesc, dropped.DropReason = flow.Verdict_DROPPED, flow.DropReason_POLICY_DENIED, 133
	dropped.EventType, dropped.IsReply = &flow.CiliumEventType{Type: 1, SubType: 133}, nil
	c.publish(testflow.Batch("node-2", 1, 1, testflow.Record(dropped),
		testflow.AgentEventRecord(now, &flow.AgentEvent{Type: flow.AgentEventType_AGENT_STARTED})))
	o := c.observer(nil)
	o.await("all flows", &hubble.GetFlowsRequest{}, func(a *answer) bool { return len(a.flows) == 7 })

	run := func(args ...string) (stdout, stderr string, code int) {
		t.Helper()
		command := exec.Command(binary, append(args, "--server", o.addr)...)
		command.Env = []string{"HOME=" + t.TempDir(), "NO_COLOR=1"}
		var out, errs bytes.Buffer
		command.Stdout, command.Stderr = &out, &errs
		if err := command.Run(); err != nil {
			code = command.ProcessState.ExitCode()
		}
		t.Logf("hubble %s: exit %d\n%s%s", strings.Join(args, " "), code, out.String(), errs.String())
		return out.String(), errs.String(), code
	}
	lines := func(text string) []string { return strings.Split(strings.TrimSuffix(text, "\n"), "\n") }
	stamp := now.UTC().Format("Jan _2 15:04:05.000")
	tests := []struct {
		name string
		args []string
		want []string // a line each holds, in order; nil = no output
	}{
		{"compact", []string{"observe", "--first", "1"}, []string{
			stamp + ": default/client-6f9c4-abcde:8080 (ID:12345) <- prod/server-7d8f-vwxyz:32769 (ID:23456) to-endpoint FORWARDED (TCP Flags: ACK, PSH)"}},
		{"last", []string{"observe", "--last", "2"}, []string{"to-endpoint FORWARDED", "Policy denied DROPPED"}},
		{"verdict", []string{"observe", "--verdict", "DROPPED"}, []string{"Policy denied DROPPED"}},
		{"namespace", []string{"observe", "-n", "prod", "--last", "100"}, []string{"", "", "", "", "", "", ""}},
		{"json", []string{"observe", "-o", "json", "--first", "1"}, []string{`"uuid":"flow-1"`}},
		{"dict", []string{"observe", "-o", "dict", "--last", "1"}, []string{"TIMESTAMP", "SOURCE", "DESTINATION", "TYPE", "VERDICT", "SUMMARY"}},
		{"since", []string{"observe", "--since", "10m"}, []string{"", "", "", "", "", "", ""}},
		{"nodes", []string{"list", "nodes"}, []string{"NAME", "default/node-1", "default/node-2"}},
		{"namespaces", []string{"list", "namespaces"}, []string{"NAMESPACE", "default", "prod"}},
		{"status", []string{"status"}, []string{"Ok", "Current/Max Flows", "Flows/s", "Connected Nodes"}},
		{"agent events", []string{"observe", "agent-events", "--last", "5"}, []string{"AGENT_STARTED"}},
		{"debug events", []string{"observe", "debug-events", "--last", "5"}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			out, errs, code := run(tt.args...)
			if code != 0 {
				t.Fatalf("exit %d: %s", code, errs)
			}
			var got []string
			if out != "" {
				got = lines(out)
			}
			if len(got) != len(tt.want) {
				t.Fatalf("got %d lines, want %d", len(got), len(tt.want))
			}
			for i := range got {
				if !strings.Contains(got[i], tt.want[i]) {
					t.Errorf("line %d is %q, want %q in it", i, got[i], tt.want[i])
				}
			}
		})
	}
	if _, errs, code := run("observe", "--port", "99999"); code != 1 || !strings.Contains(errs, `invalid port "99999"`) {
		t.Errorf("a bad filter: exit %d, %q", code, errs)
	}
}
