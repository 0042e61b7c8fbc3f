// SPDX-License-Identifier: Apache-2.0

package state

import (
	"github.com/weirmesh/weir/services/policy/internal/label"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// dnsNamespace and dnsLabel tell the cluster's DNS pods.
const (
	dnsNamespace = "kube-system"
	dnsLabel     = "k8s-app"
)

// dnsNumbers are the fixed numbers of the cluster's DNS pods by their k8s-app label. The identity
// broker and NATS may need names to start, so DNS must not wait for them.
var dnsNumbers = map[string]uint32{"kube-dns": 102, "coredns": 104}

// wellKnown returns the fixed identity of a pod that has one. Its label set is compiled in, not the
// pod's own: a number must mean one set, whatever else the pod carries.
func wellKnown(o *object.Pod, cluster string) (label.Set, uint32, bool) {
	if o.Namespace != dnsNamespace {
		return nil, 0, false
	}
	app := o.Labels[dnsLabel]
	number, ok := dnsNumbers[app]
	if !ok {
		return nil, 0, false
	}
	return label.Pod{
		Labels:    map[string]string{dnsLabel: app},
		Namespace: dnsNamespace,
		Cluster:   cluster,
	}.Identity(), number, true
}
