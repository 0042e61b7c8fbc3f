// SPDX-License-Identifier: Apache-2.0

package endpoint_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/address"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/endpoint"
	"github.com/weirmesh/weir/services/agent/internal/event"
	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
	"github.com/weirmesh/weir/services/agent/internal/policysync"
	"github.com/weirmesh/weir/services/agent/internal/testns"
)

// kernel stands in for the datapath's maps and programs; links are real.
type kernel struct {
	mu       sync.Mutex
	rows     map[netip.Addr]datapath.Endpoint
	attached map[string]bool
	claims   map[netip.Addr]flow.Peer
	purged   []uint16
	peers    map[netip.Addr]uint32
	fail     error // of the next Upsert
}

func (k *kernel) AttachPod(name string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.attached[name] = true
	return nil
}

func (k *kernel) DetachPod(name string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.attached, name)
	return nil
}

func (k *kernel) Purge(id uint16) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for a, e := range k.rows {
		if e.ID == id {
			return fmt.Errorf("connections of endpoint %d are purged while it has %s", id, a)
		}
	}
	k.purged = append(k.purged, id)
	return nil
}

func (k *kernel) Upsert(a netip.Addr, e datapath.Endpoint) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.fail; err != nil {
		k.fail = nil
		return err
	}
	k.rows[a] = e
	return nil
}

func (k *kernel) Delete(a netip.Addr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.rows, a)
	return nil
}

func (k *kernel) List() ([]datapath.EndpointRow, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var rows []datapath.EndpointRow
	for a, e := range k.rows {
		rows = append(rows, datapath.EndpointRow{Addr: a, Endpoint: e})
	}
	return rows, nil
}

func (k *kernel) SetLocal(_ string, a netip.Addr, p flow.Peer) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.claims[a] = p
	return nil
}

func (k *kernel) RemoveLocal(_ string, a netip.Addr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.claims, a)
	return nil
}

func (k *kernel) LocalPeer(_ string, a netip.Addr, _ uint32) uint32 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.peers[a]
}

// policies knows the policies of every pod but those without.
type policies struct {
	mu      sync.Mutex
	without string
	bound   map[uint16]string
	bumps   int
}

func (p *policies) Wait(ctx context.Context, uid string) error {
	if uid == p.without {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

func (p *policies) Bind(uid string, id uint16) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.bound[id] = uid
	return nil
}

func (p *policies) Adopt(uid string, id uint16) error { return p.Bind(uid, id) }

func (p *policies) Release(_ string, id uint16) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.bound, id)
	return nil
}

func (p *policies) AddressesChanged() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.bumps++
	return nil
}

// registry answers every registration at once.
type registry struct {
	mu     sync.Mutex
	uids   map[string]policysync.Endpoint
	answer *policysync.Spread // nil = no answer
}

func (r *registry) Register(e policysync.Endpoint) <-chan policysync.Spread {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.uids[e.UID] = e
	ch := make(chan policysync.Spread, 1)
	if r.answer != nil {
		ch <- *r.answer
	}
	return ch
}

func (r *registry) Unregister(uid string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.uids, uid)
}

type fixture struct {
	t *testing.T
	*endpoint.Manager
	kernel   *kernel
	policies *policies
	registry *registry
	store    *desired.Store
	events   *event.Queue
	file     string
}

func start(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{t: t, file: filepath.Join(t.TempDir(), "endpoints"), store: desired.NewStore(), registry: &registry{uids: map[string]policysync.Endpoint{},
		answer: &policysync.Spread{}}, events: event.NewQueue(time.Now),
		policies: &policies{bound: map[uint16]string{}},
		kernel: &kernel{rows: map[netip.Addr]datapath.Endpoint{}, attached: map[string]bool{}, claims: map[netip.Addr]flow.Peer{},
			peers: map[netip.Addr]uint32{}}}
	f.store.Apply([]desired.Upsert{{Key: desired.Key{Kind: desired.KindNode, Name: "n1"}, Resource: &desired.Node{Name: "n1",
		PodCIDRs: []netip.Prefix{netip.MustParsePrefix("fd00:10:244:1::/64"), netip.MustParsePrefix("10.244.1.0/29")}}}}, nil)
	f.restart()
	return f
}

// restart is a new agent over the same kernel and disk.
func (f *fixture) restart() {
	f.t.Helper()
	f.registry.uids = map[string]policysync.Endpoint{}
	f.Manager = endpoint.New(endpoint.Config{
		Node: "n1", StateFile: f.file, MTU: 1400, Store: f.store, Programs: f.kernel, Table: f.kernel, Identities: f.kernel, Policies: f.policies, Registry: f.registry,
		Directory: flow.NewDirectory("default", time.Now), Events: f.events, Now: time.Now,
		PolicyWait: 50 * time.Millisecond, SpreadWait: 50 * time.Millisecond, Log: slog.New(slog.DiscardHandler),
	})
	if err := f.Restore(); err != nil {
		f.t.Error(err)
	}
}

func (f *fixture) pod(name string, change ...func(*desired.Pod)) {
	p := &desired.Pod{UID: "uid-" + name, Namespace: "default", Name: name, Identity: 300}
	for _, c := range change {
		c(p)
	}
	f.store.Apply([]desired.Upsert{{Key: desired.Key{Kind: desired.KindPod, Name: p.UID}, Resource: p}}, nil)
}

func fixed(addresses ...string) func(*desired.Pod) {
	return func(p *desired.Pod) {
		for _, a := range addresses {
			p.Addresses = append(p.Addresses, netip.MustParseAddr(a))
		}
	}
}

func (f *fixture) add(name, netns string) (*endpoint.Added, error) {
	return f.Add(f.t.Context(), endpoint.AddRequest{ContainerID: "c-" + name, Netns: netns, IfName: "eth0", Namespace: "default", Name: name, UID: "uid-" + name})
}

func (f *fixture) mustAdd(name, netns string) *endpoint.Added {
	f.t.Helper()
	a, err := f.add(name, netns)
	if err != nil {
		f.t.Fatal(err)
	}
	return a
}

func (f *fixture) remove(name string) {
	f.t.Helper()
	if err := f.Delete(f.t.Context(), "c-"+name, "eth0"); err != nil {
		f.t.Error(err)
	}
}

// left counts what is in the kernel.
func (f *fixture) left() string {
	links, err := netdev.LinksWithPrefix(endpoint.InterfacePrefix)
	if err != nil {
		f.t.Error(err)
	}
	return fmt.Sprintf("%d links, %d rows, %d programs, %d claims, %d registered, %d endpoints",
		len(links), len(f.kernel.rows), len(f.kernel.attached), len(f.kernel.claims), len(f.registry.uids), len(f.List()))
}

const nothing = "0 links, 0 rows, 0 programs, 0 claims, 0 registered, 0 endpoints"

// inNode runs a test with a fresh node of its own.
func inNode(t *testing.T, body func(f *fixture)) {
	t.Helper()
	testns.Do(t, func() { body(start(t)) })
}

func TestAddAndDelete(t *testing.T) {
	inNode(t, func(f *fixture) {
		f.pod("a")
		ns := testns.New(t)
		e := f.mustAdd("a", ns)
		if e.ID != 1 || e.Identity != 300 || fmt.Sprint(e.Addresses) != "[10.244.1.2 fd00:10:244:1::2]" || e.MTU != 1400 {
			t.Errorf("added %+v", e)
		}
		row := f.kernel.rows[netip.MustParseAddr("fd00:10:244:1::2")]
		index, _ := netdev.LinkIndex(e.HostIfName)
		if row.ID != 1 || row.Identity != 300 || int(row.IfIndex) != index || row.MAC.String() != e.MAC || row.NetnsCookie == 0 {
			t.Errorf("row %+v, interface %d", row, index)
		}
		if r := f.registry.uids["uid-a"]; r.Identity != 300 || len(r.Addresses) != 2 {
			t.Errorf("registered %+v", r)
		}
		if err := f.Check("c-a", "eth0", ns); err != nil {
			t.Errorf("check: %v", err)
		}
		// The same request again finds what is there.
		if again := f.mustAdd("a", ns); again.ID != 1 || again.MAC != e.MAC {
			t.Errorf("added again: %+v", again)
		}
		f.remove("a")
		f.remove("a")
		if got := f.left(); got != nothing {
			t.Errorf("left: %s", got)
		}
		if !slices.Equal(f.kernel.purged, []uint16{1}) {
			t.Errorf("purged %v, want endpoint 1 once", f.kernel.purged)
		}
		if err := f.Check("c-a", "eth0", ns); !errors.Is(err, endpoint.ErrUnknown) {
			t.Errorf("check of nothing: %v", err)
		}
	})
}

func TestAddNeverStartsAPodWithoutItsIdentity(t *testing.T) {
	inNode(t, func(f *fixture) {
		ns := testns.New(t)
		for _, step := range []struct{ name, want string }{{"unknown", "has not named pod"}, {"numberless", "no identity yet"}} {
			if step.name == "numberless" {
				f.pod("numberless", func(p *desired.Pod) { p.Identity = 0 })
			}
			_, err := f.add(step.name, ns)
			if !errors.Is(err, endpoint.ErrNoPolicy) || !strings.Contains(err.Error(), step.want) {
				t.Errorf("%s: %v, want %q", step.name, err, step.want)
			}
		}
		f.policies.without = "uid-lawless"
		f.pod("lawless")
		if _, err := f.add("lawless", ns); !errors.Is(err, endpoint.ErrNoPolicy) {
			t.Errorf("without a policy: %v", err)
		}
		if got := f.left(); got != nothing {
			t.Errorf("left: %s", got)
		}
	})
}

func TestAddressesAndFailures(t *testing.T) {
	inNode(t, func(f *fixture) {
		f.pod("fixed", fixed("10.244.1.5"))
		if e := f.mustAdd("fixed", testns.New(t)); fmt.Sprint(e.Addresses) != "[10.244.1.5]" {
			t.Errorf("addresses %v", e.Addresses)
		}
		// One of no pool is as good.
		f.pod("outside", fixed("10.9.9.9"))
		if e := f.mustAdd("outside", testns.New(t)); fmt.Sprint(e.Addresses) != "[10.9.9.9]" {
			t.Errorf("addresses %v", e.Addresses)
		}
		tests := []struct {
			name, want string
			addresses  []string
			is         error
		}{
			{"taken", "10.244.1.5", []string{"10.244.1.5"}, address.ErrTaken},
			{"local", "127.0.0.9", []string{"127.0.0.9"}, address.ErrOutside},
			{"broadcast", "10.244.1.7", []string{"10.244.1.7"}, address.ErrOutside},
			{"second-outside", "10.9.9.9", []string{"fd00:10:244:1::9", "10.9.9.9"}, address.ErrTaken},
			{"twice", "two addresses", []string{"10.244.1.3", "10.244.1.4"}, nil},
		}
		for _, tt := range tests {
			f.pod(tt.name, fixed(tt.addresses...))
			_, err := f.add(tt.name, testns.New(t))
			if err == nil || !strings.Contains(err.Error(), tt.want) || tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("%s: %v", tt.name, err)
			}
		}
		// What failed has given everything back: of .2 to .6, one is taken, .2 and .3 rest.
		f.kernel.fail = errors.New("map is full")
		f.pod("unlucky")
		if _, err := f.add("unlucky", testns.New(t)); err == nil || !strings.Contains(err.Error(), "map is full") {
			t.Errorf("failing map: %v", err)
		}
		for i := range 2 {
			name := fmt.Sprint("p", i)
			f.pod(name)
			f.mustAdd(name, testns.New(t))
		}
		f.pod("late")
		if _, err := f.add("late", testns.New(t)); !errors.Is(err, address.ErrExhausted) {
			t.Errorf("full pool: %v", err)
		}
	})
}

func TestSpread(t *testing.T) {
	inNode(t, func(f *fixture) {
		f.registry.answer = &policysync.Spread{LateNodes: []string{"n7"}}
		f.pod("a")
		if e := f.mustAdd("a", testns.New(t)); !slices.Equal(e.LateNodes, []string{"n7"}) || f.LateNodes()["n7"] != 1 {
			t.Errorf("late %v, counted %v", e.LateNodes, f.LateNodes())
		}
		f.registry.answer = nil // the policy service is away: the pod starts all the same
		f.pod("b")
		f.mustAdd("b", testns.New(t))
		f.registry.answer = &policysync.Spread{Refused: "not yours"}
		f.pod("c")
		if _, err := f.add("c", testns.New(t)); err == nil || !strings.Contains(err.Error(), "not yours") || len(f.List()) != 2 {
			t.Errorf("refused: %v, %d endpoints", err, len(f.List()))
		}
	})
}

func TestRestart(t *testing.T) {
	inNode(t, func(f *fixture) {
		for _, name := range []string{"a", "b"} {
			f.pod(name)
			f.mustAdd(name, testns.New(t))
		}
		before := f.List()
		// While no agent runs, b's interface goes, and somebody makes one that looks like ours.
		if err := netdev.DeleteLink(before[1].HostIfName); err != nil {
			t.Fatal(err)
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "wr00000000ff"
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "other"}); err != nil {
			t.Fatal(err)
		}
		f.kernel.rows[netip.MustParseAddr("10.9.9.9")] = datapath.Endpoint{ID: 77}
		f.restart()
		after := f.List()
		if len(after) != 1 || after[0].ID != before[0].ID || after[0].MAC != before[0].MAC || after[0].HostIfName != before[0].HostIfName {
			t.Errorf("after a restart %+v, want %+v", after, before[:1])
		}
		if got, want := f.left(), "1 links, 2 rows, 1 programs, 2 claims, 1 registered, 1 endpoints"; got != want {
			t.Errorf("left %s, want %s", got, want)
		}
		f.pod("c")
		// b's number and address rest; a's are a's.
		if c := f.mustAdd("c", testns.New(t)); c.ID != 3 || c.Addresses[0].String() != "10.244.1.4" {
			t.Errorf("new endpoint %d, %v", c.ID, c.Addresses)
		}
	})
}

func TestGarbage(t *testing.T) {
	inNode(t, func(f *fixture) {
		for _, name := range []string{"a", "b", "c"} {
			f.pod(name)
			f.mustAdd(name, testns.New(t))
		}
		if err := f.CollectGarbage(t.Context(), []endpoint.Attachment{{ContainerID: "c-b", IfName: "eth0"}}); err != nil {
			t.Error(err)
		}
		if list := f.List(); len(list) != 1 || list[0].Name != "b" {
			t.Errorf("left %+v", list)
		}
	})
}

func TestIdentityChanges(t *testing.T) {
	inNode(t, func(f *fixture) {
		f.pod("a")
		e := f.mustAdd("a", testns.New(t))
		f.PodChanged(&desired.Pod{UID: "uid-a", Namespace: "default", Name: "a", Identity: 301})
		if got := f.kernel.rows[e.Addresses[0]].Identity; got != 301 || f.kernel.claims[e.Addresses[0]].Identity != 301 || f.registry.uids["uid-a"].Identity != 301 {
			t.Errorf("row %d, claim %d, registered %d, want 301", got, f.kernel.claims[e.Addresses[0]].Identity, f.registry.uids["uid-a"].Identity)
		}
	})
}

func TestUnmanagedPod(t *testing.T) {
	inNode(t, func(f *fixture) {
		f.pod("a", func(p *desired.Pod) { p.Unmanaged, p.Identity = true, 0 })
		ns := testns.New(t)
		e := f.mustAdd("a", ns)
		if e.Identity != 3 || len(f.kernel.rows) != 0 || len(f.kernel.attached) != 0 || f.kernel.claims[e.Addresses[0]].Identity != 3 {
			t.Errorf("endpoint %+v, rows %v, programs %v", e, f.kernel.rows, f.kernel.attached)
		}
		routes, err := netlink.RouteGet(e.Addresses[0].AsSlice())
		if index, _ := netdev.LinkIndex(e.HostIfName); err != nil || len(routes) != 1 || routes[0].LinkIndex != index {
			t.Errorf("route to it: %v, %v", routes, err)
		}
		f.restart()
		f.remove("a")
		if got := f.left(); got != nothing {
			t.Errorf("left: %s", got)
		}
	})
}

// A new sandbox of the same pod may be added before the old one is removed.
func TestSecondSandboxKeepsTheRegistration(t *testing.T) {
	inNode(t, func(f *fixture) {
		f.pod("a")
		f.mustAdd("a", testns.New(t))
		_, err := f.Add(t.Context(), endpoint.AddRequest{ContainerID: "c-new", Netns: testns.New(t), IfName: "eth0", Namespace: "default", Name: "a"})
		if err != nil {
			t.Fatal(err)
		}
		f.remove("a")
		if _, ok := f.registry.uids["uid-a"]; !ok {
			t.Error("the pod was unregistered while it has a sandbox")
		}
	})
}

func TestHealthEndpoint(t *testing.T) {
	inNode(t, func(f *fixture) {
		address := func() string {
			for _, e := range f.List() {
				if e.UID == endpoint.HealthUID && e.Phase == endpoint.Ready && e.Identity == 4 {
					return e.Addresses[0].String()
				}
			}
			return ""
		}
		run := func() string {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			watched := make(chan struct{})
			// RunHealth makes links in the namespace of its thread, so it runs on this one.
			var got string
			go func() {
				defer close(watched)
				defer cancel()
				tick := time.NewTicker(time.Millisecond)
				defer tick.Stop()
				for got == "" && ctx.Err() == nil {
					<-tick.C
					got = address()
				}
			}()
			if err := f.RunHealth(ctx); err != nil {
				t.Error(err)
			}
			<-watched
			return got
		}
		first := run()
		f.restart()
		if second := run(); first == "" || second != first {
			t.Errorf("health endpoint at %q, then %q: want the same", first, second)
		}
		if err := f.CollectGarbage(t.Context(), nil); err != nil || len(f.List()) != 1 {
			t.Errorf("garbage collection took the health endpoint: %v", err)
		}
	})
}
