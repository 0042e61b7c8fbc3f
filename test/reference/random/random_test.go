// SPDX-License-Identifier: Apache-2.0

package random

import (
	"encoding/json"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test/reference"
)

// Every feature occurs, and every verdict often enough that a comparison means something.
func TestWorlds(t *testing.T) {
	var text strings.Builder
	verdicts := map[reference.Side]map[reference.Verdict]int{reference.Egress: {}, reference.Ingress: {}}
	const worlds, packets = 1000, 20
	for seed := range uint64(worlds) {
		w := New(seed, packets)
		raw, err := json.Marshal(w.Cluster)
		if err != nil {
			t.Fatal(err)
		}
		text.Write(raw)
		for _, p := range w.Packets {
			egress, ingress := w.Cluster.Decide(p)
			verdicts[reference.Egress][egress]++
			verdicts[reference.Ingress][ingress]++
		}
	}
	t.Log(verdicts)
	for side, counts := range verdicts {
		for _, v := range []reference.Verdict{reference.Allow, reference.DefaultDeny, reference.Deny} {
			if counts[v] < worlds*packets/50 {
				t.Errorf("%s: %d of %d say %v", side, counts[v], worlds*packets, v)
			}
		}
	}
	for _, feature := range []string{
		"NetworkPolicy", "CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy", "CiliumCIDRGroup", "ClusterNetworkPolicy", "AdminNetworkPolicy",
		"BaselineAdminNetworkPolicy", "specs", "nodeSelector", "enableDefaultDeny", "ingressDeny", "egressDeny", "fromEndpoints", "toEndpoints", "fromEntities",
		"toEntities", "fromCIDR", "fromCIDRSet", "toCIDRSet", "fromNodes", "toNodes", "k8sService", "k8sServiceSelector", "cidrGroupRef", "cidrGroupSelector",
		"except", "icmps", "endPort", "SCTP", "ANY", "reserved:host", "reserved.host", "any:io.kubernetes.pod.namespace", "NotIn", "DoesNotExist", "ipBlock",
		"namespaceSelector", "policyTypes", "Pass", "networks", "nodes", "destinationNamedPort", "portRange", "::/0",
	} {
		if !strings.Contains(text.String(), `"`+feature+`"`) {
			t.Errorf("%s does not occur", feature)
		}
	}
	for _, empty := range []string{`"fromEndpoints":\[\]`, `"toEntities":\[\]`, `"toPorts":\[\]`, `"ports":\[\]`, `"fields":\[\]`, `"ingress":\[\]`, `"egress":\[{}`, `"from":\[\]`} {
		if !regexp.MustCompile(empty).MatchString(text.String()) {
			t.Errorf("%s does not occur", empty)
		}
	}
}

func TestSeed(t *testing.T) {
	for seed := range uint64(50) {
		a, b := New(seed, 5), New(seed, 5)
		if !reflect.DeepEqual(a, b) {
			t.Errorf("seed %d: two worlds", seed)
		}
	}
}
