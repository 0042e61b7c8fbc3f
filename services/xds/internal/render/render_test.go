// SPDX-License-Identifier: Apache-2.0

package render

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

var update = flag.Bool("update", false, "write the golden files")

func newState(t *testing.T, resources ...*policyv1.RenderResource) *State {
	t.Helper()
	s, err := NewState(DefaultOptions())
	if err != nil {
		t.Fatal(err)
	}
	s.Apply(resources, nil)
	return s
}

func filterOf(f *policyv1.Filter) *policyv1.RenderResource {
	return &policyv1.RenderResource{Resource: &policyv1.RenderResource_Filter{Filter: f}}
}

func configOf(c *policyv1.EnvoyConfig) *policyv1.RenderResource {
	return &policyv1.RenderResource{Resource: &policyv1.RenderResource_Config{Config: c}}
}

func serviceOf(s *policyv1.Service) *policyv1.RenderResource {
	return &policyv1.RenderResource{Resource: &policyv1.RenderResource_Service{Service: s}}
}

// slotsOf gives keys the slots 1, 2, ... on a node.
func slotsOf(node string, keys ...string) *policyv1.RenderResource {
	n := &policyv1.NodeSlots{Node: node}
	for i, key := range keys {
		n.Slots = append(n.Slots, &policyv1.Slot{Number: uint32(i + 1), Key: key, Port: uint32(20001 + i)})
	}
	return &policyv1.RenderResource{Resource: &policyv1.RenderResource_Node{Node: n}}
}

// published is the configuration of the article, as a user writes it.
func published(t *testing.T) *policyv1.EnvoyConfig {
	t.Helper()
	text, err := os.ReadFile("../../../../internal/envoyconfig/testdata/api-traffic-split.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var object struct {
		Kind     string
		Metadata struct{ Namespace, Name string }
		Spec     json.RawMessage
	}
	if err := yaml.Unmarshal(text, &object); err != nil {
		t.Fatal(err)
	}
	return &policyv1.EnvoyConfig{Kind: object.Kind, Namespace: object.Metadata.Namespace, Name: object.Metadata.Name, Spec: object.Spec}
}

func routeFilter() *policyv1.Filter {
	return &policyv1.Filter{
		Key: "route-1", Kind: policyv1.FilterKind_FILTER_KIND_ROUTE, Namespace: "production",
		Route: &policyv1.Route{
			Kind: "CiliumEnvoyConfig", Namespace: "production", Name: "api-traffic-split", Listener: "api-listener",
			ServiceNamespace: "production", ServiceName: "api-service", ServicePort: 80,
		},
	}
}

func backendService(name string, addresses ...string) *policyv1.Service {
	port := &policyv1.ServicePort{Name: "http", Protocol: policyv1.Protocol_PROTOCOL_TCP, Port: 80}
	for _, a := range addresses {
		port.Backends = append(port.Backends, &policyv1.Backend{Address: a, Port: 8080, Node: "n1"})
	}
	return &policyv1.Service{Namespace: "production", Name: name, Ports: []*policyv1.ServicePort{port}}
}

func publishedState(t *testing.T) []*policyv1.RenderResource {
	return []*policyv1.RenderResource{
		configOf(published(t)), serviceOf(backendService("api-service", "10.0.0.1")),
		serviceOf(backendService("api-service-v1", "10.0.0.2", "10.0.0.3", "fd00::2")), serviceOf(backendService("api-service-v2", "10.0.0.4")),
		filterOf(routeFilter()), slotsOf("n1", "route-1"),
	}
}

// lockDown is what becomes of the published policy lock-down-todoui.
func lockDown() *policyv1.Filter {
	return &policyv1.Filter{
		Key: "http-1", Kind: policyv1.FilterKind_FILTER_KIND_HTTP, Direction: policyv1.Direction_DIRECTION_INGRESS, Namespace: "default",
		Http: []*policyv1.HTTPRule{{
			Rule:   &policyv1.PolicyRule{Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "lock-down-todoui", List: "ingress"},
			Method: "GET", Path: "/",
		}},
	}
}

// dump writes a snapshot as stable JSON.
func dump(t *testing.T, s *Snapshot) []byte {
	t.Helper()
	all := map[string]any{}
	for _, sets := range []struct {
		name string
		sets [numTypes]Set
	}{{"", s.Sets}, {"by name: ", s.ByName}} {
		for i, set := range sets.sets {
			for name, r := range set {
				text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(r.Body)
				if err != nil {
					t.Fatal(err)
				}
				all[fmt.Sprintf("%s%s %s", sets.name, Type(i), name)] = json.RawMessage(text)
			}
		}
	}
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetIndent("", " ")
	e.SetEscapeHTML(false)
	if err := e.Encode(all); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestGolden(t *testing.T) {
	sni := &policyv1.Filter{
		Key: "tls-1", Kind: policyv1.FilterKind_FILTER_KIND_TLS, Direction: policyv1.Direction_DIRECTION_EGRESS, Namespace: "default",
		Tls: []*policyv1.TLSRule{{
			Rule:        &policyv1.PolicyRule{Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "sni", List: "egress", Index: 2},
			ServerNames: []string{"*.example.com", "**.example.org"},
		}},
	}
	actions := lockDown()
	actions.Http[0].Headers = []*policyv1.HeaderRule{
		{Name: "X-Tenant", Value: proto.String("100%"), Mismatch: policyv1.Mismatch_MISMATCH_REPLACE},
		{Name: "X-Debug", Value: proto.String("no"), Mismatch: policyv1.Mismatch_MISMATCH_DELETE},
		{Name: "X-Need"},
	}
	seen := &policyv1.Filter{
		Key: "http-2", Kind: policyv1.FilterKind_FILTER_KIND_HTTP, Direction: policyv1.Direction_DIRECTION_EGRESS, Namespace: "default", Visibility: true,
	}
	for name, resources := range map[string][]*policyv1.RenderResource{
		"api-traffic-split": publishedState(t),
		"lock-down-todoui":  {filterOf(lockDown()), slotsOf("n1", "http-1")},
		"server-names":      {filterOf(sni), slotsOf("n1", "tls-1")},
		"header-actions":    {filterOf(actions), slotsOf("n1", "http-1")},
		"visibility":        {filterOf(seen), slotsOf("n1", "http-2")},
	} {
		t.Run(name, func(t *testing.T) {
			snapshot := newState(t, resources...).Snapshot("n1")
			if len(snapshot.Problems) > 0 {
				t.Errorf("problems: %v", snapshot.Problems)
			}
			got := dump(t, snapshot)
			file := filepath.Join("testdata", name+".json")
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("differs (-want +got):\n%s", diff)
			}
		})
	}
}

// TestCombinationsOfActions: items that no request can match together do not multiply each other's routes.
func TestCombinationsOfActions(t *testing.T) {
	item := func(method, path string, headers ...string) *policyv1.HTTPRule {
		r := &policyv1.HTTPRule{Method: method, Path: path}
		for _, h := range headers {
			r.Headers = append(r.Headers, &policyv1.HeaderRule{Name: h, Value: proto.String("v"), Mismatch: policyv1.Mismatch_MISMATCH_ADD})
		}
		return r
	}
	var many []*policyv1.HTTPRule
	for i := range 100 {
		many = append(many, item("", fmt.Sprintf("/path%02d", i), "x"))
	}
	for name, test := range map[string]struct {
		items []*policyv1.HTTPRule
		want  int
	}{
		"one item":          {[]*policyv1.HTTPRule{item("GET", "/", "a", "b")}, 4},
		"other methods":     {[]*policyv1.HTTPRule{item("GET", "", "a"), item("PUT", "", "a")}, 3},
		"a method in both":  {[]*policyv1.HTTPRule{item("GET", "", "a"), item("GET|PUT", "", "a")}, 4},
		"a path of both":    {[]*policyv1.HTTPRule{item("", "/a.*", "a"), item("", "/ab", "a")}, 4},
		"paths":             {[]*policyv1.HTTPRule{item("", "/a.*", "a"), item("", "/b", "a")}, 3},
		"whole paths":       {[]*policyv1.HTTPRule{item("", "/a", "a"), item("", "/ab", "a")}, 3},
		"cases":             {[]*policyv1.HTTPRule{item("", "(?i)/a", "a"), item("", "/A", "a")}, 4},
		"a hundred of them": {many, 101},
	} {
		t.Run(name, func(t *testing.T) {
			routes, err := variants(test.items)
			if err != nil || len(routes) != test.want {
				t.Fatalf("%d routes, %v; want %d", len(routes), err, test.want)
			}
			for i := 1; i < len(routes); i++ {
				if len(routes[i].GetRequestHeadersToAdd()) > len(routes[i-1].GetRequestHeadersToAdd()) {
					t.Errorf("route %d does more than the one before it", i)
				}
			}
		})
	}
}
