// SPDX-License-Identifier: Apache-2.0

package dnsrules

import (
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/bpf/datapath"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/agent/internal/dnsnames"
	"github.com/weirmesh/weir/services/agent/internal/dnsproxy"
)

var (
	client    = netip.MustParseAddr("10.0.0.1")
	nobody    = netip.MustParseAddr("10.0.0.9")
	serverIn  = netip.MustParseAddrPort("10.0.0.2:53")
	serverOut = netip.MustParseAddrPort("8.8.8.8:53")
)

const clientID = 5

// fakeView has one client; everybody in the cluster is peer 100, everybody else world.
type fakeView struct {
	egress     datapath.EndpointPolicyWord
	words      map[uint32]datapath.PolicyRange // by peer
	lookups    int
	generation uint64
	err        error // of Generation
}

func (v *fakeView) Endpoint(a netip.Addr) (id uint16, identity, peer uint32, ok bool) {
	return clientID, 1000, 1000, a == client
}

func (v *fakeView) Peer(a netip.Addr) (identity, peer uint32) {
	if a.IsPrivate() {
		return 100, 100
	}
	return datapath.IdentityWorldIPv4, datapath.IdentityWorldIPv4
}

func (v *fakeView) Policy(uint16) (ingress, egress datapath.EndpointPolicyWord) {
	return datapath.EndpointPolicyWord{}, v.egress
}

func (v *fakeView) Generation() (uint64, error) { return v.generation, v.err }

func (v *fakeView) Lookup(_, peer uint32, _ uint8, _ uint16) (datapath.PolicyRange, bool) {
	v.lookups++
	r, ok := v.words[peer]
	return r, ok
}

type fakeNames struct {
	upserts []dnsnames.Policy
	removed []uint32
	// complete: the last update was.
	complete bool
	settled  bool
	named    *dnsnames.Range
}

func (n *fakeNames) Update(upserts []dnsnames.Policy, removed []uint32, complete bool, done func()) {
	n.upserts, n.removed, n.complete = upserts, removed, complete
	if done != nil {
		done()
	}
}

func (n *fakeNames) Settle() { n.settled = true }

func (n *fakeNames) Range(uint32, netip.Addr, uint8, uint16) (dnsnames.Range, bool) {
	if n.named == nil {
		return dnsnames.Range{}, false
	}
	return *n.named, true
}

func word(v datapath.PolicyVerdict, slot uint16) datapath.PolicyRange {
	return datapath.PolicyRange{Verdict: v, Slot: slot}
}

func TestJudge(t *testing.T) {
	const pass, refuse, unknown = dnsproxy.Pass, dnsproxy.Refuse, dnsproxy.Unknown
	enforced := datapath.EndpointPolicyWord{Number: 7}
	for _, c := range []struct {
		name   string
		client netip.Addr
		egress datapath.EndpointPolicyWord
		word   *datapath.PolicyRange // nil = it cannot be read
		server netip.AddrPort
		named  *dnsnames.Range
		ask    string
		want   dnsproxy.Verdict
		slot   uint16
		rules  int
	}{
		{name: "not an endpoint", client: nobody, egress: enforced, word: new(word(datapath.PolicyAllow, 0)), want: unknown},
		{name: "not enforced", want: pass},
		{name: "unreadable", egress: enforced, want: refuse},
		{name: "plain", egress: enforced, word: new(word(datapath.PolicyAllow, 0)), want: pass},
		{name: "denied", egress: enforced, word: new(word(datapath.PolicyDeny, 0)), want: refuse},
		{name: "default", egress: enforced, word: new(word(datapath.PolicyDefaultDeny, 0)), want: refuse},
		{name: "audited", egress: datapath.EndpointPolicyWord{Number: 7, Audit: true}, word: new(word(datapath.PolicyDefaultDeny, 0)), want: pass},
		{name: "another verdict", egress: enforced, word: new(word(9, 1)), want: refuse, slot: 1},
		{name: "allowed name", egress: enforced, word: new(word(datapath.PolicyRedirect, 1)), want: pass, slot: 1, rules: 2},
		{name: "other name", egress: enforced, word: new(word(datapath.PolicyRedirect, 1)), ask: "b.org.", want: refuse, slot: 1},
		{name: "audit does not soften", egress: datapath.EndpointPolicyWord{Number: 7, Audit: true}, word: new(word(datapath.PolicyRedirect, 1)),
			ask: "b.org.", want: refuse, slot: 1},
		{name: "no filter", egress: enforced, word: new(word(datapath.PolicyRedirect, 2)), want: refuse, slot: 2},
		{name: "filter of visibility", egress: enforced, word: new(word(datapath.PolicyRedirect, 3)), ask: "b.org.", want: pass, slot: 3},
		{name: "visible without filter", egress: enforced, word: new(word(datapath.PolicyVisible, 2)), ask: "b.org.", want: pass, slot: 2},
		{name: "every name", egress: enforced, word: new(word(datapath.PolicyRedirect, 4)), ask: ".", want: pass, slot: 4, rules: 1},
		{name: "no items", egress: enforced, word: new(word(datapath.PolicyRedirect, 5)), want: refuse, slot: 5},
		{name: "server by name", egress: enforced, word: new(word(datapath.PolicyDefaultDeny, 0)), server: serverOut, named: &dnsnames.Range{Slot: 1},
			want: pass, slot: 1, rules: 2},
		{name: "server by name, plainly", egress: enforced, word: new(word(datapath.PolicyRedirect, 2)), server: serverOut, named: &dnsnames.Range{},
			want: pass},
		{name: "deny stands before names", egress: enforced, word: new(word(datapath.PolicyDeny, 0)), server: serverOut, named: &dnsnames.Range{}, want: refuse},
		{name: "names are of outside", egress: enforced, word: new(word(datapath.PolicyDefaultDeny, 0)), named: &dnsnames.Range{}, want: refuse},
	} {
		t.Run(c.name, func(t *testing.T) {
			view := &fakeView{egress: c.egress, words: map[uint32]datapath.PolicyRange{}}
			if c.word != nil {
				view.words[100], view.words[datapath.IdentityWorldIPv4] = *c.word, *c.word
			}
			r := New(view, &fakeNames{named: c.named}, "", slog.New(slog.DiscardHandler))
			one, two := &policyv1.PolicyRule{Name: "one"}, &policyv1.PolicyRule{Name: "two"}
			err := r.apply(newSession(), &agentv1.SyncDNSResponse{Synced: true, Filters: []*agentv1.DNSFilter{
				{Slot: 1, Rules: []*policyv1.DNSRule{{Rule: one, MatchPattern: "*.example"}, {Rule: two, MatchName: "a.example"}, {Rule: one, MatchPattern: "a.*"}}},
				{Slot: 3, Visibility: true}, {Slot: 4, Rules: []*policyv1.DNSRule{{Rule: one}}}, {Slot: 5},
			}}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if !c.client.IsValid() {
				c.client = client
			}
			if !c.server.IsValid() {
				c.server = serverIn
			}
			if c.ask == "" {
				c.ask = "a.example."
			}
			for range 2 { // the second time from memory
				got := r.Judge(c.client, c.server, 17, c.ask)
				rules, _ := got.Rules.([]*policyv1.PolicyRule)
				if got.Verdict != c.want || got.Slot != c.slot || len(rules) != c.rules || (got.Endpoint == clientID) != (c.want != unknown) {
					t.Errorf("%+v; want verdict %d, slot %d, %d rules", got, c.want, c.slot, c.rules)
				}
			}
		})
	}
}

func TestSessions(t *testing.T) {
	names := &fakeNames{}
	r := New(&fakeView{}, names, filepath.Join(t.TempDir(), "rules"), slog.New(slog.DiscardHandler))
	if err := r.Load(); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("no file: %v", err)
	}
	s := newSession()
	ranges := []*agentv1.DNSRange{{Protocol: 6, First: 443, Last: 443, Rule: 9, Slot: 2, Visibility: true}, {Protocol: 6, First: 9, Last: 1}, {Protocol: 999}}
	err := r.apply(s, &agentv1.SyncDNSResponse{Revision: 1, Filters: []*agentv1.DNSFilter{{Slot: 1}, {Slot: 70000}},
		Policies: []*agentv1.DNSPolicy{{Policy: 7, Names: []*agentv1.DNSName{{MatchName: "a", Ranges: ranges}, {}}}}}, nil)
	if err == nil || names.settled {
		t.Errorf("what cannot be read was taken, or it is complete: %v", err)
	}
	want := []dnsnames.Policy{{Number: 7, Names: []dnsnames.Selector{{
		NameSelector: policy.NameSelector{MatchName: "a"}, Ranges: []dnsnames.Range{{Proto: 6, First: 443, Last: 443, Rule: 9, Slot: 2, Visibility: true}},
	}}}}
	if diff := cmp.Diff(want, names.upserts); diff != "" {
		t.Error(diff)
	}
	if err := r.Save(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(r.file); !errors.Is(err, fs.ErrNotExist) {
		t.Error("rules were saved before they were complete")
	}
	// The next stream has less: what is missing goes when it is complete.
	s = newSession()
	if err := r.apply(s, &agentv1.SyncDNSResponse{Revision: 2, Filters: []*agentv1.DNSFilter{{Slot: 2}}}, nil); err != nil {
		t.Fatal(err)
	}
	if f, p, known := r.Counts(); f != 2 || p != 1 || known {
		t.Errorf("%d filters, %d policies, known %v", f, p, known)
	}
	if err := r.apply(s, &agentv1.SyncDNSResponse{Revision: 3, Synced: true}, nil); err != nil {
		t.Fatal(err)
	}
	if f, p, known := r.Counts(); f != 1 || p != 0 || !known || !cmp.Equal(names.removed, []uint32{7}) || !names.settled || !names.complete {
		t.Errorf("%d filters, %d policies, known %v, removed %v, complete %v", f, p, known, names.removed, names.complete)
	}
	if err := r.Save(); err != nil {
		t.Fatal(err)
	}
	names = &fakeNames{}
	other := New(&fakeView{}, names, r.file, slog.New(slog.DiscardHandler))
	if err := other.Load(); err != nil {
		t.Fatal(err)
	}
	if f, _, known := other.Counts(); f != 1 || !known || other.filter(2) == nil || names.complete {
		t.Errorf("%d filters, known %v, complete %v: what is on disk may be old", f, known, names.complete)
	}
	// A damaged file is told, and is no rules.
	b, err := os.ReadFile(r.file)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1]++
	if err := os.WriteFile(r.file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	damaged := New(&fakeView{}, &fakeNames{}, r.file, slog.New(slog.DiscardHandler))
	if err := damaged.Load(); err == nil {
		t.Error("a damaged file was read")
	}
	if _, _, known := damaged.Counts(); known {
		t.Error("known after a damaged file")
	}
}

// What rows decide is looked up once in a generation of policy; who asks, by which policy and whom, for every query.
func TestRowsAreRemembered(t *testing.T) {
	v := &fakeView{egress: datapath.EndpointPolicyWord{Number: 7}, words: map[uint32]datapath.PolicyRange{100: word(datapath.PolicyAllow, 0)}, generation: 1}
	r := New(v, &fakeNames{}, "", slog.New(slog.DiscardHandler))
	for _, step := range []struct {
		name    string
		change  func()
		server  netip.AddrPort
		want    dnsproxy.Verdict
		lookups int
	}{
		{"the first", func() {}, serverIn, dnsproxy.Pass, 1},
		{"again", func() {}, serverIn, dnsproxy.Pass, 1},
		{"another server", func() {}, serverOut, dnsproxy.Refuse, 2},
		{"a policy that is not bumped yet", func() { v.words[100] = word(datapath.PolicyDeny, 0) }, serverIn, dnsproxy.Pass, 2},
		{"another generation", func() { v.generation++ }, serverIn, dnsproxy.Refuse, 3},
		{"not enforced any more", func() { v.egress.Number = 0 }, serverIn, dnsproxy.Pass, 3},
		{"another policy", func() { v.egress.Number = 8; v.words[100] = word(datapath.PolicyAllow, 0) }, serverIn, dnsproxy.Pass, 4},
		{"the first policy again", func() { v.egress.Number = 7 }, serverIn, dnsproxy.Refuse, 4},
		{"no generation", func() { v.err = errors.New("gone") }, serverIn, dnsproxy.Pass, 5},
		{"none again", func() {}, serverIn, dnsproxy.Pass, 6},
	} {
		step.change()
		if got := r.Judge(client, step.server, 17, "a.com."); got.Verdict != step.want || v.lookups != step.lookups {
			t.Errorf("%s: verdict %v after %d lookups, want %v after %d", step.name, got.Verdict, v.lookups, step.want, step.lookups)
		}
	}
	// An answer that could not be had is asked for again.
	delete(v.words, 100)
	v.err, v.egress.Number = nil, 9
	for n := range 2 {
		if got := r.Judge(client, serverIn, 17, "a.com."); got.Verdict != dnsproxy.Refuse || v.lookups != 7+n {
			t.Errorf("unreadable: verdict %v after %d lookups", got.Verdict, v.lookups)
		}
	}
	// What is remembered is bounded.
	v.words[100] = word(datapath.PolicyAllow, 0)
	for port := range uint16(2 * maxWords) {
		r.Judge(client, netip.AddrPortFrom(serverIn.Addr(), port), 17, "a.com.")
		if n := len(r.words.known); n > maxWords {
			t.Fatalf("%d remembered", n)
		}
	}
}
