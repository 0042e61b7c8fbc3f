// SPDX-License-Identifier: Apache-2.0

package reserved

import (
	"testing"
)

func TestAll(t *testing.T) {
	var last uint32
	for _, id := range All("default") {
		if id.Number <= last || id.Number >= FirstGiven {
			t.Errorf("number %d after %d", id.Number, last)
		}
		last = id.Number
		if id.Number > WorldIPv6 {
			if err := id.Labels.Check(); err != nil {
				t.Errorf("%d: %v", id.Number, err)
			}
		}
	}
	if got := All("default")[WorldIPv6-1]; got.Labels[0] != "reserved:world-ipv6" {
		t.Errorf("identity 10 is %v", got)
	}
}

func TestDNS(t *testing.T) {
	tests := []struct {
		namespace, app string
		want           uint32
	}{
		{"kube-system", "kube-dns", 102}, {"kube-system", "coredns", 104},
		{"kube-system", "other", 0}, {"default", "kube-dns", 0}, {"kube-system", "", 0},
	}
	for _, tt := range tests {
		got, ok := DNS(tt.namespace, map[string]string{"k8s-app": tt.app, "else": "x"}, "default")
		if ok != (tt.want != 0) || got.Number != tt.want {
			t.Errorf("DNS(%s, %s) = %v, %t", tt.namespace, tt.app, got, ok)
		}
	}
}
