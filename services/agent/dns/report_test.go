// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"log/slog"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weirmesh/weir/services/agent/internal/dnsnames"
	"github.com/weirmesh/weir/services/agent/internal/dnsproxy"
	"github.com/weirmesh/weir/services/agent/internal/dnsrecord"
	"github.com/weirmesh/weir/services/agent/internal/dnsrules"
)

func TestMetricsAndDetails(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	proxy, err := dnsproxy.New(dnsproxy.Config{Log: log})
	if err != nil {
		t.Fatal(err)
	}
	p := &parts{Service: &Service{log: log}, proxy: proxy, names: dnsnames.New(dnsnames.Config{Log: log}), records: dnsrecord.New(1, 1)}
	p.rules = dnsrules.New(nil, p.names, "", log)
	p.sync = dnsrules.NewSync(p.rules, nil, nil, nil, nil)
	proxy.Counters().Refused.Add(3)
	proxy.Counters().Overload.Add(2)
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(newCollector(p))
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	refused := 0.0
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "weir_dns_") || f.GetHelp() == "" {
			t.Errorf("metric %v", f)
		}
		if f.GetName() == "weir_dns_refused_total" {
			for _, m := range f.GetMetric() {
				refused += m.GetCounter().GetValue()
			}
		}
	}
	if refused != 5 || len(families) < 20 {
		t.Errorf("%d metrics, %v refused", len(families), refused)
	}
	text := ""
	for _, d := range p.details() {
		text += d.Name + ": " + d.Value + "\n"
	}
	for _, want := range []string{"rules: none yet", "3 refused", "overload: 2 ", "0 timeouts"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}

func TestConfig(t *testing.T) {
	good := DefaultConfig()
	good.Node = "n1"
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	bad := DefaultConfig()
	bad.Reject, bad.StateDir, bad.UDPSize, bad.MinTTL = "no", "x", 100, -1
	err := bad.Validate()
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"node is empty", "reject-response-code", "state-dir", "edns-udp-max", "min-ttl"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in %v", want, err)
		}
	}
}
