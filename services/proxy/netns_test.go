// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"bufio"
	"crypto/rand"
	"encoding/hex"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"golang.org/x/sys/unix"
)

// space is a network namespace.
type space struct {
	t    testing.TB
	name string
}

// newSpace makes one, which is deleted when the test ends.
func newSpace(t testing.TB, role string) space {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("network namespaces need root")
	}
	b := make([]byte, 4)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	s := space{t, "wpx-" + role + "-" + hex.EncodeToString(b)}
	command(t, "ip", "netns", "add", s.name)
	t.Cleanup(func() { command(t, "ip", "netns", "del", s.name) })
	s.ip("link set lo up")
	return s
}

func command(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func (s space) ip(args string) {
	s.t.Helper()
	command(s.t, append([]string{"ip", "-n", s.name}, strings.Fields(args)...)...)
}

// do runs f in the namespace. Its thread is thrown away afterwards.
func (s space) do(f func()) {
	s.t.Helper()
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		var file *os.File
		if file, err = os.Open("/run/netns/" + s.name); err != nil {
			return
		}
		defer file.Close()
		if err = unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err == nil {
			f()
		}
	}()
	<-done
	if err != nil {
		s.t.Fatalf("enter %s: %v", s.name, err)
	}
}

// node is a client, a server, and between them a node whose kernel hands all that comes from either to local sockets, as the mesh's programs do.
func node(t testing.TB) (client, middle, server space) {
	t.Helper()
	client, middle, server = newSpace(t, "client"), newSpace(t, "node"), newSpace(t, "server")
	for i, end := range []space{client, server} {
		n := string(rune('1' + i))
		middle.ip("link add v" + n + " type veth peer name eth0 netns " + end.name)
		middle.ip("addr add 10.77." + n + ".1/24 dev v" + n)
		middle.ip("-6 addr add fd77:" + n + "::1/64 dev v" + n + " nodad")
		middle.ip("link set v" + n + " up")
		end.ip("addr add 10.77." + n + ".2/24 dev eth0")
		end.ip("-6 addr add fd77:" + n + "::2/64 dev eth0 nodad")
		end.ip("link set eth0 up")
		end.ip("route add default via 10.77." + n + ".1")
		end.ip("-6 route add default via fd77:" + n + "::1")
		for _, family := range []string{"-4", "-6"} {
			middle.ip(family + " rule add iif v" + n + " lookup 100 pref 5")
		}
	}
	middle.ip("route add local default dev lo table 100")
	middle.ip("-6 route add local default dev lo table 100")
	return client, middle, server
}

// TestTransparent: the server sees the client's address with a port of the range, for both families, and with ports chosen by kernel and proxy.
func TestTransparent(t *testing.T) {
	client, middle, server := node(t)
	var addrs []string
	var mu sync.Mutex
	handler := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		addrs = append(addrs, r.RemoteAddr)
		mu.Unlock()
		_, _ = io.WriteString(w, "one") // the client checks it
	})}
	t.Cleanup(func() { _ = handler.Close() })
	server.do(func() {
		ln, err := net.Listen("tcp", ":8080")
		if err != nil {
			t.Error(err)
			return
		}
		go func() { _ = handler.Serve(ln) }() // it ends by Close
	})
	for _, extra := range [][]string{nil, {"--choose-upstream-ports"}} {
		t.Run(strings.Join(append(extra, "proxy"), " "), func(t *testing.T) {
			b := newBench(t)
			b.stop()
			middle.do(func() { b.serveXDS("127.0.0.1:0") })
			b.config.XDS = []string{b.addr}
			b.logCluster()
			b.originalDst()
			b.routes("key", "original-dst")
			b.slotListener("slot-5", "key", "0.0.0.0:8080", "[::]:8080")
			b.spawnIn(middle, extra...)
			for _, target := range []string{"10.77.2.2:8080", "[fd77:2::2]:8080"} {
				var got string
				until(t, "an answer through the proxy of "+target, func() bool {
					client.do(func() { got = askHere(target) })
					return got == "one" && len(b.logs.requests()) > 0
				})
			}
			until(t, "an entry of each request", func() bool {
				ended := map[string]bool{}
				for _, e := range b.logs.requests() {
					if c := e.GetCommonProperties(); c.GetAccessLogType() == datav3.AccessLogType_DownstreamEnd {
						ended[c.GetDownstreamLocalAddress().GetSocketAddress().GetAddress()] = true
					}
				}
				return len(ended) == 2
			})
			for _, e := range b.logs.requests() {
				c := e.GetCommonProperties()
				remote, local := c.GetDownstreamRemoteAddress().GetSocketAddress(), c.GetDownstreamLocalAddress().GetSocketAddress()
				if !strings.HasSuffix(remote.GetAddress(), ".1.2") && remote.GetAddress() != "fd77:1::2" || local.GetPortValue() != 8080 ||
					local.GetAddress() != "10.77.2.2" && local.GetAddress() != "fd77:2::2" {
					t.Errorf("logged %v -> %v", remote, local)
				}
			}
		})
	}
	mu.Lock()
	defer mu.Unlock()
	proxied := map[string]int{}
	for _, a := range addrs {
		from := netip.MustParseAddrPort(a)
		if from.Port() < 52000 || from.Port() > 60999 {
			t.Errorf("the server saw %s", a)
		}
		proxied[from.Addr().Unmap().String()]++
	}
	if proxied["10.77.1.2"] < 2 || proxied["fd77:1::2"] < 2 || len(proxied) != 2 {
		t.Errorf("the server saw %v", proxied)
	}
}

// askHere makes a request by this very thread, which may be in a namespace of its own; http.Client would dial from another one.
func askHere(addr string) string {
	conn, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		return ""
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		return ""
	}
	r, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return ""
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return ""
	}
	return string(body)
}

// spawnIn starts a proxy in a namespace.
func (b *bench) spawnIn(s space, extra ...string) *process {
	b.t.Helper()
	var p *process
	b.config.Socket = filepath.Join(b.dir, "ns.sock")
	s.do(func() { p = b.spawn(extra...) })
	return p
}

func (b *bench) originalDst() {
	b.set("original-dst", &clusterv3.Cluster{}, `{"name":"original-dst","type":"ORIGINAL_DST","lb_policy":"CLUSTER_PROVIDED","connect_timeout":"5s",
		"circuit_breakers":{"thresholds":[{"max_connections":100000,"max_pending_requests":100000,"max_requests":100000,"max_retries":100}]},
		"typed_extension_protocol_options":{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions":{
			"@type":"type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions","use_downstream_protocol_config":{"http2_protocol_options":{}}}},
		"upstream_bind_config":{"source_address":{"address":"0.0.0.0","port_value":0},
			"socket_options":[{"level":0,"name":51,"int_value":3997682464,"state":"STATE_PREBIND"}]}}`)
}

// slotListener makes a listener as a slot of egress has.
func (b *bench) slotListener(name, routes, v4, v6 string) {
	b.t.Helper()
	address := func(a string) string {
		host, port, err := net.SplitHostPort(a)
		if err != nil {
			b.t.Fatal(err)
		}
		return `{"socket_address":{"address":` + quoted(host) + `,"port_value":` + port + `}}`
	}
	b.set(name, &listenerv3.Listener{}, `{"name":%q,"address":%s,"additional_addresses":[{"address":%s}],"transparent":true,
		"metadata":{"filter_metadata":{"weir":{"namespace":"shop","filter":"key"}}},
		"listener_filters":[{"name":"envoy.filters.listener.original_src","typed_config":{
			"@type":"type.googleapis.com/envoy.extensions.filters.listener.original_src.v3.OriginalSrc","mark":768}}],
		"filter_chains":[{"filters":[{"name":"envoy.filters.network.http_connection_manager","typed_config":{
			"@type":"type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
			"stat_prefix":"x","codec_type":"AUTO","rds":{"config_source":{"ads":{},"resource_api_version":"V3"},"route_config_name":%q},
			"generate_request_id":false,"access_log_options":{"flush_access_log_on_new_request":true},"access_log":[%s],
			"http_filters":[{"name":"envoy.filters.http.router","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}]}}]}]}`,
		name, address(v4), address(v6), routes, strings.Replace(httpAccessLog, "%q", quoted(name), 1))
}
