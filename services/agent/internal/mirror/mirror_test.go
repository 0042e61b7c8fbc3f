// SPDX-License-Identifier: Apache-2.0

package mirror_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/bpf/datapath"
	flowpb "github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/event"
	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/healthport"
	"github.com/weirmesh/weir/services/agent/internal/mirror"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
	"github.com/weirmesh/weir/services/agent/internal/slot"
)

// fakeIPCache is the map, and a journal of writes.
type fakeIPCache struct {
	rows    map[netip.Prefix]datapath.IPCacheEntry
	journal []string
	fail    error
}

func (m *fakeIPCache) Upsert(p netip.Prefix, e datapath.IPCacheEntry) error {
	if m.fail != nil {
		return m.fail
	}
	m.rows[p] = e
	m.journal = append(m.journal, "set "+p.String())
	return nil
}

func (m *fakeIPCache) Delete(p netip.Prefix) error {
	delete(m.rows, p)
	m.journal = append(m.journal, "delete "+p.String())
	return nil
}

func (m *fakeIPCache) List() ([]datapath.IPCacheRow, error) {
	var rows []datapath.IPCacheRow
	for p, e := range m.rows {
		rows = append(rows, datapath.IPCacheRow{Prefix: p, IPCacheEntry: e})
	}
	return rows, nil
}

type fakeServices struct {
	rows  map[datapath.Frontend]datapath.Service
	full  uint16 // the port for which there is no room
	calls int
}

func (m *fakeServices) Upsert(list ...datapath.Service) error {
	m.calls++
	var errs []error
	for _, s := range list {
		if s.Frontend.Port == m.full {
			errs = append(errs, &datapath.ServiceError{Frontend: s.Frontend, Err: datapath.ErrFull})
			continue
		}
		m.rows[s.Frontend] = s
	}
	return errors.Join(errs...)
}

func (m *fakeServices) Delete(list ...datapath.Frontend) error {
	for _, f := range list {
		delete(m.rows, f)
	}
	return nil
}

func (m *fakeServices) List() ([]datapath.Service, error) {
	var rows []datapath.Service
	for _, s := range m.rows {
		rows = append(rows, s)
	}
	return rows, nil
}

type fixture struct {
	*mirror.Mirror
	store    *desired.Store
	ipcache  *fakeIPCache
	services *fakeServices
	routes   []netdev.Route
	events   *event.Queue
	dir      string
	pods     []string
	renamed  []string
	ports    ports
	slots    slots
	max      int
}

func start(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{store: desired.NewStore(), dir: t.TempDir(), events: event.NewQueue(time.Now),
		ipcache:  &fakeIPCache{rows: map[netip.Prefix]datapath.IPCacheEntry{}},
		services: &fakeServices{rows: map[datapath.Frontend]datapath.Service{}}}
	f.restart(t)
	return f
}

// restart is a new agent over the same kernel and disk.
func (f *fixture) restart(t *testing.T) {
	t.Helper()
	present, _ := f.services.List()
	ids, err := mirror.LoadServiceIDs(filepath.Join(f.dir, "ids"), present)
	if err != nil {
		t.Fatal(err)
	}
	f.Mirror = mirror.New(mirror.Config{
		Node: "n1", WorldIPv4: 9, WorldIPv6: 10, IPCache: f.ipcache, IPCacheMax: f.max, Services: f.services,
		Routes:   func(r []netdev.Route) error { f.routes = r; return nil },
		NodeIPv4: netip.MustParseAddr("172.30.0.1"), NodeIPv6: netip.MustParseAddr("fd30::1"),
		Directory: flow.NewDirectory("default", time.Now), Events: f.events, ServiceIDs: ids,
		HealthPorts: &f.ports, Peers: names{}, Slots: &f.slots, PeersChanged: func(uid string) { f.renamed = append(f.renamed, uid) },
		PodChanged: func(p *desired.Pod) { f.pods = append(f.pods, p.Name) }, Log: slog.New(slog.DiscardHandler),
	})
	if err := f.Adopt(); err != nil {
		t.Fatal(err)
	}
	f.store = desired.NewStore()
}

func (f *fixture) apply(t *testing.T, upserts []desired.Upsert, removals ...desired.Key) {
	t.Helper()
	if err := f.Apply(f.store.Apply(upserts, removals), false, nil); err != nil {
		t.Fatal(err)
	}
}

func addrs(texts ...string) []netip.Addr {
	var list []netip.Addr
	for _, s := range texts {
		list = append(list, netip.MustParseAddr(s))
	}
	return list
}

func node(name string, i int) desired.Upsert {
	return desired.Upsert{Key: desired.Key{Kind: desired.KindNode, Name: name}, Resource: &desired.Node{
		Name: name, Addresses: addrs(fmt.Sprintf("172.30.0.%d", i), fmt.Sprintf("fd30::%d", i)),
		PodCIDRs: []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", i)), netip.MustParsePrefix(fmt.Sprintf("fd00:%d::/64", i))},
		Health:   addrs(fmt.Sprintf("10.244.%d.2", i)),
	}}
}

func pod(uid, node string, identity uint32, addresses ...string) desired.Upsert {
	return desired.Upsert{Key: desired.Key{Kind: desired.KindEndpoint, Name: uid}, Resource: &desired.Endpoint{
		UID: uid, Node: node, Namespace: "default", Name: "pod-" + uid, Identity: identity, Addresses: addrs(addresses...)}}
}

func key(kind desired.Kind, name string) desired.Key { return desired.Key{Kind: kind, Name: name} }

// row is a line of the ipcache: identity, node and flags.
func (f *fixture) row(prefix string) string {
	e, ok := f.ipcache.rows[netip.MustParsePrefix(prefix)]
	if !ok {
		return "none"
	}
	text := fmt.Sprint(e.Identity)
	if e.NodeAddr.IsValid() {
		text += " via " + e.NodeAddr.String()
	}
	if e.Flags != 0 {
		text += fmt.Sprintf(" flags %d", e.Flags)
	}
	if e.Peer != 0 || e.Identity >= 1000 {
		text += fmt.Sprintf(" peer %d", e.Peer)
	}
	return text
}

func (f *fixture) expect(t *testing.T, step string, want map[string]string) {
	t.Helper()
	for prefix, w := range want {
		if got := f.row(prefix); got != w {
			t.Errorf("%s: %s is %q, want %q", step, prefix, got, w)
		}
	}
}

func TestNodes(t *testing.T) {
	f := start(t)
	f.apply(t, []desired.Upsert{node("n1", 1), node("n2", 2)})
	f.expect(t, "two nodes", map[string]string{
		"172.30.0.1/32": "1", "fd30::1/128": "1", "10.244.1.0/24": "3 flags 1", "10.244.1.2/32": "4",
		"172.30.0.2/32": "6 via 172.30.0.2", "10.244.2.0/24": "3 via 172.30.0.2", "fd00:2::/64": "3 via fd30::2", "10.244.2.2/32": "4 via 172.30.0.2",
	})
	var routes []string
	for _, r := range f.routes {
		routes = append(routes, fmt.Sprintf("%s via %s from %s", r.Prefix, r.Via, r.Source))
	}
	slices.Sort(routes)
	want := []string{"10.244.1.0/24 via invalid IP from 172.30.0.1", "10.244.2.0/24 via 172.30.0.2 from invalid IP",
		"fd00:1::/64 via invalid IP from fd30::1", "fd00:2::/64 via fd30::2 from invalid IP"}
	if !slices.Equal(routes, want) {
		t.Errorf("routes\n%s\nwant\n%s", strings.Join(routes, "\n"), strings.Join(want, "\n"))
	}
	f.apply(t, nil, key(desired.KindNode, "n2"))
	f.expect(t, "one is gone", map[string]string{"172.30.0.2/32": "none", "10.244.2.0/24": "none", "10.244.2.2/32": "none", "172.30.0.1/32": "1"})
	if len(f.routes) != 2 {
		t.Errorf("routes %v", f.routes)
	}
}

func TestEndpoints(t *testing.T) {
	f := start(t)
	f.apply(t, []desired.Upsert{node("n1", 1), node("n2", 2), pod("a", "n2", 300, "10.244.2.5", "fd00:2::5")})
	f.expect(t, "remote pod", map[string]string{"10.244.2.5/32": "300 via 172.30.0.2", "fd00:2::5/128": "300 via fd30::2"})

	f.apply(t, []desired.Upsert{pod("a", "n2", 301, "10.244.2.5")})
	f.expect(t, "another identity, one address less", map[string]string{"10.244.2.5/32": "301 via 172.30.0.2", "fd00:2::5/128": "none"})

	// A new pod has the address before the old one's removal comes: it counts, and goes on counting.
	f.apply(t, []desired.Upsert{pod("b", "n2", 302, "10.244.2.5")})
	f.expect(t, "new owner", map[string]string{"10.244.2.5/32": "302 via 172.30.0.2"})
	f.apply(t, nil, key(desired.KindEndpoint, "a"))
	f.expect(t, "old owner is gone", map[string]string{"10.244.2.5/32": "302 via 172.30.0.2"})
	f.apply(t, nil, key(desired.KindEndpoint, "b"))
	f.expect(t, "both are gone", map[string]string{"10.244.2.5/32": "none"})

	host := pod("h", "n2", 1, "172.30.0.2")
	host.Resource.(*desired.Endpoint).HostNetwork = true
	f.apply(t, []desired.Upsert{host})
	f.expect(t, "a pod on the host's network", map[string]string{"172.30.0.2/32": "6 via 172.30.0.2"})
}

func TestLocalEndpointsCount(t *testing.T) {
	f := start(t)
	a := netip.MustParseAddr("10.244.1.7")
	// A stale claim of another node's pod, then ours, then the stale one again.
	f.apply(t, []desired.Upsert{node("n1", 1), node("n2", 2), pod("old", "n2", 299, "10.244.1.7")})
	if err := f.SetLocal("u", a, flow.Peer{EndpointID: 1, Identity: 300}); err != nil {
		t.Fatal(err)
	}
	f.expect(t, "local", map[string]string{"10.244.1.7/32": "300"})
	f.apply(t, []desired.Upsert{pod("old", "n2", 298, "10.244.1.7"), pod("u", "n1", 300, "10.244.1.7")})
	f.expect(t, "what the policy service says", map[string]string{"10.244.1.7/32": "300"})
	f.apply(t, nil, key(desired.KindEndpoint, "old"), key(desired.KindEndpoint, "u"))
	f.expect(t, "the policy service has not heard of it", map[string]string{"10.244.1.7/32": "300"})
	if err := f.RemoveLocal("u", a); err != nil {
		t.Fatal(err)
	}
	f.expect(t, "gone", map[string]string{"10.244.1.7/32": "none"})
}

// Narrow rows come before wide ones go, and what failed is written later.
func TestWritesAreOrderedAndRetried(t *testing.T) {
	f := start(t)
	f.apply(t, []desired.Upsert{node("n2", 2)})
	f.ipcache.journal = nil
	f.apply(t, []desired.Upsert{pod("a", "n2", 300, "10.244.2.5")}, key(desired.KindNode, "n2"))
	first := slices.IndexFunc(f.ipcache.journal, func(s string) bool { return strings.HasPrefix(s, "delete") })
	last := slices.Index(f.ipcache.journal, "set 10.244.2.5/32")
	if first < 0 || last < 0 || last > first {
		t.Errorf("journal %q: want the pod's row before anything is deleted", f.ipcache.journal)
	}
	f.ipcache.fail = errors.New("full")
	if err := f.Apply(f.store.Apply([]desired.Upsert{pod("b", "n2", 301, "10.244.2.6")}, nil), false, nil); err == nil {
		t.Error("a failed write is not told")
	}
	f.ipcache.fail = nil
	if err := f.Retry(); err != nil {
		t.Fatal(err)
	}
	f.expect(t, "after a retry", map[string]string{"10.244.2.6/32": "301"})
}

func service(name string, backends ...string) desired.Upsert {
	s := &desired.Service{Namespace: "default", Name: name, Type: "ClusterIP", ClusterIPs: addrs("10.96.0.1", "fd00:96::1"),
		Ports: []desired.ServicePort{{Name: "http", Proto: 6, Port: 80}}}
	for _, b := range backends {
		s.Ports[0].Backends = append(s.Ports[0].Backends, desired.Backend{Addr: netip.MustParseAddrPort(b)})
	}
	return desired.Upsert{Key: key(desired.KindService, "default/"+name), Resource: s}
}

func frontend(a string) datapath.Frontend {
	return datapath.Frontend{Addr: netip.MustParseAddr(a), Port: 80, Proto: 6}
}

// backends is a line of a frontend's backends.
func backends(s datapath.Service) string {
	var words []string
	for _, b := range s.Backends {
		text := b.AddrPort.String()
		if b.Local {
			text += " local"
		}
		if b.Terminating {
			text += " terminating"
		}
		words = append(words, text)
	}
	return strings.Join(words, " ")
}

func TestServices(t *testing.T) {
	f := start(t)
	f.apply(t, []desired.Upsert{service("web", "10.244.2.5:8080", "[fd00:2::5]:8080", "10.244.1.5:8080")})
	v4, v6 := f.services.rows[frontend("10.96.0.1")], f.services.rows[frontend("fd00:96::1")]
	if backends(v4) != "10.244.1.5:8080 10.244.2.5:8080" || backends(v6) != "[fd00:2::5]:8080" {
		t.Errorf("backends %v, %v: want those of the frontend's family", v4.Backends, v6.Backends)
	}
	if v4.ID == 0 || v4.ID == v6.ID {
		t.Errorf("numbers %d, %d", v4.ID, v6.ID)
	}
	f.expect(t, "service addresses", map[string]string{"10.96.0.1/32": "9 flags 2", "fd00:96::1/128": "10 flags 2"})

	// The number stays, over changes and a restart.
	f.apply(t, []desired.Upsert{service("web")})
	if got := f.services.rows[frontend("10.96.0.1")]; got.ID != v4.ID || len(got.Backends) != 0 {
		t.Errorf("without backends %+v, want number %d", got, v4.ID)
	}
	f.restart(t)
	f.apply(t, []desired.Upsert{service("web", "10.244.2.5:8080")})
	if got := f.services.rows[frontend("10.96.0.1")]; got.ID != v4.ID {
		t.Errorf("after a restart number %d, want %d", got.ID, v4.ID)
	}
	f.apply(t, nil, key(desired.KindService, "default/web"))
	f.expect(t, "gone", map[string]string{"10.96.0.1/32": "none"})
	if len(f.services.rows) != 0 || len(f.ServiceRows()) != 0 {
		t.Errorf("rows left: %v", f.services.rows)
	}
	// Its number is not given to another frontend, also after a restart.
	f.restart(t)
	f.apply(t, []desired.Upsert{service("other")})
	if got := f.services.rows[frontend("10.96.0.1")].ID; got == v4.ID || got == v6.ID {
		t.Errorf("number %d was given again", got)
	}
}

// A service's address that another service takes over in the same update stays.
func TestServiceTakesOverAnAddress(t *testing.T) {
	f := start(t)
	f.apply(t, []desired.Upsert{service("old", "10.244.2.5:8080")})
	f.apply(t, []desired.Upsert{service("new", "10.244.2.6:8080")}, key(desired.KindService, "default/old"))
	if got := f.services.rows[frontend("10.96.0.1")]; backends(got) != "10.244.2.6:8080" {
		t.Errorf("row %+v", got)
	}
	f.expect(t, "address", map[string]string{"10.96.0.1/32": "9 flags 2"})
	if rows := f.ServiceRows(); len(rows) != 2 || rows[0].Name != "new" {
		t.Errorf("rows %+v", rows)
	}
}

func TestPrune(t *testing.T) {
	f := start(t)
	f.ipcache.rows[netip.MustParsePrefix("10.9.9.9/32")] = datapath.IPCacheEntry{Identity: 300}
	f.restart(t)
	f.apply(t, []desired.Upsert{node("n1", 1), service("web", "10.244.1.5:8080")})
	stray := datapath.Frontend{Addr: netip.MustParseAddr("10.96.9.9"), Port: 1, Proto: 17}
	f.services.rows[stray] = datapath.Service{Frontend: stray, ID: 99}
	if err := f.Prune(); err != nil {
		t.Fatal(err)
	}
	f.expect(t, "pruned", map[string]string{"10.9.9.9/32": "none", "172.30.0.1/32": "1"})
	if _, ok := f.services.rows[stray]; ok || len(f.services.rows) != 2 {
		t.Errorf("services %v", f.services.rows)
	}
}

func TestEvents(t *testing.T) {
	f := start(t)
	if err := f.Apply(f.store.Apply([]desired.Upsert{node("n2", 2), pod("a", "n2", 300, "10.244.2.5"), service("web")}, nil), true, nil); err != nil {
		t.Fatal(err)
	}
	if e, ok := f.events.Next(); ok {
		t.Errorf("event %v of state that is no news", e)
	}
	f.apply(t, []desired.Upsert{pod("b", "n2", 300, "10.244.2.6"), pod("c", "n2", 301, "10.244.2.7"), service("web", "10.244.2.6:80")},
		key(desired.KindNamespace, "none"))
	f.apply(t, nil, key(desired.KindService, "default/web"))
	var got []string
	for {
		e, ok := f.events.Next()
		if !ok {
			break
		}
		m := &flowpb.AgentEvent{}
		if err := proto.Unmarshal(e.Body, m); err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprintf("%s %s", m.Type, m.GetIpcacheUpdate().GetCidr()))
	}
	slices.Sort(got)
	want := []string{"IPCACHE_UPSERTED 10.244.2.7/32", "SERVICE_DELETED ", "SERVICE_DELETED ", "SERVICE_UPSERTED "}
	if !slices.Equal(got, want) {
		t.Errorf("events %q, want %q", got, want)
	}
}

func TestPodsAreHandedOn(t *testing.T) {
	f := start(t)
	f.apply(t, []desired.Upsert{{Key: key(desired.KindPod, "u"), Resource: &desired.Pod{UID: "u", Name: "p"}}})
	f.apply(t, nil, key(desired.KindPod, "u"))
	if !slices.Equal(f.pods, []string{"p"}) {
		t.Errorf("pods %q", f.pods)
	}
}

// Pods outside of all pod CIDRs have routes of their own, those that the mesh leaves alone excepted: theirs go through their interface.
func TestRoutesToFixedAddresses(t *testing.T) {
	f := start(t)
	f.apply(t, []desired.Upsert{node("n1", 1), node("n2", 2), pod("far", "n2", 300, "10.1.0.21", "10.244.2.9", "fd99::21"), pod("host", "n2", 300, "10.1.0.22")})
	if err := f.SetLocal("near", netip.MustParseAddr("10.1.0.10"), flow.Peer{EndpointID: 1, Identity: 300}); err != nil {
		t.Fatal(err)
	}
	for a, p := range map[string]flow.Peer{"10.1.0.11": {Identity: 3}, "10.244.1.9": {EndpointID: 2, Identity: 300}} {
		if err := f.SetLocal("u-"+a, netip.MustParseAddr(a), p); err != nil {
			t.Fatal(err)
		}
	}
	check := func(when string, want ...string) {
		t.Helper()
		var got []string
		for _, r := range f.routes {
			if r.Prefix.Bits() == r.Prefix.Addr().BitLen() {
				got = append(got, fmt.Sprintf("%s via %s", r.Prefix, r.Via))
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s: routes %q, want %q", when, got, want)
		}
	}
	check("all", "10.1.0.10/32 via invalid IP", "10.1.0.21/32 via 172.30.0.2", "10.1.0.22/32 via 172.30.0.2", "fd99::21/128 via fd30::2")
	if err := f.RemoveLocal("near", netip.MustParseAddr("10.1.0.10")); err != nil {
		t.Fatal(err)
	}
	f.apply(t, []desired.Upsert{pod("far", "n2", 300, "10.1.0.21")}, key(desired.KindEndpoint, "host"))
	check("some are gone", "10.1.0.21/32 via 172.30.0.2")
}

// What is in the cluster is no prefix of a policy, and policies may know a node or a pod by a number of its own.
func TestPeers(t *testing.T) {
	f := start(t)
	peer := func(key string, labels []string, prefixes ...string) desired.Upsert {
		p := &desired.Peer{Key: key, Labels: labels}
		for _, x := range prefixes {
			p.Prefixes = append(p.Prefixes, netip.MustParsePrefix(x))
		}
		return desired.Upsert{Key: desired.Key{Kind: desired.KindPeer, Name: key}, Resource: p}
	}
	variant := pod("v", "n2", 300, "10.244.2.5", "10.244.2.6")
	variant.Resource.(*desired.Endpoint).Variants = []string{"http=80/TCP", ""}
	f.apply(t, []desired.Upsert{peer("cidr:10.0.0.0/8", nil, "10.0.0.0/8"), peer("cidr:10.244.2.0/25", nil, "10.244.2.0/25"), peer("cidr:172.30.0.2/32", nil, "172.30.0.2/32"),
		node("n1", 1), node("n2", 2), node("n3", 3), variant,
		peer("node:n2", []string{"reserved:remote-node"}, "172.30.0.2/32"), peer("7", nil, "172.30.0.3/32", "172.30.0.1/32"),
		peer("4/10.244.0.0/16", nil, "10.244.2.2/32"), peer("1/kube-apiserver", nil, "172.30.0.1/32")})
	f.expect(t, "peers", map[string]string{"10.0.0.0/8": "1000 peer 0", "10.244.2.0/25": "none", "172.30.0.2/32": "6 via 172.30.0.2 peer 1004", "172.30.0.3/32": "7 via 172.30.0.3 flags 8",
		"172.30.0.1/32": "1 peer 1006", "10.244.2.2/32": "4 via 172.30.0.2 peer 1005", "10.244.2.5/32": "300 via 172.30.0.2 peer 1003", "10.244.2.6/32": "300 via 172.30.0.2"})
	for a, want := range map[string]uint32{"10.9.9.9": 1000, "10.244.2.5": 1003, "10.244.2.6": 300, "10.244.2.99": 3, "8.8.8.8": 9, "fd77::1": 10} {
		if got := f.PeerAt(netip.MustParseAddr(a)); got != want {
			t.Errorf("peer at %s: %d, want %d", a, got, want)
		}
	}
	if !f.TakeChanged() || f.TakeChanged() {
		t.Error("changes of addresses: want them told once")
	}
	f.apply(t, nil, key(desired.KindPeer, "node:n2"), key(desired.KindNode, "n3"), key(desired.KindNode, "n2"))
	f.expect(t, "a node is gone", map[string]string{"172.30.0.2/32": "1002 peer 0", "10.244.2.0/25": "1001 peer 0"})
}

// A local address takes a new name at once, and its rows with it.
func TestLocalVariant(t *testing.T) {
	f := start(t)
	a := netip.MustParseAddr("10.244.1.7")
	f.apply(t, []desired.Upsert{node("n1", 1)})
	if err := f.SetLocal("u", a, flow.Peer{EndpointID: 1, Identity: 300}); err != nil {
		t.Fatal(err)
	}
	named := pod("u", "n1", 300, "10.244.1.7")
	named.Resource.(*desired.Endpoint).Variants = []string{"http=80/TCP"}
	f.apply(t, []desired.Upsert{named})
	if n := f.LocalPeer("u", a, 300); n != 1000 || !slices.Equal(f.renamed, []string{"u"}) || f.row("10.244.1.7/32") != "300 peer 1000" {
		t.Errorf("peer %d, renamed %v, row %s", n, f.renamed, f.row("10.244.1.7/32"))
	}
	if n := f.LocalPeer("u", a, 301); n != 0 {
		t.Errorf("peer %d of another identity", n)
	}
}

// What is pinned is younger than the state on disk.
func TestQuietStateLeavesWhatIsPinned(t *testing.T) {
	f := start(t)
	f.apply(t, []desired.Upsert{node("n2", 2), pod("a", "n2", 300, "10.244.2.5")})
	f.restart(t)
	f.ipcache.journal = nil
	if err := f.Apply(f.store.Apply([]desired.Upsert{node("n2", 2), pod("a", "n2", 299, "10.244.2.5"), pod("b", "n2", 301, "10.244.2.6")}, nil), true, nil); err != nil {
		t.Fatal(err)
	}
	f.expect(t, "from disk", map[string]string{"10.244.2.5/32": "300 via 172.30.0.2", "10.244.2.6/32": "301 via 172.30.0.2"})
	f.apply(t, []desired.Upsert{pod("a", "n2", 298, "10.244.2.5")})
	f.expect(t, "from the policy service", map[string]string{"10.244.2.5/32": "298 via 172.30.0.2"})
	if err := f.Prune(); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(f.ipcache.journal, []string{"set 10.244.2.6/32", "set 10.244.2.5/32"}) {
		t.Errorf("journal %q", f.ipcache.journal)
	}
}

// names numbers peers as they come.
type names map[string]uint32

func (n names) Number(name string) uint32 {
	if _, ok := n[name]; !ok {
		n[name] = uint32(1000 + len(n))
	}
	return n[name]
}

// ports remembers what the health-check node ports tell.
type ports struct{ set map[uint16]healthport.Service }

func (p *ports) Set(want map[uint16]healthport.Service) error { p.set = want; return nil }

// balanced is a service with all that a service can have.
func balanced() *desired.Service {
	return &desired.Service{Namespace: "default", Name: "web", Type: "LoadBalancer", ClusterIPs: addrs("10.96.0.1"), ExternalIPs: addrs("192.0.2.9"),
		LoadBalancerIPs: addrs("198.18.0.1"), SourceRanges: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}, AffinitySeconds: 60, ExternalLocal: true,
		InternalLocal: true, HealthCheckNodePort: 32000, Maglev: true, Ports: []desired.ServicePort{{Name: "http", Proto: 6, Port: 80, NodePort: 30080,
			Backends: []desired.Backend{{Addr: netip.MustParseAddrPort("10.244.1.5:8080"), Node: "n1"}, {Addr: netip.MustParseAddrPort("10.244.2.5:8080"), Node: "n2"},
				{Addr: netip.MustParseAddrPort("10.244.1.6:8080"), Node: "n1", Terminating: true}, {Addr: netip.MustParseAddrPort("10.244.1.5:8080"), Node: "n1", Terminating: true},
				{Addr: netip.MustParseAddrPort("[fd00:1::5]:8080"), Node: "n1"}}}}}
}

func TestKindsOfFrontends(t *testing.T) {
	f := start(t)
	f.apply(t, []desired.Upsert{{Key: key(desired.KindService, "default/web"), Resource: balanced()}})
	ranges := []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}
	group := f.services.rows[frontend("10.96.0.1")].ID
	for _, tt := range []struct {
		addr   string
		port   uint16
		kind   datapath.FrontendKind
		ranges []netip.Prefix
	}{{"10.96.0.1", 80, datapath.ClusterIP, nil}, {"0.0.0.0", 30080, datapath.NodePort, ranges}, {"192.0.2.9", 80, datapath.ExternalIP, nil},
		{"198.18.0.1", 80, datapath.LoadBalancer, ranges}} {
		at := datapath.Frontend{Addr: netip.MustParseAddr(tt.addr), Port: tt.port, Proto: 6}
		got := f.services.rows[at]
		want := datapath.Service{Frontend: at, ID: got.ID, Kind: tt.kind, Backends: got.Backends, Algorithm: datapath.Maglev, Affinity: time.Minute, AffinityGroup: group,
			ExternalLocal: tt.kind != datapath.ClusterIP, InternalLocal: tt.kind == datapath.ClusterIP, SourceRanges: tt.ranges}
		if !reflect.DeepEqual(got, want) || got.ID == 0 {
			t.Errorf("%s:%d\n%+v, want\n%+v", tt.addr, tt.port, got, want)
		}
		if b := backends(got); b != "10.244.1.5:8080 local 10.244.1.6:8080 local terminating 10.244.2.5:8080" {
			t.Errorf("%s:%d: backends %s", tt.addr, tt.port, b)
		}
	}
	if len(f.services.rows) != 4 || f.services.calls != 1 {
		t.Errorf("%d rows in %d calls, want 4 in one", len(f.services.rows), f.services.calls)
	}
	f.expect(t, "addresses", map[string]string{"192.0.2.9/32": "9 flags 2", "198.18.0.1/32": "9 flags 2", "0.0.0.0/32": "none"})
	if got := f.ports.set[32000]; got != (healthport.Service{Namespace: "default", Name: "web", LocalEndpoints: 1}) {
		t.Errorf("health port %+v", got)
	}
	f.apply(t, nil, key(desired.KindService, "default/web"))
	if len(f.services.rows) != 0 || len(f.ports.set) != 0 {
		t.Errorf("left: %v, %v", f.services.rows, f.ports.set)
	}
	f.expect(t, "gone", map[string]string{"192.0.2.9/32": "none", "198.18.0.1/32": "none"})
}

// slots numbers filters in their order, as long as there is room.
type slots struct {
	room int
	keys []string
}

func (s *slots) Of(f slot.Filter) (uint16, error) {
	if i := slices.Index(s.keys, f.Key); i >= 0 {
		return uint16(i + 1), nil
	}
	if len(s.keys) >= s.room {
		return 0, slot.ErrFull
	}
	s.keys = append(s.keys, f.Key)
	return uint16(len(s.keys)), nil
}

// Pods' connections to cluster IPs pass the route; a service for whose route there is no slot stays as it was, or does not come about.
func TestRoutedServices(t *testing.T) {
	f := start(t)
	routed := func(route string) []desired.Upsert {
		s := balanced()
		s.Ports[0].Route = route
		return []desired.Upsert{{Key: key(desired.KindService, "default/web"), Resource: s}}
	}
	expect := func(when string, clusterIP uint16, refused bool) {
		t.Helper()
		for at, row := range f.services.rows {
			if want := map[bool]uint16{true: clusterIP}[row.Kind == datapath.ClusterIP]; row.Route != want {
				t.Errorf("%s: route of %v is %d, want %d", when, at, row.Route, want)
			}
		}
		if _, told := f.Refused()["default/web"]; told != refused {
			t.Errorf("%s: refused %v", when, f.Refused())
		}
	}
	f.apply(t, routed("route-a"))
	expect("no slot", 0, true)
	if len(f.services.rows) != 3 {
		t.Errorf("rows %v: want all but the cluster IP", f.services.rows)
	}
	f.slots.room = 1
	if err := f.Retry(); err != nil {
		t.Fatal(err)
	}
	expect("a slot is free", 1, false)
	f.apply(t, routed("route-b"))
	expect("another route, no slot", 1, true)
	if keys := f.Routes(); len(keys) != 1 || len(f.slots.keys) != 1 {
		t.Errorf("routes %v, slots %v", keys, f.slots.keys)
	}
	f.apply(t, routed(""))
	expect("no route", 0, false)
	f.apply(t, routed("route-b"))
	expect("a plain service stays plain", 0, true)
	f.apply(t, nil, key(desired.KindService, "default/web"))
	if len(f.services.rows) != 0 || len(f.Routes()) != 0 {
		t.Errorf("left: %v, %v", f.services.rows, f.Routes())
	}
}

// Of two services with one address the first has it, until it lets go.
func TestSharedFrontend(t *testing.T) {
	f := start(t)
	f.apply(t, []desired.Upsert{service("first", "10.244.2.5:8080"), service("second", "10.244.2.6:8080")})
	if got := f.services.rows[frontend("10.96.0.1")]; backends(got) != "10.244.2.5:8080" || f.ServiceRows()[0].Name != "first" {
		t.Errorf("row %+v", got)
	}
	f.apply(t, []desired.Upsert{service("second", "10.244.2.7:8080")})
	f.apply(t, nil, key(desired.KindService, "default/first"))
	if got := f.services.rows[frontend("10.96.0.1")]; backends(got) != "10.244.2.7:8080" || f.ServiceRows()[0].Name != "second" {
		t.Errorf("row %+v", got)
	}
}

// What does not fit is refused by name, and keeps nothing else away.
func TestServiceThatDoesNotFit(t *testing.T) {
	f := start(t)
	f.services.full = 30080
	f.apply(t, []desired.Upsert{{Key: key(desired.KindService, "default/web"), Resource: balanced()}})
	if r := f.Refused()["default/web"]; !strings.Contains(r, "30080") || len(f.services.rows) != 3 {
		t.Errorf("refused %v, %d rows", f.Refused(), len(f.services.rows))
	}
	f.services.full = 0
	if err := f.Retry(); err != nil || len(f.Refused()) != 0 || len(f.services.rows) != 4 {
		t.Errorf("after a retry: %v, refused %v, %d rows", err, f.Refused(), len(f.services.rows))
	}
}

// Services that are pinned are younger than those on disk.
func TestQuietServices(t *testing.T) {
	f := start(t)
	f.apply(t, []desired.Upsert{service("web", "10.244.2.5:8080")})
	f.restart(t)
	if err := f.Apply(f.store.Apply([]desired.Upsert{service("web", "10.244.2.4:8080")}, nil), true, nil); err != nil {
		t.Fatal(err)
	}
	if got := f.services.rows[frontend("10.96.0.1")]; backends(got) != "10.244.2.5:8080" {
		t.Errorf("from disk: %+v", got)
	}
	if err := f.Prune(); err != nil {
		t.Fatal(err)
	}
	if got := f.services.rows[frontend("10.96.0.1")]; backends(got) != "10.244.2.4:8080" {
		t.Errorf("said again: %+v", got)
	}
}

// Prefixes of policies are refused first, by name; an endpoint that finds no room does not start.
func TestFullIPCache(t *testing.T) {
	f := start(t)
	f.max = 20
	f.restart(t)
	f.apply(t, []desired.Upsert{node("n1", 1), pod("a", "n1", 300, "10.244.1.9")}) // 6 rows
	var upserts []desired.Upsert
	for i := range 15 {
		p := &desired.Peer{Key: fmt.Sprintf("cidr:100.%d.0.0/16", i), Prefixes: []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("100.%d.0.0/16", i))}}
		upserts = append(upserts, desired.Upsert{Key: key(desired.KindPeer, p.Key), Resource: p})
	}
	var told []mirror.Unplaced
	if err := f.Apply(f.store.Apply(upserts, nil), false, func(u []mirror.Unplaced) error { told = u; return nil }); err != nil {
		t.Fatal(err)
	}
	if len(f.ipcache.rows) != 18 || len(told) != 3 || told[0].Around != "9" || !errors.Is(told[0].Err, datapath.ErrFull) {
		t.Errorf("%d rows, unplaced %+v: want 2 of 20 left for pods", len(f.ipcache.rows), told)
	}
	for i, want := range []bool{true, true, false} {
		err := f.SetLocal(fmt.Sprint("u", i), netip.MustParseAddr(fmt.Sprintf("10.244.1.%d", 20+i)), flow.Peer{EndpointID: 1, Identity: 300})
		if (err == nil) != want {
			t.Errorf("endpoint %d: %v", i, err)
		}
	}
	f.apply(t, []desired.Upsert{pod("b", "n1", 300, "10.244.1.10")})
	if r := f.RefusedPods(); r["b"] == "" {
		t.Errorf("refused %v", r)
	}
	for _, u := range upserts[:9] {
		f.apply(t, nil, u.Key)
	}
	if err := f.Retry(); err != nil || len(f.Unplaced()) != 0 || len(f.RefusedPods()) != 0 {
		t.Errorf("after a retry: %v, unplaced %v", err, f.Unplaced())
	}
}
