// SPDX-License-Identifier: Apache-2.0

package format

import (
	"math"
	"testing"
)

func TestQuicken(t *testing.T) {
	const head = "id: x\npods: [{name: a, namespace: s}]\nconfig: {tofqdns_min_ttl: 30}\n"
	const answer = "dns_answers: [{client: s/a, name: n.example, ips: [192.0.2.1], ttl: 60, at: 0}, {client: s/a, name: m.example, ips: [192.0.2.2], ttl: 1, at: 100}]\n"
	expect := func(at string) string {
		return "expect: [{from: s/a, to: 'ip:192.0.2.1', port: 1, verdict: allow, at: 40}, {from: s/a, to: 'ip:192.0.2.1', port: 1, verdict: deny, at: " + at + "}]\n"
	}
	for name, test := range map[string]struct {
		text string
		// want is what becomes of 3000 s.
		want float64
	}{
		"long":           {head + answer + expect("3000"), 450},
		"brief":          {head + "dns_answers: [{client: s/a, name: n.example, ttl: 3, at: 0}]\nexpect: [{from: s/a, to: 'ip:192.0.2.1', port: 1, verdict: allow, at: 20}]", 3000},
		"near the end":   {head + answer + expect("62"), 3000},
		"without names":  {head + expect("3000"), 3000},
		"close of a use": {head + answer + "connections: [{from: s/a, to: 'ip:192.0.2.1', port: 1, open_at: 1, close_at: 2990}]\n" + expect("3000"), 900},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := Parse([]byte(test.text))
			if err != nil {
				t.Fatal(err)
			}
			before, last := c.Lasts(), c.Expect[len(c.Expect)-1].At
			c.Quicken()
			pace := test.want / 3000
			if got := c.Lasts(); math.Abs(got-before*pace) > 1e-9 || math.Abs(c.Expect[len(c.Expect)-1].At-lastOf(c, last, pace)) > 1e-9 {
				t.Errorf("%g s became %g s, want a pace of %g", before, got, pace)
			}
			if len(c.DNSAnswers) > 0 && c.DNSAnswers[0].TTL != math.Round(c.DNSAnswers[0].TTL) {
				t.Errorf("a TTL of %g s", c.DNSAnswers[0].TTL)
			}
		})
	}
}

func lastOf(c *Case, last, pace float64) float64 {
	if !c.HasTimes() {
		return last
	}
	return last * pace
}
