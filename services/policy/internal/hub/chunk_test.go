// SPDX-License-Identifier: Apache-2.0

package hub

import (
	"fmt"
	"slices"
	"testing"

	"github.com/weirmesh/weir/services/policy/internal/engine"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

func members(n int) []string {
	var all []string
	for i := range n {
		all = append(all, fmt.Sprint(1000+i))
	}
	return all
}

// what writes an update's content, in its order.
func what(c state.Change) []string {
	var all []string
	for _, r := range c.Upserts {
		text := "+" + r.Key().Name
		if s, ok := r.(state.Selector); ok {
			text += fmt.Sprint("=", s.Size())
		}
		all = append(all, text)
	}
	for _, s := range c.Selectors {
		all = append(all, fmt.Sprintf("%s+%d-%d", s.Key, len(s.Joined), len(s.Left)))
	}
	for _, r := range c.Removals {
		all = append(all, "-"+r.Key.Name)
	}
	return all
}

func TestChunk(t *testing.T) {
	selector := func(n int) state.Selector {
		return state.Selector{Selector: (&engine.Selector{Key: "s"}).Part(members(n))}
	}
	policy := state.Policy{Policy: &engine.Policy{Key: "p"}}
	peer, endpoint, subject, pod := state.Peer{Name: "cidr:x"}, state.Endpoint{UID: "e"}, state.Subject{Name: "u"}, state.Pod{UID: "pod"}
	change := state.SelectorChange{Key: "t", Joined: members(1), Left: members(2)}
	removals := []state.Removal{
		{Key: state.Key{Kind: state.KindEndpoint, Name: "old-e"}}, {Key: state.Key{Kind: state.KindPolicy, Name: "old-p"}}, {Key: state.Key{Kind: state.KindSelector, Name: "old-s"}},
	}
	tests := []struct {
		name   string
		change state.Change
		size   int
		want   [][]string
	}{
		{"nothing", state.Change{}, 10, nil},
		{"small", state.Change{Upserts: []state.Resource{selector(1), policy, subject, pod}, Selectors: []state.SelectorChange{change}, Removals: removals}, 100,
			[][]string{{"+s=1", "+p", "+u", "+pod", "t+1-2", "-old-e", "-old-p", "-old-s"}}},
		{"addresses before subjects", state.Change{
			Upserts: []state.Resource{selector(1), policy, peer, endpoint, subject, pod}, Selectors: []state.SelectorChange{change}, Removals: removals,
		}, 100, [][]string{{"+s=1", "+p", "+cidr:x", "+e", "t+1-0"}, {"+u", "+pod", "t+0-2", "-old-e", "-old-p", "-old-s"}}},
		{"one by one", state.Change{
			Upserts: []state.Resource{selector(1), policy, peer, subject}, Selectors: []state.SelectorChange{change}, Removals: removals,
		}, 1, [][]string{{"+s=1"}, {"+p"}, {"t+1-0"}, {"+cidr:x"}, {"+u"}, {"-old-e"}, {"t+0-2"}, {"-old-p"}, {"-old-s"}}},
		{"classes go after their peers", state.Change{Upserts: []state.Resource{policy}, Removals: removals[:1], Late: []state.Resource{policy}}, 100,
			[][]string{{"+p", "-old-e"}, {"+p"}}},
		{"a large selector", state.Change{Upserts: []state.Resource{selector(2*2*perUnit + 1), policy}}, 2,
			[][]string{{"+s=40"}, {"s+40-0"}, {"+p", "s+1-0"}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var got [][]string
			for _, c := range chunk(tt.change, tt.size) {
				got = append(got, what(c))
			}
			if !slices.EqualFunc(got, tt.want, slices.Equal) {
				t.Errorf("got %v\nwant %v", got, tt.want)
			}
		})
	}
}
