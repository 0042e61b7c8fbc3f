// SPDX-License-Identifier: Apache-2.0

package query

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/internal/policy"
)

func TestSplit(t *testing.T) {
	tests := []struct {
		name, text string
		want       []string
	}{
		{"nothing", "", nil},
		{"one", "a: 1\n", []string{"a: 1\n"}},
		{"two", "a: 1\n---\nb: 2\n", []string{"a: 1\n", "b: 2\n"}},
		{"comments and empty ones", "# x\n---\n\n---\na: 1\n--- \n# y\n", []string{"a: 1\n"}},
		{"on the line", "--- {a: 1}\n---\nb: 2", []string{" {a: 1}\n", "b: 2"}},
		{"in a text", "a: |\n  ---\n  b\n", []string{"a: |\n  ---\n  b\n"}},
	}
	for _, tt := range tests {
		var got []string
		for _, d := range split([]byte(tt.text)) {
			got = append(got, string(d))
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

// FuzzSplit: no document is lost or made up.
func FuzzSplit(f *testing.F) {
	f.Add([]byte("a: 1\n---\nb: 2\n"))
	f.Add([]byte("--- x\n---\n#\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		total := 0
		for _, d := range split(data) {
			total += len(d)
			if len(bytes.TrimSpace(stripComments(d))) == 0 {
				t.Errorf("an empty document: %q", d)
			}
		}
		if total > len(data)+1 {
			t.Errorf("%d bytes became %d", len(data), total)
		}
	})
}

func TestCompareRanges(t *testing.T) {
	allow := func(proto uint8, first, last uint16) policy.Range {
		return policy.Range{Proto: proto, First: first, Last: last, Verdict: policy.Allow}
	}
	only := func(first, last uint16, method string) policy.Range {
		r := allow(policy.TCP, first, last)
		r.Filter = &policy.Filter{Kind: policy.FilterHTTP, HTTP: []policy.HTTPItem{{HTTPRule: policy.HTTPRule{Method: method}}}}
		return r
	}
	tests := []struct {
		name          string
		before, after []policy.Range
		want          []string // proto ports verdict
	}{
		{"the same", everything(), everything(), nil},
		{"all denied", everything(), nil, []string{"all ports denied"}},
		{"one port stays", everything(), []policy.Range{allow(policy.TCP, 80, 80)}, []string{"any other protocol denied", "0-79/TCP denied", "81-65535/TCP denied"}},
		{"one more", []policy.Range{allow(policy.TCP, 80, 80)}, []policy.Range{allow(policy.TCP, 80, 81)}, []string{"81/TCP allowed"}},
		{"split and joined", []policy.Range{allow(policy.UDP, 1, 5), allow(policy.UDP, 6, 9)}, nil, []string{"1-9/UDP denied"}},
		{"with other requests", []policy.Range{allow(policy.TCP, 1, 2)}, []policy.Range{only(1, 2, "GET")}, []string{"1-2/TCP GET"}},
		{"with no request", []policy.Range{allow(policy.TCP, 1, 2)}, []policy.Range{{Proto: policy.TCP, First: 1, Last: 2, Verdict: policy.Allow,
			Filter: &policy.Filter{Kind: policy.FilterDNS}}}, []string{"1-2/TCP nothing"}},
		{"with any request", []policy.Range{only(1, 1, "GET"), only(2, 2, "PUT")}, []policy.Range{allow(policy.TCP, 1, 2)}, []string{"1/TCP allowed", "2/TCP allowed"}},
		{"with the same requests", []policy.Range{only(1, 1, "GET"), only(2, 2, "GET")}, []policy.Range{only(1, 2, "GET")}, nil},
		{"denied by rule or by default", []policy.Range{{Proto: policy.TCP, First: 1, Last: 2, Verdict: policy.Deny}}, nil, nil},
	}
	for _, tt := range tests {
		var got []string
		differences := compareRanges(tt.before, tt.after)
		for _, d := range differences {
			text := portsInWords(d.at, len(differences) == 1) + " denied"
			if d.at.Verdict == policy.Allow {
				text = portsInWords(d.at, len(differences) == 1) + " " + strings.Join(append(itemsInWords(d.at.Filter), "allowed")[:1], "")
			}
			got = append(got, text)
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}
