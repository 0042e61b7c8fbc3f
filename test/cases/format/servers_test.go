// SPDX-License-Identifier: Apache-2.0

package format

import (
	"fmt"
	"testing"
)

func TestServers(t *testing.T) {
	c, err := Parse([]byte(`
id: x
pods:
- {name: a, namespace: s, labels: {app: a}}
- {name: b, namespace: s, labels: {app: b}}
- {name: c, namespace: s, labels: {app: c}}
- {name: coredns, namespace: kube-system}
- {name: names, namespace: s, labels: {app: names}}
dns_answers: [{client: s/a, name: n.example, ips: [192.0.2.1], ttl: 60}]
policies:
- spec: []
- metadata: {name: one, namespace: s}
  spec:
    endpointSelector: {matchLabels: {app: a}}
    egress:
    - toCIDR: [8.8.8.8/32, 0.0.0.0/0, bad]
      toCIDRSet: [{cidr: 198.18.0.0/16}]
      toPorts: [{ports: [{port: "5353"}], rules: {dns: [{matchPattern: "*"}]}}]
    - toCIDR: [9.9.9.9/32]
      toPorts: [{ports: [{port: "54"}], rules: {dns: []}}]
- metadata: {name: two}
  specs:
  - endpointSelector: {matchExpressions: [{key: app, operator: NotIn, values: [a, c]}]}
    egress:
    - toEndpoints: [{matchLabels: {app: names}}, {matchLabels: {"k8s:io.kubernetes.pod.namespace": kube-system, "k8s:k8s-app": kube-dns}}, {matchLabels: {"reserved:host": ""}}]
      toPorts: [{ports: [{port: dns}], rules: {dns: [{matchPattern: "*"}]}}]
`))
	if err != nil {
		t.Fatal(err)
	}
	const usual = " [{kube-system/coredns 53} {kube-system/weircases-dns0 53} {ip:198.51.100.53 53}]"
	for client, want := range map[string]string{
		"s/a": "[{ip:8.8.8.8 5353} {ip:198.51.100.53 5353} {ip:198.18.0.1 5353}]" + usual,
		"s/b": "[{s/names 53} {kube-system/weircases-dns0 53}]" + usual,
		"s/c": "[]" + usual,
	} {
		listed, rest := c.Servers(client)
		if got := fmt.Sprint(listed, rest); got != want {
			t.Errorf("%s: %s, want %s", client, got, want)
		}
	}
}
