// SPDX-License-Identifier: Apache-2.0

package hub

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// proxyFollower is an xDS server as far as state goes.
type proxyFollower struct {
	t         *testing.T
	sent      *state.Render
	resources map[state.RenderKey]state.RenderResource
}

func newProxyFollower(t *testing.T) *proxyFollower {
	return &proxyFollower{t: t, resources: map[state.RenderKey]state.RenderResource{}}
}

// follow takes in what leads to a state, in small parts. After each of them every slot has its filter.
func (p *proxyFollower) follow(to *state.Render, size int) {
	p.t.Helper()
	for _, c := range chunkRender(state.DiffRender(p.sent, to), size) {
		for _, r := range c.Upserts {
			p.resources[r.RenderKey()] = r
		}
		for _, k := range c.Removals {
			if p.resources[k] == nil {
				p.t.Fatalf("%v is removed and was not there", k)
			}
			delete(p.resources, k)
		}
		for _, r := range p.resources {
			n, ok := r.(state.NodeSlots)
			if !ok {
				continue
			}
			for _, s := range n.Slots {
				if p.resources[state.RenderKey{Kind: state.RenderFilter, Name: s.Key}] == nil {
					p.t.Fatalf("slot %d of %s without its filter %s", s.Number, n.Node, s.Key)
				}
			}
		}
	}
	p.sent = to
}

func (p *proxyFollower) text() map[string]string {
	all := map[string]string{}
	for key, r := range p.resources {
		text := fmt.Sprintf("%+v", r)
		if f, ok := r.(state.ProxyFilter); ok {
			text = fmt.Sprintf("%+v %+v %s", *f.Of.Filter, f.Of.Rules, f.Of.Namespace)
		}
		all[fmt.Sprint(key)] = text
	}
	return all
}

// reportSlots has a node give slots to some of the filters that there are.
func reportSlots(t *testing.T, r *rand.Rand, st *state.State, node string) {
	t.Helper()
	filters := st.Snapshot().Policy().Filters
	var slots []state.Slot
	for _, key := range slices.Sorted(maps.Keys(filters)) {
		if filters[key].Kind == policy.FilterHTTP && r.IntN(2) == 0 {
			n := uint16(len(slots) + 1)
			slots = append(slots, state.Slot{Number: n, Key: key, Port: 20000 + n})
		}
	}
	if err := st.SetSlots(node, slots); err != nil {
		t.Fatal(err)
	}
}
