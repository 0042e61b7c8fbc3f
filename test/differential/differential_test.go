// SPDX-License-Identifier: Apache-2.0

package differential

import (
	"flag"
	"fmt"
	"runtime/debug"
	"testing"

	"github.com/weirmesh/weir/test/reference"
	"github.com/weirmesh/weir/test/reference/random"
)

var (
	cases = flag.Int("cases", 10_000, "packets to send through the datapath; the compiler gets 3 times as many")
	seed  = flag.Uint64("seed", 1, "seed of the first world; the next ones follow")
	labs  = flag.Int("labs", 3, "worlds to play on live labs")
	bin   = flag.String("bin", "../../bin", "folder of Weir's programs, for live labs")
	stop  = flag.Int("stop", 20, "faults to stop at")
)

// packetsOfWorld is how many packets go through each world.
const packetsOfWorld = 20

// TestCompiler compares the compiler with the reference evaluator.
func TestCompiler(t *testing.T) {
	worlds := uint64((*cases*3 + packetsOfWorld - 1) / packetsOfWorld)
	t.Logf("%d worlds of %d packets, seeds %d to %d", worlds, packetsOfWorld, *seed, *seed+worlds-1)
	counts := map[string]int{}
	for s := *seed; s < *seed+worlds; s++ {
		report(t, scenarioOf(random.New(s, packetsOfWorld)), s, compilerFault, counts)
	}
	t.Logf("sides: %v", counts)
	for _, v := range []reference.Verdict{reference.Allow, reference.DefaultDeny, reference.Deny} {
		if counts[v.String()] == 0 {
			t.Errorf("no side said %v", v)
		}
	}
}

// report fails the test on a fault, and ends it after many.
func report(t *testing.T, s scenario, seed uint64, look comparison, counts map[string]int) {
	t.Helper()
	f := look(s, counts)
	if f == nil {
		return
	}
	t.Errorf("seed %d: %v", seed, f.shrunk(s, look))
	if counts["faults"]++; counts["faults"] >= *stop {
		t.Fatal("too many faults")
	}
}

// compilerFault compares Decide, Class and Explain with the reference evaluator.
func compilerFault(s scenario, counts map[string]int) (f *fault) {
	var p reference.Packet
	defer func() {
		if r := recover(); r != nil {
			f = &fault{fmt.Sprint("panic: ", r), fmt.Sprintf("%v\n%s", r, debug.Stack()), p}
		}
	}()
	c, f := compiled(s.cluster)
	if f != nil {
		return f
	}
	for _, p = range s.packets {
		wantEgress, wantIngress := s.cluster.Decide(p)
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
