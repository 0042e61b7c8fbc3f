// SPDX-License-Identifier: Apache-2.0

package random

import (
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test/reference"
)

// Trials are always the same, say yes and no often enough, and can be asked of real proxies.
func TestTrials(t *testing.T) {
	const seeds = 1000
	http, dns, sni := map[string]int{}, map[string]int{}, map[string]int{}
	valid := regexp.MustCompile(`^/(%[0-9A-Fa-f]{2}|[^%# \\])*$`)
	for seed := range uint64(seeds) {
		a := RandomHTTP(seed)
		if !reflect.DeepEqual(a, RandomHTTP(seed)) || !reflect.DeepEqual(RandomDNS(seed), RandomDNS(seed)) || !reflect.DeepEqual(RandomSNI(seed), RandomSNI(seed)) {
			t.Errorf("seed %d: two trials", seed)
		}
		for _, ask := range a.Asks {
			switch {
			case ask.Location != "":
				http["redirected"]++
			case ask.Passes && !reflect.DeepEqual(ask.Headers, ask.Request.Headers):
				http["changed"]++
			default:
				http[fmt.Sprint(ask.Passes)]++
			}
			if !valid.MatchString(ask.Request.Path) || ask.Passes && ask.Location != "" {
				t.Errorf("seed %d: %+v", seed, ask)
			}
		}
		for _, ask := range RandomDNS(seed).Asks {
			dns[fmt.Sprint(ask.Passes)]++
			for label := range strings.SplitSeq(strings.TrimSuffix(ask.Name, "."), ".") {
				if ask.Name != "." && (label == "" || len(label) > 63) {
					t.Errorf("seed %d: %q", seed, ask.Name)
				}
			}
		}
		for _, ask := range RandomSNI(seed).Asks {
			sni[fmt.Sprint(ask.Passes)]++
		}
	}
	t.Log(http, dns, sni)
	for _, counts := range []map[string]int{http, dns, sni} {
		for _, verdict := range []string{"true", "false"} {
			if counts[verdict] < seeds*asksOfTrial/10 {
				t.Errorf("%v: too few %s", counts, verdict)
			}
		}
	}
	if http["redirected"] < seeds || http["changed"] < seeds/10 {
		t.Errorf("%v", http)
	}
}

// Every feature above L4 occurs, and every answer often enough.
func TestRequestWorlds(t *testing.T) {
	var text strings.Builder
	answers := map[string]int{}
	const worlds, packets = 500, 20
	for seed := range uint64(worlds) {
		w := NewRequests(seed, packets)
		raw, err := json.Marshal(w.Cluster)
		if err != nil {
			t.Fatal(err)
		}
		text.Write(raw)
		for i, p := range w.Packets {
			egress, ingress := w.Cluster.Ask(p, w.Requests[i])
			for _, a := range []reference.Answer{egress, ingress} {
				if a.Verdict == reference.Allow && a.Proxy != "" {
					answers[fmt.Sprint(a.Proxy, " visible ", a.Visible, " passes ", a.Passes)]++
				}
			}
		}
	}
	t.Log(answers)
	for _, answer := range []string{
		"http visible false passes true", "http visible false passes false", "tls visible false passes true", "tls visible false passes false",
		"dns visible false passes true", "dns visible false passes false", "http visible true passes true", "dns visible true passes true",
	} {
		if answers[answer] < 10 {
			t.Errorf("%d answers are: %s", answers[answer], answer)
		}
	}
	for _, feature := range []string{"http", "dns", "serverNames", "toFQDNs", "matchName", "matchPattern", "headerMatches", "mismatch", "headers", "host", "Annotations"} {
		if !strings.Contains(text.String(), `"`+feature+`"`) {
			t.Errorf("%s does not occur", feature)
		}
	}
}
