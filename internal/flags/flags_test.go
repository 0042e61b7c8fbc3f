// SPDX-License-Identifier: Apache-2.0

package flags

import (
	"io"
	"testing"

	"github.com/spf13/pflag"
)

func TestParse(t *testing.T) {
	env := map[string]string{"WEIR_LISTEN": ":1", "WEIR_METRICS_LISTEN": ":2", "WEIR_LOG_LEVEL": "debug"}
	lookup := func(name string) (string, bool) { v, ok := env[name]; return v, ok }
	c := Default(":9")
	set := pflag.NewFlagSet("x", pflag.ContinueOnError)
	set.SetOutput(io.Discard)
	c.Add(set)
	if err := Parse(set, []string{"--listen", ":7"}, lookup); err != nil {
		t.Fatal(err)
	}
	want := Default(":7") // the flag beats the environment
	want.MetricsListen, want.LogLevel = ":2", "debug"
	if c != want {
		t.Errorf("got %+v, want %+v", c, want)
	}
	if err := Parse(set, []string{"stray"}, lookup); err == nil {
		t.Error("a stray argument was accepted")
	}
}

func TestParseBadEnvironment(t *testing.T) {
	set := pflag.NewFlagSet("x", pflag.ContinueOnError)
	set.Int("n", 1, "")
	if err := Parse(set, nil, func(string) (string, bool) { return "many", true }); err == nil {
		t.Error("WEIR_N=many was accepted")
	}
}

func TestValidate(t *testing.T) {
	c := Default("")
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
	c.LogLevel, c.ClusterName = "loud", ""
	if err := c.Validate(); err == nil {
		t.Error("faults were not reported")
	}
	if _, err := Logger(io.Discard, "loud"); err == nil {
		t.Error("Logger accepted a bad level")
	}
}
