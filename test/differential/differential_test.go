// SPDX-License-Identifier: Apache-2.0

package differential

import (
	"errors"
	"flag"
	"fmt"
	"runtime/debug"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/test/reference"
	"github.com/weirmesh/weir/test/reference/random"
)

var (
	cases = flag.Int("cases", 10_000, "packets to compare")
	stop  = flag.Int("stop", 20, "faults to stop at")
	seed  = flag.Uint64("seed", 1, "seed of the first world; the next ones follow")
)

// packetsOfWorld is how many packets go through each world.
const packetsOfWorld = 20

// TestCompiler compares the compiler with the reference evaluator.
func TestCompiler(t *testing.T) {
	worlds := uint64((*cases*5 + packetsOfWorld - 1) / packetsOfWorld)
	t.Logf("%d worlds of %d packets, seeds %d to %d", worlds, packetsOfWorld, *seed, *seed+worlds-1)
	counts := map[string]int{}
	faults := 0
	for s := *seed; s < *seed+worlds; s++ {
		w := random.New(s, random.Limits{Packets: packetsOfWorld})
		f := disagreement(w.Cluster, w.Packets, counts)
		if f == nil {
			continue
		}
		t.Errorf("seed %d: %v", s, f.shrunk(w.Cluster, disagreement))
		if faults++; faults == *stop {
			t.Fatal("too many faults")
		}
	}
	t.Logf("sides: %v", counts)
	for _, v := range []reference.Verdict{reference.Allow, reference.DefaultDeny, reference.Deny} {
		if counts[v.String()] == 0 {
			t.Errorf("no side said %v", v)
		}
	}
}

// fault of a world: its class stays the same while it is made smaller.
type fault struct {
	class, text string
	packet      reference.Packet
}

// compiled compiles a world; not to be able to is a fault.
func compiled(cluster *reference.Cluster, packets []reference.Packet) (*Compiled, *fault) {
	c, err := Compile(cluster)
	var refused *policy.Error
	switch {
	case errors.As(err, &refused):
		return nil, &fault{refused.Message, err.Error(), packets[0]}
	case err != nil:
		return nil, &fault{"compile", err.Error(), packets[0]}
	}
	return c, nil
}

// disagreement returns the first fault that a packet shows. counts may be nil.
func disagreement(cluster *reference.Cluster, packets []reference.Packet, counts map[string]int) (f *fault) {
	var p reference.Packet
	defer func() {
		if r := recover(); r != nil {
			f = &fault{fmt.Sprint("panic: ", r), fmt.Sprintf("%v\n%s", r, debug.Stack()), p}
		}
	}()
	c, f := compiled(cluster, packets)
	if f != nil {
		return f
	}
	for _, p = range packets {
		wantEgress, wantIngress := cluster.Decide(p)
		egress, ingress, err := c.Decide(p)
		if counts != nil {
			counts[wantEgress.String()]++
			counts[wantIngress.String()]++
		}
		switch {
		case err != nil:
			return &fault{"inner", err.Error(), p}
		case egress != wantEgress:
			return &fault{fmt.Sprint("egress ", egress, wantEgress), fmt.Sprintf("egress: %v, the reference says %v", egress, wantEgress), p}
		case ingress != wantIngress:
			return &fault{fmt.Sprint("ingress ", ingress, wantIngress), fmt.Sprintf("ingress: %v, the reference says %v", ingress, wantIngress), p}
		}
	}
	return nil
}

// shrunk describes the fault in the smallest world that has it.
func (f *fault) shrunk(cluster *reference.Cluster, look func(*reference.Cluster, []reference.Packet, map[string]int) *fault) string {
	pods := func(c *reference.Cluster) (n int) {
		for _, p := range c.Pods {
			if name := p.Namespace + "/" + p.Name; name == f.packet.From || name == f.packet.To {
				n++
			}
		}
		return n
	}
	small := Shrink(cluster, func(c *reference.Cluster) bool {
		if pods(c) != pods(cluster) {
			return false
		}
		g := look(c, []reference.Packet{f.packet}, nil)
		return g != nil && g.class == f.class
	})
	text := f.text
	if g := look(copyOf(small), []reference.Packet{f.packet}, nil); g != nil {
		text = g.text
	}
	raw, err := yaml.Marshal(small)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%v: %s\n%s", f.packet, text, raw)
}
