// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// resetNodes are nodes with addresses that are not of the fabric's subnet.
const resetNodes = `apiVersion: v1
kind: Node
metadata: {name: alpha, labels: {rack: one}}
spec: {podCIDRs: [10.50.1.0/24]}
status: {addresses: [{type: InternalIP, address: 192.168.70.1}, {type: InternalIP, address: "fd99::1"}]}
---
apiVersion: v1
kind: Node
metadata: {name: beta}
status: {addresses: [{type: InternalIP, address: 10.9.0.2}]}
---
`

const resetFirst = resetNodes + `apiVersion: v1
kind: Pod
metadata: {name: server, annotations: {weir.dev/ip-addresses: "10.1.0.80,fd00:1::80"}}
spec:
  nodeName: alpha
  containers: [{name: main, command: [todo, backend], readinessProbe: {httpGet: {path: /todos/, port: 8080}}}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: open}
spec: {podSelector: {matchLabels: {app: nobody}}, policyTypes: []}
---
apiVersion: lab.weir.dev/v1
kind: Host
metadata: {name: outside}
spec: {addresses: [203.0.113.10, 203.0.113.11, "2001:db8::10"]}
`

const resetSecond = resetNodes + `apiVersion: v1
kind: Pod
metadata: {name: server, annotations: {weir.dev/ip-addresses: "10.1.0.80,fd00:1::81"}}
spec:
  nodeName: beta
  containers: [{name: main, command: [todo, backend], readinessProbe: {httpGet: {path: /todos/, port: 8080}}}]
---
apiVersion: lab.weir.dev/v1
kind: Host
metadata: {name: elsewhere}
spec: {addresses: [203.0.113.10]}
`

func (m *machine) file(text string) string {
	m.Helper()
	path := filepath.Join(m.TempDir(), "objects.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		m.Fatal(err)
	}
	return path
}

// get asks for a page from an end of the lab.
func (m *machine) get(end, url string) {
	m.Helper()
	command, out := m.command("exec", end, "--", "sh", "-c", "TODO_PERIOD=100ms TODO_URL="+url+" timeout 10 todo client | grep -m1 '200 OK'")
	if err := command.Run(); err != nil {
		m.Errorf("%s does not reach %s: %v\n%s", end, url, err, out)
	}
}

// TestReset: nodes with the addresses that manifests give them, pods with addresses of no node's range, and the next set of objects in the
// same lab, which knows nothing of the one before.
func TestReset(t *testing.T) {
	m := newMachine(t)
	before := m.traces()
	t.Cleanup(func() {
		command, _ := m.command("down")
		_ = command.Run() // after a failure
	})
	m.run("up", "-d", "--observer-listen", "127.0.0.1:0", "--manifests", m.file(resetFirst))
	for _, end := range []string{"node/alpha", "node/beta", "host/outside"} {
		m.get(end, "http://10.1.0.80:8080/todos/")
		m.get(end, "http://[fd00:1::80]:8080/todos/")
	}
	if got := m.run("get", "NetworkPolicy", "default/open"); !strings.Contains(got, `"spec":{"podSelector":{"matchLabels":{"app":"nobody"}},"policyTypes":[]}`) || !strings.Contains(got, `"generation":1`) {
		t.Errorf("the policy is not as it was applied: %s", got)
	}
	if got := m.run("apply", "-f", m.file(resetFirst)); strings.Contains(got, "created") || strings.Contains(got, "configured") || !strings.Contains(got, "networkpolicy/open unchanged") {
		t.Errorf("the same again: %s", got)
	}
	if got := m.run("get", "Node", "alpha"); !strings.Contains(got, `"rack":"one"`) || !strings.Contains(got, "192.168.70.1") || !strings.Contains(got, "10.50.1.0/24") {
		t.Errorf("node: %s", got)
	}

	command, out := m.command("reset", "-f", m.file("apiVersion: v1\nkind: Node\nmetadata: {name: gamma}\n"))
	if err := command.Run(); err == nil || !strings.Contains(out.String(), "gamma is not a node of this lab") {
		t.Errorf("a node that is not there: %v\n%s", err, out)
	}
	m.get("host/outside", "http://10.1.0.80:8080/todos/")

	m.run("reset", "-f", m.file(resetSecond))
	m.get("host/elsewhere", "http://10.1.0.80:8080/todos/")
	m.get("node/alpha", "http://[fd00:1::81]:8080/todos/")
	status := m.run("status")
	for _, gone := range []string{"outside", "fd00:1::80", "NetworkPolicy"} {
		if strings.Contains(status, gone) {
			t.Errorf("%s is left:\n%s", gone, status)
		}
	}
	m.run("reset")
	if status := m.run("status"); strings.Contains(status, "default") || strings.Contains(status, "elsewhere") {
		t.Errorf("something is left:\n%s", status)
	}
	m.run("down")
	m.compare("after down", before)
}
