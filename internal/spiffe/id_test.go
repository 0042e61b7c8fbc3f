// SPDX-License-Identifier: Apache-2.0

package spiffe

import (
	"strings"
	"testing"
)

func TestParseID(t *testing.T) {
	tests := []struct {
		uri  string
		want ID // zero = an error
	}{
		{"spiffe://weir.local/weir/policy", ID{"weir.local", "policy", ""}},
		{"spiffe://weir.local/weir/agent/node-1.example", ID{"weir.local", "agent", "node-1.example"}},
		{"spiffe://td/weir/agent/Node_1", ID{"td", "agent", "Node_1"}},
		{"https://weir.local/weir/policy", ID{}},
		{"SPIFFE://weir.local/weir/policy", ID{}},
		{"spiffe://Weir.local/weir/policy", ID{}},
		{"spiffe://weir.local:80/weir/policy", ID{}},
		{"spiffe://user@weir.local/weir/policy", ID{}},
		{"spiffe:///weir/policy", ID{}},
		{"spiffe://weir.local/policy", ID{}},
		{"spiffe://weir.local/weir", ID{}},
		{"spiffe://weir.local/weir/", ID{}},
		{"spiffe://weir.local/weir//n1", ID{}},
		{"spiffe://weir.local/weir/agent/", ID{}},
		{"spiffe://weir.local/weir/agent/..", ID{}},
		{"spiffe://weir.local/weir/agent/a/b", ID{}},
		{"spiffe://weir.local/weir/agent?x=1", ID{}},
		{"spiffe://weir.local/weir/agent#x", ID{}},
		{"spiffe://weir.local/weir/%61gent", ID{}},
		{"spiffe://weir.local/weir/local", ID{}},
		{"spiffe://weir.local/weir/*", ID{}},
		{"spiffe://weir.local/other/agent", ID{}},
		{"spiffe://" + strings.Repeat("a", 256) + "/weir/agent", ID{}},
	}
	for _, tt := range tests {
		got, err := ParseID(tt.uri)
		if (err != nil) != (tt.want == ID{}) || got != tt.want {
			t.Errorf("ParseID(%q) = %+v, %v; want %+v", tt.uri, got, err, tt.want)
		}
	}
}

func FuzzParseID(f *testing.F) {
	f.Add("spiffe://weir.local/weir/agent/n1")
	f.Add("spiffe://weir.local/weir/policy")
	f.Add("spiffe://a/weir/%2e")
	f.Fuzz(func(t *testing.T, uri string) {
		id, err := ParseID(uri)
		if err == nil && id.String() != uri {
			t.Errorf("ParseID(%q).String() = %q", uri, id.String())
		}
	})
}
