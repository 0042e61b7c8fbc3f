// SPDX-License-Identifier: Apache-2.0

package state

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"slices"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/engine"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// Revisions of filters are made of their contents alone, so that every replica of the policy service has the same: a proxy takes what one of them said,
// and another one writes the status.

// proxyFilter returns the resource of a policy's filter; of one that is known its revision is not computed again.
func proxyFilter(before *Render, f *engine.Filter) ProxyFilter {
	if old, ok := before.parts[RenderFilter].get()[f.Key].(ProxyFilter); ok && old.Of == f {
		return old
	}
	return ProxyFilter{Key: f.Key, Of: f, Revision: filterRevision(f)}
}

// filterRevision: the order of items does not matter, nor where their rules stand in the policy, which may be one of several with this filter.
func filterRevision(f *engine.Filter) string {
	var items []string
	add := func(rule int, says any) {
		var name *policy.RuleName
		if rule >= 0 && rule < len(f.Rules) {
			name = &f.Rules[rule]
		}
		items = append(items, text(name, says))
	}
	for i := range f.HTTP {
		add(f.HTTP[i].Rule, f.HTTP[i].HTTPRule)
	}
	for i := range f.DNS {
		add(f.DNS[i].Rule, f.DNS[i].NameSelector)
	}
	for i := range f.TLS {
		add(f.TLS[i].Rule, []any{f.TLS[i].Any, f.TLS[i].ServerNames})
	}
	slices.Sort(items)
	return digest(text(f.Kind, f.Direction, f.Visibility, f.Namespace, items))
}

// routeRevision covers what the configuration says, which leads a route's requests.
func (s *State) routeRevision(r Route) string {
	config := ""
	if c := s.configs[object.Key{Kind: r.Kind, Namespace: r.Namespace, Name: r.Name}]; c != nil {
		config = c.revision
	}
	return digest(text(r, config))
}

func text(values ...any) string {
	b, err := json.Marshal(values)
	if err != nil {
		panic(err) // structs of text and numbers always encode
	}
	return string(b)
}

func digest(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:12])
}
