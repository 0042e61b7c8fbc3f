// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"strings"
	"testing"

	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/services/agent"
)

func good() agent.Config {
	c := agent.DefaultConfig()
	c.Node, c.Socket, c.Policy, c.Relay = "node-1", "/run/weir/agent.sock", []string{"172.30.0.2:18001"}, []string{"172.30.0.2:4244"}
	c.TLS = spiffe.Files{Cert: "c", Key: "k", CA: "a"}
	return c
}

func TestValidate(t *testing.T) {
	c := good()
	if err := c.Validate(); err != nil {
		t.Fatalf("good: %v", err)
	}
	for _, tt := range []struct {
		want   string
		change func(*agent.Config)
	}{
		{"node", func(c *agent.Config) { c.Node = "" }},
		{"node", func(c *agent.Config) { c.Node = "a b" }},
		{"policy", func(c *agent.Config) { c.Policy = nil }},
		{"relay", func(c *agent.Config) { c.Relay = []string{"x"} }},
		{"socket", func(c *agent.Config) { c.Socket = "" }},
		{"state-dir", func(c *agent.Config) { c.StateDir = "x" }},
		{"bpffs", func(c *agent.Config) { c.BPFFS = "" }},
		{"cgroup", func(c *agent.Config) { c.Cgroup = "x" }},
		{"uplink", func(c *agent.Config) { c.Uplink = "" }},
		{"aggregation", func(c *agent.Config) { c.Aggregation = "high" }},
		{"spool-bytes", func(c *agent.Config) { c.SpoolBytes = 1 }},
		{"ring bytes", func(c *agent.Config) { c.RingBytes = 1 }},
		{"conntrack", func(c *agent.Config) { c.ConntrackMax = 0 }},
		{"report interval", func(c *agent.Config) { c.ReportInterval = 0 }},
		{"tls-cert", func(c *agent.Config) { c.TLS = spiffe.Files{} }},
	} {
		c := good()
		tt.change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.want, err)
		}
	}
	// All faults at once.
	c.Node, c.Uplink = "", ""
	if err := c.Validate(); !strings.Contains(err.Error(), "node") || !strings.Contains(err.Error(), "uplink") {
		t.Errorf("two faults: %v", err)
	}
}
