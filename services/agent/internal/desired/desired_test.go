// SPDX-License-Identifier: Apache-2.0

package desired_test

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/weirmesh/weir/services/agent/internal/desired"
)

func pod(name, uid string, identity uint32) desired.Upsert {
	return desired.Upsert{Key: desired.Key{Kind: desired.KindPod, Name: uid}, Resource: &desired.Pod{UID: uid, Namespace: "ns", Name: name, Identity: identity}}
}

func node(cidrs ...string) desired.Upsert {
	n := &desired.Node{Name: "n"}
	for _, c := range cidrs {
		n.PodCIDRs = append(n.PodCIDRs, netip.MustParsePrefix(c))
	}
	return desired.Upsert{Key: desired.Key{Kind: desired.KindNode, Name: "n"}, Resource: n}
}

func TestWaitPod(t *testing.T) {
	tests := []struct {
		name   string
		before []desired.Upsert
		after  []desired.Upsert // arrive while it waits
		uid    string
		want   string // uid of the pod; "" = it waits in vain
	}{
		{"all there", []desired.Upsert{node("10.0.0.0/24"), pod("p", "u", 300)}, nil, "u", "u"},
		{"any uid", []desired.Upsert{node("10.0.0.0/24"), pod("p", "u", 300)}, nil, "", "u"},
		{"another uid", []desired.Upsert{node("10.0.0.0/24"), pod("p", "old", 300)}, nil, "u", ""},
		{"same uid, another name", []desired.Upsert{node("10.0.0.0/24"), pod("q", "u", 300)}, nil, "u", ""},
		{"comes late", []desired.Upsert{node("10.0.0.0/24")}, []desired.Upsert{pod("p", "u", 300)}, "u", "u"},
		{"number comes late", []desired.Upsert{node("10.0.0.0/24"), pod("p", "u", 0)}, []desired.Upsert{pod("p", "u", 300)}, "u", "u"},
		{"node comes late", []desired.Upsert{pod("p", "u", 300)}, []desired.Upsert{node("10.0.0.0/24")}, "u", "u"},
		{"node without CIDRs", []desired.Upsert{pod("p", "u", 300), node()}, nil, "u", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := desired.NewStore()
			s.Apply(tt.before, nil)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			if tt.want == "" {
				cancel()
			}
			defer cancel()
			go s.Apply(tt.after, nil)
			p, n, err := s.WaitPod(ctx, "n", "ns", "p", tt.uid)
			if tt.want == "" {
				if !errors.Is(err, context.Canceled) {
					t.Errorf("got %v, %v", p, err)
				}
				return
			}
			if err != nil || p.UID != tt.want || len(n.PodCIDRs) != 1 {
				t.Errorf("got %v, %v, %v", p, n, err)
			}
		})
	}
}

func TestChanges(t *testing.T) {
	s := desired.NewStore()
	c := s.Apply([]desired.Upsert{pod("p", "u", 300)}, []desired.Key{{Kind: desired.KindPod, Name: "none"}})
	if len(c) != 1 || c[0].Old != nil || c[0].New.(*desired.Pod).Identity != 300 {
		t.Errorf("new: %+v", c)
	}
	c = s.Apply([]desired.Upsert{pod("p", "u", 301)}, nil)
	if len(c) != 1 || c[0].Old.(*desired.Pod).Identity != 300 || c[0].New.(*desired.Pod).Identity != 301 {
		t.Errorf("changed: %+v", c)
	}
	s.Begin()
	if c := s.Complete(); len(c) != 1 || c[0].New != nil || c[0].Old == nil || s.Count(desired.KindPod) != 0 {
		t.Errorf("not sent again: %+v", c)
	}
}
