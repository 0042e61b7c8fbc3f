// SPDX-License-Identifier: Apache-2.0

package policymap

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/statefile"
)

// Numbers of peers that are this node's own.
const (
	firstLocal   = 1 << 24
	firstCIDR    = 1<<24 + 1
	firstNode    = 2<<24 + 1
	firstVariant = 3<<24 + 1
	perKind      = 1<<24 - 1
)

// rest is how long a number that nothing uses keeps its meaning: last flows come minutes after.
const rest = 15 * time.Minute

const (
	numbersKind    = "policy-numbers"
	numbersVersion = 1
)

// ruleList is what a rule number of the kernel stands for: how a packet came under it, and the rules.
type ruleList struct {
	match uint8
	rules []desired.PolicyRule
}

// numbers gives out numbers and keeps them on disk: the kernel's maps and live connections carry them, so that a number must mean the same after a
// restart.
type numbers struct {
	path  string
	now   func() time.Time
	dirty bool

	peers map[string]uint32
	taken map[uint32]struct{} // of peers
	next  map[uint32]uint32   // by the first number of a kind

	policies   map[string]uint32
	given      map[uint32]struct{} // of policies
	nextPolicy uint32
	// named are policies that a weir-dns may have rows of by names, which outlive it: nobody else gets their numbers before one has said that it has none.
	named map[uint32]struct{}

	ruleNumbers map[string]uint32 // by content
	lists       map[uint32]ruleList
	nextRule    uint32

	looked time.Time
	idle   map[string]time.Time // since when nothing uses a number: "peer/...", "policy/...", "rule/..."
}

type numbersFile struct {
	Peers      map[string]uint32 `json:"peers,omitempty"`
	NextPeer   map[uint32]uint32 `json:"nextPeer,omitempty"`
	Policies   map[string]uint32 `json:"policies,omitempty"`
	NextPolicy uint32            `json:"nextPolicy"`
	Named      []uint32          `json:"named,omitempty"`
	Rules      []ruleLine        `json:"rules,omitempty"`
	NextRule   uint32            `json:"nextRule"`
}

type ruleLine struct {
	Number uint32               `json:"number"`
	Match  uint8                `json:"match,omitempty"`
	Rules  []desired.PolicyRule `json:"rules,omitempty"`
}

// loadNumbers always returns something to go on with.
func loadNumbers(path string, now func() time.Time) (*numbers, error) {
	n := &numbers{path: path, now: now, peers: map[string]uint32{}, taken: map[uint32]struct{}{}, next: map[uint32]uint32{}, policies: map[string]uint32{},
		given: map[uint32]struct{}{}, nextPolicy: denyAll + 1, named: map[uint32]struct{}{}, ruleNumbers: map[string]uint32{}, lists: map[uint32]ruleList{}, nextRule: 1, idle: map[string]time.Time{}}
	b, err := statefile.Read(path, numbersKind, numbersVersion)
	if errors.Is(err, fs.ErrNotExist) {
		return n, nil
	}
	var f numbersFile
	if err == nil {
		err = json.Unmarshal(b, &f)
	}
	if err != nil {
		return n, err
	}
	for key, number := range f.Peers {
		n.peers[key] = number
		n.taken[number] = struct{}{}
	}
	for first, next := range f.NextPeer {
		n.next[first] = next
	}
	for key, number := range f.Policies {
		n.policies[key], n.given[number] = number, struct{}{}
		n.nextPolicy = max(n.nextPolicy, number+1)
	}
	n.nextPolicy = max(n.nextPolicy, f.NextPolicy)
	n.reserve(f.Named)
	for _, l := range f.Rules {
		if l.Number == 0 || l.Number > datapath.MaxRule {
			continue // of a kernel layout of before
		}
		n.lists[l.Number] = ruleList{l.Match, l.Rules}
		n.ruleNumbers[contentOf(l.Match, l.Rules)] = l.Number
		n.nextRule = max(n.nextRule, l.Number+1)
	}
	n.nextRule = max(n.nextRule, f.NextRule)
	return n, nil
}

// reserve notes policies that weir-dns may have rows of.
func (n *numbers) reserve(policies []uint32) {
	for _, number := range policies {
		if _, known := n.named[number]; !known {
			n.named[number] = struct{}{}
			n.dirty = true
		}
	}
}

// raise puts the next numbers above whatever is pinned and not on disk.
func (n *numbers) raise(rows []datapath.PolicyRow, endpoints map[uint16]datapath.EndpointPolicy) {
	for _, r := range rows {
		n.nextPolicy = max(n.nextPolicy, r.Policy+1)
		for _, x := range r.Ranges {
			n.nextRule = max(n.nextRule, x.Rule+1)
		}
		if first, ok := kindOf(r.Peer); ok {
			n.next[first] = max(n.next[first], r.Peer+1)
		}
	}
	for _, e := range endpoints {
		n.nextPolicy = max(n.nextPolicy, e.Ingress+1, e.Egress+1)
	}
}

// kindOf finds the range that a peer's number is of.
func kindOf(number uint32) (first uint32, ok bool) {
	for _, first := range []uint32{firstCIDR, firstNode, firstVariant} {
		if number >= first && number < first+perKind {
			return first, true
		}
	}
	return 0, false
}

// RecoverPeers takes numbers of prefixes from what is pinned in ipcache, where the file is missing.
func (e *Engine) RecoverPeers(rows []datapath.IPCacheRow) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, r := range rows {
		first, ok := kindOf(r.Identity)
		if !ok || first != firstCIDR {
			continue
		}
		e.numbers.next[first] = max(e.numbers.next[first], r.Identity+1)
		key := "cidr:" + r.Prefix.String()
		_, known := e.numbers.peers[key]
		_, taken := e.numbers.taken[r.Identity]
		if !known && !taken {
			e.numbers.take(key, r.Identity)
		}
	}
}

// peer finds the number of a peer that has one.
func (n *numbers) peer(name string) (uint32, bool) {
	if x, ok := identityOf(name); ok {
		return x, true
	}
	number, ok := n.peers[name]
	return number, ok
}

// identityOf reads the name of a cluster-wide identity.
func identityOf(name string) (uint32, bool) {
	if name == "" || name[0] < '0' || name[0] > '9' || strings.Contains(name, "/") {
		return 0, false
	}
	x, err := strconv.ParseUint(name, 10, 32)
	return uint32(x), err == nil && x < firstLocal
}

// of returns the number of a peer, a new one if it has none.
func (n *numbers) of(name string) (uint32, error) {
	if number, ok := n.peer(name); ok {
		return number, nil
	}
	first := uint32(0)
	identity, _, variant := strings.Cut(name, "/")
	switch {
	case strings.HasPrefix(name, "cidr:"):
		if _, err := netip.ParsePrefix(name[len("cidr:"):]); err != nil {
			return 0, fmt.Errorf("peer %q: %w", name, err)
		}
		first = firstCIDR
	case strings.HasPrefix(name, "node:"):
		first = firstNode
	case variant:
		if _, ok := identityOf(identity); !ok {
			return 0, fmt.Errorf("peer %q: not an identity with a variant", name)
		}
		first = firstVariant
	default:
		return 0, fmt.Errorf("peer %q: neither an identity nor a prefix nor a node", name)
	}
	next := max(n.next[first], first)
	for range perKind {
		if next >= first+perKind {
			next = first
		}
		if _, taken := n.taken[next]; !taken {
			n.next[first] = next + 1
			n.take(name, next)
			return next, nil
		}
		next++
	}
	return 0, fmt.Errorf("peer %q: no number is free", name)
}

func (n *numbers) take(name string, number uint32) {
	n.peers[name] = number
	n.taken[number] = struct{}{}
	n.dirty = true
}

// policy returns the number of a policy, a new one if it has none.
func (n *numbers) policy(key string) uint32 {
	if number, ok := n.policies[key]; ok {
		return number
	}
	number := n.nextPolicy
	for ; ; number++ { // there are more numbers than policies fit into memory
		if number > datapath.MaxPolicy {
			number = denyAll + 1
		}
		_, given := n.given[number]
		if _, named := n.named[number]; !given && !named {
			break
		}
	}
	n.nextPolicy = number + 1
	n.policies[key], n.given[number] = number, struct{}{}
	n.dirty = true
	return number
}

// list returns the number of a list of rules; fresh = nobody has asked for it before. No rules have no number unless something is to be told of how a
// packet came there. With the error the number is 0, which names nothing.
func (n *numbers) list(match uint8, rules []desired.PolicyRule) (number uint32, fresh bool, err error) {
	content := contentOf(match, rules)
	if number, ok := n.ruleNumbers[content]; ok {
		return number, false, nil
	}
	for range datapath.MaxRule {
		if n.nextRule == 0 || n.nextRule > datapath.MaxRule {
			n.nextRule = 1
		}
		number = n.nextRule
		n.nextRule++
		if _, taken := n.lists[number]; !taken {
			n.ruleNumbers[content], n.lists[number] = number, ruleList{match, rules}
			n.dirty = true
			return number, true, nil
		}
	}
	return 0, false, errors.New("no number is free for a list of rules")
}

func contentOf(match uint8, rules []desired.PolicyRule) string {
	b, err := json.Marshal(ruleLine{Match: match, Rules: rules})
	if err != nil {
		// Strings and numbers always encode.
		panic(err)
	}
	return string(b)
}

func (n *numbers) save() error {
	if !n.dirty {
		return nil
	}
	f := numbersFile{Peers: n.peers, NextPeer: n.next, Policies: n.policies, NextPolicy: n.nextPolicy, NextRule: n.nextRule,
		Named: slices.Sorted(maps.Keys(n.named))}
	for number, l := range n.lists {
		f.Rules = append(f.Rules, ruleLine{number, l.match, l.rules})
	}
	b, err := json.Marshal(f)
	if err == nil {
		err = statefile.Write(n.path, numbersKind, numbersVersion, b)
	}
	if err == nil {
		n.dirty = false
	}
	return err
}

// keep says whether something that is not used now keeps its number.
func (n *numbers) keep(name string, used bool) bool {
	if used {
		delete(n.idle, name)
		return true
	}
	since, ok := n.idle[name]
	if !ok {
		n.idle[name] = n.now()
		return true
	}
	if n.now().Sub(since) < rest {
		return true
	}
	delete(n.idle, name)
	n.dirty = true
	return false
}

// forgetInterval is how often it is looked for numbers that nothing uses: with many selectors that takes a while.
const forgetInterval = time.Minute

// forgetNumbers takes numbers back that nothing has used for long.
func (e *Engine) forgetNumbers() {
	n := e.numbers
	if n.now().Sub(n.looked) < forgetInterval {
		return
	}
	n.looked = n.now()
	variants := map[string]struct{}{}
	for _, names := range e.variants {
		for _, name := range names {
			variants[name] = struct{}{}
		}
	}
	for name, number := range n.peers {
		_, used := variants[name]
		if !n.keep("peer/"+name, used || e.peers[name] != nil || e.selected(name)) {
			delete(n.peers, name)
			delete(n.taken, number)
		}
	}
	rules := map[uint32]struct{}{}
	for _, p := range e.policies {
		for _, c := range p.classes {
			for _, r := range c {
				rules[r.Rule] = struct{}{}
			}
		}
		for _, name := range p.names {
			for _, r := range name.Ranges {
				rules[r.Rule] = struct{}{}
			}
		}
	}
	for number, l := range n.lists {
		if _, ok := rules[number]; !n.keep("rule/"+strconv.FormatUint(uint64(number), 10), ok) {
			delete(n.lists, number)
			delete(n.ruleNumbers, contentOf(l.match, l.rules))
			e.cfg.Names.RemoveRules(number)
		}
	}
	for key, number := range n.policies {
		if !n.keep("policy/"+key, e.policies[key] != nil) {
			delete(n.policies, key)
			delete(n.given, number)
		}
	}
	e.forgetNamed()
	e.save()
}

// forgetNamed takes back the numbers of policies of which weir-dns has nothing any more.
func (e *Engine) forgetNamed() {
	n := e.numbers
	inUse := map[uint32]struct{}{}
	for _, p := range e.policies {
		inUse[p.number] = struct{}{}
	}
	for number := range n.named {
		if _, used := inUse[number]; !used && e.cfg.NameRules.Gone(number) {
			delete(n.named, number)
			n.dirty = true
		}
	}
}

// selected says that some selector matches a peer.
func (e *Engine) selected(peer string) bool {
	for _, s := range e.selectors {
		if _, ok := s.members[peer]; ok {
			return true
		}
	}
	return false
}
