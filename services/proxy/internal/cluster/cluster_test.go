// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/sockets"
)

func parse[M proto.Message](t testing.TB, text string, m M) M {
	t.Helper()
	if err := protojson.Unmarshal([]byte(text), m); err != nil {
		t.Fatal(err)
	}
	return m
}

// table makes a table with one cluster.
func table(t testing.TB, cluster string) *Table {
	t.Helper()
	tb := NewTable(sockets.New())
	if err := tb.Put(parse(t, cluster, &clusterv3.Cluster{})); err != nil {
		t.Fatal(err)
	}
	return tb
}

// hosts makes the JSON of endpoints: "address weight health priority".
func hosts(t testing.TB, lines ...string) string {
	t.Helper()
	var out []string
	for _, line := range lines {
		var addr, health string
		var weight, priority int
		if _, err := fmt.Sscanf(line, "%s %d %s %d", &addr, &weight, &health, &priority); err != nil {
			t.Fatal(err)
		}
		out = append(out, fmt.Sprintf(`{"priority":%d,"lb_endpoints":[{"load_balancing_weight":%d,"health_status":%q,
			"endpoint":{"address":{"socket_address":{"address":%q,"port_value":80}}}}]}`, priority, weight, health, addr))
	}
	return `[` + strings.Join(out, ",") + `]`
}

const edsCluster = `{"name":"c","type":"EDS","lb_policy":%q,"eds_cluster_config":{"eds_config":{"ads":{}}}%s}`

func assign(t testing.TB, tb *Table, lines ...string) {
	t.Helper()
	if err := tb.Assign(parse(t, `{"cluster_name":"c","endpoints":`+hosts(t, lines...)+`}`, &endpointv3.ClusterLoadAssignment{})); err != nil {
		t.Fatal(err)
	}
}

// spread counts which endpoints n choices take.
func spread(t testing.TB, c model.Cluster, n int, avoid ...string) map[string]int {
	t.Helper()
	var not []netip.AddrPort
	for _, a := range avoid {
		not = append(not, netip.AddrPortFrom(netip.MustParseAddr(a), 80))
	}
	got := map[string]int{}
	for range n {
		e, release, err := c.Acquire(&model.Conn{}, not)
		if err != nil {
			t.Fatal(err)
		}
		release(true)
		got[e.Address.Addr().String()]++
	}
	return got
}

func TestChoice(t *testing.T) {
	for _, policy := range []string{"ROUND_ROBIN", "LEAST_REQUEST", "RANDOM"} {
		t.Run(policy, func(t *testing.T) {
			tb := table(t, fmt.Sprintf(edsCluster, policy, ""))
			c := tb.Cluster("c")
			if _, _, err := c.Acquire(&model.Conn{}, nil); !errors.Is(err, model.ErrNoEndpoint) {
				t.Fatalf("without endpoints: %v", err)
			}
			assign(t, tb, "10.0.0.1 1 HEALTHY 0", "10.0.0.2 3 UNKNOWN 0", "10.0.0.3 9 UNHEALTHY 0", "10.0.0.4 1 HEALTHY 1")
			got := spread(t, c, 4000)
			// Least-request draws by weight too, and is then evened out only by what is active.
			if len(got) != 2 || got["10.0.0.1"] < 700 || got["10.0.0.1"] > 1300 {
				t.Errorf("weights 1 and 3 gave %v", got)
			}
			if got := spread(t, c, 100, "10.0.0.1"); got["10.0.0.2"] != 100 {
				t.Errorf("avoiding one gave %v", got)
			}
			if got := spread(t, c, 100, "10.0.0.1", "10.0.0.2"); got["10.0.0.4"] != 100 {
				t.Errorf("avoiding all of the first priority gave %v", got)
			}
			assign(t, tb, "10.0.0.1 1 DRAINING 0", "10.0.0.4 1 HEALTHY 1")
			if got := spread(t, c, 100); got["10.0.0.4"] != 100 {
				t.Errorf("the second priority should have all: %v", got)
			}
			assign(t, tb, "10.0.0.1 1 UNHEALTHY 0")
			if _, _, err := c.Acquire(&model.Conn{}, nil); !errors.Is(err, model.ErrNoEndpoint) {
				t.Errorf("unhealthy endpoints only: %v", err)
			}
		})
	}
}

// TestFamilies: a socket in the client's name reaches only servers of the client's family.
func TestFamilies(t *testing.T) {
	tb := table(t, fmt.Sprintf(edsCluster, "ROUND_ROBIN", ""))
	assign(t, tb, "10.0.0.1 1 HEALTHY 0", "fd00::1 1 HEALTHY 0", "10.0.0.2 1 HEALTHY 1")
	for _, tc := range []struct {
		client string
		source *model.Source
		want   []string
	}{
		{"10.9.9.9:1", &model.Source{}, []string{"10.0.0.1"}},
		{"[::ffff:10.9.9.9]:1", &model.Source{}, []string{"10.0.0.1"}},
		{"[fd00::9]:1", &model.Source{}, []string{"fd00::1"}},
		{"[fd00::9]:1", nil, []string{"10.0.0.1", "fd00::1"}},
	} {
		got := map[string]bool{}
		for range 20 {
			e, release, err := tb.Cluster("c").Acquire(&model.Conn{Remote: netip.MustParseAddrPort(tc.client), Source: tc.source}, nil)
			if err != nil {
				t.Fatal(err)
			}
			release(true)
			got[e.Address.Addr().String()] = true
		}
		if keys := slices.Sorted(maps.Keys(got)); !slices.Equal(keys, tc.want) {
			t.Errorf("%s: %v, want %v", tc.client, keys, tc.want)
		}
	}
	assign(t, tb, "fd00::1 1 HEALTHY 0")
	c := &model.Conn{Remote: netip.MustParseAddrPort("10.9.9.9:1"), Source: &model.Source{}}
	if _, _, err := tb.Cluster("c").Acquire(c, nil); !errors.Is(err, model.ErrNoEndpoint) {
		t.Errorf("no server of the family: %v", err)
	}
}

func TestRoundIsEven(t *testing.T) {
	tb := table(t, fmt.Sprintf(edsCluster, "ROUND_ROBIN", ""))
	assign(t, tb, "10.0.0.1 1 HEALTHY 0", "10.0.0.2 1 HEALTHY 0", "10.0.0.3 1 HEALTHY 0")
	if got := spread(t, tb.Cluster("c"), 300); got["10.0.0.1"] != 100 || got["10.0.0.2"] != 100 || got["10.0.0.3"] != 100 {
		t.Errorf("got %v", got)
	}
}

func TestLeastRequestAvoidsTheBusy(t *testing.T) {
	tb := table(t, fmt.Sprintf(edsCluster, "LEAST_REQUEST", ""))
	assign(t, tb, "10.0.0.1 1 HEALTHY 0", "10.0.0.2 1 HEALTHY 0")
	c := tb.Cluster("c")
	open := map[string]int{}
	for range 200 {
		e, _, err := c.Acquire(&model.Conn{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		open[e.Address.Addr().String()]++
	}
	if d := open["10.0.0.1"] - open["10.0.0.2"]; d < -20 || d > 20 {
		t.Errorf("active requests %v", open)
	}
	// What is active stays counted when the endpoints, or the cluster, are renewed.
	assign(t, tb, "10.0.0.1 1 HEALTHY 0", "10.0.0.2 1 HEALTHY 0", "10.0.0.3 1 HEALTHY 0")
	if err := tb.Put(parse(t, fmt.Sprintf(edsCluster, "LEAST_REQUEST", ""), &clusterv3.Cluster{})); err != nil {
		t.Fatal(err)
	}
	for range 50 {
		if _, _, err := tb.Cluster("c").Acquire(&model.Conn{}, nil); err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range tb.Status()[0].Hosts {
		if h.Address.Addr().String() == "10.0.0.3" && h.Active < 20 {
			t.Errorf("the new endpoint has %d of 50 requests", h.Active)
		}
	}
}

func TestBreakers(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	tb := table(t, fmt.Sprintf(`{"name":"c","type":"STATIC","circuit_breakers":{"thresholds":[
		{"max_requests":2,"max_connections":1,"retry_budget":{"budget_percent":{"value":50},"min_retry_concurrency":1}}]},
		"load_assignment":{"cluster_name":"c","endpoints":[{"lb_endpoints":[{"endpoint":{"address":{"socket_address":
		{"address":"127.0.0.1","port_value":%d}}}}]}]}}`, ln.Addr().(*net.TCPAddr).Port))
	c := tb.Cluster("c")
	e, first, err := c.Acquire(&model.Conn{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.Acquire(&model.Conn{}, nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.Acquire(&model.Conn{}, nil); !errors.Is(err, model.ErrOverflow) {
		t.Fatalf("a third request: %v", err)
	}
	done, ok := c.Retry()
	if !ok {
		t.Fatal("one retry is always allowed")
	}
	if _, ok := c.Retry(); ok {
		t.Fatal("two retries beside two requests at 50 %")
	}
	done()
	done()
	conn, err := c.Dial(t.Context(), &model.Conn{}, e)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Dial(t.Context(), &model.Conn{}, e); !errors.Is(err, model.ErrOverflow) {
		t.Fatalf("a second connection: %v", err)
	}
	for range 2 {
		_ = conn.Close() // closing twice counts once
	}
	conn, err = c.Dial(t.Context(), &model.Conn{}, e)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close() // of the test
	first(true)
	first(true)
	if _, _, err := c.Acquire(&model.Conn{}, nil); err != nil {
		t.Fatal(err)
	}
	if n := tb.Status()[0].Counters; n.Requests.Load() != 2 || n.Connections.Load() != 0 || n.Retries.Load() != 0 || n.Pending.Load() != 0 {
		t.Errorf("counters %d %d %d %d", n.Requests.Load(), n.Connections.Load(), n.Retries.Load(), n.Pending.Load())
	}
}

func TestOriginalDestination(t *testing.T) {
	tb := table(t, `{"name":"c","type":"ORIGINAL_DST","lb_policy":"CLUSTER_PROVIDED"}`)
	c, to := tb.Cluster("c"), netip.MustParseAddrPort("10.1.2.3:80")
	if e, _, err := c.Acquire(&model.Conn{Local: to}, nil); err != nil || e.Address != to {
		t.Errorf("got %v, %v", e, err)
	}
	if _, _, err := c.Acquire(&model.Conn{Local: to, Direct: true}, nil); !errors.Is(err, model.ErrNoEndpoint) {
		t.Errorf("a direct connection would go round for ever: %v", err)
	}
}

func TestOutlier(t *testing.T) {
	tb := table(t, fmt.Sprintf(edsCluster, "ROUND_ROBIN", `,"outlier_detection":{"consecutive_5xx":3,"base_ejection_time":"30s"}`))
	now := time.Unix(1000, 0)
	tb.clusters["c"].now = func() time.Time { return now }
	assign(t, tb, "10.0.0.1 1 HEALTHY 0", "10.0.0.2 1 HEALTHY 0")
	c := tb.Cluster("c")
	fail := func(bad string, n int) {
		for n > 0 {
			e, release, err := c.Acquire(&model.Conn{}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if e.Address.Addr().String() == bad {
				n--
				release(false)
			} else {
				release(true)
			}
		}
	}
	fail("10.0.0.1", 2)
	if got := spread(t, c, 10); len(got) != 2 {
		t.Fatalf("left out too early, %v", got)
	}
	fail("10.0.0.1", 3)
	if got := spread(t, c, 10); got["10.0.0.2"] != 10 {
		t.Fatalf("not left out: %v", got)
	}
	// Never more than the share, but one.
	fail("10.0.0.2", 3)
	if got := spread(t, c, 10); got["10.0.0.2"] != 10 {
		t.Fatalf("all are left out: %v", got)
	}
	now = now.Add(31 * time.Second)
	if got := spread(t, c, 10); len(got) != 2 {
		t.Fatalf("not taken back: %v", got)
	}
}

func TestRefusedByName(t *testing.T) {
	const static = `"load_assignment":{"cluster_name":"c"}`
	for _, tc := range []struct{ name, in, want string }{
		{"name", `{}`, "cluster.name"},
		{"dns", `{"name":"c","type":"STRICT_DNS"}`, "STRICT_DNS"},
		{"hash", `{"name":"c","lb_policy":"RING_HASH"}`, "RING_HASH"},
		{"original with a policy", `{"name":"c","type":"ORIGINAL_DST","lb_policy":"ROUND_ROBIN"}`, "lb_policy"},
		{"original by header", `{"name":"c","type":"ORIGINAL_DST","lb_policy":"CLUSTER_PROVIDED","original_dst_lb_config":{"use_http_header":true}}`, "use_http_header"},
		{"health checks", `{"name":"c","health_checks":[{"timeout":"1s"}]}`, "health_checks"},
		{"subsets", `{"name":"c","lb_subset_config":{}}`, "lb_subset_config"},
		{"file endpoints", `{"name":"c","type":"EDS","eds_cluster_config":{"eds_config":{"path":"/x"}}}`, "eds_config"},
		{"other extension", `{"name":"c","cluster_type":{"name":"envoy.clusters.aggregate"}}`, "envoy.clusters.aggregate"},
		{"source address", `{"name":"c","upstream_bind_config":{"source_address":{"address":"10.0.0.1"}},` + static + `}`, "source_address"},
		{"HTTP/3", `{"name":"c","typed_extension_protocol_options":{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions":{
			"@type":"type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions","explicit_http_config":{"http3_protocol_options":{}}}}}`, "explicit_http_config"},
		{"negative timeout", `{"name":"c","connect_timeout":"-1s"}`, "connect_timeout"},
		{"name as address", `{"name":"c","load_assignment":{"cluster_name":"c","endpoints":[{"lb_endpoints":[
			{"endpoint":{"address":{"socket_address":{"address":"web.example","port_value":1}}}}]}]}}`, "web.example"},
		{"TLS key from a file", `{"name":"c","transport_socket":{"name":"envoy.transport_sockets.tls","typed_config":{
			"@type":"type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
			"common_tls_context":{"tls_certificates":[{"certificate_chain":{"filename":"/x"}}]}}}}`, "filename"},
		{"TLS secret service", `{"name":"c","transport_socket":{"name":"envoy.transport_sockets.tls","typed_config":{
			"@type":"type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
			"common_tls_context":{"tls_certificate_sds_secret_configs":[{"name":"x"}]}}}}`, "tls_certificate_sds_secret_configs"},
		{"other transport", `{"name":"c","transport_socket":{"name":"envoy.transport_sockets.alts"}}`, "envoy.transport_sockets.alts"},
	} {
		tb := NewTable(sockets.New())
		err := tb.Put(parse(t, tc.in, &clusterv3.Cluster{}))
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want it to name %q", tc.name, err, tc.want)
		}
		if tb.Cluster("c") != nil {
			t.Errorf("%s: it is in force", tc.name)
		}
	}
}

// FuzzPut: whatever the server sends, an answer.
func FuzzPut(f *testing.F) {
	for _, text := range []string{
		fmt.Sprintf(edsCluster, "ROUND_ROBIN", ""), `{"name":"c","type":"ORIGINAL_DST","lb_policy":"CLUSTER_PROVIDED"}`,
		`{"name":"c","load_assignment":{"cluster_name":"c","endpoints":[{"lb_endpoints":[{"endpoint":{"address":{"pipe":{"path":"/x"}}}}]}]}}`,
	} {
		b, err := proto.Marshal(parse(f, text, &clusterv3.Cluster{}))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var in clusterv3.Cluster
		if proto.Unmarshal(b, &in) != nil {
			return
		}
		tb := NewTable(sockets.New())
		if err := tb.Put(&in); err != nil {
			return
		}
		c := tb.Cluster(in.GetName())
		if _, release, err := c.Acquire(&model.Conn{}, nil); err == nil {
			release(true)
		}
		if a := in.GetLoadAssignment(); a != nil {
			_ = tb.Assign(a) // refused or not
		}
	})
}
