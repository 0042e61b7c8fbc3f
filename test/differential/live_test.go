// SPDX-License-Identifier: Apache-2.0

package differential

import (
	"flag"
	"fmt"
	"net/textproto"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/weirmesh/weir/test/reference/random"
)

var requests = flag.Int("requests", 5_000, "requests and queries to send through live proxies")

// A batch has so many servers with random rules for requests, and clients with random rules for names; both get batch after batch of rules.
const (
	serversOfBatch = 16
	clientsOfBatch = 8
	// batchesOfLab bounds what one lab plays: a case file has at most 4 MiB, and a slot that was given rests.
	batchesOfLab = 24
	// actionsOfFilter is how many header actions a filter may have whatever else its items say: each combination is a route, and there are at most 128. With more
	// every request is refused, and the policy says so: it would not come into force.
	actionsOfFilter = 7
)

// TestLiveRequests plays random rules for requests and names on live labs: from the policy object through slots, xDS, proxy and weir-dns, against what the
// reference evaluator says.
func TestLiveRequests(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes network namespaces and loads eBPF")
	}
	program := filepath.Join(*bin, "weir-cases")
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%s is missing: run make build", program)
	}
	s := *seed
	for made := 0; made < *requests; {
		c := newLiveCase(s)
		for c.batches < batchesOfLab && made+len(c.Expect) < *requests {
			c.batch()
		}
		made += len(c.Expect)
		s = c.seed
		c.play(t, program)
	}
}

// liveCase is a case file of requests.
type liveCase struct {
	ID      string           `yaml:"id"`
	Pods    []map[string]any `yaml:"pods"`
	Changes []map[string]any `yaml:"policy_changes"`
	Expect  []map[string]any `yaml:"expect"`

	seed    uint64
	batches int
	before  []map[string]any
	actions [serversOfBatch]int // of the batch before, by server
}

func newLiveCase(seed uint64) *liveCase {
	c := &liveCase{ID: fmt.Sprintf("requests-%d", seed), seed: seed}
	pod := func(name string, i int) {
		c.Pods = append(c.Pods, map[string]any{
			"name": name, "namespace": "d", "labels": map[string]string{"app": name}, "node": fmt.Sprintf("n%d", 1+i%2),
		})
	}
	pod("client", 0)
	pod("dns", 1)
	for i := range serversOfBatch {
		pod(fmt.Sprintf("s%d", i), i)
	}
	for i := range clientsOfBatch {
		pod(fmt.Sprintf("c%d", i), i)
	}
	return c
}

// batch takes the rules of the batch before away and adds new ones, with what is to be asked under them. Names are new, so that nothing of before is edited:
// what an edit does has tests of its own.
func (c *liveCase) batch() {
	at := c.batches
	var add []map[string]any
	for i := range serversOfBatch {
		trial := c.trialFor(i)
		name := fmt.Sprintf("s%d", i)
		add = append(add, l7Object(fmt.Sprintf("%s-%d", name, c.seed), name, "ingress", "8080", "TCP", "http", trial.Rules))
		for _, ask := range trial.Asks {
			e := c.expect("d/client", "d/"+name, 8080, "TCP", ask.Passes)
			e["http"] = map[string]any{"method": ask.Request.Method, "path": ask.Request.Path, "host": ask.Request.Host, "headers": ask.Request.Headers}
			switch {
			case ask.Passes:
				e["upstream_headers"] = upstreamHeaders(ask.Headers)
			case ask.Location != "":
				e["status"] = "307"
			default:
				e["status"] = "403"
			}
			e["reason"] = fmt.Sprintf("seed %d, rules %v", c.seed, trial.Rules)
		}
		c.seed++
	}
	for i := range clientsOfBatch {
		trial := random.RandomDNS(c.seed)
		name := fmt.Sprintf("c%d", i)
		add = append(add, l7Object(fmt.Sprintf("%s-%d", name, c.seed), name, "egress", "53", "ANY", "dns", trial.Rules))
		for j, ask := range trial.Asks {
			e := c.expect("d/"+name, "d/dns", 53, [2]string{"UDP", "TCP"}[j%2], ask.Passes)
			e["dns"] = map[string]any{"query": ask.Name}
			if !ask.Passes {
				e["rcode"] = "REFUSED"
			}
			e["reason"] = fmt.Sprintf("seed %d, rules %v", c.seed, trial.Rules)
		}
		c.seed++
	}
	change := map[string]any{"at": at, "add": add}
	if len(c.before) > 0 {
		change["remove"] = c.before
	}
	c.Changes = append(c.Changes, change)
	c.before = add
	c.batches++
}

// trialFor is the next trial for a server whose rules may be in force together with those of the batch before, which go when these have come.
func (c *liveCase) trialFor(server int) random.HTTPTrial {
	for {
		trial := random.RandomHTTP(c.seed)
		n := 0
		for _, rule := range trial.Rules {
			matches, _ := rule["headerMatches"].([]any)
			for _, m := range matches {
				if m.(map[string]any)["mismatch"] != nil {
					n++
				}
			}
		}
		if n+c.actions[server] <= actionsOfFilter {
			c.actions[server] = n
			return trial
		}
		c.seed++
	}
}

func (c *liveCase) expect(from, to string, port int, protocol string, passes bool) map[string]any {
	e := map[string]any{
		"from": from, "to": to, "port": port, "protocol": protocol, "at": c.batches, "verdict": "redirect",
		"l7": map[bool]string{true: "allow", false: "deny"}[passes],
	}
	c.Expect = append(c.Expect, e)
	return e
}

// l7Object is a policy with rules for one port of one pod.
func l7Object(name, app, direction, port, protocol, kind string, rules []map[string]any) map[string]any {
	return map[string]any{
		"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": map[string]any{"name": name, "namespace": "d"},
		"spec": map[string]any{
			"endpointSelector": map[string]any{"matchLabels": map[string]string{"app": app}},
			direction: []map[string]any{{"toPorts": []map[string]any{{
				"ports": []map[string]string{{"port": port, "protocol": protocol}}, "rules": map[string]any{kind: rules},
			}}}},
		},
	}
}

// upstreamHeaders are the values of the headers that random rules speak of, as they must reach the server.
func upstreamHeaders(headers []string) map[string][]string {
	wanted := map[string][]string{"X-A": {}, "X-B": {}, "X-C": {}}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ":")
		name = textproto.CanonicalMIMEHeaderKey(name)
		if _, ok := wanted[name]; ok {
			wanted[name] = append(wanted[name], strings.TrimSpace(value))
		}
	}
	return wanted
}

func (c *liveCase) play(t *testing.T, program string) {
	t.Helper()
	raw, err := yaml.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), c.ID+".yaml")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(program, "--limit", "30m", file).CombinedOutput()
	t.Logf("%d requests and queries in %d batches\n%s", len(c.Expect), c.batches, out)
	if err != nil {
		t.Errorf("weir-cases: %v", err)
	}
}
