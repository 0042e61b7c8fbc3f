// SPDX-License-Identifier: Apache-2.0

package zone_test

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/lab/internal/zone"
)

func service(namespace, name string, ips ...string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.ServiceSpec{
			ClusterIP: ips[0], ClusterIPs: ips,
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP}, {Port: 81, Protocol: corev1.ProtocolTCP}},
		},
	}
}

func TestRender(t *testing.T) {
	yes, no := true, false
	port, name, tcp, host := int32(8080), "http", corev1.ProtocolTCP, "db-0"
	objects := zone.Objects{
		Services: []*corev1.Service{
			service("default", "web", "10.96.1.0", "fd00:10:96::100"),
			service("shop", "db", corev1.ClusterIPNone),
			service("kube-system", "kube-dns", "10.96.0.10"),
		},
		Slices: []*discoveryv1.EndpointSlice{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Labels: map[string]string{discoveryv1.LabelServiceName: "db"}},
			Ports:      []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &tcp}},
			Endpoints: []discoveryv1.Endpoint{
				{Addresses: []string{"10.244.1.5"}, Conditions: discoveryv1.EndpointConditions{Ready: &yes}},
				{Addresses: []string{"10.244.1.6"}, Conditions: discoveryv1.EndpointConditions{Ready: &yes}, Hostname: &host},
				{Addresses: []string{"10.244.1.7"}, Conditions: discoveryv1.EndpointConditions{Ready: &no}},
			},
		}},
		Pods: []*corev1.Pod{
			{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "a"}, Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "10.244.1.5"}, {IP: "fd00::"}}}},
			{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "h"}, Spec: corev1.PodSpec{HostNetwork: true}, Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "172.30.0.11"}}}},
		},
	}
	const want = `$ORIGIN cluster.local.
$TTL 5
@ IN SOA ns.dns.cluster.local. hostmaster.cluster.local. 7 7200 1800 86400 1
@ IN NS ns.dns.cluster.local.
dns-version IN TXT "1.1.0"
10-244-1-5.db.shop.svc IN A 10.244.1.5
10-244-1-5.default.pod IN A 10.244.1.5
_http._tcp.db.shop.svc IN SRV 0 100 8080 10-244-1-5.db.shop.svc.cluster.local.
_http._tcp.db.shop.svc IN SRV 0 100 8080 db-0.db.shop.svc.cluster.local.
_http._tcp.kube-dns.kube-system.svc IN SRV 0 100 80 kube-dns.kube-system.svc.cluster.local.
_http._tcp.web.default.svc IN SRV 0 100 80 web.default.svc.cluster.local.
db-0.db.shop.svc IN A 10.244.1.6
db.shop.svc IN A 10.244.1.5
db.shop.svc IN A 10.244.1.6
fd00--0.default.pod IN AAAA fd00::
kube-dns.kube-system.svc IN A 10.96.0.10
ns.dns IN A 10.96.0.10
web.default.svc IN A 10.96.1.0
web.default.svc IN AAAA fd00:10:96::100
`
	if got := zone.Render(7, objects); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got := zone.Render(1, zone.Objects{}); !strings.Contains(got, "ns.dns IN A ") {
		t.Errorf("a zone without services lacks its name server:\n%s", got)
	}
}
