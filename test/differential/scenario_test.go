// SPDX-License-Identifier: Apache-2.0

package differential

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/test/reference"
	"github.com/weirmesh/weir/test/reference/random"
)

// scenario is what a comparison runs: packets in a cluster, and then, if next is not nil, with other policies.
type scenario struct {
	cluster *reference.Cluster
	next    []map[string]any
	packets []reference.Packet
	// requests on the packets; none, or one for each.
	requests []reference.Request
}

func scenarioOf(w *random.World) scenario { return scenario{w.Cluster, w.Next, w.Packets, w.Requests} }

// after is the cluster with the next policies.
func (s scenario) after() *reference.Cluster {
	c := *s.cluster
	c.Policies = s.next
	return &c
}

// less is the scenario without a packet.
func (s scenario) less(i int) scenario {
	s.packets = without(s.packets, i)
	if s.requests != nil {
		s.requests = without(s.requests, i)
	}
	return s
}

func (s scenario) in(c *reference.Cluster) scenario {
	s.cluster = c
	return s
}

func (s scenario) then(policies []map[string]any) scenario {
	s.next = policies
	return s
}

// comparison returns the first fault that a scenario shows. counts may be nil.
type comparison func(s scenario, counts map[string]int) *fault

// fault of a scenario: its class stays the same while it is made smaller.
type fault struct {
	class, text string
	packet      reference.Packet
}

// compiled compiles a cluster; not to be able to is a fault.
func compiled(cluster *reference.Cluster) (*Compiled, *fault) {
	c, err := Compile(cluster)
	var refused *policy.Error
	switch {
	case errors.As(err, &refused):
		return nil, &fault{refused.Message, err.Error(), reference.Packet{}}
	case err != nil:
		return nil, &fault{"compile", err.Error(), reference.Packet{}}
	}
	return c, nil
}

// shrunk describes the fault in the smallest scenario that has it.
func (f *fault) shrunk(s scenario, look comparison) string {
	still := func(s scenario) bool {
		s.cluster = copyOf(s.cluster)
		g := look(s, nil)
		return g != nil && g.class == f.class
	}
	if !still(s) {
		return f.text + "\n(not when run again)"
	}
	for i := len(s.packets) - 1; i >= 0 && len(s.packets) > 1; i-- {
		if less := s.less(i); still(less) {
			s = less
		}
	}
	s.cluster = Shrink(s.cluster, func(c *reference.Cluster) bool {
		return ends(c, s.packets) == ends(s.cluster, s.packets) && still(s.in(c))
	})
	if s.next != nil {
		s.next = Shrink(s.after(), func(c *reference.Cluster) bool {
			return len(c.Pods) == len(s.cluster.Pods) && still(s.then(slices.Concat(c.Policies, []map[string]any{})))
		}).Policies
	}
	if g := look(s, nil); g != nil {
		f = g
	}
	raw, err := yaml.Marshal(struct {
		*reference.Cluster `yaml:",inline"`
		Next               []map[string]any `yaml:"policies_then,omitempty"`
		Requests           []reference.Request
		Learnt             []reference.Learnt
	}{s.cluster, s.next, s.requests, s.cluster.Learnt})
	if err != nil {
		return err.Error()
	}
	var packets strings.Builder
	for _, p := range s.packets {
		fmt.Fprintf(&packets, "\n%v", p)
	}
	return fmt.Sprintf("%v: %s%s\n%s", f.packet, f.text, packets.String(), raw)
}

// ends counts the pods that packets name.
func ends(c *reference.Cluster, packets []reference.Packet) (n int) {
	for _, pod := range c.Pods {
		name := pod.Namespace + "/" + pod.Name
		if slices.ContainsFunc(packets, func(p reference.Packet) bool { return p.From == name || p.To == name }) {
			n++
		}
	}
	return n
}
