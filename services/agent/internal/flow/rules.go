// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"fmt"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

// Tags of what a flow says of policy.
const (
	tagMatchType      = 23 << 3
	tagEgressAllowed  = 21001<<3 | 2
	tagIngressAllowed = 21002<<3 | 2
	tagEgressDenied   = 21004<<3 | 2
	tagIngressDenied  = 21005<<3 | 2
	tagPolicyLog      = 21006<<3 | 2
)

// LabelRule is the label that names rules of a policy in flows: "weir:policy.rule=spec.ingress[0]".
const LabelRule = "weir:policy.rule="

// encodedRules is a list of rules: flow.Policy messages, one for each object, and log values.
type encodedRules struct {
	match    uint8
	policies [][]byte
	logs     []string
}

// SetRules says which rules a number stands for, and how a packet came under them (Hubble's match type).
func (d *Directory) SetRules(number uint32, match uint8, rules []desired.PolicyRule) {
	r := encodeRules(match, rules)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rules[number] = r
}

// RemoveRules forgets a number.
func (d *Directory) RemoveRules(number uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.rules, number)
}

func encodeRules(match uint8, rules []desired.PolicyRule) *encodedRules {
	type object struct{ kind, namespace, name, uid, implicit string }
	r := &encodedRules{match: match}
	labels := map[object][]string{}
	var order []object
	for i := range rules {
		x := &rules[i]
		o := object{x.Kind, x.Namespace, x.Name, x.UID, x.Implicit}
		if _, ok := labels[o]; !ok {
			order = append(order, o)
			labels[o] = slices.Clone(x.Labels)
		}
		if x.Name != "" {
			labels[o] = append(labels[o], LabelRule+RuleName(x))
		}
		for _, l := range x.Labels {
			if !slices.Contains(labels[o], l) {
				labels[o] = append(labels[o], l)
			}
		}
		if x.Log != "" && !slices.Contains(r.logs, x.Log) {
			r.logs = append(r.logs, x.Log)
		}
	}
	for _, o := range order {
		if o.name == "" && o.implicit != "" && len(labels[o]) == 0 {
			labels[o] = []string{"weir:policy.implicit=" + o.implicit}
		}
		var b []byte
		b = appendStringField(b, 1<<3|2, o.name)
		b = appendStringField(b, 2<<3|2, o.namespace)
		for _, l := range labels[o] {
			b = appendBytesField(b, 3<<3|2, []byte(l))
		}
		b = appendStringField(b, 5<<3|2, o.kind)
		r.policies = append(r.policies, b)
	}
	return r
}

// RuleName names a rule within its object: "spec.ingress[0]", "specs[1].egressDeny[2]".
func RuleName(r *desired.PolicyRule) string {
	spec := "spec"
	if r.Spec > 0 {
		spec = fmt.Sprintf("specs[%d]", r.Spec)
	}
	if r.List == "" {
		return spec
	}
	return fmt.Sprintf("%s.%s[%d]", spec, r.List, r.Index)
}

// decided appends what a flow says of the rules that decided; the caller holds mu. A drop that no rule decided names none.
func (d *Directory) decided(b []byte, r *datapath.Record) []byte {
	rules := d.rules[r.Rule]
	if r.Rule == 0 || rules == nil {
		return b
	}
	allowed := r.Type == datapath.RecordVerdict && datapath.PolicyVerdict(r.Verdict).Allows()
	tag := uint32(tagIngressDenied)
	switch {
	case allowed && r.Direction == datapath.DirectionEgress:
		tag = tagEgressAllowed
	case allowed:
		tag = tagIngressAllowed
	case r.Direction == datapath.DirectionEgress:
		tag = tagEgressDenied
	}
	if r.Type == datapath.RecordVerdict {
		b = protowire.AppendVarint(appendTag(b, tagMatchType), uint64(rules.match))
	}
	for _, p := range rules.policies {
		b = appendBytesField(b, tag, p)
	}
	for _, l := range rules.logs {
		b = appendStringField(b, tagPolicyLog, l)
	}
	return b
}
