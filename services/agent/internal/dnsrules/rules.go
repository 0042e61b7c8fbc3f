// SPDX-License-Identifier: Apache-2.0

// Package dnsrules keeps the DNS rules of a node as its agent sends them: filters of queries, by slot, and what policies allow by names. They are on
// disk, so that weir-dns works while the agent is away. It judges queries by them and by what the kernel's maps say.
package dnsrules

import (
	"log/slog"
	"net/netip"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/bpf/datapath"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/agent/internal/dnsnames"
	"github.com/weirmesh/weir/services/agent/internal/dnsproxy"
)

// View is what the kernel's maps say.
type View interface {
	Endpoint(a netip.Addr) (id uint16, identity, peer uint32, ok bool)
	Peer(a netip.Addr) (identity, peer uint32)
	Policy(id uint16) (ingress, egress datapath.EndpointPolicyWord)
	Lookup(policy, peer uint32, proto uint8, port uint16) (datapath.PolicyRange, bool)
	// Generation is another one after every change of what Lookup says.
	Generation() (uint64, error)
}

// Names takes the policies, and says what they allow by name.
type Names interface {
	Update(upserts []dnsnames.Policy, removed []uint32, complete bool, done func())
	Settle()
	Range(policy uint32, addr netip.Addr, proto uint8, port uint16) (dnsnames.Range, bool)
}

// Rules are safe for concurrent use.
type Rules struct {
	view  View
	words words
	names Names
	log   *slog.Logger
	file  string
	save  chan struct{}

	mu       sync.RWMutex
	revision uint64
	filters  map[uint16]*filter
	policies map[uint32]*agentv1.DNSPolicy
	known    bool // there are rules: from disk or, complete, from the agent
}

// New makes rules without content. file keeps them; empty = nothing does.
func New(view View, names Names, file string, log *slog.Logger) *Rules {
	return &Rules{
		view: view, words: words{view: view, known: map[wordKey]datapath.PolicyRange{}}, names: names, log: log.With("component", "rules"), file: file, save: make(chan struct{}, 1),
		filters: map[uint16]*filter{}, policies: map[uint32]*agentv1.DNSPolicy{},
	}
}

// Counts returns how many filters and policies there are, and whether they are known at all.
func (r *Rules) Counts() (filters, policies int, known bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.filters), len(r.policies), r.known
}

// Judge implements dnsproxy.Judge.
func (r *Rules) Judge(client netip.Addr, server netip.AddrPort, proto uint8, name string) dnsproxy.Judgement {
	id, _, _, ok := r.view.Endpoint(client)
	if !ok {
		return dnsproxy.Judgement{}
	}
	j := dnsproxy.Judgement{Verdict: dnsproxy.Refuse, Endpoint: id}
	_, egress := r.view.Policy(id)
	if egress.Number == 0 {
		// It was redirected by a policy that is gone.
		j.Verdict = dnsproxy.Pass
		return j
	}
	word, ok := r.word(egress.Number, server, proto)
	if !ok {
		return j
	}
	j.Slot = word.Slot
	switch word.Verdict {
	case datapath.PolicyAllow:
		j.Verdict = dnsproxy.Pass
	case datapath.PolicyVisible:
		j.Verdict = dnsproxy.Pass
	case datapath.PolicyRedirect:
		if f := r.filter(word.Slot); f != nil {
			if rules, passes := f.accepts(name); passes {
				j.Verdict, j.Rules = dnsproxy.Pass, rules
			}
		}
	case datapath.PolicyDefaultDeny, datapath.PolicyDeny:
		if egress.Audit {
			j.Verdict = dnsproxy.Pass
		}
	}
	return j
}

// word is what the programs decide for a packet to a server.
func (r *Rules) word(number uint32, server netip.AddrPort, proto uint8) (datapath.PolicyRange, bool) {
	identity, peer := r.view.Peer(server.Addr())
	word, ok := r.words.lookup(number, peer, proto, server.Port())
	if !ok || !outside(identity) || word.Verdict != datapath.PolicyDefaultDeny && word.Verdict != datapath.PolicyRedirect {
		return word, ok
	}
	if named, ok := r.names.Range(number, server.Addr(), proto, server.Port()); ok {
		word.Verdict, word.Slot, word.Rule = VerdictOf(named), named.Slot, named.Rule
	}
	return word, true
}

// outside reports whether an identity is world or of a CIDR.
func outside(identity uint32) bool {
	switch identity {
	case datapath.IdentityWorld, datapath.IdentityWorldIPv4, datapath.IdentityWorldIPv6:
		return true
	}
	return identity >= firstLocalIdentity
}

// firstLocalIdentity: those above are of CIDRs.
const firstLocalIdentity = 1 << 24

// VerdictOf is a range's verdict.
func VerdictOf(r dnsnames.Range) datapath.PolicyVerdict {
	switch {
	case r.Slot == 0:
		return datapath.PolicyAllow
	case r.Visibility:
		return datapath.PolicyVisible
	}
	return datapath.PolicyRedirect
}

func (r *Rules) filter(slot uint16) *filter {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.filters[slot]
}

// filter is what queries by one slot may ask for. It is never changed.
type filter struct {
	message *agentv1.DNSFilter
	items   []item

	mu     sync.Mutex
	recent map[string][]*policyv1.PolicyRule // of names asked for lately; nil = refused
}

type item struct {
	selector policy.NameSelector
	rule     *policyv1.PolicyRule
}

// maxRecent bounds filter.recent.
const maxRecent = 4096

func newFilter(m *agentv1.DNSFilter) *filter {
	f := &filter{message: m, recent: map[string][]*policyv1.PolicyRule{}}
	for _, r := range m.GetRules() {
		f.items = append(f.items, item{policy.NameSelector{MatchName: r.GetMatchName(), MatchPattern: r.GetMatchPattern()}, r.GetRule()})
	}
	return f
}

// accepts reports whether a query for a name passes, and by which rules.
func (f *filter) accepts(name string) ([]*policyv1.PolicyRule, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	rules, ok := f.recent[name]
	if !ok {
		rules = f.match(name)
		if len(f.recent) >= maxRecent {
			clear(f.recent)
		}
		f.recent[name] = rules
	}
	return rules, rules != nil || f.message.GetVisibility()
}

func (f *filter) match(name string) []*policyv1.PolicyRule {
	var rules []*policyv1.PolicyRule
	for _, i := range f.items {
		if i.selector != (policy.NameSelector{}) && !policy.MatchName(i.selector, name) {
			continue
		}
		if rules == nil {
			rules = []*policyv1.PolicyRule{}
		}
		if i.rule != nil && !contains(rules, i.rule) {
			rules = append(rules, i.rule)
		}
	}
	return rules
}

func contains(rules []*policyv1.PolicyRule, rule *policyv1.PolicyRule) bool {
	for _, r := range rules {
		if proto.Equal(r, rule) {
			return true
		}
	}
	return false
}
