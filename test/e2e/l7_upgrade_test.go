// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	"github.com/weirmesh/weir/test/e2e/cluster"
	"github.com/weirmesh/weir/test/e2e/names"
	"github.com/weirmesh/weir/test/e2e/web"
)

// upgradedPolicy lets requests run for as long as they like; what is allowed by edit changes while an agent is away.
func upgradedPolicy(edit string) string {
	return strings.Replace(ruledPolicy, `{method: GET, path: "/open"}`,
		`{method: GET, path: "/open"}, {method: GET, path: "/slow/.*"}, {method: POST, path: "/held"}, {method: GET, path: "`+edit+`"}`, 1)
}

// TestUpgradedUnderRules replaces what stands under connections to rules, and under load: the agents, by a build with other programs, and then the proxy, by
// a process that takes over from it. No request fails, none that policy denies passes, names are answered, and the slots keep their numbers.
func TestUpgradedUnderRules(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	bin := binaries(t)
	next := nextAgent(t)
	lab := cluster.Up(t, faultPods+"---"+namesWorld, "--bin", bin, "--agent-arg=--metrics-listen=127.0.0.1:9962")
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	lab.Apply(ctx, upgradedPolicy("/edit0")+"---"+namesPolicy)
	lab.InForce(ctx, "default/ruled", "default/app-egress")
	stop := upgradedLoad(ctx, t, lab)
	before := slotPorts(ctx, t, lab)
	if len(before) < 2 {
		t.Fatalf("slots %v, want those of a rule and of what is seen", before)
	}
	t.Run("agents", func(t *testing.T) {
		lab := lab.For(t)
		for i, node := range []string{"node1", "node2"} {
			lab.Control(ctx, "agent/"+node, labv1.ControlPartRequest_ACTION_KILL)
			link(t, next, filepath.Join(bin, "weir-agent"))
			edit := fmt.Sprintf("/edit%d", i+1)
			lab.Apply(ctx, upgradedPolicy(edit))
			lab.Control(ctx, "agent/"+node, labv1.ControlPartRequest_ACTION_START)
			lab.InForce(ctx, "default/ruled", "default/app-egress")
			fresh := l7Everywhere[i].web(ctx, lab, ruledAt, web.Options{Fresh: true})
			expectStatus(ctx, t, fresh, edit, http.StatusOK)
			expectStatus(ctx, t, fresh, fmt.Sprintf("/edit%d", i), http.StatusForbidden)
		}
		if after := slotPorts(ctx, t, lab); !maps.Equal(before, after) {
			t.Errorf("slots %v, before the upgrade %v", after, before)
		}
	})
	t.Run("proxy", func(t *testing.T) {
		for range 2 {
			takeOver(ctx, t, lab.For(t))
		}
		if after := slotPorts(ctx, t, lab); !maps.Equal(before, after) {
			t.Errorf("slots %v, before the proxies %v", after, before)
		}
	})
	stop()
	for _, node := range []string{"node1", "node2"} {
		m, err := lab.Metrics(ctx, node, 9962)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"no_listener", "not_seen", "lost", "moved"} {
			if n := m.Sum("weir_agent_proxy_"+name+"_total", ""); n > 0 {
				t.Errorf("%s counts %s: %v", node, name, n)
			}
		}
	}
}

// upgradedLoad makes requests of all kinds and asks for names; stop judges what became of them.
func upgradedLoad(ctx context.Context, t *testing.T, lab *cluster.Lab) (stop func()) {
	t.Helper()
	near, far, visitor := l7Everywhere[0], l7Everywhere[1], l7Everywhere[2]
	get := func(path string, status int) []web.Request {
		return []web.Request{{Method: "GET", URL: "http://server:8080" + path, Status: status}}
	}
	judged := append(get("/open", http.StatusOK), get("/secret", http.StatusForbidden)...)
	ruledAt6 := netip.MustParseAddrPort("[fd00:10:244:2::81]:8080")
	loads := map[string]*web.Running{}
	start := func(name string, client *web.Client, workers int, requests []web.Request) {
		loads[name] = web.Load{Client: client, Every: 20 * time.Millisecond, Workers: workers, Requests: requests}.Start(ctx)
	}
	kept, fresh := web.Options{}, web.Options{Fresh: true}
	start("ruled, kept", far.web(ctx, lab, ruledAt, kept), 1, judged)
	start("ruled, new", near.web(ctx, lab, ruledAt, fresh), 1, judged)
	start("ruled over IPv6, kept", near.web(ctx, lab, ruledAt6, kept), 1, judged)
	start("ruled over IPv6, new", visitor.web(ctx, lab, ruledAt6, fresh), 1, judged)
	start("ruled over HTTP/2", visitor.web(ctx, lab, ruledAt, web.Options{HTTP2: true}), 2, judged)
	start("running, kept", near.web(ctx, lab, ruledAt, kept), 3, get("/slow/150", http.StatusOK))
	start("seen, kept", near.web(ctx, lab, seenAt, kept), 1, get("/", http.StatusOK))
	start("seen, new", far.web(ctx, lab, seenAt, fresh), 1, get("/", http.StatusOK))
	start("plain, kept", far.web(ctx, lab, plainAt, kept), 1, get("/", http.StatusOK))
	app := lab.Netns(ctx, "default", "app")
	if _, err := names.Ask(app, "udp", nameServers[0], "api.example.com", dnsmessage.TypeA, 5*time.Second); err != nil {
		t.Fatal(err)
	}
	start("by name, kept", web.NewClient(app, netip.Addr{}, apiHost, kept), 1, []web.Request{{Method: "GET", URL: "http://api.example.com/", Status: http.StatusOK}})
	stopAsking := askNames(app)
	return func() {
		awaitAnswers(t, 20, loads)
		for name, load := range loads {
			r := load.Stop()
			t.Logf("%s: %s", name, r)
			if r.Failures() > 0 || len(r.Wrong) > 0 {
				t.Errorf("%s: %s", name, r)
			}
		}
		asked, errs := stopAsking()
		t.Logf("%d names were asked for", asked)
		if len(errs) > 0 || asked == 0 {
			t.Errorf("of %d questions for names %d went wrong, the first: %v", asked, len(errs), errors.Join(errs[:min(len(errs), 5)]...))
		}
	}
}

// askNames asks every server, over UDP and TCP, for names that may and may not be asked for, until stop.
func askNames(from string) (stop func() (asked int, errs []error)) {
	end := make(chan struct{})
	var wg sync.WaitGroup
	asked, errs := 0, []error(nil)
	wg.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for ; ; asked++ {
			select {
			case <-end:
				return
			case <-tick.C:
			}
			server, network, name, code := nameServers[asked%len(nameServers)], "udp", "other.example.com", dnsmessage.RCodeSuccess
			if asked%5 == 0 {
				network = "tcp"
			}
			if asked%2 == 0 {
				name, code = "evil.test", dnsmessage.RCodeRefused
			}
			begun := time.Now()
			f, err := names.Ask(from, network, server, name, dnsmessage.TypeA, 20*time.Second)
			if err == nil && f.RCode != code {
				err = fmt.Errorf("%s is answered with %s, want %s", name, f.RCode, code)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("%s %s at %s: %w", network, server, begun.UTC().Format(time.RFC3339Nano), err))
			}
		}
	})
	return func() (int, []error) {
		close(end)
		wg.Wait()
		return asked, errs
	}
}

func expectStatus(ctx context.Context, t *testing.T, client *web.Client, path string, status int) {
	t.Helper()
	a, err := client.Do(ctx, http.MethodGet, "http://server:8080"+path)
	if err != nil || a.Status != status {
		t.Errorf("%s: %d, %v; want %d", path, a.Status, err, status)
	}
}

// takeOver lets a new proxy take over from the one of node2 while a request is under way.
func takeOver(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	t.Helper()
	config := proxyPage(ctx, t, lab, "/config_dump")
	old := int(lab.Part(ctx, "proxy/node2").Pid)
	conn, err := lab.Dial(ctx, lab.Netns(ctx, "default", "near"), "tcp", ruledAt.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := fmt.Fprint(conn, "POST /held HTTP/1.1\r\nHost: server\r\nContent-Length: 8\r\n\r\nhalf"); err != nil {
		t.Fatal(err)
	}
	lab.Control(ctx, "proxy/node2", labv1.ControlPartRequest_ACTION_REPLACE)
	current := int(lab.Part(ctx, "proxy/node2").Pid)
	cluster.Eventually(t, func() error {
		pid, err := listensAt(filepath.Join("/run/weir", lab.Name, "nodes/node2/proxy.sock"))
		if err == nil && pid != current {
			err = fmt.Errorf("process %d serves, the new one is %d", pid, current)
		}
		return err
	})
	if err := syscall.Kill(old, 0); err != nil || current == old {
		t.Fatalf("the process before, %d of which a request is under way, has ended: %v", old, err)
	}
	newServes(ctx, t, lab, old)
	if after := proxyPage(ctx, t, lab, "/config_dump"); after != config {
		t.Errorf("the new process's configuration is another one:\n%s\nbefore:\n%s", after, config)
	}
	if _, err := fmt.Fprint(conn, "half"); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	r, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || r.StatusCode != http.StatusOK || !r.Close {
		t.Errorf("the request that was under way: %v, %v; want 200 and the end of the connection", r, err)
	}
	conn.Close()
	cluster.Eventually(t, func() error {
		if err := syscall.Kill(old, 0); err == nil {
			return fmt.Errorf("the process before, %d, has not ended", old)
		}
		return nil
	})
	if now := int(lab.Part(ctx, "proxy/node2").Pid); now != current {
		t.Errorf("process %d is the proxy, want %d", now, current)
	}
}

// newServes holds the old process while it makes connections.
func newServes(ctx context.Context, t *testing.T, lab *cluster.Lab, old int) {
	t.Helper()
	release := cluster.Hold(t, old)
	defer release()
	client := l7Everywhere[0].web(ctx, lab, ruledAt, web.Options{Fresh: true, Timeout: time.Minute})
	for range 5 {
		expectStatus(ctx, t, client, "/open", http.StatusOK)
		expectStatus(ctx, t, client, "/secret", http.StatusForbidden)
	}
}

// listensAt is the process that serves a unix socket.
func listensAt(path string) (int, error) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var peer *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { peer, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil || credErr != nil {
		return 0, errors.Join(err, credErr)
	}
	return int(peer.Pid), nil
}

// proxyPage reads the admin page of node2's proxy.
func proxyPage(ctx context.Context, t *testing.T, lab *cluster.Lab, path string) string {
	t.Helper()
	client := web.NewClient(lab.NodeNetns(ctx, "node2"), netip.Addr{}, netip.MustParseAddrPort("127.0.0.1:9901"), web.Options{Fresh: true})
	a, err := client.Do(ctx, http.MethodGet, "http://127.0.0.1:9901"+path)
	if err != nil || a.Status != http.StatusOK {
		t.Fatalf("%s of the proxy: %d, %v", path, a.Status, err)
	}
	return a.Body
}

// slotPorts are the ports of node2's listeners, which stand for the numbers of their slots.
func slotPorts(ctx context.Context, t *testing.T, lab *cluster.Lab) map[string]int {
	t.Helper()
	var dump struct {
		Configs []struct {
			Listeners []struct {
				Name   string `json:"name"`
				Active struct {
					Listener struct {
						Address struct {
							Socket struct {
								Port int `json:"port_value"`
							} `json:"socket_address"`
						} `json:"address"`
					} `json:"listener"`
				} `json:"active_state"`
			} `json:"dynamic_listeners"`
		} `json:"configs"`
	}
	if err := json.Unmarshal([]byte(proxyPage(ctx, t, lab, "/config_dump")), &dump); err != nil {
		t.Fatal(err)
	}
	ports := map[string]int{}
	for _, config := range dump.Configs {
		for _, l := range config.Listeners {
			ports[l.Name] = l.Active.Listener.Address.Socket.Port
		}
	}
	return ports
}
