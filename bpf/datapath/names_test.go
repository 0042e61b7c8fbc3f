// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"
)

func openNames(t testing.TB, d *Datapath) *Names {
	t.Helper()
	n, err := OpenNames(d.cfg.PinPath)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func TestNamesOutliveTheirProcess(t *testing.T) {
	b := newBench(t, func(c *Config) { c.NamesMax = 2 })
	n := openNames(t, b.Datapath)
	web := []PolicyRange{{Proto: unix.IPPROTO_TCP, First: 443, Last: 443, Verdict: PolicyRedirect, Rule: 5, Slot: 9}}
	for _, err := range []error{n.SetPolicy(3, 1, web), n.SetPolicy(4, 1, web), n.SetAddress(out4, 1), n.SetAddress(out6, 2), n.SetAddress(out4, 2)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := n.SetAddress(far4, 1); !errors.Is(err, ErrFull) {
		t.Errorf("a third address of two: %v, want ErrFull", err)
	}
	if err := errors.Join(n.DeletePolicy(4, 1), n.DeletePolicy(4, 1), n.Close()); err != nil {
		t.Fatal(err)
	}
	n = openNames(t, b.Datapath)
	have, err := n.Addresses()
	if want := map[netip.Addr]uint32{out4: 2, out6: 2}; err != nil || !maps.Equal(have, want) {
		t.Errorf("addresses %v, %v; want %v", have, err, want)
	}
	policies, err := n.Policies()
	if want := []NamePolicy{{Policy: 3, Set: 1}}; err != nil || !reflect.DeepEqual(policies, want) {
		t.Errorf("policies %v, %v; want %v", policies, err, want)
	}
	if err := errors.Join(n.DeleteAddress(out4), n.DeleteAddress(out4)); err != nil {
		t.Error(err)
	}
	for _, u := range n.Usage() {
		if want := map[string]int{tcMapFqdn: 1, tcMapFqdnPeers: 1, tcMapFqdnRanges: 3}[u.Map]; u.Entries != want {
			t.Errorf("%s: %d entries, want %d", u.Map, u.Entries, want)
		}
	}
	if _, err := OpenNames(t.TempDir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a datapath: %v, want fs.ErrNotExist", err)
	}
}

func TestView(t *testing.T) {
	b := newBench(t, nil)
	slot := PolicyRange{Proto: unix.IPPROTO_UDP, First: 53, Last: 53, Verdict: PolicyRedirect, Rule: 5, Slot: 9}
	b.policy(5, rows{0: nothing, idFar: {slot}})
	b.enforce(epA, EndpointPolicy{Egress: 5, EgressAudit: true})
	if v := b.run(tcProgFromPod, b.ifA, udp(t, at(podA4, 1000), at(out4, 99), 1)); v.code != actOK {
		t.Fatalf("verdict %+v", v)
	}
	v, err := OpenView(b.cfg.PinPath)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if id, identity, peer, ok := v.Endpoint(podA6); id != epA || identity != idA || peer != idA || !ok {
		t.Errorf("endpoint %d, identity %d, peer %d, %v", id, identity, peer, ok)
	}
	if _, _, _, ok := v.Endpoint(far4); ok {
		t.Error("another node's pod is an endpoint")
	}
	for a, want := range map[netip.Addr]uint32{podA4: idA, far6: idFar, out4: IdentityWorldIPv4, out6: IdentityWorldIPv6, node4: IdentityHost} {
		if identity, peer := v.Peer(a); identity != want || peer != want {
			t.Errorf("%v is identity %d, peer %d; want %d", a, identity, peer, want)
		}
	}
	in, out := v.Policy(epA)
	if in != (EndpointPolicyWord{}) || out != (EndpointPolicyWord{5, true}) {
		t.Errorf("policies %v and %v", in, out)
	}
	if r, ok := v.Lookup(5, idFar, unix.IPPROTO_UDP, 53); r != slot || !ok {
		t.Errorf("range %+v, %v; want %+v", r, ok, slot)
	}
	if r, ok := v.Lookup(5, idB, unix.IPPROTO_UDP, 53); r.Verdict != PolicyDefaultDeny || !ok {
		t.Errorf("range %+v, %v; want denied", r, ok)
	}
	before, err := v.Generation()
	b.bump()
	if after, err2 := v.Generation(); err != nil || err2 != nil || after != before+1 {
		t.Errorf("generation %d, then %d; %v, %v", before, after, err, err2)
	}
	remotes, err := v.LiveRemotes()
	if _, there := remotes[out4]; err != nil || !there || len(remotes) != 1 {
		t.Errorf("live remotes %v, %v; want %v", remotes, err, out4)
	}
	if stale, err := v.Stale(); err != nil || stale {
		t.Errorf("stale %v, %v", stale, err)
	}
	// As an agent of another layout leaves it.
	if err := os.Remove(b.oldPin(tcMapCt, layouts[tcMapCt])); err != nil {
		t.Fatal(err)
	}
	if remotes, err := v.LiveRemotes(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without ct: %v, %v; want fs.ErrNotExist", remotes, err)
	}
	if stale, err := v.Stale(); err != nil || stale {
		t.Errorf("without ct: stale %v, %v", stale, err)
	}
	other, err := OpenView(b.cfg.PinPath)
	if err != nil {
		t.Fatalf("without ct: %v", err)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	if err := os.Remove(b.oldPin(tcMapIpcache, layouts[tcMapIpcache])); err != nil {
		t.Fatal(err)
	}
	if stale, err := v.Stale(); err != nil || !stale {
		t.Errorf("without a pin: stale %v, %v", stale, err)
	}
}
