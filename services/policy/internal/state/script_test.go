// SPDX-License-Identifier: Apache-2.0

package state

import (
	"bytes"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"
	"sigs.k8s.io/yaml"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

var update = flag.Bool("update", false, "write what the scripts in testdata produce into them")

// TestScripts runs testdata/*.txtar: objects and events in, resources out. The sections of a script
// are its steps, in order:
//
//	apply            objects as YAML documents
//	delete           lines "Kind [namespace/]name"
//	broker off|on    while off, label sets get no numbers; on answers all that wait
//	synced           the source has sent all it had
//	session NODE     the node's agent connects
//	ack NODE         its first acknowledgement
//	register NODE    lines "UID ADDRESS... [= error text]"
//	unregister NODE  lines "UID"
//	want             the whole state
//	change [NODE]    what the steps since the last want or change made of it, all or as a node sees it
//	rest             time passes: what nobody needs any more rests
//	policies         how things stand with policy objects and Envoy configurations
//	slots NODE       lines "NUMBER KEY [= error text]": all slots of the node; a key "KIND@N" is the Nth filter of that kind, by key, "route@SERVICE:PORT" a route
//	render           what the steps since the last render made of what proxies are rendered from
//	warnings         objects with an annotation that has no effect
//	complete         "true" or "false"
func TestScripts(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			r := &runner{t: t, state: New("default"), broker: true, numbers: map[string]uint32{}, next: 256, last: &Snapshot{}}
			r.state.SetStandIns(true)
			for i := range archive.Files {
				r.step(&archive.Files[i])
			}
			if *update {
				if err := os.WriteFile(path, txtar.Format(archive), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

type runner struct {
	t       *testing.T
	state   *State
	broker  bool
	numbers map[string]uint32 // the broker's memory
	next    uint32
	waiting []string
	last    *Snapshot
	// rendered is what the last render showed.
	rendered *Render
}

func (r *runner) step(f *txtar.File) {
	words := strings.Fields(f.Name)
	arg := ""
	if len(words) > 1 {
		arg = words[1]
	}
	lines := slices.DeleteFunc(strings.Split(string(f.Data), "\n"), func(s string) bool { return strings.TrimSpace(s) == "" })
	switch words[0] {
	case "apply":
		for doc := range bytes.SplitSeq(f.Data, []byte("---\n")) {
			r.state.Upsert(r.decode(doc))
		}
	case "delete":
		for _, line := range lines {
			kind, name, _ := strings.Cut(line, " ")
			key := object.Key{Kind: kind, Name: name}
			if ns, n, ok := strings.Cut(name, "/"); ok {
				key.Namespace, key.Name = ns, n
			}
			r.state.Delete(key)
		}
	case "broker":
		r.broker = arg == "on"
	case "synced":
		r.state.MarkSynced()
	case "session":
		r.state.BeginSession(arg)
	case "ack":
		r.state.EndSessionStart(arg)
	case "register":
		for _, line := range lines {
			r.register(arg, line)
		}
	case "unregister":
		for _, line := range lines {
			r.state.Unregister(arg, line)
		}
	case "want":
		snapshot := r.commit()
		r.last = snapshot
		r.compare(f, dump(Diff(nil, snapshot)))
	case "change":
		snapshot := r.commit()
		change := Diff(r.last, snapshot)
		if arg != "" {
			change = change.For(arg)
		}
		r.last = snapshot
		r.compare(f, dump(change))
	case "rest":
		r.state.Rest()
	case "slots":
		r.slots(arg, lines)
	case "render":
		snapshot := r.commit()
		r.compare(f, dumpRender(DiffRender(r.rendered, snapshot.Render())))
		r.rendered = snapshot.Render()
	case "warnings":
		r.commit()
		var b strings.Builder
		for _, w := range r.state.Warnings() {
			fmt.Fprintf(&b, "%s: %s\n", w.Object, w.Text)
		}
		r.compare(f, b.String())
	case "policies":
		r.commit()
		var b strings.Builder
		for _, p := range r.state.PolicyStatuses() {
			fmt.Fprintf(&b, "%s generation=%d in-force=%d waiting=%t selected=%d fault=%v\n", p.Object.Key(), p.Object.Generation, p.Generation, p.Waiting, p.Selected, p.Fault)
			for _, c := range p.Conflicts {
				fmt.Fprintf(&b, "  conflict at %s: %s\n", c.Subject, c.Text)
			}
			for _, text := range p.Problems {
				fmt.Fprintf(&b, "  problem: %s\n", text)
			}
			for _, text := range p.Warnings {
				fmt.Fprintf(&b, "  note: %s\n", text)
			}
			if len(p.Routes) > 0 {
				fmt.Fprintf(&b, "  routes %v\n", p.Routes)
			}
		}
		r.compare(f, b.String())
	case "complete":
		r.commit()
		r.compare(f, fmt.Sprintln(r.state.Complete()))
	default:
		r.t.Fatalf("unknown step %q", f.Name)
	}
}

func (r *runner) decode(doc []byte) object.Object {
	r.t.Helper()
	data, err := yaml.YAMLToJSON(doc)
	if err != nil {
		r.t.Fatal(err)
	}
	var kind struct {
		Kind string `json:"kind"`
	}
	if err := yaml.Unmarshal(doc, &kind); err != nil {
		r.t.Fatal(err)
	}
	o, _, err := object.Decode(kind.Kind, data)
	if err != nil {
		r.t.Fatal(err)
	}
	return o
}

func (r *runner) register(node, line string) {
	r.t.Helper()
	line, want, _ := strings.Cut(line, "=")
	words := strings.Fields(line)
	var addresses []netip.Addr
	for _, w := range words[1:] {
		addresses = append(addresses, netip.MustParseAddr(w))
	}
	err := r.state.Register(node, words[0], addresses)
	want = strings.TrimSpace(want)
	if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
		r.t.Errorf("register %s %s: %v, want %q", node, line, err, want)
	}
}

// commit answers for the broker, in the order of the questions.
func (r *runner) commit() *Snapshot {
	r.t.Helper()
	acquire, _ := r.state.TakeIdentityChanges()
	for _, set := range acquire {
		r.waiting = append(r.waiting, strings.Join(set, "\x00"))
	}
	slices.Sort(r.waiting)
	if r.broker {
		for _, key := range r.waiting {
			if r.numbers[key] == 0 {
				r.numbers[key] = r.next
				r.next++
			}
			if err := r.state.SetNumber(strings.Split(key, "\x00"), r.numbers[key]); err != nil {
				r.t.Fatal(err)
			}
		}
		r.waiting = nil
	}
	snapshot, _ := r.state.Commit()
	return snapshot
}

func (r *runner) compare(f *txtar.File, got string) {
	r.t.Helper()
	if *update {
		f.Data = []byte(got)
		return
	}
	if got != string(f.Data) {
		r.t.Errorf("section %q:\ngot:\n%s\nwant:\n%s", f.Name, got, f.Data)
	}
}

// dump writes a change in the order in which it is applied.
func dump(c Change) string {
	var b strings.Builder
	for _, r := range c.Upserts {
		fmt.Fprintln(&b, describe(r))
	}
	for _, s := range c.Selectors {
		fmt.Fprintf(&b, "selector %s joined=%v left=%v\n", s.Key, s.Joined, s.Left)
	}
	for _, r := range c.Removals {
		fmt.Fprintf(&b, "gone %s %s\n", kindName(r.Key.Kind), r.Key.Name)
	}
	for _, r := range c.Late {
		fmt.Fprintln(&b, "late", describe(r))
	}
	return b.String()
}

func kindName(k Kind) string {
	return [kinds]string{"namespace", "identity", "selector", "policy", "peer", "node", "endpoint", "subject", "service", "pod"}[k]
}

func describe(resource Resource) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s", kindName(resource.Key().Kind), resource.Key().Name)
	field := func(name string, value any, show bool) {
		if show {
			fmt.Fprintf(&b, " %s=%v", name, value)
		}
	}
	ranges := func(all []policy.Range) {
		for _, x := range all {
			fmt.Fprintf(&b, " %d/%d-%d=%d%v", x.Proto, x.First, x.Last, x.Verdict, x.Rules)
			if x.Filter != nil {
				fmt.Fprintf(&b, "(%s)", x.Filter.Key)
			}
		}
	}
	switch r := resource.(type) {
	case Selector:
		field("members", r.Members(), true)
	case Policy:
		field("direction", r.Direction, true)
		for i, key := range r.Selectors {
			fmt.Fprintf(&b, "\n  selector %d: %s", i, key)
		}
		for _, c := range r.Classes {
			fmt.Fprintf(&b, "\n  class %v:", c.Selectors)
			ranges(c.Ranges)
		}
		for i, n := range r.Rules {
			fmt.Fprintf(&b, "\n  rule %d: %s", i, n)
		}
		for _, n := range r.Names {
			fmt.Fprintf(&b, "\n  name %s%s:", n.MatchName, n.MatchPattern)
			ranges(n.Ranges)
		}
		for _, f := range r.Filters {
			fmt.Fprintf(&b, "\n  filter %s", describeFilter(f))
		}
	case Peer:
		field("labels", []string(r.Labels), true)
		field("own", true, r.Own)
		for _, at := range r.At {
			fmt.Fprintf(&b, " %s@%s", at.Prefix, at.Node)
		}
	case Subject:
		field("node", r.Node, true)
		field("ingress", r.Ingress, r.Ingress != "")
		field("egress", r.Egress, r.Egress != "")
		field("audit", true, r.Audit)
	case Node:
		field("addresses", r.Addresses, len(r.Addresses) > 0)
		field("cidrs", r.PodCIDRs, len(r.PodCIDRs) > 0)
		field("labels", r.Labels, len(r.Labels) > 0)
		field("health", r.HealthAddresses, len(r.HealthAddresses) > 0)
	case Namespace:
		field("labels", r.Labels, len(r.Labels) > 0)
	case Identity:
		field("labels", []string(r.Labels), true)
	case Service:
		field("type", r.Type, true)
		field("ips", r.ClusterIPs, true)
		field("external", r.ExternalIPs, len(r.ExternalIPs) > 0)
		field("load-balancer", r.LoadBalancerIPs, len(r.LoadBalancerIPs) > 0)
		field("clients", r.SourceRanges, len(r.SourceRanges) > 0)
		field("affinity", r.Affinity, r.Affinity > 0)
		field("external-local", r.ExternalLocal, r.ExternalLocal)
		field("health-port", r.HealthCheckNodePort, r.HealthCheckNodePort > 0)
		field("algorithm", r.Algorithm, r.Algorithm != 0)
		for _, p := range r.Ports {
			fmt.Fprintf(&b, " %s/%d%s->", p.Protocol, p.Port, strings.TrimSuffix(":"+p.Name, ":"))
			if p.Route != "" {
				fmt.Fprintf(&b, "(%s)", p.Route)
			}
			if p.NodePort > 0 {
				fmt.Fprintf(&b, "(%d)", p.NodePort)
			}
			for _, backend := range p.Backends {
				fmt.Fprintf(&b, "[%s]@%s", netip.AddrPortFrom(backend.Address, backend.Port), backend.Node)
				if backend.Terminating {
					b.WriteString("(ending)")
				}
			}
		}
	case Pod:
		field("name", r.Namespace+"/"+r.Name, true)
		field("node", r.Node, true)
		field("identity", r.Identity, true)
		field("owner", r.Workload.Kind+"/"+r.Workload.Name, r.Workload.Name != "")
		field("fixed", r.Addresses, len(r.Addresses) > 0)
		field("ports", r.NamedPorts, len(r.NamedPorts) > 0)
		field("unmanaged", true, r.Unmanaged)
	case Endpoint:
		field("name", r.Namespace+"/"+r.Name, true)
		field("node", r.Node, true)
		field("addresses", r.Addresses, true)
		field("identity", r.Identity, true)
		field("owner", r.Workload.Kind+"/"+r.Workload.Name, r.Workload.Name != "")
		field("ports", r.NamedPorts, len(r.NamedPorts) > 0)
		field("host-network", true, r.HostNetwork)
		field("variants", r.Variants, len(r.Variants) > 0)
	}
	return b.String()
}
