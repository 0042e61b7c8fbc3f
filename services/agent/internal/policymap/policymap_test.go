// SPDX-License-Identifier: Apache-2.0

package policymap_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/policymap"
)

func state() []desired.Resource {
	return []desired.Resource{selector("web", "300"), selector("bad", "301", "302"), webPolicy("p"), &desired.Subject{Key: "pod", Ingress: "p"}}
}

func TestRowsFollowSelectors(t *testing.T) {
	f := start(t)
	f.apply(false, state())
	f.prune()
	f.bind("pod", 7)
	f.expect("first", 7, map[string]string{"300:80": "allow allow", "300:443": "allow tls", "300:1": "default-deny", "301:80": "deny deny", "303:443": "allow tls",
		"303:80": "default-deny"})

	f.kernel.take()
	f.apply(false, []desired.Resource{selector("web", "300", "302", "304")})
	f.expect("joined", 7, map[string]string{"302:443": "deny deny", "304:80": "allow allow"})
	if j := f.kernel.take(); len(j) != 2 || j[1] != "bump" {
		t.Errorf("journal %q: want one row (302 is decided as before) and a bump", j)
	}
	f.apply(false, []desired.Resource{selector("web", "300"), selector("bad")})
	f.expect("left", 7, map[string]string{"301:443": "allow tls", "304:80": "default-deny", "300:80": "allow allow"})

	f.apply(false, nil, desired.Key{Kind: desired.KindSubject, Name: "pod"}, desired.Key{Kind: desired.KindPolicy, Name: "p"}, desired.Key{Kind: desired.KindSelector, Name: "web"},
		desired.Key{Kind: desired.KindSelector, Name: "bad"})
	f.expect("taken back while an endpoint has it", 7, map[string]string{"300:80": "allow allow", "300:1": "default-deny"})
	if err := f.Release("pod", 7); err != nil {
		t.Fatal(err)
	}
	if len(f.kernel.endpoints) != 0 || len(f.kernel.rows) != 1 { // deny-all stays
		t.Errorf("left: endpoints %v, rows %v", f.kernel.endpoints, f.kernel.rows)
	}
	if !slices.Contains(f.told.notices, "updated NetworkPolicy=default/allow,NetworkPolicy=default/deny,NetworkPolicy=default/tls") || !strings.HasPrefix(f.told.notices[len(f.told.notices)-1], "deleted") {
		t.Errorf("events %q", f.told.notices)
	}
}

// Rows are there before an address may name a peer, endpoints get policies after, and what left goes last.
func TestOrder(t *testing.T) {
	f := start(t)
	f.apply(false, []desired.Resource{selector("web", "300"), selector("bad", "301"), webPolicy("p"), &desired.Subject{Key: "pod"}})
	f.prune()
	f.bind("pod", 7)
	if _, enforced := f.kernel.endpoints[7]; enforced {
		t.Errorf("endpoint %v: want nothing enforced", f.kernel.endpoints[7])
	}
	f.kernel.take()
	changes := f.store.Apply(upserts([]desired.Resource{selector("web", "305"), &desired.Subject{Key: "pod", Ingress: "p"}}), nil)
	must(t, f.Prepare(changes, false))
	if j := f.kernel.take(); !slices.Equal(j, []string{"row 2/305"}) {
		t.Errorf("prepared: %q", j)
	}
	must(t, f.Switch())
	if j := f.kernel.take(); !slices.Equal(j, []string{"endpoint 7", "bump"}) {
		t.Errorf("switched: %q", j)
	}
	must(t, f.Finish())
	if j := f.kernel.take(); !slices.Equal(j, []string{"no row 2/300", "bump"}) {
		t.Errorf("finished: %q", j)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// What the policy service did not say is denied, and told.
func TestMissingParts(t *testing.T) {
	f := start(t)
	p := webPolicy("p")
	p.Classes = p.Classes[:2]
	f.apply(false, []desired.Resource{selector("web", "300", "301"), selector("bad", "301"), p, &desired.Subject{Key: "pod", Ingress: "p"}})
	f.prune()
	f.bind("pod", 7)
	key := desired.Key{Kind: desired.KindPolicy, Name: "p"}
	f.expect("class", 7, map[string]string{"301:80": "default-deny", "301:443": "default-deny", "300:80": "allow allow"})
	if r := f.Refusals()[key]; !strings.Contains(r, "301") {
		t.Errorf("refusals %v", f.Refusals())
	}
	f.apply(false, []desired.Resource{webPolicy("p")})
	f.expect("class is there", 7, map[string]string{"301:80": "deny deny"})

	f.apply(false, []desired.Resource{&desired.Policy{Key: "q", Direction: desired.Ingress, Selectors: []string{"late"}, Classes: []desired.PolicyClass{
		{Ranges: []desired.PolicyRange{ports(desired.Allow, 1, 65535)}}, {Selectors: []uint32{0}}}}, &desired.Subject{Key: "other", Ingress: "q"}})
	f.bind("other", 8)
	f.expect("selector", 8, map[string]string{"300:80": "default-deny"})
	if _, ok := f.Refusals()[desired.Key{Kind: desired.KindPolicy, Name: "q"}]; !ok {
		t.Errorf("refusals %v", f.Refusals())
	}
	f.apply(false, []desired.Resource{selector("late", "302")})
	f.expect("selector is there", 8, map[string]string{"300:80": "allow", "302:80": "default-deny"})
	if len(f.Refusals()) != 0 {
		t.Errorf("refusals %v", f.Refusals())
	}
}

func TestFullMap(t *testing.T) {
	f := start(t)
	f.apply(false, state())
	f.prune()
	f.bind("pod", 7)
	big := &desired.Policy{Key: "big", Direction: desired.Ingress, Selectors: []string{"many"}, Rules: []desired.PolicyRule{rule("big")}, Classes: []desired.PolicyClass{{},
		{Selectors: []uint32{0}, Ranges: []desired.PolicyRange{ports(desired.Allow, 1, 1, 0)}}}}
	var members []string
	for i := range 1000 {
		members = append(members, fmt.Sprint(1000+i))
	}
	f.apply(false, []desired.Resource{selector("many", members...), big, &desired.Subject{Key: "pod", Ingress: "big"}, &desired.Subject{Key: "new", Ingress: "big"}})
	f.bind("new", 8)
	f.expect("refused", 7, map[string]string{"300:80": "allow allow"})
	f.expect("refused, nothing before", 8, map[string]string{"1000:1": "default-deny"})
	key := desired.Key{Kind: desired.KindPolicy, Name: "big"}
	if r := f.Refusals()[key]; !strings.Contains(r, "policy_peers is full") || f.Describe(key) != "NetworkPolicy=default/big" {
		t.Errorf("refusals %v, described as %s", f.Refusals(), f.Describe(key))
	}
	f.kernel.max = 2000
	if err := f.Retry(); err != nil || len(f.Refusals()) != 0 {
		t.Errorf("retry: %v, refusals %v", err, f.Refusals())
	}
	f.expect("room again", 7, map[string]string{"300:80": "default-deny", "1000:1": "allow big"})

	// A peer that finds no room is judged as everybody else, unless that would let it pass: then everybody else is denied.
	f.apply(false, []desired.Resource{webPolicy("p"), &desired.Subject{Key: "pod", Ingress: "p"}})
	f.kernel.max = len(f.kernel.rows)
	f.apply(false, []desired.Resource{selector("web", "300", "310")})
	f.expect("an allowed peer more", 7, map[string]string{"310:80": "default-deny", "310:443": "allow tls"})
	f.apply(false, []desired.Resource{selector("bad", "301", "302", "311")})
	f.expect("a denied peer more", 7, map[string]string{"311:443": "default-deny", "999:443": "default-deny", "300:80": "allow allow"})
	f.kernel.max += 10
	if err := f.Retry(); err != nil || len(f.Refusals()) != 0 {
		t.Errorf("retry: %v, refusals %v", err, f.Refusals())
	}
	f.expect("room again", 7, map[string]string{"311:443": "deny deny", "999:443": "allow tls", "310:80": "allow allow"})
}

func TestFailedWriteIsDoneAgain(t *testing.T) {
	f := start(t)
	f.apply(false, state())
	f.prune()
	f.bind("pod", 7)
	f.kernel.fail = errors.New("broken")
	if err := f.Prepare(f.store.Apply(upserts([]desired.Resource{selector("web", "300", "320")}), nil), false); err == nil {
		t.Error("a failed write is not told")
	}
	if err := f.Retry(); err != nil {
		t.Fatal(err)
	}
	f.expect("after a retry", 7, map[string]string{"320:80": "allow allow"})
}

// A new agent changes nothing that is pinned until the policy service has spoken, and then nothing that is right.
func TestRestart(t *testing.T) {
	f := start(t)
	f.apply(false, append(state(), &desired.Peer{Key: "cidr:10.0.0.0/8", Labels: []string{"cidr:10.0.0.0/8"}}, selector("web", "300", "cidr:10.0.0.0/8")))
	f.prune()
	f.bind("pod", 7)
	f.bind("pod", 9)
	cidr := f.Number("cidr:10.0.0.0/8")
	if cidr>>24 != 1 || f.told.identities[cidr] == nil {
		t.Errorf("number %#x, labels %v", cidr, f.told.identities)
	}
	before := fmt.Sprint(f.kernel.rows, f.kernel.endpoints)

	// The state on disk is older: of another policy.
	f.restart()
	f.kernel.take()
	must(t, f.Adopt("pod", 7))
	old := webPolicy("older")
	old.Classes[0].Ranges = nil
	f.apply(true, []desired.Resource{selector("web"), selector("bad"), old, &desired.Subject{Key: "pod", Ingress: "older"}, &desired.Subject{Key: "new", Ingress: "older"}})
	if now := f.kernel.endpoints[7]; now.Ingress != 2 {
		t.Errorf("endpoint %+v: want policy 2 as it was", now)
	}
	f.bind("new", 8)
	f.expect("a pod that starts meanwhile", 8, map[string]string{"300:443": "default-deny"})

	f.restart()
	f.kernel.take()
	must(t, f.Adopt("pod", 7))
	f.apply(false, append(state(), &desired.Peer{Key: "cidr:10.0.0.0/8"}, selector("web", "300", "cidr:10.0.0.0/8")))
	f.prune()
	if got := fmt.Sprint(f.kernel.rows, f.kernel.endpoints); got != strings.Replace(before, " 9:"+fmt.Sprint(f.kernel.endpoints[7]), "", 1) {
		t.Errorf("kernel\n%s\nwant (less endpoint 9)\n%s", got, before)
	}
	for _, j := range f.kernel.take() {
		if strings.HasPrefix(j, "row") {
			t.Errorf("a row was written: %s", j)
		}
	}
	if f.Number("cidr:10.0.0.0/8") != cidr || len(f.told.rules) < 3 {
		t.Errorf("numbers: %#x, rules %v", f.Number("cidr:10.0.0.0/8"), f.told.rules)
	}
}

// Without the file, new numbers are above everything pinned.
func TestLostNumbers(t *testing.T) {
	f := start(t)
	f.apply(false, append(state(), selector("web", "300", "cidr:10.0.0.0/8")))
	f.prune()
	f.bind("pod", 7)
	must(t, os.WriteFile(filepath.Join(f.dir, "numbers"), []byte("nonsense"), 0o600))
	f.restart()
	f.RecoverPeers(nil)
	must(t, f.Adopt("pod", 7))
	f.expect("no state", 7, map[string]string{"300:80": "allow"}) // decided as before, without names
	f.apply(false, append(state(), selector("web", "300", "cidr:11.0.0.0/8")))
	f.prune()
	if got := f.kernel.endpoints[7]; got.Ingress != 3 {
		t.Errorf("endpoint %+v, want policy 3", got)
	}
	if n := f.Number("cidr:11.0.0.0/8"); n <= 1<<24+1 {
		t.Errorf("number %#x was another prefix's", n)
	}
	f.expect("anew", 7, map[string]string{"300:80": "allow allow", "301:80": "deny deny"})
	for key := range f.kernel.rows {
		if key.policy == 2 {
			t.Errorf("a row of the old policy is left: %v", key)
		}
	}
}

func TestRecoveredPeers(t *testing.T) {
	f := start(t)
	f.RecoverPeers([]datapath.IPCacheRow{{Prefix: prefix("10.0.0.0/8"), IPCacheEntry: datapath.IPCacheEntry{Identity: 1<<24 + 77}}, {Prefix: prefix("10.1.0.0/16"),
		IPCacheEntry: datapath.IPCacheEntry{Identity: 300}}})
	if n := f.Number("cidr:10.0.0.0/8"); n != 1<<24+77 {
		t.Errorf("number %#x, want the pinned one", n)
	}
	if n := f.Number("cidr:11.0.0.0/8"); n != 1<<24+78 {
		t.Errorf("number %#x, want one above", n)
	}
}

func TestNumbersOfPeers(t *testing.T) {
	f := start(t)
	for name, want := range map[string]uint32{"300": 300, "7": 7, "node:n2": 2<<24 + 1, "300/http=8080/TCP": 3<<24 + 1, "cidr:fd00::/8": 1<<24 + 1,
		"cidr:nonsense": 0, "x/y": 0, "": 0, "16777216": 0, "99999999999": 0} {
		if got := f.Number(name); got != want {
			t.Errorf("%q: %#x, want %#x", name, got, want)
		}
	}
	if _, err := f.Peer("node:n9"); !errors.Is(err, policymap.ErrUnknown) {
		t.Errorf("unknown peer: %v", err)
	}
}

// Numbers rest before they are forgotten.
func TestForgottenNumbers(t *testing.T) {
	f := start(t)
	f.apply(false, append(state(), selector("web", "cidr:10.0.0.0/8")))
	f.prune()
	f.apply(false, nil, desired.Key{Kind: desired.KindPolicy, Name: "p"}, desired.Key{Kind: desired.KindSelector, Name: "web"}, desired.Key{Kind: desired.KindSelector, Name: "bad"})
	must(t, f.Retry())
	if _, err := f.Peer("cidr:10.0.0.0/8"); err != nil || len(f.told.rules) == 0 {
		t.Errorf("forgotten at once: %v, rules %v", err, f.told.rules)
	}
	f.now = f.now.Add(time.Hour)
	must(t, f.Retry())
	if _, err := f.Peer("cidr:10.0.0.0/8"); err == nil || len(f.told.rules) != 0 {
		t.Errorf("not forgotten: %v, rules %v", err, f.told.rules)
	}
	if n := f.Number("cidr:12.0.0.0/8"); n == 1<<24+1 {
		t.Error("a forgotten number was given again at once")
	}
}

func TestPauses(t *testing.T) {
	f := start(t)
	f.apply(false, state())
	f.prune()
	f.bind("pod", 7)
	must(t, f.Pause("pod", policymap.Pause{Pod: "default/pod", Since: f.now, Until: f.now.Add(time.Minute), Reason: "wrong policy"}))
	f.expect("paused", 7, map[string]string{"301:80": "deny deny audit"})
	f.restart()
	must(t, f.Adopt("pod", 7))
	f.apply(false, state())
	f.prune()
	f.expect("paused over a restart", 7, map[string]string{"301:80": "deny deny audit"})
	if len(f.Pauses()) != 1 || !f.PausedUntil("pod").Equal(f.now.Add(time.Minute)) {
		t.Errorf("pauses %v", f.Pauses())
	}
	f.now = f.now.Add(time.Minute)
	f.ExpirePauses()
	f.expect("over", 7, map[string]string{"301:80": "deny deny"})

	must(t, f.Pause("", policymap.Pause{Until: f.now.Add(time.Minute)}))
	f.expect("node", 7, map[string]string{"301:80": "deny deny audit"})
	if resumed, err := f.Resume(""); !resumed || err != nil {
		t.Errorf("resume: %v, %v", resumed, err)
	}
	if resumed, err := f.Resume(""); resumed || err != nil {
		t.Errorf("resume of nothing: %v, %v", resumed, err)
	}
	f.expect("resumed", 7, map[string]string{"301:80": "deny deny"})
	f.apply(false, []desired.Resource{&desired.Subject{Key: "pod", Ingress: "p", Audit: true}})
	f.expect("audit mode", 7, map[string]string{"301:80": "deny deny audit"})
	if !slices.Contains(f.told.notices, "policy-resumed") {
		t.Errorf("events %q", f.told.notices)
	}
}

func TestWait(t *testing.T) {
	f := start(t)
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	f.apply(false, state()) // known, and perhaps not whole
	if err := f.Wait(short, "pod"); !errors.Is(err, policymap.ErrNoSubject) {
		t.Errorf("before the state is whole: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- f.Wait(t.Context(), "pod") }()
	f.prune()
	must(t, <-done)
	if err := f.Bind("nobody", 3); !errors.Is(err, policymap.ErrNoSubject) {
		t.Errorf("bind of nobody: %v", err)
	}
}

// The way by which a packet came under a rule is told as Hubble does.
func TestMatchTypes(t *testing.T) {
	f := start(t)
	any := func(rules ...uint32) desired.PolicyRange {
		return desired.PolicyRange{Last: 65535, Verdict: desired.Allow, Rules: rules}
	}
	tests := []struct {
		name        string
		class, rest desired.PolicyRange
		want        uint8
	}{
		{"L3-Only", any(0), desired.PolicyRange{}, 1},
		{"L3-L4", ports(desired.Allow, 80, 80, 0), desired.PolicyRange{}, 2},
		{"L4-Only", ports(desired.Allow, 80, 80, 0), ports(desired.Allow, 80, 90, 0), 3},
		{"all", any(0), any(0), 4},
		{"L3-Proto", ports(desired.Allow, 0, 65535, 0), desired.PolicyRange{}, 5},
		{"Proto-Only", ports(desired.Allow, 0, 65535, 0), ports(desired.Allow, 0, 65535, 0), 6},
		{"other rules for others", ports(desired.Allow, 80, 80, 0), ports(desired.Allow, 80, 80, 1), 2},
	}
	for i, tt := range tests {
		key := fmt.Sprint("p", i)
		p := &desired.Policy{Key: key, Direction: desired.Ingress, Selectors: []string{"s"}, Rules: []desired.PolicyRule{rule(tt.name), rule("other")},
			Classes: []desired.PolicyClass{{}, {Selectors: []uint32{0}, Ranges: []desired.PolicyRange{tt.class, ports(desired.Deny, 9, 9)}}}}
		if tt.class.Proto == 0 || tt.class.Last == 65535 {
			p.Classes[1].Ranges = p.Classes[1].Ranges[:1]
		}
		if tt.rest.Verdict != 0 {
			p.Classes[0].Ranges = []desired.PolicyRange{tt.rest}
		}
		f.apply(false, []desired.Resource{selector("s", "300"), p, &desired.Subject{Key: key, Ingress: key}})
		f.prune()
		f.bind(key, uint16(100+i))
		a, err := f.Lookup(uint16(100+i), desired.Ingress, 300, 6, 80)
		must(t, err)
		if got := f.told.matches[a.Rule]; got != tt.want || a.Rules[0].Name != tt.name {
			t.Errorf("%s: match type %d by %v, want %d", tt.name, got, a.Rules, tt.want)
		}
	}
}

func TestDump(t *testing.T) {
	f := start(t)
	f.apply(false, append(state(), selector("web", "300", "cidr:10.0.0.0/8")))
	f.prune()
	f.bind("pod", 7)
	rows, err := f.Dump(7)
	must(t, err)
	names := map[string]int{}
	for _, r := range rows {
		if r.Key != "p" || r.Direction != desired.Ingress || !slices.Equal(r.Endpoints, []uint16{7}) {
			t.Errorf("row %+v", r)
		}
		names[r.PeerName] = len(r.Ranges)
	}
	if fmt.Sprint(names) != "map[:1 300:2 301:1 302:1 cidr:10.0.0.0/8:2]" {
		t.Errorf("rows %v", names)
	}
}

// A policy that needs a prefix for which ipcache has no room is not given to anybody new.
func TestUnplacedPeers(t *testing.T) {
	f := start(t)
	f.apply(false, append(state(), selector("web", "300", "cidr:10.0.0.0/8", "cidr:10.1.0.0/16")))
	f.prune()
	f.bind("pod", 7)
	next := &desired.Policy{Key: "next", Direction: desired.Ingress, Selectors: []string{"narrow"}, Rules: []desired.PolicyRule{rule("next")}, Classes: []desired.PolicyClass{
		{Ranges: []desired.PolicyRange{ports(desired.Allow, 1, 65535)}}, {Selectors: []uint32{0}}}}
	changes := f.store.Apply(upserts([]desired.Resource{selector("narrow", "cidr:10.1.0.0/16"), next, &desired.Subject{Key: "pod", Ingress: "next"},
		&desired.Subject{Key: "new", Ingress: "next"}}), nil)
	must(t, f.Prepare(changes, false))
	f.Place(map[string]policymap.Unplaced{"cidr:10.1.0.0/16": {Around: "cidr:10.0.0.0/8", Err: errors.New("full")}})
	must(t, f.Switch())
	must(t, f.Finish())
	f.bind("new", 8)
	f.expect("keeps what it had", 7, map[string]string{"cidr:10.0.0.0/8:80": "allow allow"})
	f.expect("has nothing", 8, map[string]string{"300:80": "default-deny"})
	if r := f.Refusals(); len(r) != 1 || !strings.Contains(r[desired.Key{Kind: desired.KindPolicy, Name: "next"}], "no room for 10.1.0.0/16") {
		t.Errorf("refusals %v: want the one that tells it from the prefix around it", r)
	}
	if !slices.Contains(f.told.notices, "policy-refused") {
		t.Errorf("events %v: want the refusal", f.told.notices)
	}
	f.Place(nil)
	must(t, f.Switch())
	f.expect("room again", 7, map[string]string{"300:80": "allow", "cidr:10.1.0.0/16:80": "default-deny"})
	if len(f.Refusals()) != 0 {
		t.Errorf("refusals %v", f.Refusals())
	}
}

// A number that had names is nobody else's before weir-dns has nothing of it any more: neither with the numbers lost, nor in a new agent.
func TestNumbersOfNames(t *testing.T) {
	f := start(t)
	kept := func() bool {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(f.dir, "numbers"))
		must(t, err)
		return strings.Contains(string(b), `"named":[2]`)
	}
	f.apply(false, []desired.Resource{selector("web"), apiPolicy("p")})
	f.prune()
	if len(f.rules.policies[2]) == 0 || !kept() {
		t.Fatalf("names %v, on disk: %v", f.rules.policies, kept())
	}
	f.apply(false, nil, desired.Key{Kind: desired.KindPolicy, Name: "p"})
	forget := func() {
		t.Helper()
		for range 2 { // it is looked at, and has rested
			f.now = f.now.Add(time.Hour)
			must(t, f.Retry())
		}
	}
	forget()
	if !kept() {
		t.Error("no weir-dns has acknowledged, and the number is free")
	}
	f.restart()
	f.prune()
	forget()
	if !kept() {
		t.Error("a new agent has forgotten it")
	}
	// The numbers are lost as well: what the kernel has rows of counts.
	must(t, os.Remove(filepath.Join(f.dir, "numbers")))
	f.named = []uint32{2}
	f.restart()
	f.apply(false, []desired.Resource{selector("web"), selector("bad"), webPolicy("q")})
	f.prune()
	if f.kernel.rows[rowKey{2, 0}] != nil || f.kernel.rows[rowKey{3, 0}] == nil {
		t.Errorf("rows %v: want them of policy 3", f.kernel.rows)
	}
	f.rules.acknowledged = true
	forget()
	if kept() {
		t.Error("weir-dns has nothing of it, and it is kept")
	}
}
