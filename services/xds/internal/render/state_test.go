// SPDX-License-Identifier: Apache-2.0

package render

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/policy"
)

// TestDeterministic: whatever the order, the versions are the same; and a change of one filter changes one type.
func TestDeterministic(t *testing.T) {
	resources := append(publishedState(t)[:5], filterOf(lockDown()), slotsOf("n1", "route-1", "http-1"))
	want := newState(t, resources...).Snapshot("n1")
	random := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		random.Shuffle(len(resources), func(i, j int) { resources[i], resources[j] = resources[j], resources[i] })
		got := newState(t, resources...).Snapshot("n1")
		if !got.Equal(want) {
			t.Fatalf("another order gives another snapshot:\n%s\n%s", dump(t, want), dump(t, got))
		}
	}
	s := newState(t, resources...)
	changed := lockDown()
	changed.Http[0].Path = "/other"
	s.Apply([]*policyv1.RenderResource{filterOf(changed)}, nil)
	got := s.Snapshot("n1")
	for _, kind := range Types() {
		if same := got.Sets[kind].Version() == want.Sets[kind].Version(); same != (kind != Route) {
			t.Errorf("%s: same %v", kind, same)
		}
	}
}

// TestOnlyWhatANodeNeeds: nothing of slots that a node has not.
func TestOnlyWhatANodeNeeds(t *testing.T) {
	s := newState(t, append(publishedState(t), filterOf(lockDown()), slotsOf("n2", "http-1"), slotsOf("n3"))...)
	for node, want := range map[string][]string{
		"n1": {"cluster original-dst", "cluster production/api-service-v1", "cluster production/api-service-v2", "endpoints production/api-service-v1",
			"endpoints production/api-service-v2", "listener slot-1", "routes production/api-traffic-split/api-listener#0.0"},
		"n2": {"cluster original-dst", "listener slot-1", "routes http-1"},
		"n3": {"cluster original-dst"},
	} {
		var got []string
		for _, kind := range Types() {
			for _, name := range s.Snapshot(node).Sets[kind].Names() {
				got = append(got, kind.String()+" "+name)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s has %q, want %q", node, got, want)
		}
	}
	if s.Snapshot("n2").Find(Listener, "production.api-service:80") != nil {
		t.Error("n2 has a listener for gRPC clients of a service that it does not route")
	}
}

// TestIsolation: what is broken or too large is left out, by name; the neighbour has what it had.
func TestIsolation(t *testing.T) {
	broken := &policyv1.EnvoyConfig{Kind: "CiliumEnvoyConfig", Namespace: "production", Name: "api-traffic-split", Spec: []byte(`{"resources": [{}]}`)}
	dear := published(t)
	dear.Spec = bytes.ReplaceAll(dear.Spec, []byte(`"prefix":"/"`), []byte(`"safe_regex":{"regex":"/[a-z]{1,9}"}`))
	actions := lockDown()
	for i := range 8 { // 256 combinations
		actions.Http[0].Headers = append(actions.Http[0].Headers, &policyv1.HeaderRule{
			Name: fmt.Sprint("x-", i), Value: proto.String("v"), Mismatch: policyv1.Mismatch_MISMATCH_ADD,
		})
	}
	pseudo := lockDown()
	pseudo.Http[0].Headers = []*policyv1.HeaderRule{{Name: "Host", Value: proto.String("v"), Mismatch: policyv1.Mismatch_MISMATCH_REPLACE}}
	neighbour := &policyv1.Filter{Key: "http-9", Kind: policyv1.FilterKind_FILTER_KIND_HTTP, Namespace: "other"}
	for _, test := range []struct {
		name      string
		resources []*policyv1.RenderResource
		key       string
		options   func(*Options)
		owner     string
		message   string
	}{
		{"broken", []*policyv1.RenderResource{configOf(broken), filterOf(routeFilter())}, "route-1", nil, "CiliumEnvoyConfig/production/api-traffic-split", "@type"},
		{"too large", publishedState(t)[:5], "route-1", func(o *Options) { o.NamespaceBytes = 100 }, "CiliumEnvoyConfig/production/api-traffic-split", "left out"},
		{
			"too dear", append([]*policyv1.RenderResource{configOf(dear)}, publishedState(t)[1:5]...), "route-1", func(o *Options) { o.NamespaceInstructions = 9 },
			"CiliumEnvoyConfig/production/api-traffic-split", "regular expressions",
		},
		{
			"rules too dear", []*policyv1.RenderResource{filterOf(lockDown())}, "http-1", func(o *Options) { o.NamespaceInstructions = 9 },
			"http-1", "default/lock-down-todoui/ingress[0]#0.method has most: 5",
		},
		{"too many actions", []*policyv1.RenderResource{filterOf(actions)}, "http-1", nil, "http-1", "8 headerMatches"},
		{"action on the host", []*policyv1.RenderResource{filterOf(pseudo)}, "http-1", nil, "http-1", `REPLACE of the header "Host"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			options := DefaultOptions()
			if test.options != nil {
				test.options(&options)
			}
			s, err := NewState(options)
			if err != nil {
				t.Fatal(err)
			}
			s.Apply(append(slices.Clone(test.resources), filterOf(neighbour), slotsOf("n1", test.key, "http-9")), nil)
			got := s.Snapshot("n1")
			if len(got.Problems) != 1 || got.Problems[0].Owner != test.owner || !strings.Contains(got.Problems[0].Error, test.message) {
				t.Errorf("problems %v", got.Problems)
			}
			if got.Find(Listener, "slot-2") == nil || got.Find(Route, "http-9") == nil {
				t.Error("the neighbour has no listener or no routes")
			}
			if r := got.Find(Route, test.key); r != nil && !bytes.Equal(r.Body.GetValue(), denied(t, test.key)) {
				t.Error("rules that could not be rendered do not refuse everything")
			}
		})
	}
}

// TestDearRules: the HTTP rules of a namespace are counted together with each other and with its configurations, each filter once a node; those that are too
// much refuse every request, and other namespaces have their own account.
func TestDearRules(t *testing.T) {
	rules := func(key, namespace, host string) *policyv1.Filter {
		return &policyv1.Filter{Key: key, Kind: policyv1.FilterKind_FILTER_KIND_HTTP, Namespace: namespace, Http: []*policyv1.HTTPRule{
			{Rule: &policyv1.PolicyRule{Namespace: namespace, Name: "first", List: "egress"}, Method: "GET"},
			{Rule: &policyv1.PolicyRule{Namespace: namespace, Name: "second", List: "egress"}, Method: "GET", Host: host},
		}}
	}
	const dear = "a{20}" // 22 instructions; with twice GET (5), and all of it twice, 64
	config := published(t)
	config.Spec = bytes.ReplaceAll(config.Spec, []byte(`"prefix":"/"`), []byte(`"safe_regex":{"regex":"/[a-z]{1,9}"}`))
	options := DefaultOptions()
	options.NamespaceInstructions = 130
	s, err := NewState(options)
	if err != nil {
		t.Fatal(err)
	}
	s.Apply(append([]*policyv1.RenderResource{
		filterOf(rules("http-1", "production", dear)), filterOf(rules("http-2", "production", dear)), filterOf(rules("http-3", "production", dear)),
		filterOf(rules("http-4", "other", dear)), filterOf(routeFilter()), configOf(config),
		slotsOf("n1", "http-1", "http-1", "http-2", "http-3", "http-4", "route-1"), slotsOf("n2", "http-3"),
	}, publishedState(t)[1:4]...), nil)
	got := s.Snapshot("n1")
	const owner = "CiliumEnvoyConfig/production/api-traffic-split"
	want := map[string][]string{
		owner: {`namespace "production" would have`, "instructions", "this configuration is left out"},
		"http-3": {
			`every request is refused: namespace "production" would have 192 instructions in regular expressions on this node, more than 130`,
			"of this filter production/second/egress[0]#1.host has most: 22",
		},
	}
	for _, p := range got.Problems {
		for _, text := range want[p.Owner] {
			if !strings.Contains(p.Error, text) {
				t.Errorf("%s: %s, want %q", p.Owner, p.Error, text)
			}
		}
	}
	if len(got.Problems) != len(want) || got.Problems[0].Owner != owner || got.Problems[1].Owner != "http-3" {
		t.Errorf("problems %v", got.Problems)
	}
	for key, refused := range map[string]bool{"http-1": false, "http-2": false, "http-3": true, "http-4": false} {
		if r := got.Find(Route, key); r == nil || bytes.Equal(r.Body.GetValue(), denied(t, key)) != refused {
			t.Errorf("%s: want refused %v", key, refused)
		}
	}
	if other := s.Snapshot("n2"); len(other.Problems) > 0 || bytes.Equal(other.Find(Route, "http-3").Body.GetValue(), denied(t, "http-3")) {
		t.Errorf("a node without the others: %v", other.Problems)
	}
}

func denied(t *testing.T, key string) []byte {
	t.Helper()
	r, err := newResource("", "", deniedRoutes(&policyv1.Filter{Key: key}))
	if err != nil {
		t.Fatal(err)
	}
	return r.Body.GetValue()
}

// TestUnknownNode: what is known of a node that said nothing yet stays.
func TestUnknownNode(t *testing.T) {
	s := newState(t, filterOf(lockDown()), slotsOf("n1", "http-1"))
	for _, node := range []string{"n1", "n2"} {
		s.Apply([]*policyv1.RenderResource{{Resource: &policyv1.RenderResource_Node{Node: &policyv1.NodeSlots{Node: node, Unknown: true}}}}, nil)
	}
	if s.Snapshot("n1").Find(Listener, "slot-1") == nil || !slices.Equal(s.Nodes(), []string{"n1"}) {
		t.Errorf("nodes %q", s.Nodes())
	}
}

// TestAffected names the nodes that a change concerns, and no others.
func TestAffected(t *testing.T) {
	s := newState(t, append(publishedState(t), filterOf(lockDown()), slotsOf("n2", "http-1"))...)
	for _, test := range []struct {
		name   string
		change *policyv1.RenderResource
		want   []string
	}{
		{"filter", filterOf(lockDown()), []string{"n2"}},
		{"config", configOf(published(t)), []string{"n1"}},
		{"service", serviceOf(backendService("api-service-v2")), []string{"n1"}},
		{"other service", serviceOf(backendService("other")), nil},
		{"slots", slotsOf("n2"), []string{"n2"}},
	} {
		if got := s.Affected([]*policyv1.RenderResource{test.change}, nil); !slices.Equal(got, test.want) {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}

// TestServerNames compares the expressions with the matcher of the policy engine.
func TestServerNames(t *testing.T) {
	patterns := []string{"*", "***", "*.example.com", "sub*.example.com", "**.example.com", "a.**.com", "Example.com.", "a*b*c", "*.*", "**.", "*."}
	names := []string{
		"example.com", "a.example.com", "a.b.example.com", "sub.example.com", "sub1.example.com", "a.x.com", "a.x.y.com", "abc", "aXbYc", "a.b", "com",
		"a..com", "EXAMPLE.com", "example.com.", "a_b.example.com",
	}
	for _, pattern := range patterns {
		whole := regexp.MustCompile("^(?:" + serverNameRegex(pattern) + ")$")
		for _, name := range names {
			// TLS inspectors give names in lower case.
			if got, want := whole.MatchString(strings.ToLower(name)), policy.MatchServerName(pattern, name); got != want {
				t.Errorf("%q matches %q: %v, want %v (%s)", pattern, name, got, want, whole)
			}
		}
	}
}

// TestVariants runs random requests over the routes, the first that matches as in Envoy, against the meaning of the actions.
func TestVariants(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	names, values := []string{"a", "b", "c"}, []string{"", "1", "2"}
	pick := func(list []string) string { return list[random.IntN(len(list))] }
	kinds := []policyv1.Mismatch{
		policyv1.Mismatch_MISMATCH_UNSPECIFIED, policyv1.Mismatch_MISMATCH_ADD, policyv1.Mismatch_MISMATCH_REPLACE,
		policyv1.Mismatch_MISMATCH_DELETE, policyv1.Mismatch_MISMATCH_LOG,
	}
	for range 3000 {
		var items []*policyv1.HTTPRule
		for range 1 + random.IntN(3) {
			item := &policyv1.HTTPRule{Rule: &policyv1.PolicyRule{Namespace: "n", Name: "p", List: "ingress"}, Method: pick([]string{"", "GET", "POST|GET"})}
			for range random.IntN(3) {
				h := &policyv1.HeaderRule{Name: pick(names), Mismatch: kinds[random.IntN(len(kinds))]}
				if h.Value = proto.String(pick(values[1:])); random.IntN(4) == 0 {
					h.Value = nil
				}
				item.Headers = append(item.Headers, h)
			}
			items = append(items, item)
		}
		routes, err := variants(items)
		if err != nil {
			t.Fatal(err)
		}
		for range 10 {
			request := map[string]string{":method": pick([]string{"GET", "POST", "PUT"}), ":path": "/", ":authority": "h"}
			for _, name := range names {
				if v := pick(values); v != "" {
					request[name] = v
				}
			}
			got, want := mutationsOf(t, routes, request), wantMutations(items, request)
			if !slices.Equal(got, want) {
				t.Fatalf("request %v, items %v: %q, want %q", request, items, got, want)
			}
		}
	}
}

// mutationsOf returns what the first route that matches does.
func mutationsOf(t *testing.T, routes []*routev3.Route, request map[string]string) []string {
	t.Helper()
	for _, r := range routes {
		if slices.ContainsFunc(r.GetMatch().GetHeaders(), func(m *routev3.HeaderMatcher) bool { return !matchesHeader(m, request) }) {
			continue
		}
		var did []string
		for _, h := range r.GetRequestHeadersToAdd() {
			did = append(did, fmt.Sprintf("%s %s=%s", h.GetAppendAction(), h.GetHeader().GetKey(), h.GetHeader().GetValue()))
		}
		for _, name := range r.GetRequestHeadersToRemove() {
			did = append(did, "remove "+name)
		}
		slices.Sort(did)
		return slices.Compact(did)
	}
	t.Fatal("no route matches")
	return nil
}

// matchesHeader is Envoy's matching: a missing header matches neither way, unless it counts as empty.
func matchesHeader(m *routev3.HeaderMatcher, request map[string]string) bool {
	value, present := request[m.GetName()]
	if _, ok := m.GetHeaderMatchSpecifier().(*routev3.HeaderMatcher_PresentMatch); ok {
		return (present == m.GetPresentMatch()) != m.GetInvertMatch()
	}
	if !present && !m.GetTreatMissingHeaderAsEmpty() {
		return false
	}
	matched := value == m.GetStringMatch().GetExact()
	if regex := m.GetStringMatch().GetSafeRegex(); regex != nil {
		matched = regexp.MustCompile("^(?:" + regex.GetRegex() + ")$").MatchString(value)
	}
	return matched != m.GetInvertMatch()
}

func wantMutations(items []*policyv1.HTTPRule, request map[string]string) []string {
	var did []string
	for _, item := range items {
		matches := item.GetMethod() == "" || slices.Contains(strings.Split(item.GetMethod(), "|"), request[":method"])
		var due []string
		for _, h := range item.GetHeaders() {
			value, present := request[h.GetName()]
			if present && (h.Value == nil || value == h.GetValue()) {
				continue
			}
			switch {
			case h.GetMismatch() == 0:
				matches = false
			case h.Value == nil:
			case h.GetMismatch() == policyv1.Mismatch_MISMATCH_ADD:
				due = append(due, fmt.Sprintf("APPEND_IF_EXISTS_OR_ADD %s=%s", h.GetName(), h.GetValue()))
			case h.GetMismatch() == policyv1.Mismatch_MISMATCH_REPLACE:
				due = append(due, fmt.Sprintf("OVERWRITE_IF_EXISTS_OR_ADD %s=%s", h.GetName(), h.GetValue()))
			case h.GetMismatch() == policyv1.Mismatch_MISMATCH_DELETE:
				due = append(due, "remove "+h.GetName())
			}
		}
		if matches {
			did = append(did, due...)
		}
	}
	slices.Sort(did)
	return slices.Compact(did)
}
