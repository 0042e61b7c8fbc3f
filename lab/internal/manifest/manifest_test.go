// SPDX-License-Identifier: Apache-2.0

package manifest_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/lab/internal/manifest"
	"github.com/weirmesh/weir/lab/internal/object"
)

const pod = `apiVersion: v1
kind: Pod
metadata:
  name: web
spec:
  containers:
  - name: web
    command: [sleep, "1"]
`

func TestParse(t *testing.T) {
	items, err := manifest.Parse("f.yaml", []byte(pod+"---\n# nothing\n---\n"+`apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Namespace, metadata: {name: shop}}
- apiVersion: v1
  kind: Service
  metadata: {name: web, namespace: shop}
  spec: {ports: [{port: 80, targetPort: http}], selector: {app: web}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - {name: web, image: nginx, command: [web], resources: {limits: {cpu: 100m}}, livenessProbe: {tcpSocket: {port: 80}}}
`))
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, item := range items {
		keys = append(keys, item.Key().String())
	}
	want := "Pod/default/web Namespace/shop Service/shop/web Deployment/default/web"
	if got := strings.Join(keys, " "); got != want {
		t.Errorf("objects %s, want %s", got, want)
	}
	if items[0].Line != 1 || items[3].Line != 21 {
		t.Errorf("lines %d and %d, want 1 and 21", items[0].Line, items[3].Line)
	}
	web := items[0].Object.(*corev1.Pod)
	if web.Spec.RestartPolicy != corev1.RestartPolicyAlways || web.Spec.Containers[0].Command[1] != "1" {
		t.Errorf("pod %+v", web.Spec)
	}
	deployment := items[3].Object.(*appsv1.Deployment)
	if *deployment.Spec.Replicas != 1 {
		t.Errorf("replicas %d, want the default, 1", *deployment.Spec.Replicas)
	}
	if cpu := deployment.Spec.Template.Spec.Containers[0].Resources.Limits.Cpu().String(); cpu != "100m" {
		t.Errorf("cpu %s", cpu)
	}
	notes := strings.Join(items[3].Notes, "\n")
	for _, field := range []string{"livenessProbe", "resources"} {
		if !strings.Contains(notes, field) {
			t.Errorf("notes do not name %s: %s", field, notes)
		}
	}
}

func TestFaults(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       []string
	}{
		{"not YAML", "a: [1\nb: 2\n", []string{"f.yaml:1: not YAML: did not find expected ',' or ']'"}},
		{"not an object", "just text\n", []string{`f.yaml:1: expected an object with apiVersion, kind and metadata, got "just text"`}},
		{"no kind", "apiVersion: v1\n", []string{"f.yaml:1: kind: required: one of AdminNetworkPolicy, BaselineAdminNetworkPolicy, CiliumCIDRGroup, CiliumClusterwideEnvoyConfig, CiliumClusterwideNetworkPolicy, CiliumEnvoyConfig, CiliumNetworkPolicy, ClusterNetworkPolicy, ConfigMap, Deployment, EndpointSlice, Host, Namespace, NetworkPolicy, Node, Pod, Service"}},
		{"unknown kind", "apiVersion: batch/v1\nkind: Job\n", []string{"f.yaml:2: kind: Job (batch/v1) is not a kind of the lab; it has AdminNetworkPolicy, BaselineAdminNetworkPolicy, CiliumCIDRGroup, CiliumClusterwideEnvoyConfig, CiliumClusterwideNetworkPolicy, CiliumEnvoyConfig, CiliumNetworkPolicy, ClusterNetworkPolicy, ConfigMap, Deployment, EndpointSlice, Host, Namespace, NetworkPolicy, Node, Pod, Service"}},
		{"derived kind", "apiVersion: apps/v1\nkind: ReplicaSet\n", []string{"f.yaml:2: kind: ReplicaSet is made by the lab itself; it cannot be in a manifest"}},
		{"wrong version", "apiVersion: v1\nkind: Deployment\n", []string{`f.yaml:1: apiVersion: expected apps/v1 for kind Deployment, got "v1"`}},
		{"unknown field", strings.Replace(pod, "  containers:", "  restartpolicy: Never\n  containers:", 1),
			[]string{"f.yaml:6: spec.restartpolicy: unknown field; did you mean restartPolicy?"}},
		{"unknown field without a likeness", strings.Replace(pod, "  containers:", "  zzzzzzzzz: 1\n  containers:", 1),
			[]string{"f.yaml:6: spec.zzzzzzzzz: unknown field"}},
		{"given twice", strings.Replace(pod, "  name: web\n", "  name: web\n  name: web2\n", 1),
			[]string{"f.yaml:5: metadata.name: given twice, first in line 4"}},
		{"number for text", strings.Replace(pod, `"1"`, "1", 1), []string{`f.yaml:8: spec.containers[0].command[1]: expected text, got the number 1; put it in quotes: "1"`}},
		{"text for number", strings.Replace(pod, "    command", "    ports:\n    - containerPort: http\n    command", 1),
			[]string{`f.yaml:9: spec.containers[0].ports[0].containerPort: expected a whole number, got "http"`}},
		{"number too large", strings.Replace(pod, "    command", "    ports:\n    - containerPort: 4294967376\n    command", 1),
			[]string{"f.yaml:9: spec.containers[0].ports[0].containerPort: expected a whole number, got the number 4294967376"}},
		{"port out of range", strings.Replace(pod, "    command", "    ports:\n    - containerPort: 70000\n    command", 1),
			[]string{"f.yaml:9: spec.containers[0].ports[0].containerPort: expected 1 to 65535, got 70000"}},
		{"text for truth", strings.Replace(pod, "  containers:", "  hostNetwork: sure\n  containers:", 1),
			[]string{`f.yaml:6: spec.hostNetwork: expected true or false, got "sure"`}},
		{"map for list", strings.Replace(pod, "[sleep, \"1\"]", "{a: b}", 1), []string{"f.yaml:8: spec.containers[0].command: expected a list, got a map"}},
		{"list for map", strings.Replace(pod, "  name: web\n", "  name: web\n  labels: [a]\n", 1),
			[]string{"f.yaml:5: metadata.labels: expected a map of names and values, got a list"}},
		{"bad quantity", strings.Replace(pod, "    command", "    resources: {limits: {memory: lots}}\n    command", 1),
			[]string{`f.yaml:8: spec.containers[0].resources.limits.memory: expected a quantity such as 100m or 64Mi, got "lots"`}},
		{"no name", strings.Replace(pod, "  name: web\n", "  namespace: default\n", 1), []string{"f.yaml:3: metadata.name: required"}},
		{"no containers", "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {}\n", []string{"f.yaml:4: spec.containers: required: at least one container"}},
		{"no command", strings.Replace(pod, "command: [sleep, \"1\"]", "image: nginx", 1),
			[]string{"f.yaml:7: spec.containers[0].command: required: the lab runs a program of this machine; it does not read the image"}},
		{"volumes", pod + "  volumes:\n  - name: a\n    emptyDir: {}\n",
			[]string{"f.yaml:9: spec.volumes: not supported by the lab: containers are programs of this machine, on its file system"}},
		{"two faults in order", strings.NewReplacer("name: web\nspec", "name: Web\nspec", "command: [sleep, \"1\"]", "command: []").Replace(pod),
			[]string{"f.yaml:4: metadata.name: a lowercase RFC 1123 subdomain", "f.yaml:8: spec.containers[0].command: required"}},
		{"fixed addresses", strings.Replace(pod, "  name: web\n", "  name: web\n  annotations:\n    weir.dev/ip-addresses: 10.1.1.1,10.1.1.2\n", 1),
			[]string{`f.yaml:6: metadata.annotations.weir.dev/ip-addresses: expected at most one address of each family; got "10.1.1.1,10.1.1.2"`}},
		{"unmanaged", strings.Replace(pod, "  name: web\n", "  name: web\n  annotations:\n    weir.dev/unmanaged: \"yes\"\n", 1),
			[]string{`f.yaml:6: metadata.annotations.weir.dev/unmanaged: expected "true" or "false", got "yes"`}},
		{"secret", pod + "    env:\n    - name: A\n      valueFrom: {secretKeyRef: {name: s, key: k}}\n",
			[]string{"f.yaml:11: spec.containers[0].env[0].valueFrom: expected fieldRef or configMapKeyRef: the lab has no other source"}},
		{"probe", pod + "    readinessProbe: {tcpSocket: {port: http}}\n",
			[]string{`f.yaml:9: spec.containers[0].readinessProbe.tcpSocket.port: expected 1 to 65535 or the name of a port of this container, got "http"`}},
		{"two handlers", pod + "    readinessProbe: {tcpSocket: {port: 1}, exec: {command: [true]}}\n",
			[]string{`f.yaml:9: spec.containers[0].readinessProbe.exec.command[0]: expected text, got the truth value true; put it in quotes: "true"`}},
		{"selector", `apiVersion: apps/v1
kind: Deployment
metadata: {name: a}
spec:
  selector: {matchLabels: {app: a}}
  template:
    metadata:
      labels: {app: b}
    spec: {containers: [{name: a, command: [a]}]}
`, []string{"f.yaml:8: spec.template.metadata.labels: expected labels that spec.selector matches (app=a), got app=b"}},
		{"service ports", "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports:\n  - port: 80\n  - port: 80\n", []string{
			"f.yaml:6: spec.ports[0].name: required when a service has several ports",
			"f.yaml:7: spec.ports[1].name: required when a service has several ports",
			"f.yaml:7: spec.ports[1].port: 80/TCP is also ports[0]",
		}},
		{"external name", "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {type: ExternalName, externalName: b.example, ports: [{port: 1}]}\n", []string{
			"f.yaml:4: spec.externalName: not supported by the lab", "f.yaml:4: spec.type: ExternalName is a name of DNS alone, which the lab's zone does not have: expected ClusterIP, NodePort or LoadBalancer",
		}},
		{"host", "apiVersion: lab.weir.dev/v1\nkind: Host\nmetadata: {name: a}\nspec:\n  addresses: [203.0.113.300]\n",
			[]string{`f.yaml:5: spec.addresses[0]: expected an address such as 203.0.113.10 or 2001:db8::10/64, got "203.0.113.300"`}},
		{"namespace of a node", "apiVersion: v1\nkind: Node\nmetadata: {name: a, namespace: b}\n", []string{"f.yaml:3: metadata.namespace: kind Node has no namespace"}},
		{"same object twice", pod + "---\n" + pod, []string{"f.yaml:10: metadata.name: Pod/default/web is already in line 1 of this file"}},
		{"second document", pod + "---\nkind: Pod\n", []string{"f.yaml:10: apiVersion: required: v1 for kind Pod"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			items, err := manifest.Parse("f.yaml", []byte(tt.text))
			if err == nil {
				t.Fatalf("no fault, %d objects", len(items))
			}
			if len(items) != 0 {
				t.Errorf("%d objects beside the fault", len(items))
			}
			got := strings.Split(err.Error(), "\n")
			if len(got) != len(tt.want) {
				t.Fatalf("got\n%s\nwant\n%s", err, strings.Join(tt.want, "\n"))
			}
			for i := range got {
				if !strings.HasPrefix(got[i], tt.want[i]) {
					t.Errorf("got  %s\nwant %s", got[i], tt.want[i])
				}
			}
		})
	}
}

// TestAliases: a small file must not become a large one.
func TestAliases(t *testing.T) {
	bomb := "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n" +
		"a: &a [x, x, x, x, x, x, x, x, x, x]\n"
	for c := 'b'; c <= 'j'; c++ {
		bomb += string(c) + ": &" + string(c) + " [" + strings.Repeat("*"+string(c-1)+", ", 9) + "*" + string(c-1) + "]\n"
	}
	if _, err := manifest.Parse("f.yaml", []byte(bomb)); err == nil {
		t.Error("no fault")
	}
	items, err := manifest.Parse("f.yaml", []byte("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: &n web, labels: {app: *n}}\n"))
	if err != nil || items[0].Object.GetLabels()["app"] != "web" {
		t.Errorf("alias of a name: %v, %v", items, err)
	}
}

func TestParseKeys(t *testing.T) {
	keys, err := manifest.ParseKeys("f.yaml", []byte("apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: b}\nspec: {nonsense: true}\n"))
	if want := (object.Key{Kind: "Pod", Namespace: "b", Name: "a"}); err != nil || len(keys) != 1 || keys[0] != want {
		t.Errorf("%v, %v, want %v", keys, err, want)
	}
	keys, err = manifest.ParseKeys("f.yaml", []byte("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: a, namespace: b}\n---\napiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\nmetadata: {name: c}\n"))
	if want := []object.Key{{Kind: "NetworkPolicy", Namespace: "b", Name: "a"}, {Kind: "CiliumClusterwideNetworkPolicy", Name: "c"}}; err != nil || !slices.Equal(keys, want) {
		t.Errorf("got %v, %v, want %v", keys, err, want)
	}
}

// TestExamples: the manifests that the repository shows are valid.
func TestExamples(t *testing.T) {
	files, err := filepath.Glob("../../../examples/*/manifests/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no example manifests: %v", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := manifest.Parse(filepath.Base(file), data); err != nil {
			t.Error(err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(pod))
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("apiVersion: v1\nkind: List\nitems: [{}, null, 1]\n"))
	f.Add([]byte("apiVersion: v1\nkind: Pod\nmetadata: {<<: {name: x}}\n"))
	f.Add([]byte("apiVersion: lab.weir.dev/v1\nkind: Host\nmetadata: {name: a}\nspec: {addresses: ['1.2.3.4/33']}\n"))
	f.Add([]byte("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: 1, targetPort: {}}]}\n"))
	f.Add([]byte("apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nKind: Pod\nmetadata: {name: a}\nspec: {a: [], b: {}, c: ~, d: 1e400, e: .inf, f: 0x10, g: '<', h: !!int x}\nstatus: 1\n"))
	f.Add([]byte("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: a, namespace: b}\n? [x]\n: y\n"))
	f.Add([]byte("apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: a}\naddressType: IPv4\nports: [{port: 9}]\nendpoints: [{addresses: [192.0.2.1]}]\n"))
	files, err := filepath.Glob("../../../examples/*/manifests/*.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		items, err := manifest.Parse("f", data)
		if err != nil && len(items) > 0 {
			t.Fatal("objects beside a fault")
		}
		for _, item := range items {
			if item.Line < 1 {
				t.Fatalf("%s: line %d", item.Key(), item.Line)
			}
			// What was read can be written and read again.
			text, err := object.JSON(item.Object)
			if err != nil {
				t.Fatal(err)
			}
			again, err := manifest.Parse("f", text)
			if err != nil {
				t.Fatalf("%s is not readable any more: %v\n%s", item.Key(), err, text)
			}
			if len(again) != 1 || again[0].Key() != item.Key() {
				t.Fatalf("%s became %v", item.Key(), again)
			}
		}
		// Reading keys has rules of its own, but must not fail where the whole could be read.
		if _, keysErr := manifest.ParseKeys("f", data); err == nil && keysErr != nil {
			t.Fatalf("keys: %v", keysErr)
		}
	})
}
