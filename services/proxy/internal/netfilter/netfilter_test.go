// SPDX-License-Identifier: Apache-2.0

package netfilter_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	networkrbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/services/proxy/internal/limit"
	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/netfilter"
)

func TestDecide(t *testing.T) {
	conn := func(remote, local, name string) *model.Conn {
		return &model.Conn{Remote: netip.MustParseAddrPort(remote), Local: netip.MustParseAddrPort(local), ServerName: name}
	}
	for _, tc := range []struct {
		name, rules string
		conn        *model.Conn
		policy      string
		ok          bool
	}{
		{"no rules", `{}`, conn("10.0.0.1:1", "10.0.0.2:80", ""), "", true},
		{"nothing matches", `{"rules":{}}`, conn("10.0.0.1:1", "10.0.0.2:80", ""), "", false},
		{"name", `{"rules":{"policies":{"p":{"permissions":[{"requested_server_name":{"exact":"a"}}],"principals":[{"any":true}]}}}}`,
			conn("10.0.0.1:1", "10.0.0.2:80", "a"), "p", true},
		{"other name", `{"rules":{"policies":{"p":{"permissions":[{"requested_server_name":{"exact":"a"}}],"principals":[{"any":true}]}}}}`,
			conn("10.0.0.1:1", "10.0.0.2:80", "b"), "", false},
		{"not", `{"rules":{"policies":{"p":{"permissions":[{"not_rule":{"destination_port":80}}],"principals":[{"any":true}]}}}}`,
			conn("10.0.0.1:1", "10.0.0.2:80", ""), "", false},
		{"and, or", `{"rules":{"policies":{"p":{"permissions":[{"and_rules":{"rules":[{"destination_port":80},{"or_rules":{"rules":[
			{"destination_ip":{"address_prefix":"10.9.0.0","prefix_len":16}},{"destination_port_range":{"start":80,"end":81}}]}}]}}],
			"principals":[{"and_ids":{"ids":[{"direct_remote_ip":{"address_prefix":"10.0.0.0","prefix_len":24}},{"not_id":{"remote_ip":{"address_prefix":"10.0.0.9","prefix_len":32}}}]}}]}}}}`,
			conn("10.0.0.1:1", "10.0.0.2:80", ""), "p", true},
		{"deny", `{"rules":{"action":"DENY","policies":{"p":{"permissions":[{"any":true}],"principals":[{"source_ip":{"address_prefix":"fd00::","prefix_len":8}}]}}}}`,
			conn("[fd00::1]:1", "[fd00::2]:80", ""), "p", false},
		{"deny others", `{"rules":{"action":"DENY","policies":{"p":{"permissions":[{"any":true}],"principals":[{"source_ip":{"address_prefix":"fd00::","prefix_len":8}}]}}}}`,
			conn("10.0.0.1:1", "10.0.0.2:80", ""), "", true},
		{"first by name", `{"rules":{"policies":{"b":{"permissions":[{"any":true}],"principals":[{"any":true}]},"a":{"permissions":[{"any":true}],"principals":[{"any":true}]}}}}`,
			conn("10.0.0.1:1", "10.0.0.2:80", ""), "a", true},
		{"shadow", `{"shadow_rules":{"policies":{"s":{"permissions":[{"any":true}],"principals":[{"any":true}]}}}}`,
			conn("10.0.0.1:1", "10.0.0.2:80", ""), "s", true},
	} {
		var in networkrbacv3.RBAC
		if err := protojson.Unmarshal([]byte(tc.rules), &in); err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		r, err := netfilter.CompileRBAC("rbac", &in, nil)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		if policy, ok := r.Decide(tc.conn); policy != tc.policy || ok != tc.ok {
			t.Errorf("%s: %q, %v, want %q, %v", tc.name, policy, ok, tc.policy, tc.ok)
		}
	}
}

func TestRBACRefused(t *testing.T) {
	for want, text := range map[string]string{
		"rbac.matcher":      `{"matcher":{}}`,
		"Permission_Header": `{"rules":{"policies":{"p":{"permissions":[{"header":{"name":"x","present_match":true}}],"principals":[{"any":true}]}}}}`,
		"Authenticated":     `{"rules":{"policies":{"p":{"permissions":[{"any":true}],"principals":[{"authenticated":{}}]}}}}`,
		"condition":         `{"rules":{"policies":{"p":{"permissions":[{"any":true}],"principals":[{"any":true}],"condition":{"id":"1"}}}}}`,
		"missing closing":   `{"rules":{"policies":{"p":{"permissions":[{"requested_server_name":{"safe_regex":{"regex":"("}}}],"principals":[{"any":true}]}}}}`,
	} {
		var in networkrbacv3.RBAC
		if err := protojson.Unmarshal([]byte(text), &in); err != nil {
			t.Fatal(err)
		}
		if _, err := netfilter.CompileRBAC("rbac", &in, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want it to name %q", err, want)
		}
	}
}

// FuzzRBAC: whatever the server sends, an answer.
func FuzzRBAC(f *testing.F) {
	f.Add([]byte{10, 2, 8, 1})
	f.Fuzz(func(_ *testing.T, b []byte) {
		var in networkrbacv3.RBAC
		if proto.Unmarshal(b, &in) != nil {
			return
		}
		if r, err := netfilter.CompileRBAC("rbac", &in, nil); err == nil {
			r.Decide(&model.Conn{Remote: netip.MustParseAddrPort("10.0.0.1:1"), Local: netip.MustParseAddrPort("[fd00::1]:2")})
		}
	})
}

// target is a cluster of one address.
type target struct {
	addr    string
	mu      sync.Mutex
	open    int
	results []bool
	fails   int // attempts that fail first
}

func (c *target) Cluster(name string) model.Cluster {
	if name == "none" {
		return nil
	}
	return c
}
func (c *target) Name() string                  { return "t" }
func (c *target) Protocol() model.Protocol      { return model.HTTP1 }
func (c *target) ConnectTimeout() time.Duration { return time.Second }
func (c *target) Retry() (func(), bool)         { return func() {}, true }
func (c *target) Acquire(*model.Conn, []netip.AddrPort) (model.Endpoint, func(bool), error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open++
	return model.Endpoint{Address: netip.MustParseAddrPort(c.addr)}, func(ok bool) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.open--
		c.results = append(c.results, ok)
	}, nil
}

func (c *target) Dial(ctx context.Context, _ *model.Conn, e model.Endpoint) (net.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fails > 0 {
		c.fails--
		return nil, errors.New("refused")
	}
	return (&net.Dialer{}).DialContext(ctx, "tcp", e.Address.String())
}

type entries struct {
	mu  sync.Mutex
	all []model.Entry
}

func (e *entries) Log(one *model.Entry) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = append(e.all, *one)
}

// pair is two ends of a TCP connection.
func pair(t *testing.T) (client, server *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = c.Close(), s.Close() })
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

func TestServe(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); _ = c.Close() }() // an echo, as long as it lasts
		}
	}()
	for _, tc := range []struct {
		name, config string
		fails        int
		flag         string
		attempts     uint32
	}{
		{"idle", `{"cluster":"t","idle_timeout":"0.05s"}`, 0, "SI", 1},
		{"too long", `{"cluster":"t","max_downstream_connection_duration":"0.05s"}`, 0, "DT", 1},
		{"no cluster", `{"cluster":"none"}`, 0, "NC", 0},
		{"refused", `{"cluster":"t"}`, 1, "UF", 1},
		{"refused once", `{"cluster":"t","max_connect_attempts":3,"idle_timeout":"0.05s"}`, 1, "SI", 2},
		{"refused always", `{"cluster":"t","max_connect_attempts":3}`, 3, "UF", 3},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var in tcpv3.TcpProxy
			if err := protojson.Unmarshal([]byte(tc.config), &in); err != nil {
				t.Fatal(err)
			}
			to, log := &target{addr: ln.Addr().String(), fails: tc.fails}, &entries{}
			p, err := netfilter.CompileTCPProxy("tcp", &in, netfilter.Env{Clusters: to, Limits: limit.New(limit.Config{}, prometheus.NewRegistry())}, log)
			if err != nil {
				t.Fatal(err)
			}
			client, server := pair(t)
			done := make(chan struct{})
			go func() {
				defer close(done)
				p.Serve(t.Context(), server, &model.Conn{}, "p")
			}()
			if _, err := client.Read(make([]byte, 1)); err == nil {
				t.Error("bytes came")
			}
			<-done
			if len(log.all) != 1 || len(log.all[0].Flags) == 0 || log.all[0].Flags[0] != tc.flag || log.all[0].Attempts != tc.attempts {
				t.Errorf("told %+v", log.all)
			}
			if to.open != 0 {
				t.Errorf("%d attempts are still counted", to.open)
			}
		})
	}
}
